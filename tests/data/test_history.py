"""Bounds from the past: a day like the days before passes, a planted fault is refused by its column, and both again alike."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.contract import check_contract
from features.ingest import ARROW, Snapshot, ingest
from pipelines.errors import Refused, UsageError
from pipelines.home import Home, open_home
from pipelines.spec import Spec
from tests.data.lines import lines_spec
from tests.random_tables import seeds

START = datetime(2024, 5, 1, tzinfo=UTC)
DAYS = 30
COLUMNS: dict[str, Any] = {
    "id": "int64", "line": "string", "late": {"type": "float64", "nulls": 1}, "full": "bool",
    "code": {"type": "string", "nulls": 1},
    "at": "timestamp", "seen": "timestamp",
}  # fmt: skip
Columns = dict[str, Any]


def spec_of(**drift: Any) -> Spec:
    return lines_spec(COLUMNS, drift=drift)


SPEC = spec_of()


def day_of(day: int, seed: int = 0) -> Columns:
    """A day's trips: some 200, fewer on Sundays; a minute late in the mean, one in ten without a code."""
    random = np.random.default_rng([seed, day])
    rows = int(random.poisson(120 if (day + 2) % 7 == 6 else 200))
    at = [START + timedelta(days=day, seconds=int(s)) for s in np.sort(random.integers(0, 86_000, rows))]
    return {
        "id": [day * 100_000 + i for i in range(rows)],
        "line": [f"L{i}" for i in random.choice(5, rows, p=[0.4, 0.3, 0.1, 0.1, 0.1])],
        "late": list(random.normal(1, 4 + random.random(), rows)), "full": list(random.random(rows) < 0.3),
        "code": [None if u < 0.1 else f"c{int(900 * v)}" for u, v in random.random((rows, 2))],
        "at": at, "seen": [t + timedelta(seconds=int(s)) for t, s in zip(at, random.integers(0, 300, rows), strict=True)],
    }  # fmt: skip


def write(home: Home, day: int, columns: Columns) -> None:
    path = home.landing("lines") / "trips" / f"{day:03}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {n: ARROW[c["type"] if isinstance(c, dict) else c] for n, c in COLUMNS.items()}
    pq.write_table(pa.table({n: pa.array(columns[n], kind) for n, kind in kinds.items()}), path)


def land(home: Home, day: int, columns: Columns) -> Snapshot:
    write(home, day, columns)
    return ingest(SPEC, home)


def history(home: Home, days: int = DAYS, seed: int = 0) -> Snapshot:
    for day in range(days):
        write(home, day, day_of(day, seed))
    return ingest(SPEC, home)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.mark.parametrize("seed", seeds(6, 3))
def test_days_like_those_before_pass(seed: int, home: Home) -> None:
    before = history(home, seed=seed)
    for day in range(DAYS, DAYS + 4):
        snapshot = land(home, day, day_of(day, seed))
        result = check_contract(SPEC, home, snapshot, before)
        judged = [c for c in result.checks if c.rule == "drift"]
        assert len(judged) > 15 and result.accepted
        before = snapshot


def late_in_seconds(day: Columns) -> None:
    day["late"] = [v * 60 for v in day["late"]]


def most_missing(day: Columns) -> None:
    for name in day:
        day[name] = day[name][::5]


def twice_as_many(day: Columns) -> None:
    for name in day:
        day[name] = day[name] * 3
    day["id"] = [v + i * 7 for i, v in enumerate(day["id"])]


def no_codes(day: Columns) -> None:
    day["code"] = [c if i % 2 else None for i, c in enumerate(day["code"])]


def other_spelling(day: Columns) -> None:
    day["line"] = [v.lower() for v in day["line"]]


def one_line_gone(day: Columns) -> None:
    day["line"] = ["L1" if v == "L0" else v for v in day["line"]]


def always_full(day: Columns) -> None:
    day["full"] = [True] * len(day["full"])


def another_zone(day: Columns) -> None:
    day["at"] = [t - timedelta(hours=5) for t in day["at"]]


FAULTS: dict[str, tuple[Callable[[Columns], None], str]] = {
    "another unit": (late_in_seconds, "trips.late [drift]"), "four fifths missing": (most_missing, "trips [drift]"),
    "too many": (twice_as_many, "trips [drift]"), "nulls": (no_codes, "trips.code [drift]"),
    "another spelling": (other_spelling, "trips.line [drift]"), "another mix": (one_line_gone, "trips.line [drift]"),
    "a constant": (always_full, "trips.full [drift]"), "another clock": (another_zone, "trips.at [drift]"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_day_unlike_those_before_is_refused_by_column(case: str, home: Home) -> None:
    change, where = FAULTS[case]
    before = history(home)
    day = day_of(DAYS)
    change(day)
    snapshot = land(home, DAYS, day)
    messages = []
    for _ in range(2):  # what it is held to is pinned: it is refused again in the same words
        with pytest.raises(Refused) as caught:
            check_contract(SPEC, home, snapshot, before)
        messages.append(str(caught.value))
    assert where in messages[0] and messages[0] == messages[1]
    others = {line.split()[0].split(".")[1] for line in messages[0].splitlines() if "[drift]" in line and "." in line.split()[0]}
    assert others <= {where.split()[0].partition(".")[2]}, messages[0]


def test_a_source_that_falls_silent_is_refused(home: Home) -> None:
    before = history(home)
    snapshot = land(home, DAYS + 2, day_of(DAYS + 2))
    with pytest.raises(Refused, match=r"trips \[drift\]: 0 in what is new; expected between"):
        check_contract(SPEC, home, snapshot, before)


def test_a_day_that_has_not_ended_is_held_to_the_same_hours(home: Home) -> None:
    before = history(home)
    whole = day_of(DAYS)
    morning = [i for i, t in enumerate(whole["seen"]) if t < START + timedelta(days=DAYS, hours=6)]
    snapshot = land(home, DAYS, {n: [v[i] for i in morning] for n, v in whole.items()})
    assert check_contract(SPEC, home, snapshot, before).accepted
    rest = {n: [v for i, v in enumerate(whole[n]) if i not in set(morning)] for n in whole}
    assert check_contract(SPEC, home, land(home, DAYS + 1, rest), snapshot).accepted


def test_bounds_widen_with_the_history(home: Home) -> None:
    """A day that was accepted, by a wider tolerance, is what the next may be."""
    before, odd = history(home), day_of(DAYS)
    odd["late"] = [v + 9 for v in odd["late"]]
    snapshot = land(home, DAYS, odd)
    with pytest.raises(Refused, match=r"trips.late \[drift\]"):
        check_contract(SPEC, home, snapshot, before)
    assert check_contract(spec_of(tolerance=20), home, snapshot, before).accepted
    again = day_of(DAYS + 1)
    again["late"] = [v + 9 for v in again["late"]]
    assert check_contract(SPEC, home, land(home, DAYS + 1, again), snapshot).accepted


def test_too_short_a_history_judges_nothing(home: Home) -> None:
    before = history(home, 5)
    day = day_of(5)
    late_in_seconds(day)
    result = check_contract(SPEC, home, land(home, 5, day), before)
    (drift,) = [c for c in result.checks if c.rule == "drift"]
    assert drift.verdict == "passed" and "fewer than 14 past days" in drift.found
    assert check_contract(SPEC, home, land(home, 5, day)).accepted  # no snapshot before


def test_only_the_named_columns_are_judged(home: Home) -> None:
    before, day = history(home), day_of(DAYS)
    late_in_seconds(day)
    spec = spec_of(columns=["line"])
    result = check_contract(spec, home, land(home, DAYS, day), before)
    assert {c.columns for c in result.checks if c.rule == "drift"} == {(), ("line",)}


def test_without_drift_in_the_spec_nothing_is_judged(home: Home) -> None:
    before, day = history(home), day_of(DAYS)
    late_in_seconds(day)
    plain = SPEC.model_copy(update={"sources": {"trips": SPEC.sources["trips"].model_copy(update={"drift": None})}})
    assert not [c for c in check_contract(plain, home, land(home, DAYS, day), before).checks if c.rule == "drift"]


def test_a_drift_column_that_is_not_there_is_named() -> None:
    with pytest.raises((ValueError, UsageError), match=r"sources.trips.drift.columns 'lat' not in source"):
        spec_of(columns=["lat"])
