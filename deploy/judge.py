"""The quality verdict: challenger, champion, baseline and prior on the same rows of the test part."""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.rollout import Release, bento_spec, find_release
from features.facts import Columns
from features.frame import arrow_columns
from features.ingest import read_snapshot
from features.rows import PARTS, hash_parts
from features.store import build_features, historical_features
from features.trainset import TrainingSet, load_training_set
from models.evaluate import CHALLENGER, CHAMPION, METRICS, PRIOR, Evaluation, Interval, evaluate
from models.gate import SAME, Verdict, decide
from models.score import Model
from models.served import slack
from pipelines.clock import MISSING
from pipelines.errors import Refused
from pipelines.home import Home, process_env
from pipelines.manifest import Note, code_digest, read_json, write_json, write_page
from pipelines.run import Run, finished
from pipelines.spec import HashSplit, Spec

REPLAY = 500


@dataclass(frozen=True)
class Judgement:
    """Evaluation and verdict, with the rows that were judged and how many of them earlier gates had seen."""

    evaluation: Evaluation
    verdict: Verdict
    rows: int
    seen_before: int


def judge(
    spec: Spec, home: Home, run: Run, data: TrainingSet, rows: pa.Table, model: Path, champion: Release | None, out: Path
) -> Judgement:  # fmt: skip
    """Judges on test rows that neither model has seen; writes `evaluation.json`, `test.parquet`, `replay.parquet`.

    `rows` holds the row columns of the training set, aligned with it. Raises Refused when too few rows are new to
    both models, or the champion cannot be reproduced.
    """
    test = data.rows("test")
    if champion is not None:
        test = test[unseen(home, champion, data, test)]
        if len(test) < spec.gate.min_rows:
            raise Refused(
                f"{len(test)} test rows are new to both models, gate.min_rows is {spec.gate.min_rows}: land more data, "
                "or make split.test longer"
            )
    batch = data.batch.take(test)
    challenger = Model.load(model)
    probabilities = {CHALLENGER: challenger.predict(batch)}
    probabilities |= {n: p for n, p in challenger.members_predict(batch).items() if n != challenger.chosen}
    if champion is not None:
        asked = rows.take(pa.array(test)).combine_chunks()
        probabilities[CHAMPION] = champion_scores(home, run, champion, asked, data.t[test])
    prior = float(data.label[data.rows("train")].mean())
    probabilities[PRIOR] = np.full(len(test), prior)
    slices = {name: values[test] for name, values in data.slices.items()}
    evaluation = evaluate(data.label[test], probabilities, slices, spec.gate, spec.seed)
    equal = champion is not None and bool(
        (np.abs(probabilities[CHALLENGER] - probabilities[CHAMPION]) <= slack(home.root / champion.bento / "src/bundle")).all()
    )
    verdict = decide(evaluation, spec.gate, has_champion=champion is not None, equal=equal)
    seen = _seen_before(home, run, data.t[test])
    columns = {"t": data.t[test], "key": data.key[test].astype(str), "label": data.label[test], **probabilities}
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), out / "test.parquet")
    _write_replay(data, rows, challenger, out / "replay.parquet")
    write_json(out / "evaluation.json", evaluation.to_dict())
    return Judgement(evaluation, verdict, len(test), seen)


def unseen(home: Home, champion: Release, data: TrainingSet, test: np.ndarray) -> np.ndarray:
    """Which of the test rows neither trained nor validated the champion (bool)."""
    spec = bento_spec(home, champion)
    if isinstance(spec.split, HashSplit):
        return hash_parts(spec.split, spec.seed, pa.array(data.key[test].astype(str))) == PARTS.index("test")
    return data.t[test] > champion.test_until_us


def champion_scores(home: Home, run: Run, champion: Release, rows: pa.Table, t: np.ndarray) -> np.ndarray:
    """The champion's answers through its own bento, on features made from its own spec by today's code."""
    spec = bento_spec(home, champion)
    bundle = home.root / champion.bento / "src/bundle"
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    times = [t]
    if changed := read_json(bundle / "bundle.json")["code"] != code_digest("features"):
        replay = pq.read_table(bundle / "replay.parquet")
        times.append(replay["_t"].to_numpy())
    since = int(min(x.min() for x in times if len(x))) if spec.timed else MISSING
    features = build_features(spec, home, snapshot, since=since)
    if changed:
        stored, replayed = replay["_score"].to_numpy(), replay.drop_columns(["_t", "_score"])
        again = answer(home, champion, historical_features(spec, home, features, replayed, times[1]))
        gap = float(np.abs(again - stored).max(initial=0.0))
        if gap > max(1e-9, slack(bundle)):
            raise Refused(
                f"champion not reproducible: {champion.release} answers its own test rows differently (by up to "
                f"{gap:g}) on features made by today's code; type `millrace rollback {run.pipeline}` or check out "
                "the code that trained it"
            )
    return answer(home, champion, historical_features(spec, home, features, rows, t))


def answer(home: Home, release: Release, frame: Columns) -> np.ndarray:
    """Answers of a release's bento to a frame, in a process of the bento's own code (N)."""
    src = home.root / release.bento / "src"
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "frame.parquet", Path(folder) / "scores.parquet"
        pq.write_table(pa.table(arrow_columns(frame)), asked)
        env = {**os.environ, **process_env(home), "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "deploy.answer", str(asked), str(answered)]
        done = subprocess.run(command, cwd=src, env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise Refused(f"champion not reproducible: {release.release} does not answer: {last[:300]}")
        return pq.read_table(answered)["score"].to_numpy()


def _write_replay(data: TrainingSet, rows: pa.Table, model: Model, path: Path) -> None:
    """The last test rows with their answers, by which a later run proves that this model is reproducible."""
    last = data.rows("test")[-REPLAY:]
    table = rows.take(pa.array(last)).combine_chunks()
    table = table.append_column("_t", pa.array(data.t[last]))
    table = table.append_column("_score", pa.array(model.predict(data.batch.take(last))))
    pq.write_table(table, path)


def _seen_before(home: Home, run: Run, t: np.ndarray) -> int:
    """How many rows lie in the test part of an earlier run of the pipeline."""
    ends = [m["test_window_us"] for m in finished(home, run.pipeline) if m.get("test_window_us")]
    return int(np.any([(t > begin) & (t <= end) for begin, end in ends], axis=0).sum()) if ends else 0


def judge_into(spec: Spec, home: Home, run: Run, data_folder: Path, model: Path, out: Path) -> Note:
    """The stage: judges, writes everything into `out`, and says the verdict."""
    data = load_training_set(data_folder)
    rows = pq.read_table(data_folder / "rows.parquet")
    champion = find_release(home, run.pipeline, run.parent) if run.parent else None
    judged = judge(spec, home, run, data, rows, model, champion, out)
    verdict, evaluation = judged.verdict, judged.evaluation
    write_json(out / "verdict.json", {
        "promoted": verdict.promoted, "reasons": list(verdict.reasons),
        "rules": [asdict(rule) for rule in verdict.rules], "rows": judged.rows, "seen_before": judged.seen_before,
    })  # fmt: skip
    names = [m for m in METRICS if m in evaluation.metrics[CHALLENGER]]
    table = [("model", *names)] + [
        (model, *(_shown(values[m]) for m in names)) for model, values in evaluation.metrics.items()
    ]
    write_page(out / "page.md", f"{spec.pipeline}: {'promoted' if verdict.promoted else 'refused'}", [
        ("Verdict", [(r.name, r.reason) for r in verdict.rules]), (f"{judged.rows:,} test rows", table),
    ])  # fmt: skip
    ours = evaluation.metrics[CHALLENGER]
    same = any(rule.name == SAME for rule in verdict.rules)
    word = ("the same model" if same else "better") if verdict.promoted else "refused"
    return Note(
        f"{word}: AUC {_shown(ours['auc'])}, log loss {_shown(ours['log_loss'])} on {judged.rows:,} test rows; "
        f"{verdict.reasons[0] if not verdict.promoted else 'against the ' + evaluation.bar}",
        ok=verdict.promoted,
    )


def _shown(found: Interval) -> str:
    return "–" if found.value is None else f"{found.value:.4f}"
