"""Facts that are not as they should be: from the future, by clocks that differ, in nights of 25 hours, keys of changing type."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.cells import StoreDown
from features.ingest import cut, ingest, read_table
from features.keys import key_runs
from features.parts import by_key
from features.steps import KEY
from features.store import build_features, historical_features
from pipelines.errors import MillraceError
from pipelines.home import open_home
from tests.agreement import arrow, frame_differences, make_world
from tests.data.test_asof import K_X, START, US, applied, repo, seen, simple, view, write
from tests.data.test_ingest import NOON, SPEC, put, trips
from tests.data.test_served import read, repository, stops
from tests.random_tables import Case, random_case
from tests.servers import NAMES, REMOTE, Server

__all__ = ["repo"]
UTC_US = pa.timestamp("us", "UTC")


# From the future


def test_a_landed_fact_from_the_future_is_kept_and_moves_no_given_time(tmp_path: Path) -> None:
    """One trip is seen a thousand days ahead: the snapshot holds it, what was known at a given time is as without it."""
    home, other = open_home(tmp_path / "with"), open_home(tmp_path / "without")
    seen_at = trips()["seen"].to_pylist()
    put(home, trips(seen=pa.array([*seen_at[:-1], NOON + timedelta(days=1000)], UTC_US)))
    put(other, trips())
    whole, as_of = ingest(SPEC, home), int(seen_at[20].timestamp()) * 10**6
    assert whole.rows == {"trips": len(seen_at)}
    then, without = (cut(SPEC, h, ingest(SPEC, h), as_of) for h in (home, other))
    assert then.watermark_us == without.watermark_us == as_of
    assert read_table(SPEC, home, then, "trips").equals(read_table(SPEC, other, without, "trips"))


def test_an_event_is_not_seen_before_it_happens(repo: Path) -> None:
    """Told at 10 of what happens at 50: known from 50 on, and the older event until then."""
    write(repo / "f.parquet", [simple(1, 5, 5, 1.0), simple(1, 50, 10, 2.0)], kinds=K_X)
    assert seen(applied(repo, view("v", "f.parquet")), [(1, 10), (1, 49), (1, 50)]) == [1.0, 1.0, 2.0]


# Clocks that differ


def skewed(seed: int) -> Case:
    """A random case in which the clock of each source is fast or slow by an odd number of µs."""
    case, tables = random_case(seed), {}
    for i, (name, facts) in enumerate(case.tables.items()):
        source, shift = case.spec["sources"][name], (2_000_003, -3_000_001, 0, 1)[(seed + i) % 4]
        moved = {"_arrival", source.get("event_time"), source["known_at"].get("column")} - {None, *source["key"]}
        tables[name] = [{c: v + shift if c in moved and v is not None else v for c, v in row.items()} for row in facts]
    return replace(case, tables=tables)


@pytest.mark.parametrize("seed", range(7_100, 7_110))
def test_clocks_that_differ_between_sources(seed: int, tmp_path: Path) -> None:
    with patch("tests.agreement.random_case", skewed):
        world = make_world(seed, tmp_path)
    asked = world.asked()
    built = build_features(world.spec, world.home, world.snapshot)
    rows = arrow(world.spec.row_source, [version for version, _ in asked])
    found = historical_features(world.spec, world.home, built, rows, np.array([t for _, t in asked]))
    assert frame_differences(world.spec, found, world.expected(asked), "row") == []


# The night of 25 hours


@pytest.mark.parametrize("zone", ["America/New_York", "Europe/Rome"])
def test_the_hour_that_comes_twice_is_two_hours(repo: Path, zone: str) -> None:
    """Facts and rows are given in local time: 1:30 (2:30) of summer time is not that of winter time."""
    local, hour = ZoneInfo(zone), 1 if zone.startswith("America") else 2
    night = datetime(2024, 11, 3) if zone.startswith("America") else datetime(2024, 10, 27)
    summer, winter = (night.replace(hour=hour, minute=30, tzinfo=local, fold=fold) for fold in (0, 1))
    assert winter.astimezone(UTC) - summer.astimezone(UTC) == timedelta(hours=1)
    event = pa.array([summer.astimezone(UTC), winter.astimezone(UTC)], UTC_US).cast(pa.timestamp("us", zone))
    pq.write_table(pa.table({"k": [1, 1], "x": [1.0, 2.0], "event": event}), repo / "f.parquet")
    store = applied(repo, view("v", "f.parquet", created=None, ttl=2 * 3600 * 10**6))
    times = [t.astimezone(UTC) - early for t in (summer, winter) for early in (US, 0 * US)]
    frame = pd.DataFrame({"k": [1] * 4, "event_timestamp": pd.to_datetime(times, utc=True).tz_convert(zone)})
    assert store.get_historical_features(entity_df=frame, features=["v:x"]).to_arrow()["x"].to_pylist() == [None, 1.0, 1.0, 2.0]


# Keys that change their type


def of_types(repo: Path, *kinds: tuple[pa.DataType, Any]) -> Any:
    (repo / "f").mkdir()
    for i, (kind, key) in enumerate(kinds):
        table = pa.table({"k": pa.array([key], kind), "x": [float(i)], "event": pa.array([START])})
        pq.write_table(table, repo / "f" / f"{i}.parquet")
    return applied(repo, view("v", "f", created=None))


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.string(), pa.float64()])
def test_a_key_is_the_same_key_in_files_of_other_types(repo: Path, kind: pa.DataType) -> None:
    key = "2" if kind == pa.string() else 2
    assert seen(of_types(repo, (pa.int64(), 1), (kind, key)), [(1, 1), (2, 1), (3, 1)]) == [0.0, 1.0, None]


@pytest.mark.parametrize(("kind", "key"), [(pa.string(), "A2"), (pa.float64(), 2.5)])
def test_a_key_that_its_type_cannot_hold_is_named(repo: Path, kind: pa.DataType, key: Any) -> None:
    with pytest.raises(MillraceError, match=r"view 'v': .*/f cannot be read with the types of its first file: .*2"):
        seen(of_types(repo, (pa.int64(), 1), (kind, key)), [(1, 1)])


# Nothing there


def test_a_view_without_rows_is_materialised_and_appended_to(repo: Path) -> None:
    write(repo / "f.parquet", [], kinds=K_X)
    store = applied(repo, view("v", "f.parquet"))
    store.materialize(START, START + 30 * US)
    assert store.get_online_features(features=["v:x"], entity_rows=[{"k": 1}]).to_dict()["x"] == [None]
    new = pd.DataFrame({"k": [1], "x": [2.0], "event": [START], "created": [START]})
    store.write_to_offline_store("v", new)
    store.materialize(START, START + 30 * US)
    assert store.get_online_features(features=["v:x"], entity_rows=[{"k": 1}]).to_dict()["x"] == [2.0]


# Half-finished


def many(folder: Path, place: str) -> Any:
    store = repository(folder, place, ttl=timedelta(days=5_000))
    rows = [(f"s{i}", i, 0.5, "L1", NOON) for i in range(5_000)]
    pq.write_table(stops(rows), folder / "stops.parquet")
    store.config.materialization_config.online_write_batch_size = 1_000
    return store


def test_a_materialise_that_broke_off_is_made_whole_by_the_next(place: str, tmp_path: Path) -> None:
    store, seen_batches = many(tmp_path / "repo", place), []
    online = store._get_provider().online_store
    honest = online.online_write_batch

    def dies(*told: Any, **named: Any) -> None:
        seen_batches.append(1)
        if len(seen_batches) == 3:
            raise KeyboardInterrupt
        honest(*told, **named)

    with patch.object(online, "online_write_batch", dies), pytest.raises(KeyboardInterrupt):
        store.materialize_incremental(NOON + timedelta(days=1))
    half = read(store, *(f"s{i}" for i in range(5_000)))["waiting"]
    assert {None} < {*half} <= {None, *range(5_000)}
    store.materialize_incremental(NOON + timedelta(days=1))
    assert read(store, *(f"s{i}" for i in range(5_000)))["waiting"] == list(range(5_000))


@pytest.mark.parametrize("kind", REMOTE)
def test_a_materialise_on_a_server_that_is_down_is_said(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(kind)
    store = many(tmp_path / "repo", f"{server.url}#test/{next(NAMES)}")
    server.kill()
    try:
        with pytest.raises(StoreDown, match=f"{server.port}.* does not answer"):
            store.materialize_incremental(NOON + timedelta(days=1))
    finally:
        server.start()
    deadline = time.monotonic() + 30
    while True:
        try:
            store.materialize_incremental(NOON + timedelta(days=1))
            break
        except StoreDown:  # it is starting up
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert read(store, "s0", "s4999")["waiting"] == [0, 4_999]


# Many keys


@pytest.mark.parametrize("seed", range(7_200, 7_206))
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_view_is_read_in_parts_of_whole_keys(seed: int, rows: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    keys = np.sort(draw.integers(0, 9, draw.integers(0, 40)).astype(str))
    table = pa.table({KEY: pa.array(keys, pa.string()), "x": np.arange(len(keys))})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=rows)
    parts = list(by_key(tmp_path / "v.parquet", [KEY, "x"]))
    assert [x for part in parts for x in part["x"].to_pylist()] == list(range(len(keys)))
    found = [k for part in parts if part.num_rows for k in key_runs(part[KEY])[0].to_pylist()]
    assert found == sorted({*keys.tolist()})
