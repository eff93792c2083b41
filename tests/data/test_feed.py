"""The served store is moved on by what changed: it answers as one that was fed whole, and costs what changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import feed as feeding
from features import online, rows
from features.cells import open_cells
from features.facts import Facts
from features.feed import changed_cells, feed, feed_changes, recent
from features.keys import KNOWN, rows_among
from features.online import OnlineStore, serve_features
from features.packed import layouts
from features.store import write_views
from features.windows import build_views
from pipelines.clock import NEVER, Anchor
from tests.agreement import World, features_at, frame_differences, make_world, same_frames, served_differences

Tables = dict[str, pa.Table]


def split(world: World, seed: int, parts: int) -> list[Tables]:
    """The facts of a world as they may have come: each in one of some parts, by chance."""
    draw, found = np.random.default_rng(seed), []
    chosen = {name: draw.integers(0, parts, table.num_rows) for name, table in world.tables.items()}
    for part in range(parts):
        found.append({name: table.filter(pa.array(chosen[name] == part)) for name, table in world.tables.items()})
    return found


def joined(world: World, parts: list[Tables]) -> Tables:
    """Facts of several parts, in the order of a snapshot."""
    found = {}
    for name, source in world.spec.sources.items():
        table = pa.concat_tables([part[name] for part in parts])
        found[name] = table.sort_by([(k, "ascending") for k in (*source.key, "_known_at")]).combine_chunks()
    return found


def fed_in_parts(world: World, folder: Path, place: str, seed: int, anchors: list[int]) -> OnlineStore:
    """A store fed with a first part of the facts, then moved on part by part."""
    parts = split(world, seed, len(anchors))
    write_views(world.spec, parts[0], folder, anchors[0])
    pq.write_table(rows.online_rows(world.spec, parts[0], anchors[0]), folder / "online_rows.parquet")
    assert feed(world.spec, folder, place, Anchor(anchors[0], 0), "0")
    for i, anchor in enumerate(anchors[1:], 1):
        tables = joined(world, parts[: i + 1])

        changes = list(changed_cells(world.spec, tables, parts[i], anchor))
        told = {"since": str(i - 1), "newest": {}, "fresh": lambda changes=changes: ((), changes)}
        assert feed_changes(world.spec, place, Anchor(anchor, 0), str(i), **told)
    return OnlineStore(world.spec, place)


@pytest.fixture(autouse=True)
def old_rows_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, feeding, online):
        monkeypatch.setattr(module, "RECENT", 2**60)


def differences(world: World, folder: Path, place: str, seed: int) -> list[str]:
    times = sorted(request.t for request in world.case.requests)
    store = fed_in_parts(world, folder, place, seed, [times[0], times[1], times[2]])
    asked = [(version, t) for version, t in world.asked() if t >= times[2]]
    found = frame_differences(world.spec, features_at(store, asked), world.expected(asked), "row")
    return found + served_differences(world, store)


@pytest.mark.parametrize("block", range(4))
def test_a_store_moved_on_by_changes_agrees_with_the_oracle(block: int, tmp_path: Path) -> None:
    found = []
    for seed in range(5_000 + block * 4, 5_004 + block * 4):
        folder = tmp_path / str(seed)
        found += [f"seed {seed}: {text}" for text in
                  differences(make_world(seed, folder), folder / "features", str(folder / "served"), seed)]  # fmt: skip
    assert found == []


def test_the_stores_on_servers_are_moved_on_too(place: str, tmp_path: Path) -> None:
    assert differences(make_world(5_003, tmp_path), tmp_path / "features", place, 5_003) == []


Plant = Callable[[pytest.MonkeyPatch], None]


def closers_do_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Facts.touched
    monkeypatch.setattr(Facts, "touched", lambda every, new, source, others, *joined: honest(every, new, source, (), *joined))


def where_a_fact_was_before_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(every, new, source, others, *joined, honest=Facts.touched):  # type: ignore[no-untyped-def]
        if source not in new:
            return honest(every, new, source, others, *joined)
        return rows_among(every.tables[source], [*every.spec.sources[source].key, KNOWN], new[source])

    monkeypatch.setattr(Facts, "touched", mutant)


def other_versions_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(every, source, rows, others, *joined, honest=Facts.narrowed):  # type: ignore[no-untyped-def]
        some = every.tables[source].take(pa.array(np.arange(every.tables[source].num_rows)[rows]))
        return Facts(every.spec, {**honest(every, source, rows, others, *joined).tables, source: some})


    monkeypatch.setattr(Facts, "narrowed", mutant)


def nothing_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = feeding._of_keys
    monkeypatch.setattr(feeding, "_of_keys", lambda *told: (change for change in honest(*told) if change[2] is not None))


# with a pipeline that is known to show it, where one of the first does not
FAULTS = [(closers_do_not_touch, 5_000), (where_a_fact_was_before_is_not_touched, 5_000), (other_versions_are_left_out, 5_005),
          (nothing_is_removed, 5_013)]  # fmt: skip


@pytest.mark.parametrize(("plant", "likely"), FAULTS)
def test_a_fault_in_what_is_touched_is_seen(plant: Plant, likely: int, tmp_path: Path) -> None:
    for seed in sorted(range(5_000, 5_100), key=lambda seed: seed != likely):
        folder = tmp_path / str(seed)
        world = make_world(seed, folder)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            if differences(world, folder / "features", str(folder / "served"), seed):
                return
    pytest.fail("not seen on 100 random pipelines")


def test_facts_that_matter_no_more_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the views are the same for every row whose times are not older than the store keeps rows."""
    monkeypatch.setattr(feeding, "RECENT", 0)
    left_out = compared = 0
    for seed in range(7_000, 7_010):
        world = make_world(seed, tmp_path / str(seed))
        since = sorted(t for _, t in world.asked())[len(world.asked()) // 2]
        some = recent(world.spec, world.tables, since)
        stamps = [c for c, column in world.spec.row_source.columns.items() if column.type == "timestamp"]
        asked = [(v, t) for v, t in world.asked() if t >= since and all((v.get(c) or NEVER) >= since for c in stamps)]
        frames = []
        for name, tables in (("whole", world.tables), ("some", some)):
            folder = tmp_path / str(seed) / name
            write_views(world.spec, tables, folder, since)
            pq.write_table(rows.online_rows(world.spec, tables, since), folder / "online_rows.parquet")
            feed(world.spec, folder, folder, Anchor(since, 0), "1")
            frames.append(features_at(OnlineStore(world.spec, folder), asked))
        assert same_frames(*frames) == [], seed
        left_out += sum(table.num_rows - some[name].num_rows for name, table in world.tables.items())
        compared += len(asked)
    assert left_out > 10 and compared > 20, (left_out, compared)


def test_cells_that_change_are_those_of_their_tables_to_the_byte(tmp_path: Path) -> None:
    """Windows and backlogs are packed from steps alone, of some keys alone: no otherwise than their tables of all keys."""
    compared = 0
    for seed in range(5_000, 5_004):
        world = make_world(seed, tmp_path / str(seed))
        anchor, packing = sorted(t for _, t in world.asked())[len(world.asked()) // 2], layouts(world.spec)
        changes = {change[:2]: change[2] for change in changed_cells(world.spec, world.tables, world.tables, anchor)}
        for name in world.spec.features.views:
            since = feeding._first(world.spec, packing[name], anchor) if name in packing else anchor
            for stored, table in build_views(Facts(world.spec, world.tables), name, since):
                whole = dict(feeding._packed(world.spec, packing[stored.name], table, anchor))
                some = {key: packed for (view, key), packed in changes.items() if view == stored.name and packed is not None}
                assert some == whole, (seed, stored.name)
                compared += len(whole)
    assert compared > 50


def test_a_store_that_is_elsewhere_is_not_moved(tmp_path: Path) -> None:
    world = make_world(5_001, tmp_path)
    store = fed_in_parts(world, tmp_path / "features", str(tmp_path / "served"), 1, [0, 1])

    def never() -> Any:
        raise AssertionError("nothing is computed for a store that is not moved")

    assert not feed_changes(world.spec, tmp_path / "served", Anchor(2, 0), "2", since="0", newest={}, fresh=never)
    assert not feed_changes(world.spec, tmp_path / "served", Anchor(0, 0), "2", since="1", newest={}, fresh=never)
    assert store.meta()["snapshot"] == "1"


def test_only_what_is_touched_is_written(tmp_path: Path) -> None:
    world = make_world(5_001, tmp_path)
    place = str(tmp_path / "served")
    fed_in_parts(world, tmp_path / "features", place, 1, [0])
    name = world.spec.rows.source
    one = world.tables[name].slice(0, 1)
    changes = list(changed_cells(world.spec, world.tables, {name: one}, 0))
    cells = open_cells(place)
    every = {(view, key) for view in layouts(world.spec) for key in cells.keys(view)}
    assert 0 < len(changes) < len(every) and {change[:2] for change in changes} <= every
    assert serve_features(OnlineStore(world.spec, place), [world.case.requests[0].version], 0)
