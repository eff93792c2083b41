"""Quarantine: exactly the bad rows are set aside, as Great Expectations sees them, and nothing later knows of them."""

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.contract import _expectation, _Frame, _Judge, _key_columns, check_contract, value_rules
from features.contract_page import as_json, from_json, render
from features.ingest import Snapshot, cut, ingest, quarantined, read_snapshot, read_table
from features.quarantine import bad_rows
from pipelines.errors import Refused
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.spec import Spec
from tests.data.test_contract import INF, NAN, NOON, SOURCES, Tables, good, land, put, spec_of
from tests.random_tables import seeds

ROWS = 400


def lenient(share: float = 0.2, *, only: tuple[str, ...] = ("plans", "trips", "stops"), **more: Any) -> Spec:
    sources = json.loads(json.dumps(SOURCES))
    sources["trips"]["columns"]["note"]["nulls"] = 0.8
    for name in only:
        sources[name]["quarantine"] = share
    return spec_of(sources, **more)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def set_aside(home: Home, snapshot: Snapshot, source: str) -> list[dict[str, Any]]:
    return pq.read_table(quarantined(home, "lines", snapshot.digest, source)).to_pylist()


EARLY = NOON - timedelta(hours=1)
# what is done to trips: (change, rows set aside, rule, columns)
BAD: dict[str, tuple[Callable[[Tables], None], set[int], str, str]] = {
    "known too early": (put("trips", "seen", EARLY, 4), {5}, "known_at", "at, seen"),
    "null": (put("trips", "mode", None, 2, 6), {3, 7}, "nulls", "mode"),
    "null known-at": (put("trips", "seen", None, 2), {3}, "nulls", "seen"),
    "NaN": (put("trips", "late", NAN, 3), {4}, "finite", "late"),
    "infinity": (put("trips", "speed", INF, 3), {4}, "finite", "speed"),
    "below": (put("trips", "late", -61.0, 0), {1}, "range", "late"),
    "above": (put("trips", "late", 601.0, 19), {20}, "range", "late"),
    "another value": (put("trips", "mode", "taxi", 1, 2, 3), {2, 3, 4}, "values", "mode"),
    "another pattern": (put("trips", "code", "ab1", 9), {10}, "pattern", "code"),
    "an unknown plan": (put("trips", "line", "L9", 8), {9}, "references", "line, trip"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_set_aside_with_their_reason(case: str, home: Home) -> None:
    change, trips, rule, columns = BAD[case]
    spec, tables = lenient(), good()
    change(tables)
    snapshot = land(spec, home, tables)
    rows = set_aside(home, snapshot, "trips")
    assert {r["trip"] for r in rows} == trips and len(rows) == len(trips)
    assert {(r["_rule"], r["_column"], r["_file"]) for r in rows} == {(rule, columns, "trips/part.parquet")}
    assert {r["_row"] + 1 for r in rows} == trips
    assert snapshot.set_aside == {"trips": len(trips)} and snapshot.rows == {"plans": 20, "trips": 20 - len(trips), "stops": 3}
    left = read_table(spec, home, snapshot, "trips")
    assert set(left["trip"].to_pylist()) == set(range(1, 21)) - trips
    result = check_contract(spec, home, snapshot, snapshot, folder=home.root / "out")
    assert result.accepted and from_json(as_json(result)) == from_json(json.loads(json.dumps(as_json(result))))
    (aside,) = result.aside
    assert aside.reasons == ((rule, columns, len(trips)),) and (home.root / aside.file).exists()
    share = next(c for c in result.checks if c.rule == "quarantine" and c.table == "trips")
    assert (share.count, share.of, share.verdict) == (len(trips), 20, "passed")
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render(result)))
    assert "were set aside" in page and f"{len(trips)} of 20 rows" in page and aside.file in page


def test_without_a_share_one_bad_row_refuses(home: Home) -> None:
    spec, tables = lenient(only=("plans",)), good()
    put("trips", "late", -61.0, 0)(tables)
    with pytest.raises(Refused, match=r"trips.late \[range\]: 1 of 20 values"):
        check_contract(spec, home, land(spec, home, tables))
    assert not list((home.root / "quarantine").rglob("*.parquet"))


def test_more_than_the_share_is_refused_and_nothing_set_aside(home: Home) -> None:
    spec, tables = lenient(0.1), good()
    put("trips", "late", -61.0, 0, 1, 2)(tables)
    put("stops", "first", "9999", 0)(tables)
    snapshot = land(spec, home, tables)
    assert snapshot.set_aside == {} and snapshot.rows == {"plans": 20, "trips": 20, "stops": 3}
    with pytest.raises(Refused) as caught:
        check_contract(spec, home, snapshot)
    message = str(caught.value)
    assert "trips [quarantine]: 3 of 20 rows (15 %) bad: 3 range (late); expected at most 10 % set aside" in message
    assert "trips.late [range]: 3 of 20 values (15 %) outside" in message
    assert not list((home.root / "quarantine").rglob("*.parquet"))


def test_exactly_the_share_is_set_aside(home: Home) -> None:
    spec, tables = lenient(0.1), good()
    put("trips", "late", -61.0, 0, 1)(tables)
    assert land(spec, home, tables).set_aside == {"trips": 2}


def test_what_refers_to_a_row_that_is_set_aside_goes_too(home: Home) -> None:
    spec, tables = lenient(), good()
    put("plans", "due", None, 3)(tables)
    snapshot = land(spec, home, tables)
    assert snapshot.set_aside == {"plans": 1, "trips": 1}
    (row,) = set_aside(home, snapshot, "trips")
    assert (row["trip"], row["_rule"], row["_column"]) == (4, "references", "line, trip")
    strict = lenient(only=("plans",))
    with pytest.raises(Refused, match=r"trips \(line, trip\) \[references\]: 1 of 20 rows"):
        check_contract(strict, home, ingest(strict, home))


def test_rules_on_a_whole_table_set_nothing_aside(home: Home) -> None:
    spec, tables = lenient(0.9), good()
    put("trips", "note", None)(tables)  # half may be null
    put("plans", "stop", "z", *range(6))(tables)  # three quarters must be known
    snapshot = land(spec, home, tables)
    assert snapshot.set_aside == {}
    with pytest.raises(Refused, match=r"2 of .* expectations failed"):
        check_contract(spec, home, snapshot)


def test_facts_that_clash_are_set_aside_all(home: Home) -> None:
    """Which of them is right nobody can say; in whichever files they lie, and counted once where they are identical."""
    spec, tables = lenient(), good()
    other = [{**tables["trips"][4], "late": 99.0}, tables["trips"][4], tables["trips"][5]]
    land(spec, home, tables)
    snapshot = land(spec, home, {"trips": other}, "again")
    assert snapshot.set_aside == {"trips": 2} and snapshot.rows["trips"] == 19
    rows = set_aside(home, snapshot, "trips")
    assert {(r["trip"], r["late"], r["_rule"]) for r in rows} == {(5, 4.0, "key"), (5, 99.0, "key")}
    assert 5 not in read_table(spec, home, snapshot, "trips")["trip"].to_pylist()
    assert check_contract(spec, home, snapshot).accepted
    elsewhere = open_home(home.root / "elsewhere")
    land(spec, elsewhere, {**tables, "trips": other[:1]}, "first")
    assert land(spec, elsewhere, {"trips": tables["trips"]}, "second").digest == snapshot.digest  # by values alone


def test_the_same_snapshot_and_spec_set_the_same_rows_aside(home: Home) -> None:
    spec, tables = lenient(), good()
    put("trips", "late", -61.0, 0)(tables)
    put("trips", "mode", "taxi", 0, 1)(tables)
    first = land(spec, home, tables)
    body = (home.root / first.path).read_bytes()
    assert ingest(spec, home) == read_snapshot(home, "lines", first.digest)
    other = open_home(home.root / "other")
    for name, part in (("a", slice(0, 7)), ("b", slice(7, 20))):
        second = land(
            spec, other, {**tables, "trips": tables["trips"][part]} if name == "a" else {"trips": tables["trips"][part]}, name
        )
    assert second.digest == first.digest
    for path in (home.snapshots("lines") / "by_objects").iterdir():
        path.unlink()
    assert ingest(spec, home).digest == first.digest and (home.root / first.path).read_bytes() == body
    assert {r["_reasons"] for r in set_aside(home, first, "trips")} == {"values: mode; range: late", "values: mode"}


def test_a_snapshot_with_nothing_bad_is_what_it_was(home: Home) -> None:
    strict, other = spec_of(SOURCES), open_home(home.root / "other")
    assert land(lenient(), home, good()).digest == land(strict, other, good()).digest


def test_a_bad_row_from_the_future_does_not_move_the_watermark(home: Home) -> None:
    spec, tables = lenient(), good()
    before = land(spec, home, tables)
    put("trips", "seen", NOON + timedelta(days=999), 3)(tables)
    put("trips", "late", NAN, 3)(tables)
    other = open_home(home.root / "other")
    snapshot = land(spec, other, tables)
    assert snapshot.watermark_us == before.watermark_us and snapshot.set_aside == {"trips": 1}


def test_a_cut_sets_aside_what_is_bad_of_what_was_known_then(home: Home) -> None:
    spec, tables = lenient(0.06), good()
    put("trips", "late", NAN, 3, 17)(tables)  # two of twenty are too many, one of the first ten also; of the first 18, one is not
    snapshot = land(spec, home, tables)
    assert snapshot.set_aside == {}
    at = [int((NOON + timedelta(minutes=5 * n + 2)).timestamp() * 1e6) for n in (9, 16)]
    assert cut(spec, home, snapshot, at[0]).set_aside == {}
    then = cut(spec, home, snapshot, at[1])
    assert then.set_aside == {"trips": 1} and then.rows["trips"] == 16
    assert cut(spec, home, snapshot, at[1]) == then
    wide = lenient(0.2)
    whole = ingest(wide, home)
    assert whole.set_aside == {"trips": 2} and cut(wide, home, whole, at[1]).set_aside == {"trips": 1}
    assert "_known_at" in read_table(wide, home, then, "trips").column_names


def test_rows_set_aside_later_are_no_loss_of_rows(home: Home) -> None:
    """The previous snapshot took a fact in; one that clashes with it lands later, and both are set aside."""
    sources = lenient(0.2).model_dump(mode="json", by_alias=True)["sources"]
    spec = spec_of({name: {**source, "rows_shrink": 0.0} for name, source in sources.items()})
    before = land(spec, home, good())
    snapshot = land(spec, home, {"trips": [{**good()["trips"][4], "late": 99.0}]}, "again")
    assert snapshot.rows["trips"] == 19
    assert check_contract(spec, home, snapshot, before).accepted


def test_files_with_rows_set_aside_stay_append_only(home: Home) -> None:
    from pipelines.run import pin

    spec, tables = lenient(), good()
    put("trips", "late", NAN, 3)(tables)
    snapshot = land(spec, home, tables)
    pin(home, spec, as_of_us=snapshot.watermark_us, snapshot=snapshot.digest, previous="", parent="", code="")
    with pytest.raises(Refused, match=r"trips/part.parquet was changed after it was read"):
        land(spec, home, {"trips": good()["trips"][:19]})


def test_a_table_without_time_sets_rows_aside_too(home: Home) -> None:
    columns = {"size": {"type": "float64", "min": 0}, "kind": "string"}
    spec = spec_of(
        {"cells": {"key": ["row_digest"], "columns": columns, "quarantine": 0.2}}, time="none",
        rows={"from": "cells", "key": "row_digest"}, predict_at=None, label_delay=None,
        label={"from": "cells", "column": "kind", "eq": "a"},
        split={"by": "hash", "train": 0.7, "valid_fit": 0.1, "valid_select": 0.1, "test": 0.1},
    )  # fmt: skip
    rows = [{"size": -1.0 if i == 4 else float(i), "kind": "ab"[i % 2]} for i in range(9)]
    snapshot = land(spec, home, {"cells": [*rows, rows[4], rows[0]]})
    assert (snapshot.rows, snapshot.set_aside, snapshot.duplicates) == ({"cells": 8}, {"cells": 1}, {"cells": 2})
    assert sorted(read_table(spec, home, snapshot, "cells")["size"].to_pylist()) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert check_contract(spec, home, snapshot).aside[0].reasons == (("range", "size", 1),)


def test_no_half_written_file_is_left(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tables = lenient(), good()
    put("trips", "late", NAN, 3)(tables)
    real = pq.write_table

    def full(table: pa.Table, where: Any, **settings: Any) -> None:
        real(table, where, **settings)
        if "_rule" in table.column_names:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        land(spec, home, tables)
    monkeypatch.undo()
    assert not [p for p in (home.root / "quarantine").rglob("*") if p.is_file()]
    assert ingest(spec, home).set_aside == {"trips": 1}


# --- the masks are what Great Expectations finds ---


def random_tables(seed: int) -> Tables:
    """Good tables, larger, with every kind of bad value strewn over them."""
    random = np.random.default_rng(seed)
    start = datetime(2024, 5, 1, tzinfo=UTC)
    plans, trips = [], []
    for i in range(ROWS):
        due = start + timedelta(minutes=i)
        plans.append({"line": f"L{i % 7}", "trip": i + 1, "stop": "abc"[i % 3], "due": due, "end": due + timedelta(minutes=5),
                      "told": due - timedelta(days=1)})  # fmt: skip
        trips.append({"line": f"L{i % 7}", "trip": i + 1, "mode": "bus", "code": "AB1", "late": float(i % 9), "speed": 1.0,
                      "note": "x", "unused": None, "full": True, "at": due, "seen": due + timedelta(minutes=1)})  # fmt: skip
    stops = [{"stop": s, "first": "0500", "last": "2300", "since": start - timedelta(days=9)} for s in "abc"]
    wrong: dict[str, dict[str, list[Any]]] = {
        "trips": {"mode": ["taxi", None, ""], "code": ["AB", None, "xAB1", "AB1x"], "late": [NAN, INF, -61.0, 600.5, None],
                  "speed": [-0.001, NAN, -INF], "trip": [0, 1000, None], "line": ["L9", None],
                  "at": [None, start + timedelta(days=9)],
                  "seen": [None, start - timedelta(days=1)], "full": [None]},
        "plans": {"line": [None], "due": [None, start + timedelta(days=30)], "end": [start, None], "told": [None],
        "trip": [None]},
    }  # fmt: skip
    tables: Tables = {"plans": plans, "trips": trips, "stops": stops}
    for name, columns in wrong.items():
        for column, values in columns.items():
            for row in random.choice(ROWS, 4, replace=False):
                tables[name][row][column] = values[random.integers(len(values))]
        for row in random.choice(ROWS, 3, replace=False):  # the same fact with another value
            clash = {**tables[name][row], **({"late": 77.0} if name == "trips" else {"stop": "b"})}
            if clash != tables[name][row]:
                tables[name].append(clash)
    return tables


@pytest.mark.parametrize("seed", seeds(4, 2))
def test_masks_are_the_rows_that_great_expectations_names(seed: int, home: Home) -> None:
    import great_expectations as gx

    spec = lenient(0.9)
    snapshot = land(spec, home, random_tables(seed))
    raw = read_json(home.root / snapshot.path)["landed"]
    judge, compared = _Judge(), 0
    whole = {name: read_table(spec, home, _raw(home, snapshot, raw), name) for name in spec.sources}
    found = bad_rows(spec, whole)
    for name, source in spec.sources.items():
        for rule in value_rules(name, source, True, None):
            own = rule.name not in ("rows_min",) and not (rule.name == "nulls" and source.nulls(rule.columns[0]) > 0)
            if not own or (rule.name == "references" and rule.kwargs["mostly"] < 1):
                continue
            frame = _Frame(whole, name).build([rule])
            batch = judge.definition.get_batch(batch_parameters={"dataframe": frame})
            told = batch.validate(
                gx.ExpectationSuite("s", expectations=[_expectation(rule, 0)]), result_format="COMPLETE"
            ).results[0]
            theirs = set(told.result.get("unexpected_index_list") or ())
            columns = ", ".join("known-at" if c == "_known_at" else c for c in rule.columns)
            mask = found[name].reasons.get((rule.name, columns))
            ours = set(np.flatnonzero(mask)) if mask is not None else set()
            if rule.name == "references":  # ours also name those whose target is bad in turn
                assert theirs <= ours
            elif rule.name == "key":  # to Great Expectations null keys are alike
                nulls = {i for i in theirs if None in [whole[name][c][i].as_py() for c in _key_columns(source, True)]}
                assert ours == theirs - nulls
            else:
                assert ours == theirs, (name, rule.name, columns)
            compared += len(theirs)
    assert compared > 50
    left = check_contract(spec, home, snapshot)
    assert left.accepted and sum(snapshot.set_aside.values()) == sum(int(b.mask.sum()) for b in found.values())


def _raw(home: Home, snapshot: Snapshot, landed: dict[str, Any]) -> Snapshot:
    """The snapshot before rows were set aside."""
    from dataclasses import replace

    from pipelines.manifest import write_json

    body = read_json(home.root / snapshot.path)
    del body["format_version"]
    path = home.snapshots("lines") / "raw.json"
    write_json(path, {**body, "objects": landed})
    return replace(snapshot, path=home.relative(path))
