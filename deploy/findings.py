"""What a run left behind, read for its report and model card. A piece that it did not leave is empty."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.preflight import entities
from features.contract_page import ContractResult, from_json
from features.frame import Feature, feature_list
from features.preprocess import Preprocess
from features.store import FeatureSet, first_needed
from models.choose import KEPT, Verdict
from models.evaluate import CHALLENGER, CHAMPION, PRIOR, Evaluation, Interval, SliceQuality
from models.gbdt import importance
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import digest_of, read_json
from pipelines.run import Run
from pipelines.spec import Spec

# in the order of the pages
MODEL_TITLES = {
    CHALLENGER: "Challenger", CHAMPION: "Champion", "words": "Bag of words", "gbdt": "LightGBM, fixed defaults",
    "gbdt_tuned": "LightGBM, tuned",
    "network": "Network", "blend": "Network + LightGBM", "blend_tuned": "Network + tuned LightGBM",
    "blend_words": "Network + bag of words", PRIOR: "Prior only",
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trial of a search: its log loss on valid_fit, if it got there, and whether it is the best of its study."""

    study: str
    slot: int
    generation: int
    state: str
    loss: float | None
    params: Mapping[str, Any]
    best: bool = False


@dataclass(frozen=True)
class Learning:
    """Log loss on valid_fit by epoch or round (NaN: not finite), on train where it is known, and the step that was kept."""

    model: str
    steps: str
    losses: tuple[float, ...]
    train: tuple[float, ...]
    kept: int


@dataclass(frozen=True)
class Weight:
    """A feature's share of the gain of all splits, and the group that it comes from."""

    name: str
    group: str
    share: float


@dataclass(frozen=True)
class Group:
    """A group of features: how many, and their share of the gain of all splits."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class Findings:
    """A run, and what its stages left of interest to a reader. `weighed` names the model that `weights` are of."""

    spec: Spec
    run: Run
    manifest: Mapping[str, Any]
    evaluation: Evaluation
    verdict: Mapping[str, Any]
    contract: ContractResult | None
    shares: Mapping[str, float]
    features: tuple[Feature, ...]
    trials: tuple[Trial, ...]
    learning: tuple[Learning, ...]
    candidates: tuple[Mapping[str, Any], ...]
    weights: tuple[Weight, ...]
    weighed: str
    notes: tuple[str, ...]
    request: Mapping[str, Any] | None
    chosen: tuple[Verdict, ...] = ()

    @property
    def verdicts(self) -> list[tuple[str, list[Verdict]]]:
        """Features that were proposed, by what became of them: those that were kept first, then the largest group."""
        found: dict[str, list[Verdict]] = {}
        for verdict in self.chosen:
            found.setdefault(verdict.reason, []).append(verdict)
        return sorted(found.items(), key=lambda item: (item[0] != KEPT, -len(item[1]), item[0]))

    @property
    def generations(self) -> int:
        """Generations of all searches together."""
        return len({(t.study, t.generation) for t in self.trials})


# What the stages left


def gather(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> Findings:
    """Reads the outputs of the stages that the manifest names. MillraceError: the evaluation is gone."""
    at = {name: home.root / path for name, path in manifest["stage_paths"].items()}
    evaluation, verdict = (_read(at, "evaluate", name) for name in ("evaluation.json", "verdict.json"))
    if not evaluation or not verdict:
        raise MillraceError(f"run {run.run_id}: evaluation.json or verdict.json is gone; run `millrace run` again")
    contract = _read(at, "contract", "contract.json")
    features = feature_list(spec)
    weighed = "gbdt_tuned" if manifest["chosen"].endswith("tuned") else "gbdt"
    notes = home.landing(run.pipeline).parent / f"{run.pipeline}.notes.json"
    return Findings(
        spec, run, manifest, Evaluation.from_dict(evaluation), verdict,
        contract=from_json(contract) if contract else None,
        shares=_read(at, "training_set", "counts.json").get("positive_share", {}),
        features=features,
        trials=_trials(_read(at, "tune", "trials.json").get("trials", ())),
        learning=learning_of(_read(at, "train", "curves.json")),
        candidates=tuple(_read(at, "train", "choice.json").get("candidates", ())),
        weights=_weights(at["train"], weighed, features), weighed=weighed,
        notes=tuple(map(str, read_json(notes)["notes"])) if notes.is_file() else (),
        request=_request(spec, home, run, manifest),
        chosen=tuple(Verdict(**v) for v in _read(at, "autofe", "chosen.json").get("verdicts", ())),
    )  # fmt: skip


def _read(at: Mapping[str, Path], stage: str, name: str) -> dict[str, Any]:
    if stage not in at or not (at[stage] / name).is_file():
        return {}
    return {k: v for k, v in read_json(at[stage] / name).items() if k != "format_version"}


def _trials(items: Iterable[Mapping[str, Any]]) -> tuple[Trial, ...]:
    found = [Trial(t["study"], t["slot"], t["generation"], t["state"], t["value"], t["params"]) for t in items]
    best: dict[str, tuple[float, int]] = {}
    for trial in found:
        if trial.state == "complete" and trial.loss is not None:
            judged = trial.loss, trial.slot
            best[trial.study] = min(best.get(trial.study, judged), judged)
    return tuple(replace(t, best=best.get(t.study) == (t.loss, t.slot)) for t in found)


def learning_of(curves: Mapping[str, Iterable[Any]]) -> tuple[Learning, ...]:
    """Networks leave a record for each epoch, trees the log loss of each round."""
    found = []
    for model, points in curves.items():
        records = [p if isinstance(p, Mapping) else {"log_loss": p} for p in points]
        losses, train = (
            tuple(math.nan if r[k] is None else float(r[k]) for r in records if k in r) for k in ("log_loss", "train_loss")
        )
        known = [loss for loss in losses if math.isfinite(loss)]
        if known:
            steps = "round" if model.startswith("gbdt") else "epoch"
            found.append(Learning(model, steps, losses, train, losses.index(min(known)) + 1))
    return tuple(found)


def _weights(train: Path, member: str, features: Iterable[Feature]) -> tuple[Weight, ...]:
    """Gain by feature of these trees, most first."""
    path = train / f"{member}.txt"
    if not path.is_file():
        return ()
    fitted, groups = Preprocess.load(train / "preprocess.json"), {f.name: f.group for f in features}
    shares = importance(path.read_text(encoding="utf-8"))
    names = (*fitted.numbers, *fitted.categories)
    named = [*zip(names, shares[: len(names)].tolist(), strict=True)]
    if fitted.texts:
        named.append((" + ".join(fitted.texts), float(shares[len(names) :].sum())))  # one column for each token
    return tuple(sorted((Weight(n, groups.get(n, ""), share) for n, share in named), key=lambda w: (-w.share, w.name)))


def _request(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The key of a row that the endpoint can answer, nearest in time; None where no row is open."""
    flight = manifest["preflight"]
    if flight and flight.get("example"):
        return {name: flight["example"][name] for name in spec.row_key if name in flight["example"]}
    pins = digest_of([run.snapshot, first_needed(spec, run.as_of_us)])
    folder = home.features(run.pipeline, manifest["defs_digest"], pins)
    if not (folder / "online_rows.parquet").is_file():
        return None
    requests, _ = entities(spec, home, FeatureSet(home.relative(folder), "", manifest["defs_digest"], run.snapshot, 0, 0))
    return requests[0] if requests else None


# What follows from it


def models(evaluation: Evaluation) -> list[str]:
    """The models in the order of the pages: challenger first, prior last."""
    places = {name: i for i, name in enumerate(MODEL_TITLES)}
    return sorted(evaluation.metrics, key=lambda name: (places.get(name, len(places) - 1.5), name))


def slices(found: Findings) -> list[SliceQuality]:
    """Slices with the smallest gain first; those that are too small to judge, or undefined, last."""
    fewest = found.spec.gate.slice_min_rows
    return sorted(
        found.evaluation.slices, key=lambda s: (s.rows < fewest or s.gain.value is None, s.gain.value or 0.0, s.name, s.value)
    )


def tone(gain: Interval) -> str:
    """`ok` or `bad` where the whole interval is on one side of 0, else empty."""
    return "ok" if (gain.low or 0) > 0 else "bad" if (gain.high or 0) < 0 else ""


def groups(found: Findings) -> list[Group]:
    """The groups of features, strongest first."""
    listed = [
        Group(name, sum(f.group == name for f in found.features), sum(w.share for w in found.weights if w.group == name))
        for name in {f.group for f in found.features}
    ]
    return sorted(listed, key=lambda g: (-g.share, g.name))
