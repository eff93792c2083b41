"""`python -m bench.online`: the served store against stock Feast: five views of real flights, real servers.

Figures: `materialize_speedup` (cells per second of a feed into SQLite, over those of Feast's `materialize` into its SQLite
store), `incremental_materialize_speedup` (seconds of Feast's `materialize_incremental` over ours, when one key in a hundred
changed: medians of five rounds in turn), `read_p99_ms` and `read_p50_ms` of one entity × 5 views while a feed goes on, by store,
`read_cpu_ratio_vs_sdk` (CPU of the lean read, by store, over that of `get_online_features` from Feast's store on the same kind
of server: medians of rounds in turn), `equal_cells`, and of how many.
"""

import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.record import options, report
from features.cells import Change
from features.facts import Facts
from features.feed import changed_cells, feed, feed_changes, recent
from features.frame import own_columns
from features.ingest import in_order, ingest, read_table
from features.keys import KNOWN
from features.online import OnlineStore, own_keys
from features.packed import ROWS
from features.parts import read_view, write_part
from features.quick_feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from features.quick_feast import types as feast
from features.rows import online_rows
from features.steps import KEY, TIME
from features.store import write_views
from features.views import absent, stored_views
from features.windows import build_views
from pipelines.clock import Anchor
from pipelines.flights import write_sample
from pipelines.home import open_home
from pipelines.spec import Spec, load_spec
from tests.servers import postgres_server, redis_server

ROUNDS = 5  # of changes
STOCK = {
    "redis": '{{type: redis, connection_string: "127.0.0.1:{port}"}}',
    "postgres": "{{type: postgres, host: 127.0.0.1, port: {port}, user: postgres, password: none, database: postgres, "
    "sslmode: disable}}",
}


def five_views(spec: Spec) -> Spec:
    """The spec with five of its window views, those of the most keys, each in its shortest window."""
    names = [n for n, v in spec.features.views.items() if v.window is not None and v.window.last and v.window.key][-5:]
    views = {}
    for name in names:
        view = spec.features.views[name]
        assert view.window is not None
        views[name] = view.model_copy(update={"window": view.window.model_copy(update={"last": view.window.last[:1]})})
    return spec.model_copy(update={"features": spec.features.model_copy(update={"views": views, "functions": ()})})


def stock(spec: Spec, folder: Path, views: Path, online: str = "{type: sqlite, path: online.db}") -> FeatureStore:
    """Feast as it comes: the same tables of steps, its file offline store and one of its online stores."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: stock\nprovider: local\nregistry: {path: registry.pb, cache_ttl_seconds: 600}\n"
        f"offline_store: {{type: duckdb}}\nonline_store: {online}\nentity_key_serialization_version: 3\n"
    )
    kinds = {"string": (feast.String, ValueType.STRING), "int64": (feast.Int64, ValueType.INT64)}
    columns = spec.row_source.columns
    objects: list[Any] = []
    entities: dict[str, Entity] = {}
    for stored in stored_views(spec):
        for c in stored.key:
            entities.setdefault(c, Entity(name=c, join_keys=[c], value_type=kinds[columns[c].type][1]))
        fields = [Field(name=c, dtype=kinds[columns[c].type][0]) for c in stored.key]
        fields += [Field(name=c, dtype=feast.Int64) for c in stored.integers]
        source = FileSource(name=stored.name, path=str(views / f"{stored.name}.parquet"), timestamp_field=TIME)
        objects.append(FeatureView(name=stored.name, entities=[entities[c] for c in stored.key], ttl=timedelta(0),
                                   schema=fields, source=source))  # fmt: skip
    store = FeatureStore(repo_path=str(folder))
    store.apply([*entities.values(), *objects])
    return store


def cpu_s() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one_read(store: OnlineStore, own: dict[str, np.ndarray], now: int) -> Any:
    """All views of one entity, as the endpoint looks them up."""
    with store.reading():
        return store.features_at(own, np.array([now]))[0]


def feeding(spec: Spec, features: Path, place: Path | str, now: int, over: Any) -> None:
    """Feeds a store again and again until told that it is over."""
    turn = 0
    while not over.is_set():
        turn += 1
        feed(spec, features, place, Anchor(now + turn, 0), str(turn))


def latencies(
    spec: Spec, features: Path, place: Path | str, rows: list[dict[str, np.ndarray]], now: int, calls: int
) -> list[float]:  # fmt: skip
    """Milliseconds of single reads while another process feeds."""
    spawn = multiprocessing.get_context("spawn")
    over = spawn.Event()
    writer = spawn.Process(target=feeding, args=(spec, features, place, now, over))
    store, times = OnlineStore(spec, place), []
    writer.start()
    try:
        while store.meta()["snapshot"] == "one":
            time.sleep(0.01)
        for i in range(calls):
            began = time.perf_counter()
            one_read(store, rows[i % len(rows)], now)
            times.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.002)
    finally:
        over.set()
        writer.join()
    return times


def main() -> None:
    """Measures and reports."""
    told = options("online")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    calls, known = (200, 200) if told.quick else (3_000, 1_000)
    rows: list[dict[str, Any]] = []
    try:
        home, spec = open_home(folder / "home"), five_views(load_spec("flights"))
        write_sample(home.landing("flights"))
        snapshot = ingest(spec, home)
        now = snapshot.watermark_us
        features = folder / "features"
        tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
        write_views(spec, tables, features, now - 7 * 86_400_000_000 if told.quick else now - 60 * 86_400_000_000)
        pq.write_table(online_rows(spec, tables, now), features / "online_rows.parquet")
        steps = folder / "steps"  # what a feed reads of these, as Feast reads it: a file for each view
        steps.mkdir()
        for stored in stored_views(spec):
            write_part(read_view(features, stored.name, now), steps / f"{stored.name}.parquet")

        began = time.monotonic()
        feed(spec, features, folder / "served", Anchor(now, 0), "one")
        ours_s = time.monotonic() - began
        lean = OnlineStore(spec, folder / "served")
        cells = sum(len(lean.cells.keys(s.name)) for s in stored_views(spec))
        fed = cells + len(lean.cells.keys("rows"))
        theirs = stock(spec, folder / "stock", steps)
        began = time.monotonic()
        end = datetime.fromtimestamp(now / 1e6, UTC) + timedelta(microseconds=1)
        theirs.materialize(datetime(2012, 1, 1, tzinfo=UTC), end)
        theirs_s = time.monotonic() - began
        rows += [{"what": "feed into SQLite", "cells": fed, "seconds": round(ours_s, 3)},
                 {"what": "Feast materialize into SQLite", "cells": cells, "seconds": round(theirs_s, 3)}]  # fmt: skip

        asked = entities(tables, spec, known)
        equal, compared = agreement(spec, lean, theirs, asked, now)
        p99, p50, ratio = {}, {}, {}
        with ExitStack() as servers:
            places: dict[str, Path | str] = {"sqlite": folder / "served"}
            peers = {"sqlite": theirs}
            for name, server in (("redis", redis_server), ("postgres", postgres_server)):
                running = servers.enter_context(server())
                places[name] = f"{running.url}#bench/flights"
                feed(spec, features, places[name], Anchor(now, 0), "one")
                peers[name] = stock(spec, folder / f"stock-{name}", steps, STOCK[name].format(port=running.port))
                peers[name].materialize(datetime(2012, 1, 1, tzinfo=UTC), end)
            for name, place in places.items():
                times = latencies(spec, features, place, asked, now, calls)
                p99[name], p50[name] = (round(float(np.percentile(times, q)), 3) for q in (99, 50))
                rows.append({"what": f"read while feeding, {name}", "calls": calls, "p50_ms": p50[name], "p99_ms": p99[name]})
                ours_cpu, theirs_cpu = read_cpu(spec, OnlineStore(spec, place), peers[name], asked, now, 2 if told.quick else 10)
                ratio[name] = round(ours_cpu / theirs_cpu, 3)
                ours_ms, sdk_ms = round(ours_cpu * 1e3, 3), round(theirs_cpu * 1e3, 3)
                rows.append({"what": f"CPU of a read, {name}", "ours_ms": ours_ms, "sdk_ms": sdk_ms})
        ours_more, theirs_more, changed = incremental(spec, tables, folder, theirs, now, cells)
        rows += [{"what": "changes into SQLite", "cells": changed, "seconds": round(ours_more, 4)},
                 {"what": "Feast's incremental", "cells": changed, "seconds": round(theirs_more, 4)}]  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "materialize_speedup": round((fed / ours_s) / (cells / theirs_s), 1),
        "incremental_materialize_speedup": round(theirs_more / ours_more, 1), "changed_keys_share": round(changed / cells, 4),
        "read_p99_ms": p99, "read_p50_ms": p50,
        "read_cpu_ratio_vs_sdk": ratio, "equal_cells": equal, "cells": compared,
    }  # fmt: skip
    report("online", figures, rows, told.json)


def read_cpu(
    spec: Spec, lean: OnlineStore, theirs: FeatureStore, asked: list[dict[str, np.ndarray]], now: int, rounds: int
) -> tuple[float, float]:  # fmt: skip
    """CPU seconds of one read by the lean path and by Feast's SDK: medians of rounds of 30 reads in turn."""
    refs = [f"{s.name}:{c}" for s in stored_views(spec) for c in s.integers]
    ours, sdk = [], []
    for i in range(rounds):
        some = [asked[j % len(asked)] for j in range(i * 30, i * 30 + 30)]
        began = cpu_s()
        for row in some:
            one_read(lean, row, now)
        ours.append((cpu_s() - began) / len(some))
        began = cpu_s()
        for row in some:
            theirs.get_online_features(refs, [plain(spec, row)], full_feature_names=True)
        sdk.append((cpu_s() - began) / len(some))
    return statistics.median(ours), statistics.median(sdk)


def incremental(
    spec: Spec, tables: dict[str, pa.Table], folder: Path, theirs: FeatureStore, now: int, cells: int
) -> tuple[float, float, int]:  # fmt: skip
    """Seconds that both need when facts come that touch one key in a hundred, and how many keys that is: medians of rounds.

    Both begin with the facts, or Feast with the steps that they make, of the keys that changed; each writes its own store.
    """
    facts, place, arrivals = recent(spec, tables, now), folder / "moved", tables["arrivals"]

    def touched(new: pa.Table, t: int) -> list[Change]:
        return [change for change in changed_cells(spec, facts, {"arrivals": new}, t) if change[0] != ROWS]

    count = next(n for n in range(1, 1_000) if len(touched(arrivals.slice(arrivals.num_rows - n - 1), now)) > cells / 100)
    feed(spec, folder / "features", place, Anchor(now, 0), "0")
    reader = OnlineStore(spec, place)  # as an endpoint has it open; Feast's store keeps its own connection
    ours, sdk, counts = [], [], []
    for i in range(1, ROUNDS + 1):
        t = now + i * 1_000_000
        new = known_again(arrivals.slice(arrivals.num_rows - i * count, count), t)
        facts["arrivals"] = in_order(pa.concat_tables([facts["arrivals"], new]), spec.sources["arrivals"])[0]
        changes = touched(new, t)
        told = {"since": str(i - 1), "newest": {}, "fresh": lambda: ((), changed_cells(spec, facts, {"arrivals": new}, t))}  # noqa: B023
        began = time.monotonic()
        if not feed_changes(spec, place, Anchor(t, 0), str(i), **told):
            raise SystemExit("the store was not moved")
        ours.append(time.monotonic() - began)
        add_steps(spec, facts, folder, changes, t)
        began = time.monotonic()
        theirs.materialize_incremental(datetime.fromtimestamp(t / 1e6, UTC) + timedelta(seconds=0.5))
        sdk.append(time.monotonic() - began)
        counts.append(len(changes))
    if reader.meta()["snapshot"] != str(ROUNDS):
        raise SystemExit("the reader does not see the last change")
    return statistics.median(ours), statistics.median(sdk), int(statistics.median(counts))


def known_again(some: pa.Table, t: int) -> pa.Table:
    """A correction of each of some facts, known at t."""
    known = pa.array(np.full(some.num_rows, t)).cast(some[KNOWN].type)
    for name in ("known_at", KNOWN):
        some = some.set_column(some.schema.get_field_index(name), name, known)
    return some


def add_steps(spec: Spec, facts: dict[str, pa.Table], folder: Path, changes: list[Change], t: int) -> None:
    """Adds to the tables that Feast reads the steps at t of the keys that changed."""
    every = Facts(spec, facts)
    for stored, after in (made for name in spec.features.views for made in build_views(every, name, t)):
        path = folder / "steps" / f"{stored.name}.parquet"
        keys = pa.array(sorted(key for view, key, _ in changes if view == stored.name), pa.string())
        at_t = pc.equal(after[TIME].cast(pa.int64()), t)
        after = after.filter(pc.and_(pc.is_in(after[KEY].cast(pa.string()), value_set=keys), at_t))
        before = pq.read_table(path)
        both = [pa.table({c: table[c].cast(before[c].type) for c in before.column_names}) for table in (before, after)]
        pq.write_table(pa.concat_tables(both), path)


def entities(tables: dict[str, Any], spec: Spec, count: int) -> list[dict[str, np.ndarray]]:
    """The newest plans whose keys are whole, as frame columns of one row each."""
    table = tables[spec.rows.source]
    own = own_columns(spec, table.slice(table.num_rows - 20 * count))
    keys = sorted({c for s in stored_views(spec) for c in s.key})
    found = [{c: own[c][i : i + 1] for c in keys} for i in range(len(own[keys[0]])) if all(own[c][i] is not None for c in keys)]
    return found[:: max(1, len(found) // count)][:count]


def plain(spec: Spec, row: dict[str, np.ndarray]) -> dict[str, Any]:
    """Key columns of one row as Feast takes them."""
    return {c: int(v[0]) if spec.row_source.columns[c].type == "int64" else v[0] for c, v in row.items()}


def agreement(
    spec: Spec, lean: OnlineStore, theirs: FeatureStore, asked: list[dict[str, np.ndarray]], now: int
) -> tuple[int, int]:  # fmt: skip
    """Cells that are the same by the lean read and by Feast's, and of how many."""
    refs = [f"{s.name}:{c}" for s in stored_views(spec) for c in s.integers]
    answer = theirs.get_online_features(refs, [plain(spec, row) for row in asked], full_feature_names=True).to_dict()
    own = {c: np.concatenate([row[c] for row in asked]) for c in asked[0]}
    raw = lean.views_at(own, np.full(len(asked), now), own_keys(spec, own, (s.key for s in stored_views(spec)), len(asked)))
    equal = compared = 0
    for stored in stored_views(spec):
        for name in stored.integers:
            expected = [absent(name) if v is None else v for v in answer[f"{stored.name}__{name}"]]
            found = raw[stored.view][stored.name][name].tolist()
            equal, compared = equal + sum(a == b for a, b in zip(found, expected, strict=True)), compared + len(found)
    return equal, compared


if __name__ == "__main__":
    main()
