"""`python -m bench.skew`: a live endpoint, facts arriving while it answers, and the skew check over all that it logged.

The flights of 2013, with departures and arrivals reported up to ten minutes late, one in twenty departures corrected
later, one in ten without its tail number, and no weather from one airport. The clock runs fast: facts land and move the
served store for two hours of it, then nothing arrives for more than an hour, while requests go on.

Figures: `requests`, `clock_hours`, `clock_hours_without_events`, `feeds`, `pushes`, `pushed_events`, `cells`, `skewed_cells`,
`late_cells`, `check_s`, `unknown_rows`; `window_cells_not_null` and, of these, `window_cells_changed` (other than an hour
before, from the same facts), both shares; `oracle_requests`, `oracle_differences`; `replayed_skewed_cells`: the same kind of
log from a store that is fed by the code as it is; and `planted_found`: whether the check sees it when a mutant of the code
feeds the store.

Run it from the checkout: the mutants and the oracle are those of the tests.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bench.record import options, report
from deploy.bundle import build_bento
from deploy.predictions import as_json
from deploy.process import call, free_port, start, stop
from deploy.rollout import Release, bento_folder, feed_all, promote
from deploy.skew import check_skew, choose, compare, requests
from features import facts
from features.cells import Event
from features.facts import Columns, Versions, int_times
from features.feed import feed
from features.frame import as_array, feature_list, is_missing
from features.ingest import Snapshot, ingest, read_snapshot, read_table
from features.keys import codes_of, key_arrays, request_key, text_keys
from features.online import OnlineStore, serve_features
from features.push import Pusher, pushed_events, snapshot_with
from features.skew import different, known_features
from features.store import build_features, first_needed
from features.trainset import build_training_set, load_training_set
from models.gbdt import fit_gbdt
from pipelines.clock import DAY_US, NEVER, Anchor, Clock, iso, parse_time, wall_us
from pipelines.flights import write_sample
from pipelines.home import Home, open_home, process_env
from pipelines.manifest import write_json
from pipelines.predlog import FEATURE, schema
from pipelines.spec import Source, Spec, load_spec
from tests.agreement import frame_differences
from tests.data import test_oracle as mutants
from tests.e2e.test_endpoint_equals_training import oracle_of, window_features

MINUTE, HOUR = 60_000_000, 3_600_000_000
BEGIN = parse_time("2013-12-30T14:00Z")  # 9 in the morning in New York
EVENTS, QUIET = 2 * HOUR, 5 * HOUR // 4  # facts arrive, then none do
MUTE = "JFK"  # the airport whose weather has expired
STATES = 8  # of the store that are compared with the oracle
FROZEN = "departures_origin"
SMALL = ("split.train=10d", "split.valid_fit=3d", "split.valid_select=3d", "split.test=3d", "gbdt.max_rounds=20",
         *(f"sources.{name}.columns.tailnum={{type: string, nulls: 0.2}}" for name in ("schedule", "departures", "arrivals")))
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is done: days of facts, requests, seconds that they take, and how many of them the oracle answers."""

    days: int
    requests: int
    seconds: int
    oracle: int

    @property
    def speed(self) -> float:
        return (EVENTS + QUIET) / 1e6 / self.seconds


FULL = Size(days=365, requests=1_000, seconds=150, oracle=60)
QUICK = Size(days=24, requests=120, seconds=15, oracle=6)


def arriving(folder: Path, days: int) -> dict[str, pa.Table]:
    """Every fact by table, in order of known-at: reported late, some corrected, some incomplete, and a gap in the weather."""
    write_sample(folder, until_us=BEGIN + DAY_US)
    draw, found = np.random.default_rng(7), {}
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / name).glob("*.parquet"))])
        if "tailnum" in table.column_names and name != "planes":
            none = pa.array(draw.random(table.num_rows) < 0.1)
            tails = pc.if_else(none, None, table["tailnum"])
            table = table.set_column(table.schema.get_field_index("tailnum"), "tailnum", tails)
        if name != "planes":
            table = table.filter(pa.array(int_times(table["known_at"]) > BEGIN - days * DAY_US))
        if name in ("departures", "arrivals"):
            table = known_later(table, draw.integers(0, 10 * MINUTE, table.num_rows))
        if name == "departures":
            again = table.take(pa.array(np.flatnonzero(draw.random(table.num_rows) < 0.05)))
            again = known_later(again, draw.integers(20 * MINUTE, HOUR, again.num_rows))
            delay = pc.add(again["dep_delay"], 7.0)
            again = again.set_column(again.schema.get_field_index("dep_delay"), "dep_delay", delay)
            table = pa.concat_tables([table, again])
        if name == "weather":
            muted = pc.and_(pc.equal(table["origin"], MUTE), pa.array(int_times(table["observed_at"]) > BEGIN - 8 * HOUR))
            table = table.filter(pc.invert(muted))
        found[name] = table.sort_by("known_at").combine_chunks()
    return found


def known_later(table: pa.Table, by: np.ndarray) -> pa.Table:
    """The same facts, known later by so many µs (N)."""
    known = pa.array(int_times(table["known_at"]) + by).cast(table["known_at"].type)
    return table.set_column(table.schema.get_field_index("known_at"), "known_at", known)


class World:
    """A home with a release, whose landing and served store are moved on while its endpoint answers."""

    def __init__(self, root: Path, size: Size) -> None:
        self.home, self.size = open_home(root / "home"), size
        self.spec = load_spec("flights_demo", [*SMALL, f"clock.speed={size.speed}"])
        text = json.dumps(self.spec.model_dump(mode="json", by_alias=True), sort_keys=True)
        self.spec = Spec.model_validate_json(text)  # as a run reads it
        self.facts = arriving(root / "sample", size.days)
        self.landed = 0
        self.anchor = Anchor(BEGIN, wall_us())
        self.feeds: list[Row] = []
        self.pushes: list[Row] = []
        self.pushed = BEGIN
        self.land(BEGIN)
        self.release = self.make_release(ingest(self.spec, self.home))

    def make_release(self, snapshot: Snapshot) -> Release:
        """A small LightGBM model as a bento, champion at once: what is asked here is about features, not quality."""
        spec, home = self.spec, self.home
        features = build_features(spec, home, snapshot, since=first_needed(spec, BEGIN))
        with tempfile.TemporaryDirectory(dir=home.root) as scratch:
            folder, staged = Path(scratch) / "model", Path(scratch) / "staged"
            folder.mkdir()
            staged.mkdir()
            build_training_set(spec, home, snapshot, features, BEGIN, folder)
            data = load_training_set(folder)
            trees = fit_gbdt(spec.gbdt, data.batch, data.label, data.part, spec.seed, threads=1)
            (folder / "gbdt.txt").write_text(trees.text)
            member = {"name": "gbdt", "kind": "gbdt", "file": "gbdt.txt", "a": 1.0, "b": 0.0}
            body = {"chosen": "gbdt", "members": [member], "prior": 0.2, "candidates": {"gbdt": {"gbdt": 1.0}}}
            write_json(folder / "model.json", body)
            files = [folder / name for name in ("model.json", "gbdt.txt", "preprocess.json")]
            bento = build_bento(spec, home, files, features.defs_digest, staged)
        release = Release(bento.tag, bento.path, "bench", snapshot.digest, BEGIN, features.defs_digest, "", (), BEGIN)
        promote(home, spec.pipeline, release, expected="", why="bench")
        return release

    def land(self, until: int) -> None:
        """Lands what became known since the last time."""
        for name, table in self.facts.items():
            known = int_times(table["known_at"])
            new = table.slice(lo := int(np.searchsorted(known, self.landed, "right")),
                              int(np.searchsorted(known, until, "right")) - lo)  # fmt: skip
            if new.num_rows:
                path = self.home.landing(self.spec.pipeline) / name / f"{iso(until).replace(':', '')}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(new, path)
        self.landed = until

    def move(self, until: int, wall: int) -> None:
        """Lands what is known at `until`, which it was at `wall`, and feeds the served store."""
        began = time.monotonic()
        self.land(until)
        snapshot = ingest(self.spec, self.home)
        built = build_features(self.spec, self.home, snapshot, since=BEGIN - 2 * HOUR)
        if not feed_all(self.home, self.spec.pipeline, snapshot, anchor := Anchor(until, wall), built):
            raise SystemExit(f"the feed at {iso(until)} moved nothing")
        self.anchor, self.pushed = anchor, until
        self.feeds.append({"what": "feed", "until": iso(until), "snapshot": snapshot.digest[:12],
                           "seconds": round(time.monotonic() - began, 2)})  # fmt: skip

    def push(self, until: int) -> None:
        """Pushes what became known since the last feed or push: it is served before it lands."""
        began, events = time.monotonic(), []
        for name, table in self.facts.items():
            known = int_times(table["known_at"])
            lo, hi = (int(np.searchsorted(known, at, "right")) for at in (self.pushed, until))
            columns = self.spec.sources[name].columns
            rows = pa.table({c: table[c].cast(pa.int64()) if kind.type == "timestamp" else table[c]
                             for c, kind in columns.items()}).slice(lo, hi - lo).to_pylist()  # fmt: skip
            events += [Event(f"{name}-{lo + i}", name, json.dumps(row), wall_us()) for i, row in enumerate(rows)]
        receipt = Pusher(self.spec, self.home, self.home.online(self.spec.pipeline, self.release.defs_digest)).push(events, until)
        self.pushed = until
        self.pushes.append({"what": "push", "until": iso(until), "snapshot": "", "events": receipt.taken,
                            "seconds": round(time.monotonic() - began, 2)})  # fmt: skip

    def now(self) -> int:
        return Clock("data", self.size.speed, 0, self.anchor).now_us()

    def keep_moving(self, failed: list[BaseException]) -> None:
        """Feeds and pushes by turns until nothing arrives any more."""
        try:
            while (until := self.now()) < BEGIN + EVENTS:
                self.move(until, wall_us())
                for _ in range(2):
                    time.sleep(self.size.seconds / 60)
                    self.push(self.now())
        except BaseException as error:
            failed.append(error)

    def asked(self, url: str) -> int:
        """Sends the requests, spread evenly; how many asked for a row that the endpoint did not know."""
        schedule = self.facts["schedule"]
        due = int_times(schedule["scheduled_departure"])
        draw, unknown, began = np.random.default_rng(11), 0, time.monotonic()
        for i in range(self.size.requests):
            time.sleep(max(0.0, began + i * self.size.seconds / self.size.requests - time.monotonic()))
            near = np.flatnonzero(np.abs(due - HOUR - self.now()) < 10 * MINUTE)
            status = 409  # one that has left too early
            while status == 409:
                row = key_of(self.spec, schedule, int(draw.choice(near)))
                status, answer = call(f"{url}/predict", {"rows": [row]})
            if status != 200:
                raise SystemExit(f"{row} was answered {status}: {answer}")
            unknown += answer["rows"][0]["unknown_entity"]
        return unknown


def key_of(spec: Spec, table: pa.Table, i: int) -> Row:
    """The row key as a request writes it."""
    row = table.slice(i, 1)
    return {n: iso(int(int_times(row[n])[0])) if pa.types.is_timestamp(row[n].type) else row[n][0].as_py() for n in spec.row_key}


def live(world: World) -> int:
    """Requests and feeds side by side; how many rows were unknown."""
    home, release = world.home, world.release
    world.move(BEGIN + 1, wall_us())
    service = start(home, bento_folder(home, release), port=free_port(), release=release.release,
                    log=home.root / "endpoint.log", extra={})  # fmt: skip
    try:
        world.move(BEGIN + MINUTE, wall_us())  # the clock starts when the endpoint is there
        failed: list[BaseException] = []
        feeding = threading.Thread(target=world.keep_moving, args=(failed,))
        feeding.start()
        try:
            unknown = world.asked(service.url)
        finally:
            feeding.join()
        if failed:
            raise failed[0]
        return unknown
    finally:
        stop(service)


# What the log shows


def by_state(world: World, log: pa.Table) -> Iterator[tuple[Snapshot, pa.Table]]:
    """Answers by what the store held: a snapshot, and the events pushed since."""
    spec, home = world.spec, world.home
    events = pushed_events([home.online(spec.pipeline, world.release.defs_digest)])
    for digest, number in sorted(set(zip(log["snapshot"].to_pylist(), log["pushed"].to_pylist(), strict=True))):
        there = pc.and_(pc.equal(log["snapshot"], digest), pc.equal(log["pushed"], number))
        held = [event for event in events if event.number <= number]
        yield snapshot_with(spec, home, read_snapshot(home, spec.pipeline, digest), held), log.filter(there).combine_chunks()


def served(spec: Spec, log: pa.Table) -> Columns:
    kinds = {"number": "float64", "category": "string"}
    return {f.name: as_array(log[FEATURE + f.name], kinds[f.kind]) for f in feature_list(spec)}


def window_shares(world: World, log: pa.Table) -> dict[str, float]:
    """Share of window cells with a value, and of these that differ from an hour before, by the same snapshot."""
    names, there, moved = window_features(world.spec), [], []
    for snapshot, part in by_state(world, log):
        before = known_features(world.spec, world.home, snapshot, requests(world.spec, part), int_times(part["clock"]) - HOUR)
        frame = served(world.spec, part)
        changed = different(frame, before.frame)
        there.append([~is_missing(frame[name]) for name in names])
        moved.append([changed[name] & ~is_missing(frame[name]) for name in names])
    cells, filled = np.concatenate(there, axis=1), np.concatenate(moved, axis=1)
    return {"window_cells_not_null": round(float(cells.mean()), 4),
            "window_cells_changed": round(float(filled.sum() / cells.sum()), 4)}  # fmt: skip


def oracle_differences(world: World, log: pa.Table) -> dict[str, int]:
    """Logged features of some requests against the oracle, row by row, over what their snapshot holds."""
    spec, wrong = world.spec, []
    names = zip(log["snapshot"].to_pylist(), log["pushed"].to_pylist(), strict=True)
    held = np.unique([f"{digest}{number}" for digest, number in names], return_inverse=True)[1]
    few = np.flatnonzero(held % max(1, held.max() // STATES) == 0)  # an oracle for each state takes its time
    chosen = log.take(pa.array(few[np.linspace(0, len(few) - 1, world.size.oracle).astype(np.int64)])).combine_chunks()
    for snapshot, part in by_state(world, chosen):
        oracle = oracle_of(spec, {name: read_table(spec, world.home, snapshot, name) for name in spec.sources}, BEGIN)
        frame = served(spec, part)
        for i, (asked, t) in enumerate(zip(requests(spec, part), int_times(part["clock"]).tolist(), strict=True)):
            key = tuple(asked[name] for name in spec.row_key)
            (version,) = oracle.live_with(spec.rows.source, spec.row_key, key, t)
            one = {name: values[i : i + 1] for name, values in frame.items()}
            wrong += frame_differences(spec, one, [oracle.features(version.row, t)], str(key))
    return {"oracle_requests": chosen.num_rows, "oracle_differences": len(wrong)}


# Planted faults

Plant = Callable[[pytest.MonkeyPatch, Spec], None]
Replay = Sequence[tuple[Row, int]]  # request and instant


def replay_of(world: World) -> Replay:
    """Requests of one hour, at whole minutes, where facts enter and leave windows.

    Flights an hour before they are due, those without a tail number too, and flights that left and are not reported yet.
    """
    spec, found = world.spec, []
    schedule, departures = world.facts["schedule"], world.facts["departures"]
    asked = int_times(schedule["scheduled_departure"]) - HOUR
    left, known = int_times(departures["departed_at"]), int_times(departures["known_at"])
    for table, at, there in ((schedule, asked, asked < NEVER), (departures, left, left < known)):
        for i in np.flatnonzero(there & (at > BEGIN + HOUR) & (at <= BEGIN + 2 * HOUR)).tolist():
            key = key_of(spec, table, i)
            found.append((key | {"time_hour": parse_time(key["time_hour"])}, int(at[i])))
    return found


def own_rows_included(asked: Replay) -> Plant:
    """The mutant of the tests for many rows at once: facts of a row's own key are known at the row's t already."""

    def plant(patch: pytest.MonkeyPatch, spec: Spec) -> None:
        times = {request_key(row, spec.row_key): t for row, t in asked}
        keys, at = pa.array(times), np.array(list(times.values()))

        def mutant(table: pa.Table, source: Source, honest: Callable[..., Versions] = facts.versions) -> Versions:
            v = honest(table, source)
            if not set(spec.row_key) <= source.columns.keys() or source is spec.row_source:
                return v
            code = codes_of(text_keys(key_arrays(v.table, spec.row_key), v.table.num_rows), keys)
            own = (code >= 0) & (np.diff(v.fact, prepend=-1) > 0)
            known = np.where(own, np.minimum(v.known_from, at[np.maximum(code, 0)]), v.known_from)
            return dataclasses.replace(v, known_from=known)

        patch.setattr(facts, "versions", mutant)

    return plant


def served_by(world: World, scratch: Path, snapshot: Snapshot, asked: Replay, plant: Plant) -> list[Columns]:
    """What a store answers that the mutated code has made and fed, each request at its own instant."""
    home = Home(scratch)
    for folder in ("objects", "snapshots"):
        (scratch / folder).symlink_to(world.home.root / folder)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, world.spec)
        built = build_features(world.spec, home, snapshot, since=BEGIN - 2 * HOUR)
        feed(world.spec, scratch / built.path, scratch / "online", Anchor(BEGIN, 0), snapshot.digest)
        store = OnlineStore(world.spec, scratch / "online")
        return [serve_features(store, [row], t).frame for row, t in asked]


def as_log(world: World, snapshot: Snapshot, asked: Replay, frames: Sequence[Columns]) -> pa.Table:
    """The log that an endpoint on that store would have written."""
    kinds = {f.name: f.kind for f in feature_list(world.spec)}
    rows = []
    for i, ((row, t), frame) in enumerate(zip(asked, frames, strict=True)):
        key = {n: iso(v) if n == "time_hour" else v for n, v in row.items()}
        cells = {FEATURE + n: None if is_missing(v)[0] else v[0] for n, v in frame.items()}
        rows.append({"request_id": str(i), "row": 0, "clock": t, "release": world.release.release, "snapshot": snapshot.digest,
                     "route": "predict", "key": as_json(key), "request": "{}", **cells})  # fmt: skip
    numbers, words = ([n for n, kind in kinds.items() if kind == wanted] for wanted in ("number", "category"))
    return pa.Table.from_pylist(rows, schema(numbers, words))


def planted(world: World, root: Path) -> tuple[int, dict[str, bool], list[Row]]:
    """Skewed cells without a fault, whether the check finds each fault, and what it found."""
    world.land(BEGIN + 8 * HOUR)  # what comes later, for those faults that see it too soon
    snapshot, asked = ingest(world.spec, world.home), replay_of(world)

    def of_tests(mutant: Callable[..., None]) -> Plant:
        return lambda patch, spec: mutant(patch, spec, (), 0)

    plants: Mapping[str, Plant] = {
        "none": of_tests(mutants.unchanged),
        "event-time join": of_tests(mutants.join_on_event_time),
        "own row included": own_rows_included(asked),
        "edge off by 1 µs": of_tests(mutants.window_ends_late),
        "other edge off by 1 µs": of_tests(mutants.window_begins_late),
        "TTL ignored": of_tests(mutants.ttl_ignored),
        "correction ignored": of_tests(mutants.correction_ignored),
        "null key matched": of_tests(mutants.null_key_matched),
    }
    logs = {}
    for name, plant in plants.items():
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            logs[name] = as_log(world, snapshot, asked, served_by(world, Path(scratch), snapshot, asked, plant))
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        logs["window frozen for an hour"] = frozen(world, Path(scratch), snapshot, asked, logs["none"], plants["none"])
    found = {name: compare(world.home, world.spec.pipeline, log) for name, log in logs.items()}
    rows: list[Row] = [{"what": "planted", "fault": name, "cells": one.cells, "skewed_cells": one.skewed_cells,
                        "by_view": one.by_view} for name, one in found.items()]  # fmt: skip
    honest = found.pop("none").skewed_cells
    return honest, {name: one.skewed_cells > 0 for name, one in found.items()}, rows


def frozen(world: World, scratch: Path, snapshot: Snapshot, asked: Replay, honest: pa.Table, plant: Plant) -> pa.Table:
    """The log of a store in which one window stands still for the hour of the replay."""
    frames = served_by(world, scratch, snapshot, [(row, BEGIN + HOUR) for row, _ in asked], plant)
    still, log = as_log(world, snapshot, asked, frames), honest
    for feature in feature_list(world.spec):
        if feature.group == FROZEN:
            name = FEATURE + feature.name
            log = log.set_column(log.schema.get_field_index(name), name, still[name])
    return log


def main() -> None:
    """Lives, checks, plants and reports."""
    told = options("skew")
    size = QUICK if told.quick else FULL
    root = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        world = World(root, size)
        os.environ.update(process_env(world.home))
        unknown = live(world)
        began = time.monotonic()
        found = check_skew(world.home, world.spec.pipeline, rows=size.requests)
        took = time.monotonic() - began
        log = choose(world.home, world.spec.pipeline, None, None, size.requests, None)
        clock = int_times(log["clock"])
        fed = world.pushed
        figures = {
            "requests": found.answers, "clock_hours": round((int(clock[-1]) - int(clock[0])) / HOUR, 2),
            "clock_hours_without_events": round((int(clock[-1]) - fed) / HOUR, 2), "feeds": len(world.feeds),
            "pushes": len(world.pushes), "pushed_events": sum(push["events"] for push in world.pushes),
            "cells": found.cells, "skewed_cells": found.skewed_cells, "late_cells": found.late_cells,
            "check_s": round(took, 1), "unknown_rows": unknown,
            **window_shares(world, log), **oracle_differences(world, log),
        }  # fmt: skip
        honest, seen, rows = planted(world, root)
        figures |= {"replayed_skewed_cells": honest, "planted_found": seen}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report("skew", figures, [*world.feeds, *world.pushes, *rows], told.json)


if __name__ == "__main__":
    main()
