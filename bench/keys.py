"""`python -m bench.keys`: ten million distinct keys, from landed Parquet to the served store, and the memory that each step took.

One source has a fact of every key; a view takes its newest value, another a window of it. Every step runs in a process of its
own. Figures: `keys`, `peak_mb` by step (resident memory above what it was with everything imported), `seconds` by step,
`peak_bytes_per_key` (of the hungriest step), `store_mb`, `read_ms` (median of single look-ups in the store).
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.pit_peers import memory_mb
from bench.record import options, report
from features.feed import feed
from features.ingest import Snapshot, ingest
from features.online import OnlineStore, serve_features
from features.store import FeatureSet, build_features
from pipelines.clock import DAY_US, Anchor, parse_time
from pipelines.home import Home, open_home
from pipelines.manifest import ROOT, read_json, write_json
from pipelines.spec import Spec, load_spec

NOW = parse_time("2024-05-06")
SPEC = """
title: Will this customer call within a day?
sources:
  asks:
    kind: plan
    key: [ask]
    event_time: due
    known_at: {column: told}
    columns: {ask: int64, customer: int64, due: timestamp, told: timestamp}
  answers:
    key: [ask]
    event_time: at
    known_at: {lag: 0s}
    columns: {ask: int64, at: timestamp, calls: int64}
  visits:
    key: [visit]
    event_time: at
    known_at: {lag: 1m}
    columns: {visit: int64, customer: int64, at: timestamp, spent: {type: float64, resolution: 0.01}}
rows: {from: asks, key: [ask]}
predict_at: {column: due, lead: 1h, tolerance: 1h}
label: {from: answers, column: calls, gt: 0}
label_delay: 1d
split: {train: 20d, valid_fit: 2d, valid_select: 2d, test: 2d, purge: 1d}
features:
  views:
    spending: {window: {from: visits, key: [customer], last: [7d], count: true, mean: [spent]}}
    last_visit: {latest: {from: visits, key: [customer], columns: [spent]}}
"""
STEPS = ("ingest", "features", "feed", "read")


def stamps(values: np.ndarray) -> pa.Array:
    return pa.array(values).cast(pa.timestamp("us", "UTC"))


def land(folder: Path, keys: int) -> None:
    """A visit of every customer in the last thirty days, in files of a million; a thousand asks of the next day."""
    (folder / "keys.yaml").write_text(SPEC)
    landing = open_home(folder / "home").landing("keys")
    for name in ("asks", "answers", "visits"):
        (landing / name).mkdir(parents=True)
    draw = np.random.default_rng(4)
    customers = draw.permutation(keys)
    for i in range(0, keys, 1_000_000):
        some = customers[i : i + 1_000_000]
        at, spent = stamps(NOW - draw.integers(0, 30 * DAY_US, len(some))), draw.integers(0, 2_000, len(some)) / 100
        table = pa.table({"visit": i + np.arange(len(some)), "customer": some, "at": at, "spent": spent})
        pq.write_table(table, landing / "visits" / f"{i:09}.parquet")
    due = NOW + draw.integers(0, DAY_US, 1_000)
    asks = {"ask": np.arange(1_000), "customer": customers[:1_000], "due": stamps(due), "told": stamps(due - DAY_US)}
    pq.write_table(pa.table(asks), landing / "asks" / "all.parquet")
    answers = {"ask": np.arange(-2, 0), "at": stamps(np.full(2, NOW - DAY_US)), "calls": np.arange(2)}
    pq.write_table(pa.table(answers), landing / "answers" / "all.parquet")


def step(name: str, folder: Path) -> dict[str, float]:
    """Does one step on what those before left; whatever else it found."""
    spec, home, state = load_spec(str(folder / "keys.yaml")), Home(folder / "home"), folder / "state"
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "ingest": lambda: _left(state / "snapshot.json", ingest(spec, home)),
        "features": lambda: _left(state / "features.json", build_features(spec, home, _snapshot(state), since=NOW)),
        "feed": lambda: _fed(spec, home, FeatureSet(**_told(state / "features.json"))),
        "read": lambda: _read(spec, home),
    }
    return steps[name]()


def _left(path: Path, made: Snapshot | FeatureSet) -> dict[str, float]:
    write_json(path, vars(made))
    return {}


def _told(path: Path) -> dict[str, Any]:
    return {k: v for k, v in read_json(path).items() if k != "format_version"}


def _snapshot(state: Path) -> Snapshot:
    return Snapshot(**_told(state / "snapshot.json"))


def _fed(spec: Spec, home: Home, features: FeatureSet) -> dict[str, float]:
    store = home.online(spec.pipeline, features.defs_digest)
    feed(spec, home.root / features.path, store, Anchor(NOW, NOW), features.snapshot)
    return {"store_mb": round(sum(p.stat().st_size for p in [store, *store.rglob("*")] if p.is_file()) / 1e6)}


def _read(spec: Spec, home: Home) -> dict[str, float]:
    (place,) = (home.root / "online" / spec.pipeline).iterdir()
    store, times, known = OnlineStore(spec, place), [], 0
    for ask in range(300):
        began = time.perf_counter()
        served = serve_features(store, [{"ask": ask}], NOW)
        times.append(time.perf_counter() - began)
        known += int(not np.isnan(served.frame["last_visit__spent"][0]))
    assert known > 290, known
    return {"read_ms": round(1e3 * statistics.median(times), 3)}


def main() -> None:
    """Lands the data, runs every step in a process of its own and reports."""
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        before = memory_mb("VmRSS")
        began = time.perf_counter()
        more = step(sys.argv[1], Path(sys.argv[2]))
        took = {"seconds": round(time.perf_counter() - began, 1), "peak_mb": round(memory_mb("VmHWM") - before)}
        print(json.dumps({**took, **more}))
        return
    told = options("keys")
    keys, folder = 100_000 if told.quick else 10_000_000, Path(tempfile.mkdtemp(prefix="millrace-keys-"))
    rows: list[dict[str, Any]] = []
    try:
        land(folder, keys)
        for name in STEPS:
            command = [sys.executable, "-m", "bench.keys", name, str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            rows.append({"step": name, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {"keys": keys, **{f: {row["step"]: row[f] for row in rows} for f in ("peak_mb", "seconds")}}
    figures |= {k: v for row in rows for k, v in row.items() if k in ("store_mb", "read_ms")}
    figures["peak_bytes_per_key"] = round(max(row["peak_mb"] for row in rows) * 1e6 / keys)
    report("keys", figures, rows, told.json, "numpy", "pyarrow")


if __name__ == "__main__":
    main()
