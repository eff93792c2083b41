"""Backfill: the past as it was known then, whatever landed since; correct to the bit, resumed, and never served backwards.

The stages are called as plain functions here; `tests/e2e/test_backfill.py` goes through Prefect.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from deploy.backfill import Backfilled
from deploy.rollout import Release, promote
from features.backfill import check_range, parts_of, pin_backfill
from features.facts import Columns
from features.frame import as_array, feature_list
from features.ingest import ingest, read_snapshot
from features.online import OnlineStore, serve_features
from features.trainset import build_training_set
from pipelines.clock import DAY_US, MISSING, NEVER, US, iso, parse_time
from pipelines.errors import UsageError
from pipelines.home import Home, open_home
from pipelines.manifest import ROOT, Artifact, read_json
from pipelines.spec import Spec
from tasks.backfill import backfill_part, feed, past_features, past_rows, pin
from tests.agreement import Oracle, frame_differences, land, outcome, plain, same_frames
from tests.command import environment
from tests.e2e.buses import EVERY, NOW, Buses, trip_at
from tests.random_tables import Case, known_at, random_case

NOON = parse_time(NOW.isoformat())
CHECKED = Artifact("contract", "", "")


def filled(home: Home, pipeline: str | Path, begin: int, end: int, as_of: int | None = None) -> Backfilled:
    """The stages of `flows/backfill.py` without its contract."""
    with patch.dict(os.environ, MILLRACE_HOME=str(home.root)), patch("tasks.policy._page"):  # which is Prefect's
        run = pin.fn(str(pipeline), iso(begin), iso(end), None if as_of is None else iso(as_of))
        rows = past_rows.fn(run, CHECKED)
        features = past_features.fn(run, rows)
        return feed.fn(run, features, [backfill_part.fn(run, features, rows, i) for i in range(len(rows.parts))])


def table_of(home: Home, made: Backfilled) -> pa.Table:
    return pq.read_table(home.root / made.path)


def frame_of(spec: Spec, table: pa.Table) -> Columns:
    return {f.name: as_array(table[f.name], "string" if f.kind == "category" else "float64") for f in feature_list(spec)}


# Against the oracle


def worlds(case: Case) -> list[int]:
    """Instants at which every table has something: most are in the midst of the facts, the last one after all."""
    known = {n: sorted(known_at(case.spec["sources"][n], row) for row in rows) for n, rows in case.tables.items()}
    everything = sorted(us for times in known.values() for us in times)
    first = max(times[0] for times in known.values())
    chosen = [everything[len(everything) * share // 8] for share in (4, 6)] + [everything[-1]]
    return [t for t in dict.fromkeys(chosen) if t >= first]


def landed(case: Case, root: Path) -> Home:
    home, spec = open_home(root / "home"), Spec.model_validate(case.spec)
    with patch("features.ingest.wall_us", side_effect=land(case, spec, home)):
        ingest(spec, home)
    return home


@pytest.mark.parametrize("seed", [4, 6, 8, 9, 10, 14, 1018, 1039])
def test_a_backfill_is_what_the_oracle_says_of_what_was_known(seed: int, tmp_path: Path) -> None:
    """Features, labels, and which rows there are: from tables with corrections and late rows, at several times."""
    case = random_case(seed)
    path = tmp_path / f"{case.spec['pipeline']}.yaml"
    path.write_text(json.dumps(case.spec))
    home, spec, every = landed(case, tmp_path), Spec.model_validate(case.spec), Oracle(case.spec, case.tables)
    compared = 0
    for as_of in worlds(case):
        then = Oracle(case.spec, known_only(case, as_of))
        rows = every.rows(as_of).rows
        if not rows:
            continue
        begin, end = rows[0].t + (len(rows) > 1), rows[-1].t + 1  # not the first one, where there are more
        wanted = {row.key: row for row in rows if begin <= row.t < end}
        table = table_of(home, filled(home, path, begin, end, as_of))
        keys = [tuple(key.values()) for key in table_keys(spec, table)]
        assert sorted(keys, key=str) == sorted(wanted, key=str)
        expected = [then.features(wanted[key].version, wanted[key].t) for key in keys]
        assert frame_differences(spec, frame_of(spec, table), expected, f"as of {as_of}: row") == []
        label = table["_label"].fill_null(-1).to_pylist(), table["_label_known"].cast(pa.int64()).fill_null(NEVER).to_pylist()
        assert [*zip(*label, strict=True)] == [outcome(every, key, wanted[key].t, as_of)[:2] for key in keys]
        assert table["_t"].cast(pa.int64()).to_pylist() == sorted(wanted[key].t for key in keys)
        compared += len(keys)
    assert compared


def known_only(case: Case, as_of: int) -> dict[str, list[dict[str, Any]]]:
    sources = case.spec["sources"]
    return {name: [r for r in rows if known_at(sources[name], r) <= as_of] for name, rows in case.tables.items()}


def table_keys(spec: Spec, table: pa.Table) -> list[dict[str, Any]]:
    names = {f"_key_{name}": name for name in spec.row_key}
    return plain(spec.row_source.model_copy(update={"columns": {n: spec.row_source.columns[n] for n in spec.row_key}}),
                 table.select([*names]).rename_columns([*names.values()]))  # fmt: skip


@pytest.mark.parametrize("seed", [6, 8, 9, 10])
def test_what_lands_later_changes_nothing_earlier(seed: int, tmp_path: Path) -> None:
    """The same bytes from a home in which only what was known had landed, and from one that has everything."""
    case = random_case(seed)
    as_of = worlds(case)[0]
    files = []
    for name, tables in (("then", known_only(case, as_of)), ("now", case.tables)):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / f"{case.spec['pipeline']}.yaml"
        path.write_text(json.dumps(case.spec))
        home = landed(replace(case, tables=tables), folder)
        made = filled(home, path, as_of - 10**15, as_of + 10**15, as_of)
        files.append({f: (home.root / made.path / f).read_bytes() for f in made.files})
    assert files[0] == files[1]


# A correction


@pytest.fixture
def corrected(buses: Buses, tmp_path: Path) -> tuple[Buses, Path, dict[str, Any]]:
    """Buses with a release, and a departure of two hours before noon that is corrected half an hour after it."""
    home = Home(tmp_path / "home")
    shutil.copytree(buses.home.root, home.root, ignore=shutil.ignore_patterns("predictions", "releases", "runs", "copies"))
    release = Release(buses.bento.tag, buses.bento.path, "made", buses.snapshot.digest, NOON, buses.features.defs_digest,
                      "", (), MISSING)  # fmt: skip
    promote(home, "buses", release, expected="", why="test")
    trip = {**trip_at(NOW - 20 * EVERY), "day": NOW.replace(hour=0)}
    return replace(buses, home=home), home.root.parent / "buses.yaml", trip


def correct(buses: Buses, trip: dict[str, Any], late: float, after: timedelta) -> None:
    folder = buses.home.landing("buses") / "departures"
    row = {**trip, "at": NOW + after, "late": late}
    pq.write_table(pa.Table.from_pylist([row], pq.read_schema(folder / "all.parquet")), folder / f"at{NOW + after:%H%M}.parquet")


def test_a_correction_changes_later_sets_and_the_online_value_and_no_earlier_one(
    corrected: tuple[Buses, Path, dict[str, Any]],
) -> None:
    buses, path, trip = corrected
    path.write_text(yaml_of(buses))
    home, span = buses.home, (NOON - DAY_US, NOON + DAY_US // 4)
    key = f"{trip['line']}\x1f{parse_time(trip['day'].isoformat())}\x1f{trip['trip']}"
    before = filled(home, path, *span)
    assert before.as_of == iso(NOON) and before.fed == ()
    online = served(buses)
    earlier = digests(home, before)
    first = table_of(home, before)
    old_label = first.filter(pc.equal(first["_key"], key))["_label"].to_pylist()
    assert len(old_label) == 1
    correct(buses, trip, 45.0 if old_label == [0] else 0.0, timedelta(minutes=30))

    again = filled(home, path, *span, NOON)
    assert digests(home, again) == earlier
    assert served(buses) == online  # fed anew, with the same values: facts landed, and none was known by noon

    after = filled(home, path, *span)
    second = table_of(home, after)
    assert after.as_of == iso(NOON + 1800 * US) and after.fed == (buses.bento.tag,)
    assert second.filter(pc.equal(second["_key"], key))["_label"].to_pylist() == [1 - old_label[0]]
    earlier_rows = pc.less(first["_t"].cast(pa.int64()), NOON + 1800 * US)
    assert second["_key"].equals(first["_key"])
    assert same_frames(frame_of(buses.spec, first.filter(earlier_rows)), frame_of(buses.spec, second.filter(earlier_rows))) == []
    assert set(same_frames(frame_of(buses.spec, first), frame_of(buses.spec, second))) >= {"line_late_1h__count"}
    newer = served(buses)
    assert newer != online

    late = filled(home, path, *span, NOON)  # once more as known at noon: what serves is newer and stays
    assert digests(home, late) == earlier and late.fed == ()
    assert served(buses) == newer


def yaml_of(buses: Buses) -> str:
    return json.dumps(buses.spec.model_dump(mode="json", by_alias=True))


def digests(home: Home, made: Backfilled) -> dict[str, str]:
    found: dict[str, str] = read_json((home.root / made.path).with_name("done.json"))["files"]
    return found


def served(buses: Buses) -> tuple[int, list[str]]:
    """The anchor of the served store, and the features of a trip of the corrected line an hour later."""
    store = OnlineStore(buses.spec, buses.home.online("buses", buses.features.defs_digest))
    trip = trip_at(NOW + 12 * EVERY)
    frame = serve_features(store, [{**trip, "day": parse_time(str(trip["day"]))}], NOON + 3600 * US).frame
    return store.anchor().data_us, [str(values[0]) for values in frame.values()]


def test_a_backfill_of_the_training_range_is_the_training_set(buses: Buses, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    shutil.copytree(buses.home.root, home.root)
    path = tmp_path / "buses.yaml"
    path.write_text(yaml_of(buses))
    snapshot = read_snapshot(home, "buses", buses.snapshot.digest)
    build_training_set(buses.spec, home, snapshot, buses.features, NOON, tmp_path)
    trained = pq.read_table(tmp_path / "frame.parquet")
    table = table_of(home, filled(home, path, int(pc.min(trained["_t"]).as_py()), int(pc.max(trained["_t"]).as_py()) + 1))
    table = table.filter(pc.is_in(table["_key"], value_set=trained["_key"].combine_chunks()))
    table = table.take(pc.index_in(trained["_key"], value_set=table["_key"].combine_chunks()))
    assert table.num_rows == trained.num_rows > 500
    assert same_frames(frame_of(buses.spec, table), frame_of(buses.spec, trained)) == []
    assert table["_label"].to_pylist() == trained["_label"].to_pylist()


# Parts, and a kill


def test_parts_are_whole_days_up_to_a_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.backfill.AT_ONCE", 10)
    days: Sequence[tuple[int, int]] = [(0, 4), (1, 6), (2, 1), (5, 25), (6, 2), (7, 8)]  # day, rows of it
    t = np.concatenate([np.full(rows, day * DAY_US + day) for day, rows in days])
    assert parts_of(t) == [(0, 10), (10, 11), (11, 36), (36, 46)]
    assert parts_of(t - 3 * DAY_US)[0] == (0, 10)
    assert parts_of(t[:1]) == [(0, 1)]


KILLED = """
import os, signal, sys
from unittest.mock import patch
import features.backfill, tasks.backfill
from tests.data.test_backfill import NOON, filled
from pipelines.clock import DAY_US
from pipelines.home import open_home
features.backfill.AT_ONCE = 200
honest = tasks.backfill.write_part
def dying(spec, home, features, rows, part, out):
    note = honest(spec, home, features, rows, part, out)
    if part == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return note
tasks.backfill.write_part = dying
print(filled(open_home(), sys.argv[1], NOON - 4 * DAY_US, NOON).path)
"""


@pytest.mark.slow
def test_a_killed_backfill_goes_on_with_the_part_that_it_was_at(buses: Buses, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    shutil.copytree(buses.home.root, home.root)
    path = tmp_path / "buses.yaml"
    path.write_text(yaml_of(buses))

    def go(kill_at: int) -> subprocess.CompletedProcess[str]:
        env = environment(home.root, PYTHONPATH=str(ROOT))
        return subprocess.run([sys.executable, "-c", KILLED, str(path), str(kill_at)], env=env, capture_output=True, text=True)

    parts = home.root / "artifacts" / "backfill_part"
    assert go(2).returncode == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in parts.glob("[!.]*/*.parquet")}
    assert len(done) == 2 and [*parts.glob(".*.partial/*.parquet")] and not [*home.backfills("buses").glob("*/rows")]
    ended = go(99)
    assert ended.returncode == 0, ended.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == done
    resumed = pq.read_table(home.root / ended.stdout.strip())
    undisturbed = table_of(home, filled(home, path, NOON - 4 * DAY_US, NOON))  # the same rows, in one part
    assert same_frames(frame_of(buses.spec, resumed), frame_of(buses.spec, undisturbed)) == []
    others = [name for name in resumed.column_names if name.startswith("_")]
    assert resumed.select(others).equals(undisturbed.select(others)) and resumed.num_rows > 900


# Bad input


@pytest.mark.parametrize(("begin", "end", "as_of", "said"), [
    (NOON, NOON, None, "--from 2024-05-06T12:00:00Z is not before --to 2024-05-06T12:00:00Z"),
    (NOON, NOON - 1, None, "is not before --to 2024-05-06T11:59:59.999999Z"),
    (NOON - 9 * DAY_US, NOON, NOON + 1, "--as-of 2024-05-06T12:00:00.000001Z is later than now, 2024-05-06T12:00:00Z"),
])  # fmt: skip
def test_a_range_or_a_time_that_cannot_be(buses: Buses, begin: int, end: int, as_of: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=f"^.*{said}"):
        pin_backfill(buses.spec, buses.home, begin, end, as_of)


def test_a_range_without_rows_names_the_times_that_there_are(buses: Buses, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    shutil.copytree(buses.home.root, home.root)
    path = tmp_path / "buses.yaml"
    path.write_text(yaml_of(buses))
    with pytest.raises(UsageError) as caught:
        filled(home, path, NOON - 400 * DAY_US, NOON - 300 * DAY_US)
    assert str(caught.value) == (
        "no prediction row of buses lies between --from 2023-04-02T12:00:00Z and --to 2023-07-11T12:00:00Z as known at "
        "2024-05-06T12:00:00Z: they are asked about from 2024-05-01T11:50:00Z to 2024-05-07T11:50:00Z"
    )
    with pytest.raises(UsageError, match=r"there are none$"):
        filled(home, path, NOON - DAY_US, NOON, NOON - 99 * DAY_US)


def test_a_pipeline_without_time_has_no_range() -> None:
    from pipelines.spec import load_spec

    with pytest.raises(UsageError, match=r"^tumours says time: none"):
        check_range(load_spec("tumours"), 0, 1)
