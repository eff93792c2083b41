"""The record of a run: `manifest.json`, written last, and the pages made from it."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.rollout import Released
from deploy.tracking import Told
from features.ingest import inputs_of, read_snapshot
from features.rows import PARTS, split_bounds
from features.store import FeatureSet
from features.versions import Version
from models.evaluate import CHALLENGER
from pipelines.clock import iso
from pipelines.home import Home
from pipelines.lineage import dataset, emit
from pipelines.manifest import ROOT, Artifact, digest_of, file_digest, read_json, write_json
from pipelines.run import Run, accepted, ended_us, result_spec
from pipelines.spec import Spec


@dataclass(frozen=True)
class Outcome:
    """How a run ended: promoted, refused or unchanged; with the paths (home-relative) of its pages."""

    outcome: str
    pipeline: str
    run_id: str
    release: str
    reasons: tuple[str, ...]
    result_digest: str
    report: str
    line: str = ""
    tracking: tuple[str, ...] = ()  # for each tracker how to see the run there, or why it is not there


def write_record(
    spec: Spec, home: Home, run: Run, features: FeatureSet, stages: Mapping[str, Artifact | None], released: Released,
    version: Version,
) -> Outcome:  # fmt: skip
    """Writes the manifest of a finished run and its pages. Written again it says the same, but for times."""
    from deploy.report import write_report

    folder = run.folder(home)
    at = {name: home.root / artifact.path for name, artifact in stages.items() if artifact is not None}
    result = _result(spec, run, at)
    inputs = read_json(folder / "inputs.json")
    del inputs["format_version"]
    costs = stage_costs(folder)
    paths = {n: a.path for n, a in stages.items() if a is not None} | ({"autofe": run.chosen} if run.chosen else {})
    evaluation = read_json(at["evaluate"] / "evaluation.json")
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    manifest = {
        "pipeline": run.pipeline, "title": spec.title, "run_id": run.run_id, "as_of": iso(run.as_of_us),
        "clock": spec.clock.model_dump(mode="json") if spec.clock else None, "inputs": inputs,
        "git_commit": _commit(), "lock_digest": _lock_digest(), "feature_service": run.pipeline,
        "defs_digest": features.defs_digest, "counts": read_json(at["training_set"] / "counts.json")["counts"],
        "seed": spec.seed, "hyper_parameters": result["hyper_parameters"], "chosen": result["chosen"],
        "metrics": evaluation["metrics"], "gains": evaluation["gains"], "bar": evaluation["bar"],
        "verdict": _without_format(read_json(at["evaluate"] / "verdict.json")),
        "inference": _without_format(read_json(at["export"] / "volatile" / "measured.json")) if "export" in at else None,
        "preflight": _preflight(at), "bento": released.release if released.outcome != "refused" else "",
        "training": _without_format(read_json(at["train"] / "volatile" / "stats.json")),
        "outcome": released.outcome, "release": released.release, "reasons": list(released.reasons),
        "stages": costs, "stage_paths": paths, "data_version": asdict(version),
        "snapshot_rows": snapshot.rows, "set_aside": snapshot.set_aside, "exact": True,
        "test_window_us": list(split_bounds(spec, run.as_of_us)[3][:2]) if spec.timed else None,
        "result_digest": digest_of(result), "result": result, "finished_wall_us": ended_us(home, run.pipeline),
    }  # fmt: skip
    write_report(spec, home, run, manifest)
    write_json(folder / "manifest.json", manifest)
    _emit(home, run, manifest)
    return outcome_of(home, manifest)


def write_told(spec: Spec, home: Home, run: Run, told: Sequence[Told]) -> Outcome:
    """Notes in the record of a finished run how it went with the trackers; on its report, where one of them failed."""
    from deploy.report import write_report

    path = run.folder(home) / "manifest.json"
    manifest = {**_without_format(read_json(path)), "tracking": [asdict(one) for one in told]}
    if not all(one.ok for one in told):
        write_report(spec, home, run, manifest)
    write_json(path, manifest)
    return outcome_of(home, manifest)


def _emit(home: Home, run: Run, manifest: Mapping[str, Any]) -> None:
    """Lineage of a finished run: from the tables of its snapshot to its training set, and its release where there is one."""
    rows = sum(manifest["counts"][part] for part in PARTS)
    paths = manifest["stage_paths"]
    outputs = [dataset(f"{run.pipeline}.training_set", Path(paths["training_set"]).name, rows, output=True),
               dataset(f"{run.pipeline}.model", Path(paths["train"]).name, output=True)]  # fmt: skip
    if manifest["bento"]:
        outputs.append(dataset(f"{run.pipeline}.release", manifest["bento"], output=True))
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    emit(home, run.pipeline, run.run_id, "COMPLETE", inputs=inputs_of(snapshot), outputs=outputs)


def write_refusal(home: Home, run: Run, reason: str, report: str) -> None:
    """The final manifest of a run that a contract stopped, so that it is not taken up again."""
    inputs = read_json(run.folder(home) / "inputs.json")
    del inputs["format_version"]
    write_json(run.folder(home) / "manifest.json", {
        "pipeline": run.pipeline, "run_id": run.run_id, "inputs": inputs, "outcome": "refused", "release": run.parent,
        "reasons": [reason], "result_digest": "", "report": report, "stages": stage_costs(run.folder(home)),
        "finished_wall_us": ended_us(home, run.pipeline),
    })  # fmt: skip
    emit(home, run.pipeline, run.run_id, "FAIL", inputs=inputs_of(read_snapshot(home, run.pipeline, run.snapshot)), error=reason)


def outcome_of(home: Home, manifest: Mapping[str, Any], *, as_word: str = "") -> Outcome:
    """The outcome that a manifest records."""
    folder = home.runs(manifest["pipeline"]) / manifest["run_id"]
    report = manifest.get("report") or home.relative(folder / "report.html")
    word = as_word or manifest["outcome"]
    return Outcome(word, manifest["pipeline"], manifest["run_id"], manifest["release"], tuple(manifest["reasons"]),
                   manifest["result_digest"], report, f"{word}: run {manifest['run_id']}",
                   tuple(Told(**one).words for one in manifest.get("tracking", ())))  # fmt: skip


def last_outcome(home: Home, run: Run) -> Outcome:
    """The outcome of the last run of a pipeline that no contract stopped, as `unchanged`."""
    last = accepted(home, run.pipeline)
    assert last is not None
    return outcome_of(home, last, as_word="unchanged")


def _result(spec: Spec, run: Run, at: Mapping[str, Path]) -> dict[str, Any]:
    """What `result_digest` covers: no time, no host, no commit, no world size."""
    model = read_json(at["train"] / "model.json")
    weights = {}
    for name in sorted({m["file"] for m in model["members"]}):
        path = at["train"] / name
        if name.endswith(".txt"):
            weights[name] = digest_of(re.sub(r"\[num_threads: .*\]\n", "", path.read_text()))
    for path in sorted(at["train"].glob("*.safetensors")):
        weights[path.name] = file_digest(path)
    evaluation, verdict = (read_json(at["evaluate"] / f"{n}.json") for n in ("evaluation", "verdict"))
    return {
        "spec": result_spec(spec),
        "pins": {"snapshot": run.snapshot, "as_of_us": run.as_of_us, "parent": run.parent},
        "rows": read_json(at["training_set"] / "counts.json")["counts"],
        "hyper_parameters": _without_format(read_json(at["tune"] / "best.json")),
        "chosen": model["chosen"], "weights": weights,
        "predictions": file_digest(at["evaluate"] / "test.parquet"),
        "metrics": {k: v["value"] for k, v in evaluation["metrics"][CHALLENGER].items()},
        "verdict": verdict["promoted"],
    }  # fmt: skip


def stage_costs(folder: Path) -> list[dict[str, Any]]:
    """Seconds, CPU seconds and peak MB of each stage, from the try that took longest: a resumed one finds its output."""
    path = folder / "stages.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            body = json.loads(line)
        except ValueError:  # a line that a crash cut short
            continue
        if body["stage"] not in found or body["seconds"] > found[body["stage"]]["seconds"]:
            found[body["stage"]] = body
    return list(found.values())


def _preflight(at: Mapping[str, Path]) -> dict[str, Any] | None:
    if "preflight" not in at:
        return None
    measured = read_json(at["preflight"] / "volatile" / "measured.json")
    return _without_format({**read_json(at["preflight"] / "preflight.json"), **measured})


def _without_format(body: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k != "format_version"}


def _commit() -> str:
    """The commit of this checkout, `-dirty` where files differ from it; empty without git or outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git("status", "--porcelain") else commit


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _lock_digest() -> str:
    path = ROOT / "requirements.lock"
    return file_digest(path) if path.exists() else ""
