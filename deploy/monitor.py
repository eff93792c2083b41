"""What became of the answers: quality on the labels that arrived since, drift of features and scores, and skew."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.rollout import Release, bento_spec, champion, take_in
from deploy.skew import Skew, check_skew
from features.frame import as_array, is_missing
from features.ingest import read_table
from features.keys import text_key
from features.rows import PARTS, labels
from models.evaluate import CHALLENGER, metric_values
from pipelines.clock import parse_time, wall_us
from pipelines.errors import Busy, MillraceError
from pipelines.home import Home
from pipelines.manifest import read_json, write_json, write_page
from pipelines.predlog import FEATURE, newest_hour, read_log, tidy
from pipelines.run import run_lock
from pipelines.spec import Spec

BINS = 10


@dataclass(frozen=True)
class Monitored:
    """What was found: answers of the champion, those with a label by now, quality, drift, skew, and what alarms.

    `skew` is None where nothing could be compared; `not_compared` says why.
    """

    pipeline: str
    release: str
    answers: int
    labelled: int
    quality: dict[str, float]
    promised: dict[str, float]
    drift: dict[str, float]
    skew: Skew | None
    not_compared: str
    alarms: tuple[str, ...]
    line: str


def monitor(home: Home, pipeline: str) -> Monitored:
    """Joins the champion's logged answers with labels known by now; writes `events/PIPELINE/monitor.json` and a page.

    Raises MillraceError without a champion.
    """
    release = champion(home, pipeline)
    if release is None:
        raise MillraceError(f"{pipeline} has no champion: type `millrace run {pipeline}`")
    spec = bento_spec(home, release)
    _tidy(home, spec)
    log = answers(home, pipeline, release.release)
    manifest = read_json(home.runs(pipeline) / release.run_id / "manifest.json")
    promised = {m: v["value"] for m, v in manifest["metrics"][CHALLENGER].items()}
    label, scores = outcomes(spec, home, log)
    known = label >= 0
    quality = metric_values(label[known].astype(np.float64), scores[known]) if known.any() else {}
    quality = {m: round(v, 6) for m, v in quality.items() if np.isfinite(v)}
    drift = _drift(spec, home.root / manifest["stage_paths"]["training_set"], log) if log.num_rows else {}
    drift |= _score_drift(home.root / manifest["stage_paths"]["evaluate"], log) if log.num_rows else {}
    skew, why = _skew(home, pipeline, release) if log.num_rows else (None, "nothing was answered yet")
    alarms = tuple(_alarms(spec, int(known.sum()), log.num_rows, quality, promised, drift, skew))
    line = f"{log.num_rows:,} answers, {int(known.sum()):,} with a label by now; {alarms[0] if alarms else 'no alarm'}"
    found = Monitored(
        pipeline, release.release, log.num_rows, int(known.sum()), quality, promised, drift, skew, why, alarms, line
    )
    folder = home.root / "events" / pipeline
    write_json(folder / "monitor.json", asdict(found))
    most = sorted(drift.items(), key=lambda item: -item[1])[:15]
    write_page(folder / "monitor.md", f"{pipeline}: monitor", [
        ("Alarms", [(str(i + 1), alarm) for i, alarm in enumerate(alarms)] or [("none", "")]),
        ("Quality", [("metric", "on test", "since then")] + [
            (m, f"{v:.4f}", f"{quality[m]:.4f}" if m in quality else "–") for m, v in promised.items() if v is not None
        ]),
        ("Drift (PSI)", [(name, f"{value:.3f}") for name, value in most]),
        ("Skew", [("last day", skew.line), *((n, f"{c:,}") for n, c in skew.by_feature.items())] if skew else [(why, "")]),
    ])  # fmt: skip
    return found


def _tidy(home: Home, spec: Spec) -> None:
    """Makes one part of each hour of the log that is over, and removes what is too old; not while a run or an erasure goes on."""
    root = home.predictions(spec.pipeline)
    now = newest_hour(root) or 0 if spec.clock and spec.clock.kind == "data" else wall_us()
    with suppress(Busy), run_lock(home, spec.pipeline):
        tidy(root, now, spec.serve.log_keep)


def answers(home: Home, pipeline: str, release: str) -> pa.Table:
    """Logged answers of the release to named rows, inside their horizon."""
    log = read_log(home.predictions(pipeline))
    keep = pc.and_(pc.equal(log["release"], release), pc.equal(log["route"], "predict"))
    keep = pc.and_(keep, pc.invert(pc.or_(log["outside_horizon"], log["unknown_entity"])))
    return log.filter(keep).combine_chunks()


def _skew(home: Home, pipeline: str, release: Release) -> tuple[Skew | None, str]:
    """What the skew check found, or why nothing can be compared: that is no reason not to look at the rest."""
    try:
        return check_skew(home, pipeline, release=release.release), ""
    except MillraceError as error:
        return None, str(error)


def outcomes(spec: Spec, home: Home, log: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Label (1, 0, −1 where not known yet) and score of each answer."""
    if not log.num_rows:
        return np.zeros(0, np.int8), np.zeros(0)
    types = {n: c.type for n, c in spec.row_source.columns.items()}
    keys = []
    for text in log["key"].to_pylist():
        body = json.loads(text)
        keys.append(text_key([parse_time(body[n]) if types.get(n) == "timestamp" else body[n] for n in spec.row_key]))
    snapshot = take_in(spec, home)
    tables = {spec.label.source: read_table(spec, home, snapshot, spec.label.source)}
    distinct = pa.array(sorted({key for key in keys if key is not None}), pa.string())
    found, _ = labels(spec, tables, distinct, snapshot.watermark_us)
    place = {key: i for i, key in enumerate(distinct.to_pylist())}
    return found[[place[str(key)] for key in keys]], log["score"].to_numpy()


def _drift(spec: Spec, training_set: Path, log: pa.Table) -> dict[str, float]:
    """Population stability index of every feature: logged answers against the test part of the training set."""
    reference = pq.read_table(training_set / "frame.parquet")
    reference = reference.filter(pc.equal(reference["_part"], PARTS.index("test")))
    names = [n for n in reference.column_names if FEATURE + n in log.column_names and spec.serve.shown(n)]
    found = {}
    for name in names:
        kind = "string" if pa.types.is_string(reference[name].type) else "float64"
        found[name] = round(psi(as_array(reference[name], kind), as_array(log[FEATURE + name], kind)), 4)
    return found


def _score_drift(evaluated: Path, log: pa.Table) -> dict[str, float]:
    reference = pq.read_table(evaluated / "test.parquet")[CHALLENGER].to_numpy()
    return {"score": round(psi(reference, log["score"].to_numpy()), 4)}


def psi(expected: np.ndarray, found: np.ndarray) -> float:
    """Population stability index over deciles of `expected` (or its categories), missing being a bin of its own.

    Shares are smoothed by half a row, so that small samples do not alarm by empty bins alone.
    """
    if expected.dtype == object:
        words = {w: i for i, w in enumerate(sorted({v for v in expected if v is not None}))}
        places = [np.array([words.get(v, len(words)) for v in values]) for values in (expected, found)]
        bins = len(words) + 1
    else:
        edges = np.unique(np.quantile(expected[~np.isnan(expected)], np.linspace(0, 1, BINS + 1)[1:-1])) if (
            ~np.isnan(expected)).any() else np.zeros(0)  # fmt: skip
        places = [np.where(is_missing(v), len(edges) + 1, np.searchsorted(edges, v)) for v in (expected, found)]
        bins = len(edges) + 2
    shares = [(np.bincount(p, minlength=bins) + 0.5) / (len(p) + 0.5 * bins) for p in places]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())


def _alarms(
    spec: Spec, labelled: int, answers: int, quality: dict[str, float], promised: dict[str, Any], drift: dict[str, float],
    skew: Skew | None,
) -> list[str]:  # fmt: skip
    rules, found = spec.monitor, []
    if labelled >= rules.min_rows and quality.get("log_loss", 0.0) > promised["log_loss"] + rules.max_log_loss_rise:
        found.append(
            f"quality: log loss {quality['log_loss']:.4f} on {labelled:,} answers, {promised['log_loss']:.4f} on test"
        )
    if answers >= rules.min_rows and drift.get("score", 0.0) > rules.max_psi:
        found.append(f"drift: PSI of the score is {drift['score']:.3f}, {rules.max_psi:g} is accepted")
    if skew and skew.skewed_cells:
        name, count = next(iter(skew.by_feature.items()))
        found.append(
            f"skew: {skew.skewed_cells:,} of {skew.cells:,} served cells are not what training computes, "
            f"most in {name!r} ({count:,})"
        )
    return found

