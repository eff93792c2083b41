"""Pushed events: served at once, each counted once, and seen by training as well."""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest

from features import feed as feeding
from features import online, rows
from features.cells import Event, SqliteCells, open_cells
from features.feed import feed, feed_changes
from features.ingest import ingest, read_snapshot, read_table
from features.online import OnlineStore, serve_features
from features.push import BadEvent, Delivery, Pusher, land_pushed, pushed_events
from features.store import build_features
from pipelines.clock import NEVER, Anchor, wall_us
from pipelines.home import Home, open_home
from pipelines.spec import Spec
from tests.agreement import World, arrow, features_at, frame_differences, land, make_world, same_frames, served_differences
from tests.random_tables import known_at

NOW = NEVER - 1
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def old_rows_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, feeding, online):
        monkeypatch.setattr(module, "RECENT", 2**60)


@dataclass(frozen=True)
class Half:
    """A world of which one half has landed and feeds a store; the other half comes as events."""

    world: World
    home: Home
    store: str
    anchor: int
    events: list[Event]

    @property
    def spec(self) -> Spec:
        return self.world.spec

    def pusher(self) -> Pusher:
        return Pusher(self.spec, self.home, self.store)

    def differences(self) -> list[str]:
        store = OnlineStore(self.spec, self.store)
        asked = [(version, t) for version, t in self.world.asked() if t >= self.anchor]
        found = frame_differences(self.spec, features_at(store, asked), self.world.expected(asked), "row")
        return found + served_differences(self.world, store)


def half(seed: int, folder: Path, store: str) -> Half:
    world = make_world(seed, folder / "whole")
    if not all(table.num_rows for table in world.tables.values()):
        return half(seed + 1_000, folder / "more", store)
    draw, landed, events = random.Random(seed), {}, []
    for name, listed in world.case.tables.items():
        rule = world.case.spec["sources"][name]["known_at"]
        known = [row for row in listed if known_at(world.case.spec["sources"][name], row) <= world.case.as_of]
        late = [row for row in known[1:] if "arrival" not in rule and draw.random() < 0.5]
        landed[name] = [row for row in known if row not in late]
        events += [event(f"{name}-{i}", name, row) for i, row in enumerate(late)]
    home = open_home(folder / "home")
    case = dataclasses.replace(world.case, tables=landed)
    with patch("features.ingest.wall_us", side_effect=land(case, world.spec, home)):
        snapshot = ingest(world.spec, home)
    anchor = sorted(request.t for request in world.case.requests)[1]
    built = build_features(world.spec, home, snapshot, since=anchor)
    feed(world.spec, home.root / built.path, store, Anchor(anchor, 0), snapshot.digest)
    draw.shuffle(events)
    return Half(world, home, store, anchor, events)


def event(id_: str, source: str, row: dict[str, Any]) -> Event:
    fields = {k: v for k, v in row.items() if not k.startswith("_")}
    return Event(id_, source, json.dumps(fields), wall_us() + next(NUMBERS))


def batches(events: list[Event], seed: int) -> Iterator[list[Event]]:
    """Events in batches, some sent again."""
    draw = random.Random(seed)
    for begin in range(0, len(events), 3):
        yield events[begin : begin + 3] + draw.choices(events[: begin + 3], k=2)


@pytest.mark.parametrize("block", range(3))
def test_what_was_pushed_is_served_as_the_oracle_says(block: int, tmp_path: Path) -> None:
    found, pushed = [], 0
    for seed in range(6_000 + 4 * block, 6_004 + 4 * block):
        one = half(seed, tmp_path / str(seed), str(tmp_path / str(seed) / "served"))
        pusher = one.pusher()
        for i, some in enumerate(batches(one.events, seed)):
            pusher = one.pusher() if i % 4 == 3 else pusher  # as after a restart
            pushed += pusher.push(some, NOW).taken
        assert pusher.push(one.events, NOW).taken == 0
        found += [f"seed {seed}: {text}" for text in one.differences()]
    assert found == [] and pushed > 25


def test_the_stores_on_servers_take_events_too(place: str, tmp_path: Path) -> None:
    one = half(6_001, tmp_path, place)
    receipts = [one.pusher().push(some, NOW) for some in batches(one.events, 1)]
    assert sum(r.taken for r in receipts) == len(one.events) == receipts[-1].last
    assert [e.id for e in pushed_events([place])] == [e.id for e in sorted(one.events, key=lambda e: e.wall_us)]
    assert len(open_cells(place).events(until=2)) == 2
    assert one.differences() == []


def test_training_sees_the_same_facts(tmp_path: Path) -> None:
    one = half(6_002, tmp_path, str(tmp_path / "served"))
    for some in batches(one.events, 1):
        one.pusher().push(some, NOW)
    assert land_pushed(one.spec, one.home, pushed_events([one.store])) == len(one.events)
    assert land_pushed(one.spec, one.home, pushed_events([one.store])) == 0
    snapshot = ingest(one.spec, one.home)
    for name, table in one.world.tables.items():
        assert read_table(one.spec, one.home, snapshot, name).equals(table), name


def test_a_push_that_is_killed_counts_once_or_not_at_all(tmp_path: Path) -> None:
    """Killed in the midst of the transaction: neither cells nor ids are there, and the same push again is whole."""
    one = half(6_003, tmp_path, str(tmp_path / "served"))
    honest = feeding._of_keys

    def dies(*told: Any) -> Iterator[feeding.Change]:
        yield from list(honest(*told))[:1]
        raise KeyboardInterrupt

    before = OnlineStore(one.spec, one.store).meta()
    with patch.object(feeding, "_of_keys", dies), pytest.raises(KeyboardInterrupt):
        one.pusher().push(one.events, NOW)
    assert OnlineStore(one.spec, one.store).meta() == before and open_cells(one.store).events() == []
    assert one.pusher().push(one.events, NOW).taken == len(one.events)
    assert one.differences() == []


def test_events_that_cannot_be_taken(tmp_path: Path) -> None:
    one = half(6_004, tmp_path, str(tmp_path / "served"))
    good = one.events[0]
    source, row = one.spec.sources[good.source], json.loads(good.row)
    known = row[source.known_at.column] if source.known_at and source.known_at.column else row[str(source.event_time)]
    bad = {
        "is not one of": dataclasses.replace(good, source="nowhere"),
        "has no column 'colour'": dataclasses.replace(good, row=json.dumps({**row, "colour": 1})),
        f"rule of its source .nulls: {source.key[0]}": dataclasses.replace(good, row=json.dumps({**row, source.key[0]: None})),
    }
    for words, event_ in bad.items():
        with pytest.raises(BadEvent, match=words):
            one.pusher().push([*one.events[1:], event_], NOW)
    with pytest.raises(BadEvent, match="is from the future"):
        one.pusher().push([good], known - 1)
    assert open_cells(one.store).events() == []
    one.pusher().push([good], NOW)
    number = next((c for c, k in source.columns.items() if k.type == "float64" and c not in source.key), None)
    if number:
        other = dataclasses.replace(good, id="other", row=json.dumps({**row, number: 12_345.0}))
        with pytest.raises(BadEvent, match="a correction needs a later known-at"):
            one.pusher().push([other], NOW)


def test_what_a_run_would_end_on_is_said_when_it_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References that every row must meet, also by facts that are too old to be kept at hand; and sums that overflow."""
    noon, hour = 1_714_564_800_000_000, 3_600_000_000
    monkeypatch.setattr(feeding, "RECENT", hour)
    rides = {"key": ["id"], "event_time": "at", "known_at": {"lag": "0s"}, "references": [{"to": "lines", "columns": ["line"]}],
             "columns": {"id": "int64", "line": "string", "at": "timestamp", "late": {"type": "float64", "resolution": 1}}}
    lines = {"key": ["line"], "event_time": "since", "known_at": {"lag": "0s"},
             "columns": {"line": "string", "since": "timestamp"}}  # fmt: skip
    spec = Spec.model_validate({
        "pipeline": "buses", "title": "Late?", "sources": {"rides": rides, "lines": lines}, "label_delay": "1h",
        "rows": {"from": "rides", "key": ["id"]}, "predict_at": {"column": "at", "lead": "0s", "tolerance": "1m"},
        "label": {"from": "rides", "column": "late", "gt": 5},
        "split": {"train": "1d", "valid_fit": "1d", "valid_select": "1d", "test": "1d", "purge": "1h"},
        "features": {"views": {"of_line": {"window": {"from": "rides", "key": ["line"], "last": ["1h"], "sum": ["late"]}}}},
    })  # fmt: skip
    home, store = open_home(tmp_path / "home"), tmp_path / "store"
    told = {"rides": [{"id": 1, "line": "A", "at": noon, "late": 1.0}], "lines": [{"line": "A", "since": 0}]}
    for name, listed in told.items():
        path = home.landing("buses") / name / "a.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(arrow(spec.sources[name], listed), path)
    snapshot = ingest(spec, home)
    feed(spec, home.root / build_features(spec, home, snapshot).path, store, Anchor(noon, 0), snapshot.digest)
    pusher = Pusher(spec, home, store)

    def ride(number: int, line: str, late: float = 2.0) -> Event:
        return event(str(number), "rides", {"id": number, "line": line, "at": noon + number, "late": late})

    assert pusher.push([ride(2, "A")], noon + hour).taken == 1
    assert pusher.tables["lines"].num_rows == 0
    with pytest.raises(BadEvent, match=r"no fact of 'lines' has {'line': 'B'}, which an event refers to: push that first"):
        pusher.push([ride(3, "A"), ride(4, "B")], noon + hour)
    with pytest.raises(BadEvent, match=r"column 'late': 9e.18 is too large for its resolution"):
        pusher.push([ride(3, "A", 9e18)], noon + hour)
    assert [e.id for e in open_cells(store).events()] == ["2"]
    assert pusher.push([ride(4, "B"), event("B", "lines", {"line": "B", "since": noon})], noon + hour).taken == 2


def test_a_fact_that_landed_otherwise_wins_over_the_event(tmp_path: Path) -> None:
    """The event came before the file, and the file says otherwise: a feed goes on with what landed."""
    one = half(6_002, tmp_path, str(tmp_path / "served"))
    late = one.events[0]
    other = {**json.loads(late.row), "x": 123.5}
    one.pusher().push([event(late.id, late.source, other)], NOW)
    folder = one.home.landing(one.spec.pipeline) / late.source
    pq.write_table(arrow(one.spec.sources[late.source], [json.loads(late.row)]), folder / "late.parquet")
    snapshot = ingest(one.spec, one.home)
    facts = Delivery(one.spec, one.home, snapshot, one.anchor, [one.store])
    built = build_features(one.spec, one.home, snapshot, since=one.anchor)
    moved, whole, clean = (str(tmp_path / name) for name in ("moved", "whole", "clean"))
    shutil.copytree(one.store, moved)
    since, anchor = open_cells(one.store).meta()["snapshot"], Anchor(one.anchor, 0)
    facts.read_since(read_snapshot(one.home, one.spec.pipeline, since))
    assert feed_changes(one.spec, moved, anchor, snapshot.digest, since=since, newest={}, fresh=facts.fresh)
    feed(one.spec, one.home.root / built.path, whole, anchor, snapshot.digest, fresh=facts.pushed)
    feed(one.spec, one.home.root / built.path, clean, anchor, snapshot.digest)
    asked = [(version, t) for version, t in one.world.asked() if t >= one.anchor]
    frames = [features_at(OnlineStore(one.spec, store), asked) for store in (moved, whole, clean, one.store)]
    assert same_frames(frames[0], frames[2]) == same_frames(frames[1], frames[2]) == [] != same_frames(frames[3], frames[2])


def test_an_event_is_forgotten_after_a_month(tmp_path: Path) -> None:
    one = half(6_004, tmp_path, str(tmp_path / "served"))
    one.pusher().push([dataclasses.replace(e, wall_us=0) for e in one.events], NOW)
    cells = open_cells(one.store)
    assert isinstance(cells, SqliteCells) and cells.events() == []
    assert np.isfinite(serve_features(OnlineStore(one.spec, one.store), [one.world.case.requests[0].version], one.anchor).now)
