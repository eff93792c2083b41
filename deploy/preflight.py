"""Preflight: the packaged artefact is started and must answer as we compute offline. The second verdict.

Two processes: this one recomputes through Feast; the bento's serves, with its import guard, from a private copy of
the served store.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.bundle import Bento, load_bento
from deploy.process import Service, call, free_port, start, stop
from features.facts import Columns, int_times
from features.feed import feed
from features.frame import as_array
from features.ingest import Snapshot, read_snapshot
from features.skew import different
from features.store import FeatureSet, historical_features
from features.trainset import TrainingSet, load_training_set
from models.score import Model
from pipelines.clock import Anchor, iso
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import Note, read_json, write_json, write_page
from pipelines.run import Run
from pipelines.spec import Spec

ROWS = 500
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Preflight:
    """What was compared, and whether the artefact may serve. Latencies in ms; not part of any digest."""

    passed: bool
    reasons: tuple[str, ...]
    feature_rows: int
    entity_rows: int
    cells: int
    worst_score_gap: float
    latency_ms: dict[str, float]
    size_mb: float
    ready_s: float
    example: dict[str, Any]


def preflight(
    spec: Spec, home: Home, bento: Bento, data: TrainingSet, features: FeatureSet, snapshot: Snapshot, scratch: Path
) -> Preflight:  # fmt: skip
    """Starts the bento on a private store and compares. Never raises for a bad artefact: it says what is wrong."""
    folder = home.root / bento.path
    store = scratch / "online"
    anchor = Anchor(snapshot.watermark_us, 0)
    feed(spec, home.root / features.path, store, anchor, snapshot.digest)
    extra = {"MILLRACE_PREFLIGHT": "1", "MILLRACE_ONLINE": str(store), "MILLRACE_PREDICTIONS": str(scratch / "log")}
    began = time.monotonic()
    try:
        service = start(home, folder, port=free_port(), release=bento.tag, log=scratch / "service.log", extra=extra)
    except MillraceError as error:
        return Preflight(False, (str(error),), 0, 0, 0, -1.0, {}, bento.size_mb, 0.0, {})
    ready = time.monotonic() - began
    try:
        return _compare(spec, home, bento, data, features, service, ready)
    finally:
        stop(service)


def _compare(
    spec: Spec, home: Home, bento: Bento, data: TrainingSet, features: FeatureSet, service: Service, ready: float
) -> Preflight:  # fmt: skip
    model = Model.load(home.root / bento.path / "src/bundle")
    reasons: list[str] = []
    test = data.rows("test")[:ROWS]
    gap_a = _by_features(data, test, model, service, reasons)
    requests, rows = entities(spec, home, features)
    cells, gap_b = _by_keys(spec, home, features, data, model, service, requests, rows, reasons)
    budget = spec.serve.latency_budget / 1_000
    latency = _latency(service, requests, budget)
    if latency and latency["p95"] > budget:
        reasons.append(f"latency: p95 of one request is {latency['p95']:.1f} ms, the budget is {budget:g} ms")
    if bento.size_mb > spec.serve.size_budget_mb:
        reasons.append(f"size: the bento has {bento.size_mb:g} MB, the budget is {spec.serve.size_budget_mb:g} MB")
    status, proof = call(f"{service.url}/preflight/modules")
    if status != 200 or proof["refused"] or proof["outside"]:
        reasons.append(f"imports: the serving process holds {proof}")
    return Preflight(not reasons, tuple(reasons), len(test), len(requests), cells, max(gap_a, gap_b), latency,
                     bento.size_mb, round(ready, 3), requests[0] if requests else {})  # fmt: skip


def _by_features(data: TrainingSet, test: np.ndarray, model: Model, service: Service, reasons: list[str]) -> float:
    """Test rows by `/predict_features` against the offline answers: the largest difference."""
    expected = model.predict(data.batch.take(test))
    rows = [{n: _plain(v[i]) for n, v in data.frame.items()} for i in test.tolist()]
    status, answer = call(f"{service.url}/predict_features", {"rows": rows})
    if status != 200:
        reasons.append(f"/predict_features answered {status}: {str(answer.get('error'))[:300]}")
        return float("inf")
    found = np.array([row["probability"] for row in answer["rows"]])
    gap = float(np.abs(found - expected).max(initial=0.0))
    if not gap <= TOLERANCE:
        reasons.append(f"/predict_features differs by {gap:g} from the offline answers, {TOLERANCE:g} is allowed")
    return gap


def entities(spec: Spec, home: Home, features: FeatureSet) -> tuple[list[dict[str, Any]], pa.Table]:
    """Requests for rows that are known and not closed at the watermark, nearest in time first, and those rows."""
    table = pq.read_table(home.root / features.path / "online_rows.parquet")
    if spec.predict_at is not None:
        now = int(read_json(home.root / features.path / "done.json")["watermark_us"])
        live = pc.and_(pc.less_equal(table["_live_from"], now), pc.greater(table["_live_to"], now))
        table = table.filter(pc.and_(live, pc.greater(table["_closed_at"], now)))
        asked = int_times(table[spec.predict_at.column]) - spec.predict_at.lead
        table = table.take(pa.array(np.argsort(np.abs(asked - now), kind="stable")))
    table = table.slice(0, ROWS).combine_chunks()
    columns = spec.row_source.columns
    names = [*spec.row_key]
    shown = {
        n: [iso(v) for v in int_times(table[n]).tolist()]
        if n in columns and columns[n].type == "timestamp"
        else table[n].to_pylist()
        for n in (["_key"] if spec.row_key == ("row_digest",) else names)
    }
    if spec.row_key == ("row_digest",):
        shown = {"row_digest": shown["_key"]}
    return [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)], table


def _by_keys(
    spec: Spec, home: Home, features: FeatureSet, data: TrainingSet, model: Model, service: Service,
    requests: list[dict[str, Any]], rows: pa.Table, reasons: list[str],
) -> tuple[int, float]:  # fmt: skip
    """Entity requests at one instant against Feast's join at that instant: cells compared, largest score gap."""
    if not requests:
        return 0, 0.0
    status, answer = call(f"{service.url}/preflight/features", {"rows": requests})
    if status != 200:
        reasons.append(f"/predict answered {status}: {str(answer.get('error'))[:300]}")
        return 0, float("inf")
    t = np.full(rows.num_rows, answer["now_us"] if spec.timed else 0)
    offline = historical_features(spec, home, features, rows, t)
    wrong = different_cells(offline, answer["features"])
    if wrong:
        name, count = max(wrong.items(), key=lambda item: item[1])
        total = sum(wrong.values())
        reasons.append(f"skew: {total} cells in {len(wrong)} features differ from training, most in {name!r} ({count})")
    expected = model.predict(data.preprocess.transform(offline))
    gap = float(np.abs(np.array(answer["scores"]) - expected).max(initial=0.0))
    if not gap <= TOLERANCE:
        reasons.append(f"/predict differs by {gap:g} from the offline answers, {TOLERANCE:g} is allowed")
    return sum(len(v) for v in offline.values()), gap


def different_cells(offline: Columns, served: Mapping[str, list[Any]]) -> dict[str, int]:
    """Features whose served values are not exactly those computed offline, and in how many rows (missing = missing)."""
    found = {}
    for name, expected in offline.items():
        text = expected.dtype == object
        column = pa.array(served.get(name, []), pa.string() if text else pa.float64())
        values = as_array(column, "string" if text else "float64")
        if len(values) != len(expected):
            found[name] = len(expected)
            continue
        wrong = different({name: values}, {name: expected})[name]
        if wrong.any():
            found[name] = int(wrong.sum())
    return found


def _latency(service: Service, requests: list[dict[str, Any]], budget: float, calls: int = 60) -> dict[str, float]:
    """Milliseconds of single requests, each for another row. A round that is above the budget is asked twice more, since
    other work on the machine may have slowed it down: the fastest counts."""
    rounds: list[dict[str, float]] = []
    while requests and len(rounds) < 3 and all(found["p95"] > budget for found in rounds):
        times = []
        for i in range(calls + 5):
            began = time.perf_counter()
            call(f"{service.url}/predict", {"rows": [requests[i % len(requests)]]})
            times.append((time.perf_counter() - began) * 1e3)
        ordered = np.sort(times[5:])  # the first few warm the process up
        rounds.append({p: round(float(np.percentile(ordered, int(p[1:]))), 3) for p in ("p50", "p95", "p99")})
    return min(rounds, key=lambda found: found["p95"], default={})


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and value != value else value



def preflight_into(
    spec: Spec, home: Home, run: Run, bento_folder: Path, data_folder: Path, features: FeatureSet, out: Path
) -> Note:  # fmt: skip
    """The stage: compares, writes `preflight.json` (measured times apart) and says the verdict."""
    bento, data = load_bento(bento_folder), load_training_set(data_folder)
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    with tempfile.TemporaryDirectory(dir=home.root) as scratch:
        found = preflight(spec, home, bento, data, features, snapshot, Path(scratch))
    body = asdict(found)
    measured = {name: body.pop(name) for name in ("latency_ms", "ready_s")}
    write_json(out / "volatile" / "measured.json", measured)
    write_json(out / "preflight.json", body)
    compared = f"{found.feature_rows} feature rows, {found.entity_rows} entity requests, {found.cells:,} cells"
    rows = [("compared", compared), ("largest score gap", f"{found.worst_score_gap:g}"), ("MB", f"{found.size_mb:g}")]
    rows += [(f"latency {p}", f"{ms:.1f} ms") for p, ms in found.latency_ms.items()]
    rows += [("refused", reason) for reason in found.reasons]
    write_page(out / "volatile" / "page.md", f"{spec.pipeline}: preflight", [("Preflight", rows)])
    return Note(f"{compared} equal" if found.passed else f"refused: {found.reasons[0]}", ok=found.passed)
