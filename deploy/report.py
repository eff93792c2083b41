"""The pages of a run: `report.html`, one file that needs nothing else, and `model_card.md` beside it.

Plots are drawn by matplotlib in stand-in colours that the page's style sheet replaces, so that one drawing fits a light
and a dark screen. Lengths in plots are CSS pixels. A piece that a run did not leave is left out.
"""

import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.preflight import entities
from features.contract_page import ContractResult, from_json, percent
from features.frame import Feature, feature_list
from features.preprocess import Preprocess
from features.rows import PARTS, split_bounds
from features.store import FeatureSet, first_needed
from models.evaluate import CHALLENGER, CHAMPION, HIGHER_IS_BETTER, METRICS, PRIOR, Evaluation, Interval, SliceQuality
from models.gbdt import importance
from pipelines.clock import duration_text
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import FORMAT_VERSION, digest_of, read_json, write_atomic
from pipelines.run import Run
from pipelines.spec import Spec

TEMPLATE = Path(__file__).with_name("report.html.j2")
TOP_FEATURES, SLICE_BARS, WEAKEST = 25, 20, 8
METRIC_TITLES = {
    "auc": "AUC", "log_loss": "Log loss", "brier": "Brier score", "ece": "Calibration error", "pr_auc": "PR-AUC",
}  # fmt: skip
_TITLES = {
    CHALLENGER: "Challenger", CHAMPION: "Champion", "gbdt": "LightGBM, fixed defaults", "gbdt_tuned": "LightGBM, tuned",
    "network": "Network", "blend": "Network + LightGBM", "blend_tuned": "Network + tuned LightGBM", PRIOR: "Prior only",
}  # fmt: skip
_USES = {
    "train": "the models learn from it", "valid_fit": "early stopping and tuning",
    "valid_select": "calibration, blend and choice", "test": "read by the gate only",
}  # fmt: skip

# style sheet variable → the colour that stands in for it in a drawing
_NAMES = ("ink", "soft", "line", "fill", "card", "bad", "odd", "ok", *(f"m-{name.replace('_', '-')}" for name in _TITLES))
_PAINT = {name: f"#0a0b{i + 1:02x}" for i, name in enumerate(_NAMES)}
_INK, _SOFT, _LINE, _FILL, _CARD, _BAD, _ODD = (_PAINT[n] for n in ("ink", "soft", "line", "fill", "card", "bad", "odd"))
_ACCENT = _PAINT["m-challenger"]
_DASHES: dict[str, Any] = {
    CHALLENGER: "-", CHAMPION: "-", "gbdt": (0, (5, 1.5)), "gbdt_tuned": (0, (7, 2, 1.5, 2)), "network": (0, (2.5, 1.2)),
    PRIOR: (0, (1, 1.5)),
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "figure.dpi": 72, "font.family": "DejaVu Sans", "font.size": 11,
    "text.color": _INK, "axes.edgecolor": _LINE, "axes.labelcolor": _SOFT, "axes.linewidth": 1, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": _LINE, "grid.linewidth": 0.7,
    "xtick.color": _SOFT, "ytick.color": _SOFT, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 5,
    "ytick.major.pad": 6, "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round", "path.simplify_threshold": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trial of the search, as it was drawn and judged on valid_fit."""

    study: str
    slot: int
    generation: int
    state: str
    loss: float | None
    params: Mapping[str, Any]
    best: bool


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
class Material:
    """What the stages of a run left behind, as the pages need it."""

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


def write_report(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> None:
    """Writes `report.html` and `model_card.md` into the run's folder; the same inputs give the same bytes."""
    found = gather(spec, home, run, manifest)
    folder = run.folder(home)
    write_atomic(folder / "report.html", render(spec, run, manifest, found))
    write_atomic(folder / "model_card.md", model_card(spec, run, manifest, found))


# What the stages left


def gather(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> Material:
    """Reads the outputs of the stages that the manifest names."""
    at = {name: home.root / path for name, path in manifest["stage_paths"].items()}
    evaluation = _read(at, "evaluate", "evaluation.json")
    verdict = _read(at, "evaluate", "verdict.json")
    if evaluation is None or verdict is None:
        raise MillraceError(f"run {run.run_id}: evaluation.json or verdict.json is gone; run `millrace run` again")
    contract = _read(at, "contract", "contract.json")
    features = feature_list(spec)
    weights, weighed = _weights(at, features, manifest["chosen"])
    return Material(
        evaluation=Evaluation.from_dict(evaluation),
        verdict=verdict,
        contract=from_json(contract) if contract else None,
        shares=(_read(at, "training_set", "counts.json") or {}).get("positive_share", {}),
        features=features,
        trials=_trials(at),
        learning=_learning(at),
        candidates=tuple((_read(at, "train", "choice.json") or {}).get("candidates", ())),
        weights=weights,
        weighed=weighed,
        notes=_notes(home, run.pipeline),
        request=_request(spec, home, run, manifest),
    )


def _read(at: Mapping[str, Path], stage: str, name: str) -> dict[str, Any] | None:
    if stage not in at or not (at[stage] / name).is_file():
        return None
    return {k: v for k, v in read_json(at[stage] / name).items() if k != "format_version"}


def _trials(at: Mapping[str, Path]) -> tuple[Trial, ...]:
    body = _read(at, "tune", "trials.json") or {}
    found = []
    for item in body.get("trials", ()):
        study, value = str(item.get("study", "network")), item.get("value")
        trial = Trial(study, int(item["slot"]), int(item["generation"]), str(item["state"]), value, item["params"], False)
        found.append(trial)
    best: dict[str, tuple[float, int]] = {}
    for trial in found:
        if trial.state == "complete" and trial.loss is not None:
            best[trial.study] = min(best.get(trial.study, (trial.loss, trial.slot)), (trial.loss, trial.slot))
    return tuple(
        Trial(t.study, t.slot, t.generation, t.state, t.loss, t.params, best.get(t.study) == (t.loss, t.slot)) for t in found
    )


def _learning(at: Mapping[str, Path]) -> tuple[Learning, ...]:
    found = []
    for model, points in (_read(at, "train", "curves.json") or {}).items():
        losses = _floats(p["log_loss"] if isinstance(p, Mapping) else p for p in points)
        train = _floats(p.get("train_loss") for p in points if isinstance(p, Mapping))
        known = [loss for loss in losses if math.isfinite(loss)]
        if known:
            steps = "round" if model.startswith("gbdt") else "epoch"
            found.append(Learning(model, steps, losses, train, losses.index(min(known)) + 1))
    return tuple(found)


def _floats(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _weights(at: Mapping[str, Path], features: tuple[Feature, ...], chosen: str) -> tuple[tuple[Weight, ...], str]:
    """Gain by feature of the tuned trees where they are chosen, else of the baseline; and whose gain it is."""
    member = "gbdt_tuned" if chosen.endswith("tuned") else "gbdt"
    path = at["train"] / f"{member}.txt"
    prepared = next((at[s] / "preprocess.json" for s in ("train", "training_set") if (at[s] / "preprocess.json").is_file()), None)
    if not path.is_file() or prepared is None:
        return (), ""
    fitted, groups = Preprocess.load(prepared), {f.name: f.group for f in features}
    names = (*fitted.numbers, *fitted.categories)
    shares = importance(path.read_text(encoding="utf-8")).tolist()
    weights = [Weight(name, groups.get(name, ""), share) for name, share in zip(names, shares, strict=True)]
    return tuple(sorted(weights, key=lambda w: (-w.share, w.name))), member


def _notes(home: Home, pipeline: str) -> tuple[str, ...]:
    path = home.landing(pipeline).parent / f"{pipeline}.notes.json"
    return tuple(map(str, read_json(path)["notes"])) if path.is_file() else ()


def _request(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The key of a row that the endpoint can answer, nearest in time; None where no row is open."""
    flight = manifest["preflight"]
    if flight and flight.get("example"):
        return {name: flight["example"][name] for name in spec.row_key if name in flight["example"]}
    pins = digest_of([run.snapshot, first_needed(spec, run.as_of_us)])
    folder = home.features(run.pipeline, manifest["defs_digest"], pins)
    if not (folder / "online_rows.parquet").is_file():
        return None
    stored = FeatureSet(home.relative(folder), "", manifest["defs_digest"], run.snapshot, 0, 0)
    requests, _ = entities(spec, home, stored)
    return requests[0] if requests else None


# Words


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A figure as a person reads it, with a true minus, none before a zero; a dash where it is undefined."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def span(found: Interval, *, sign: bool = False) -> str:
    """The bounds of an interval."""
    if found.low is None or found.high is None:
        return "no interval"
    return f"{number(found.low, sign=sign)} to {number(found.high, sign=sign)}"


def moment(us: int) -> str:
    """A time for people: `30 Dec 2013, 12:00 UTC`."""
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    seconds = f":{at:%S}" if at.second else ""
    return f"{at.day} {at:%b %Y, %H:%M}{seconds} UTC"


def capital(text: str) -> str:
    """The text with its first letter raised."""
    return text[:1].upper() + text[1:]


def metric_words(metric: str) -> str:
    """A metric within a sentence: `log loss`, but `AUC`."""
    title = METRIC_TITLES[metric]
    return title if "AUC" in title else title.lower()


def model_title(name: str, chosen: str) -> str:
    """What a model is called on the pages; the challenger says what it is made of."""
    title = _TITLES.get(name, name.replace("_", " "))
    return f"{title}: {_TITLES.get(chosen, chosen)}" if name == CHALLENGER else title


def bar_title(evaluation: Evaluation) -> str:
    """What the challenger had to beat."""
    return "the champion" if evaluation.bar == CHAMPION else "a model that knows only the base rate"


def ordered(evaluation: Evaluation) -> list[str]:
    """The models in the order of the pages: challenger first, prior last."""
    places = {name: i for i, name in enumerate(_TITLES)}
    return sorted(evaluation.metrics, key=lambda name: (places.get(name, len(places) - 1.5), name))


def _lead(manifest: Mapping[str, Any], evaluation: Evaluation) -> str:
    release = manifest["release"]
    if manifest["outcome"] == "promoted":
        return f"{release} is the champion: it is better than {bar_title(evaluation)}, and answers as it was trained."
    if manifest["outcome"] == "unchanged":
        return f"The challenger equals the champion {release}, which goes on serving."
    return f"What serves stays as it is: {release}." if release else "There is no champion yet, and nothing is served."


def _whys(manifest: Mapping[str, Any], found: Material) -> list[dict[str, Any]]:
    """The rules of the gate and the preflight: passed or not, in a sentence each."""
    rules = [{"passed": rule["passed"], "text": capital(rule["reason"])} for rule in found.verdict["rules"]]
    flight = manifest["preflight"]
    if flight and flight["passed"]:
        compared = f"{flight['feature_rows']:,} feature rows and {flight['entity_rows']:,} requests by key"
        rules.append({"passed": True, "text": f"Served as it was trained: {compared}, {flight['cells']:,} cells equal"})
    elif flight:
        rules += [{"passed": False, "text": f"Preflight: {reason}"} for reason in flight["reasons"]]
    return rules


def _curl(spec: Spec, request: Mapping[str, Any]) -> str:
    body = json.dumps({"rows": [request]}, ensure_ascii=False)
    url = f"http://127.0.0.1:{spec.serve.port}/predict"
    return f"curl -s {url} \\\n  -H 'content-type: application/json' \\\n  -d {shlex.quote(body)}"


def _asked(spec: Spec) -> str:
    if spec.predict_at is None:
        return f"once for each row of {spec.rows.source}"
    lead, slack = duration_text(spec.predict_at.lead), duration_text(spec.predict_at.tolerance)
    return f"for each row of {spec.rows.source}, {lead} before its {spec.predict_at.column} (give or take {slack})"


# The page


def render(spec: Spec, run: Run, manifest: Mapping[str, Any], found: Material) -> str:
    """The whole report as one HTML text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "num": number, "span": span, "moment": moment, "percent": percent, "count": lambda value: f"{value:,}",
        "capital": capital, "words": lambda text: str(text).replace("_", " "), "value": _value,
    }  # fmt: skip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    evaluation, chosen = found.evaluation, manifest["chosen"]
    with matplotlib.rc_context(_STYLE):
        charts = _charts(spec, manifest, found)
        tiles = _tiles(evaluation, chosen)
    return template.render(
        spec=spec, run=run, manifest=manifest, found=found, evaluation=evaluation, charts=charts, tiles=tiles,
        format_version=FORMAT_VERSION, lead=_lead(manifest, evaluation), whys=_whys(manifest, found),
        curl=_curl(spec, found.request) if found.request and manifest["release"] else "", asked=_asked(spec),
        models=ordered(evaluation), title=lambda name: model_title(name, chosen), bar=bar_title(evaluation),
        metrics=METRICS, metric_titles=METRIC_TITLES, best=_best(evaluation), higher=HIGHER_IS_BETTER, challenger=CHALLENGER,
        gain_in=metric_words(evaluation.metric),
        tables=_tables(manifest, found.contract), funnel=funnel(spec, manifest["counts"]),
        parts=_parts(spec, run, manifest, found),
        slices=ranked(evaluation.slices, spec.gate.slice_min_rows), paint=_variable,
        candidates=sorted(found.candidates, key=lambda c: c["log_loss"]), groups=_groups(found),
        parameters=_parameters(found.trials), duration=duration_text, provenance=_provenance(run, manifest),
        manifest_text=json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, default=str),
    )  # fmt: skip


def _value(value: Any) -> str:
    """A parameter for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _variable(name: str) -> str:
    return f"var(--m-{name.replace('_', '-')}, var(--soft))"


def _best(evaluation: Evaluation) -> dict[str, str]:
    """Metric → the model that is best in it."""
    found = {}
    for metric in METRICS:
        known = {m: v[metric].value for m, v in evaluation.metrics.items() if m != PRIOR}
        values = {m: v for m, v in known.items() if v is not None}
        if values:
            pick = max if metric in HIGHER_IS_BETTER else min
            found[metric] = pick(values, key=lambda m: values[m])
    return found


def _tables(manifest: Mapping[str, Any], contract: ContractResult | None) -> list[dict[str, Any]]:
    """Rows, change, duplicates and expectations of every table."""
    arrived = {a.table: a for a in contract.arrived} if contract else {}
    found = []
    for name, rows in sorted(manifest["snapshot_rows"].items(), key=lambda item: (-item[1], item[0])):
        checks = [c for c in contract.checks if c.table == name] if contract else []
        previous = arrived[name].previous if name in arrived else None
        found.append({
            "name": name, "rows": rows, "change": None if previous is None else rows - previous,
            "duplicates": arrived[name].duplicates if name in arrived else None,
            "checks": len(checks), "passed": sum(c.verdict == "passed" for c in checks),
        })  # fmt: skip
    return found


def funnel(spec: Spec, counts: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """From keys to the rows of the parts: words, rows, and whether it is a sum, a loss or a part."""
    source, known = spec.rows.source, set(PARTS) | {"keys", "rows", "unlabelled"}
    words = {
        "without_version_in_time": "not known yet when they would have been asked about",
        "closed_before_asked": f"already closed by then ({', '.join(spec.closed_by)})",
    }
    steps = [(f"keys in {source}", counts["keys"], "sum")]
    steps += [(words.get(k, k.replace("_", " ")), n, "loss") for k, n in counts.items() if k not in known and n]
    steps.append(("rows to predict", counts["rows"], "sum"))
    steps.append((f"no outcome in {spec.label.source} by the time of this run", counts["unlabelled"], "loss"))
    used = sum(counts[p] for p in PARTS)
    outside = counts["rows"] - counts["unlabelled"] - used
    if outside:
        steps.append(("labelled, but before the first part, in a gap between parts, or known too late", outside, "loss"))
    steps.append(("rows with a label and a part", used, "sum"))
    return steps


def _parts(spec: Spec, run: Run, manifest: Mapping[str, Any], found: Material) -> list[dict[str, Any]]:
    """The parts of the split: rows, share of positives, and their time or share."""
    bounds = split_bounds(spec, run.as_of_us) if spec.timed else []
    listed = []
    for i, name in enumerate(PARTS):
        begin, end = bounds[i][:2] if bounds else (None, None)
        gap = bounds[i + 1][0] - bounds[i][1] if bounds and i + 1 < len(PARTS) else 0
        rows = manifest["counts"][name]
        length = end - begin if begin is not None and end is not None else rows
        listed.append({
            "name": name, "rows": rows, "share": found.shares.get(name), "begin": begin, "end": end, "use": _USES[name],
            "length": length, "gap": gap, "days": duration_text(length) if bounds else "",
        })  # fmt: skip
    return listed


def _loses(found: SliceQuality) -> bool:
    return found.gain.high is not None and found.gain.high < 0


def ranked(slices: Sequence[SliceQuality], fewest: int) -> list[SliceQuality]:
    """Slices with the smallest gain first; those that are too small to judge, or undefined, last."""
    return sorted(slices, key=lambda s: (s.rows < fewest or s.gain.value is None, s.gain.value or 0.0, s.name, s.value))


def _groups(found: Material) -> list[dict[str, Any]]:
    """Features and share of gain by group, strongest first."""
    listed = []
    for group in dict.fromkeys(f.group for f in found.features):
        share = sum(w.share for w in found.weights if w.group == group)
        listed.append({"name": group, "count": sum(f.group == group for f in found.features), "share": share})
    return sorted(listed, key=lambda g: (-g["share"], g["name"]))


def _parameters(trials: Iterable[Trial]) -> dict[str, list[str]]:
    """Study → the names of the parameters that it searched."""
    found: dict[str, dict[str, None]] = {}
    for trial in trials:
        found.setdefault(trial.study, {}).update(dict.fromkeys(trial.params))
    return {study: list(names) for study, names in found.items()}


def _provenance(run: Run, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = [
        ("Result digest", manifest["result_digest"]), ("Snapshot", run.snapshot), ("Spec", run.spec_digest),
        ("Feature definitions", manifest["defs_digest"]), ("Code", run.code), ("Lock file", manifest["lock_digest"]),
        ("Git commit", manifest["git_commit"]), ("Champion before", run.parent), ("Run", run.run_id),
    ]  # fmt: skip
    return [(name, value) for name, value in listed if value]


def _tiles(evaluation: Evaluation, chosen: str) -> list[dict[str, Any]]:
    """The headline figures: two metrics of the challenger, and what it gains on the bar and on the baseline."""
    ours = evaluation.metrics[CHALLENGER]
    shown = [m for m in (CHALLENGER, "gbdt", evaluation.bar) if m in evaluation.metrics]
    tiles = []
    for metric in ("auc", "log_loss"):
        rows = [(_TITLES[m].split(",")[0], evaluation.metrics[m][metric], _PAINT[f"m-{m}"]) for m in shown]
        tiles.append({
            "label": METRIC_TITLES[metric], "note": "higher is better" if metric in HIGHER_IS_BETTER else "lower is better",
            "value": number(ours[metric].value), "span": span(ours[metric]), "chart": _strip(metric, rows),
        })  # fmt: skip
    metric = evaluation.metric
    for other in dict.fromkeys((evaluation.bar, "gbdt")):
        if other in evaluation.gains:
            gain = evaluation.gains[other][metric]
            against = {"gbdt": "LightGBM", PRIOR: "the base rate"}.get(other, "the champion")
            tone = "ok" if (gain.low or 0) > 0 else "bad" if gain.high is not None and gain.high < 0 else "odd"
            tiles.append({
                "label": f"Gain on {against}", "note": f"in {metric_words(metric)}; above 0 is better",
                "value": number(gain.value, sign=True), "span": span(gain, sign=True), "tone": tone,
                "chart": _strip(f"gain-{other}", [("", gain, _PAINT[tone])], zero=True),
            })  # fmt: skip
    if chosen == "gbdt":
        gain = ours["ece"]
        tiles.append({"label": METRIC_TITLES["ece"], "note": "lower is better; the baseline itself is chosen",
                      "value": number(gain.value), "span": span(gain),
                      "chart": _strip("ece", [("", gain, _ACCENT)], zero=True)})  # fmt: skip
    return tiles


# Plots


def _charts(spec: Spec, manifest: Mapping[str, Any], found: Material) -> dict[str, Any]:
    evaluation = found.evaluation
    by_name: dict[str, list[SliceQuality]] = {}
    for one in ranked(evaluation.slices, spec.gate.slice_min_rows):
        by_name.setdefault(one.name, []).append(one)
    limits = _gain_limits(evaluation.slices, spec.gate.slice_min_rows)
    studies = {t.study: [x for x in found.trials if x.study == t.study] for t in found.trials}
    return {
        "roc": _roc(evaluation), "pr": _precision(evaluation), "calibration": _calibration(evaluation),
        "slices": {n: _slices(n, s[:SLICE_BARS], spec.gate.slice_min_rows, limits) for n, s in by_name.items()},
        "more": {n: len(s) - SLICE_BARS for n, s in by_name.items() if len(s) > SLICE_BARS},
        "importance": _importance([w for w in found.weights if w.share > 0][:TOP_FEATURES]) if found.weights else "",
        "groups": _group_bars(found) if found.weights else "",
        "trials": {study: _trial_points(study, trials) for study, trials in studies.items()},
        "learning": [(one, _learning_curve(one)) for one in found.learning],
        "stages": _stages(manifest["stages"]) if manifest["stages"] else "",
    }  # fmt: skip


def _axes(width: float, height: float, *, left: float, right: float = 12, top: float = 12, bottom: float = 26) -> Axes:
    """Axes in a figure of this size, with these margins."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    axes: Axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height), facecolor="none"
    )
    return axes


_TAG = re.compile(r"<[^>]+>")


def _svg(axes: Axes, name: str, title: str) -> Markup:
    """The figure as inline SVG: no header, no name spaces, ids of its own, colours and fonts of the page."""
    figure, buffer = axes.get_figure(root=True), io.StringIO()
    assert isinstance(figure, Figure)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = buffer.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", text))
    prefix = f"{re.sub(r'[^a-z0-9]', '', name.lower())}-{digest_of(name)[:4]}-"
    text = _TAG.sub(lambda tag: _clean(tag[0], used, prefix), text)
    text = re.sub(r">\s+<", "><", text)
    label = Markup.escape(title)
    width = round(figure.get_size_inches()[0] * 72)
    size = f"min-width:{round(0.8 * width)}px;max-width:{width}px"  # a small screen scrolls, so that words stay legible
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{size}"', 1))


_SWAPS = {paint: f"var(--{name})" for name, paint in _PAINT.items()}


def _clean(tag: str, used: set[str], prefix: str) -> str:
    tag = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", tag) if tag.startswith("<svg") else tag
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'xlink:href="#', f'href="#{prefix}', tag).replace("url(#", f"url(#{prefix}")
    tag = re.sub(r"font-family: [^;\"]*(; )?", "", tag)
    tag = re.sub(r"#0a0b[0-9a-f]{2}", lambda m: _SWAPS.get(m[0], m[0]), tag)
    return re.sub(r"(\.\d{2})\d+", r"\1", re.sub(r"\s*\n", " ", tag))


def _plain(text: object, most: int = 34) -> str:
    """Text for a plot: one line, printable, not longer than `most`."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _strip(name: str, rows: list[tuple[str, Interval, str]], *, zero: bool = False) -> Markup:
    """Values and intervals below one another, for a tile."""
    known = [row for row in rows if row[1].value is not None]
    axes = _axes(230, 22 + 17 * len(rows), left=66 if rows[0][0] else 4, right=8, top=4, bottom=18)
    ends = [v for _, i, _ in known for v in (i.low, i.value, i.high) if v is not None] + ([0.0] if zero else [])
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    pad = 0.12 * (high - low) or 0.05
    axes.set(xlim=(low - pad, high + pad), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    axes.set_yticklabels([label for label, _, _ in rows], fontsize=10.5)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=3)
    axes.tick_params(axis="x", labelsize=9.5, pad=3)
    if zero:
        axes.axvline(0, color=_SOFT, lw=1, ls=(0, (2, 2)))
    for place, (_, found, paint) in enumerate(rows):
        _interval(axes, found, place, paint)
    return _svg(axes, f"strip-{name}", f"{name.replace('_', ' ')}: values with intervals")


def _interval(axes: Axes, found: Interval, place: float, paint: str, *, size: float = 6.5) -> None:
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place, place], color=paint, lw=2.2, alpha=0.55)
    if found.value is not None:
        axes.plot([found.value], [place], "o", color=paint, ms=size, mec=_CARD, mew=1)


def _square(title: str, x: str, y: str) -> Axes:
    axes = _axes(340, 336, left=34, right=12, top=46, bottom=42)
    axes.text(-0.115, 1.105, title, transform=axes.transAxes, fontsize=13.5, fontweight="bold")
    axes.set_xlabel(x, fontsize=10.5, labelpad=6)
    axes.text(-0.115, 1.03, y, transform=axes.transAxes, fontsize=10.5, color=_SOFT)
    axes.grid(visible=True)
    axes.tick_params(labelsize=10)
    return axes


def _lines(evaluation: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """Models from back to front, and how their lines look."""
    found = []
    for name in reversed(ordered(evaluation)):
        first = name == CHALLENGER
        paint = _PAINT.get(f"m-{name.replace('_', '-')}", _SOFT)
        found.append((name, {"color": paint, "lw": 2.4 if first else 1.5, "ls": _DASHES.get(name, (0, (4, 1.5)))}))
    return found


def _roc(evaluation: Evaluation) -> Markup:
    axes = _square("ROC", "share of the negatives called", "share of the positives found")
    axes.plot([0, 1], [0, 1], color=_SOFT, lw=1, ls=(0, (1, 2)))
    for name, style in _lines(evaluation):
        if name != PRIOR:
            curve = evaluation.curves[name]["roc"]
            axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], **style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return _svg(axes, "roc", "ROC curves of all models")


def _precision(evaluation: Evaluation) -> Markup:
    axes = _square("Precision and recall", "share of the positives found (recall)", "share of the called that are positive")
    axes.axhline(evaluation.positives / evaluation.rows, color=_SOFT, lw=1, ls=(0, (1, 2)))
    for name, style in _lines(evaluation):
        if name != PRIOR:
            curve = evaluation.curves[name]["pr"]
            axes.plot(curve["recall"], curve["precision"], **style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return _svg(axes, "pr", "Precision-recall curves of all models")


def _calibration(evaluation: Evaluation) -> Markup:
    axes = _square("Calibration", "probability that was answered", "share that came true")
    axes.plot([0, 1], [0, 1], color=_SOFT, lw=1, ls=(0, (1, 2)))
    ends = [1e-3]
    for name, style in _lines(evaluation):
        points = evaluation.curves[name]["calibration"]
        size = {CHALLENGER: 5.0, PRIOR: 7.0}.get(name, 3.5)
        axes.plot(points["mean"], points["share"], marker="o", ms=size, mec=_CARD, mew=0.7, **style)
        ends += [*points["mean"], *points["share"]]
    top = min(1.01, 1.06 * max(ends))
    axes.set(xlim=(-0.012 * top, top), ylim=(-0.012 * top, top))
    return _svg(axes, "calibration", "Calibration curves of all models")


def _gain_limits(slices: Sequence[SliceQuality], fewest: int) -> tuple[float, float]:
    """One scale for all slices that are judged, zero included; small ones may reach beyond it."""
    judged = [s for s in slices if s.rows >= fewest] or list(slices)
    ends = [v for s in judged for v in (s.gain.low, s.gain.value, s.gain.high) if v is not None] + [0.0]
    pad = 0.06 * (max(ends) - min(ends)) or 0.01
    return min(ends) - pad, max(ends) + pad


def _slices(name: str, slices: list[SliceQuality], fewest: int, limits: tuple[float, float]) -> Markup:
    """Gain over the bar with its interval for each value of a slice, worst first."""
    width = min(150, 14 + 7 * max(len(_plain(s.value, 20)) for s in slices))
    axes = _axes(500, 40 + 21 * len(slices), left=width, right=74, top=20, bottom=20)
    axes.set(xlim=limits, ylim=(len(slices) - 0.4, -0.6), yticks=range(len(slices)))
    axes.set_yticklabels([_plain(s.value, 20) for s in slices])
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="x", labelsize=10)
    axes.axvline(0, color=_SOFT, lw=1.2)
    axes.text(1.14, 1 + 7 / (21 * len(slices)), "rows", transform=axes.transAxes, color=_SOFT, fontsize=10, ha="right")
    for place, one in enumerate(slices):
        paint = _SOFT if one.rows < fewest else _BAD if _loses(one) else _ACCENT
        _interval(axes, one.gain, place, paint)
        axes.text(1.14, place, f"{one.rows:,}", transform=axes.get_yaxis_transform(), ha="right", va="center_baseline",
                  color=_SOFT, fontsize=10.5)  # fmt: skip
    return _svg(axes, f"slice-{name}", f"Gain by {name}, with intervals, worst first")


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], paint: str, *, height: float = 0.62) -> None:
    axes.barh(range(len(values)), values, height=height, color=paint)
    axes.set(ylim=(len(values) - 0.4, -0.6), yticks=range(len(values)), xticks=[])
    axes.set_yticklabels(labels)
    axes.tick_params(axis="y", labelcolor=_INK)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _importance(weights: Sequence[Weight]) -> Markup:
    axes = _axes(620, 12 + 21 * len(weights), left=272, right=186, top=2, bottom=6)
    _bars(axes, [_plain(w.name, 42) for w in weights], [w.share for w in weights], _ACCENT)
    axes.set_xlim(0, max((w.share for w in weights), default=1))
    for place, one in enumerate(weights):
        axes.annotate(f"{one.share:.1%}", (one.share, place), (5, 0), textcoords="offset points", va="center_baseline",
                      fontsize=10.5)  # fmt: skip
        axes.annotate(_plain(one.group, 25), (1, place), (184, 0), xycoords=axes.get_yaxis_transform(), color=_SOFT,
                      textcoords="offset points", ha="right", va="center_baseline", fontsize=10)  # fmt: skip
    return _svg(axes, "importance", "The strongest features by gain")


def _group_bars(found: Material) -> Markup:
    groups = [g for g in _groups(found) if g["share"] > 0]
    axes = _axes(400, 12 + 21 * len(groups), left=178, right=52, top=2, bottom=6)
    _bars(axes, [_plain(g["name"], 25) for g in groups], [g["share"] for g in groups], _PAINT["m-gbdt"])
    axes.set_xlim(0, max((g["share"] for g in groups), default=1))
    for place, group in enumerate(groups):
        axes.annotate(f"{group['share']:.1%}", (group["share"], place), (5, 0), textcoords="offset points",
                      va="center_baseline", fontsize=10.5)  # fmt: skip
    return _svg(axes, "groups", "Gain by group of features")


def _trial_points(study: str, trials: Sequence[Trial]) -> Markup:
    """Every trial's log loss in the order of slots, generations shaded, pruned ones hollow, the best ringed."""
    axes = _axes(520, 256, left=46, right=14, top=26, bottom=40)
    axes.grid(visible=True, axis="y")
    axes.text(-0.07, 1.05, "log loss on valid_fit", transform=axes.transAxes, color=_SOFT, fontsize=10.5)
    axes.set_xlabel("trial", fontsize=10.5, labelpad=5)
    generations = sorted({t.generation for t in trials})
    known = [(i, t, t.loss) for i, t in enumerate(trials) if t.loss is not None]
    for number_, generation in enumerate(generations):
        places = [i for i, t in enumerate(trials) if t.generation == generation]
        if number_ % 2 == 0:
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=_FILL, lw=0)
    paint = _PAINT.get(f"m-{study.replace('_', '-')}", _ACCENT)
    done = [(i, loss) for i, t, loss in known if t.state == "complete"]
    lowest: list[float] = []
    for _, loss in done:
        lowest.append(min(loss, lowest[-1]) if lowest else loss)
    axes.step([i for i, _ in done], lowest, where="post", color=_SOFT, lw=1.2)
    for place, trial, loss in known:
        full = trial.state == "complete"
        axes.plot([place], [loss], "o", ms=8, mfc=paint if full else _CARD, mec=_CARD if full else _SOFT, mew=1.4)
        if trial.best:
            axes.plot([place], [loss], "o", ms=14, mfc="none", mec=paint, mew=1.8)
    axes.set(xlim=(-0.6, len(trials) - 0.4), xticks=range(0, len(trials), max(1, len(trials) // 12)))
    axes.set_xticklabels([str(trials[int(i)].slot) for i in axes.get_xticks()])
    axes.margins(y=0.14)
    axes.locator_params(axis="y", nbins=5)
    return _svg(axes, f"trials-{study}", f"Trials of the {study}: log loss by slot")


def _learning_curve(one: Learning) -> Markup:
    axes = _axes(520, 224, left=46, right=14, top=26, bottom=40)
    steps = range(1, len(one.losses) + 1)
    paint = _PAINT.get(f"m-{one.model.replace('_', '-')}", _ACCENT)
    few = len(one.losses) <= 40
    if one.train:
        axes.plot(range(1, len(one.train) + 1), one.train, color=_SOFT, lw=1.4, ls=(0, (4, 2)))
    axes.plot(steps, one.losses, color=paint, lw=2, marker="o" if few else None, ms=6, mec=_CARD, mew=1)
    axes.plot([one.kept], [one.losses[one.kept - 1]], "o", ms=13 if few else 9, mfc="none", mec=paint, mew=1.8)
    axes.grid(visible=True, axis="y")
    said = "log loss on valid_fit" + (", dashed: on train" if one.train else "")
    axes.text(-0.07, 1.06, said, transform=axes.transAxes, color=_SOFT, fontsize=10.5)
    axes.set_xlabel(one.steps, fontsize=10.5, labelpad=5)
    axes.margins(y=0.14)
    axes.locator_params(axis="y", nbins=5)
    if few:
        axes.set(xlim=(0.6, len(one.losses) + 0.4), xticks=list(steps)[:: max(1, len(one.losses) // 10)])
    return _svg(axes, f"learning-{one.model}", f"Learning curve of {one.model}")


def _stages(stages: Sequence[Mapping[str, Any]]) -> Markup:
    """Seconds, and CPU seconds below them, of every stage."""
    axes = _axes(460, 34 + 36 * len(stages), left=104, right=58, top=2, bottom=6)
    seconds, cpu = [s["seconds"] for s in stages], [s["cpu_s"] for s in stages]
    _bars(axes, [s["stage"].replace("_", " ") for s in stages], seconds, _ACCENT, height=0.3)
    axes.barh([i + 0.31 for i in range(len(cpu))], cpu, height=0.2, color=_ACCENT, alpha=0.38)
    axes.set_xlim(0, max([*seconds, *cpu, 1e-3]))
    axes.set_ylim(len(stages) - 0.3, -0.5)
    for place, value in enumerate(seconds):
        axes.annotate(f"{value:,.1f} s", (value, place), (5, 0), textcoords="offset points", va="center_baseline",
                      fontsize=10.5)  # fmt: skip
    return _svg(axes, "stages", "Seconds and CPU seconds of every stage")


# The model card


def model_card(spec: Spec, run: Run, manifest: Mapping[str, Any], found: Material) -> str:
    """The model card as Markdown."""
    sections = {
        "Question": _card_question(spec, manifest, found),
        "Intended use": _card_use(spec),
        "Data": _card_data(spec, run, manifest, found),
        "Features": _card_features(found),
        "Training and selection": _card_training(manifest, found),
        "Metrics": _card_metrics(manifest, found),
        "Where it is weak": _card_slices(spec, found),
        "Limits": _card_limits(spec, manifest, found),
        "How it was judged": _card_gate(spec, manifest, found),
        "Provenance": [_table(("", ""), [(n, f"`{v}`") for n, v in _provenance(run, manifest)])],
        "How to make it again": _card_again(spec, manifest),
    }
    lines = [f"# Model card: {_md(spec.pipeline)}", ""]
    for heading, paragraphs in sections.items():
        lines += [f"## {heading}", "", *(line for paragraph in paragraphs for line in (paragraph, ""))]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _card_question(spec: Spec, manifest: Mapping[str, Any], found: Material) -> list[str]:
    model = model_title(CHALLENGER, manifest["chosen"]).partition(": ")[2]
    said = [f"**{_md(spec.title)}**", f"Asked {_md(_asked(spec))}. The answer is a probability; from "
            f"{spec.serve.threshold:g} on the decision is yes. The model is: {_md(model)}."]  # fmt: skip
    return [*said, f"**{capital(manifest['outcome'])}.** {_md(_lead(manifest, found.evaluation))}"]


def _card_use(spec: Spec) -> list[str]:
    horizon = "" if spec.predict_at is None else (
        f" Requests further than {duration_text(spec.predict_at.tolerance)} from that instant are answered with "
        "`outside_horizon: true` and are no part of its quality."
    )  # fmt: skip
    return [
        f"Answers for rows of `{spec.rows.source}`, named by {', '.join(f'`{k}`' for k in spec.row_key)}, over `/predict`; "
        f"features are computed by the service.{horizon}",
        "Not meant for rows of another origin, as a reading of causes (importance is not cause), or where a wrong answer "
        "harms someone and no person looks at it.",
    ]


def _card_data(spec: Spec, run: Run, manifest: Mapping[str, Any], found: Material) -> list[str]:
    tables = [(f"`{t['name']}`", f"{t['rows']:,}") for t in _tables(manifest, found.contract)]
    known = f", known up to {moment(run.as_of_us)}" if spec.timed else ""
    paragraphs = [f"Snapshot `{run.snapshot[:16]}`{known}.", _table(("table", "rows"), tables)]
    if found.contract:
        paragraphs.append(f"All {found.contract.expectations} expectations of the data contract hold.")
    steps = [(_md(words), f"{'−' if kind == 'loss' else ''}{rows:,}") for words, rows, kind in funnel(spec, manifest["counts"])]
    paragraphs.append(_table(("from keys to rows", ""), steps))
    head = ("part", "from", "to", "rows", "positive", "used for")
    rows = [
        (p["name"], moment(p["begin"]) if spec.timed else "–", moment(p["end"]) if spec.timed else "–", f"{p['rows']:,}",
         "–" if p["share"] is None else f"{p['share']:.1%}", p["use"])
        for p in _parts(spec, run, manifest, found)
    ]  # fmt: skip
    paragraphs.append(_table(head, rows))
    return paragraphs + (["\n".join(f"- {_md(note)}" for note in found.notes)] if found.notes else [])


def _card_features(found: Material) -> list[str]:
    kinds = [f.kind for f in found.features]
    groups = _groups(found)
    weighed = bool(found.weights)
    head = ("group", "features", *(("share of gain",) if weighed else ()))
    rows = [(f"`{g['name']}`", str(g["count"]), *((f"{g['share']:.1%}",) if weighed else ())) for g in groups]
    said = f"{len(kinds)} features, {kinds.count('category')} of them categories; each is what was known at the time asked about."
    strongest = ", ".join(f"`{w.name}`" for w in found.weights[:8])
    return [said, _table(head, rows)] + ([f"Strongest: {strongest}."] if strongest else [])


def _card_training(manifest: Mapping[str, Any], found: Material) -> list[str]:
    paragraphs = ["LightGBM at fixed defaults is trained on the same rows in every run: the baseline."]
    if found.trials:
        pruned = sum(t.state == "pruned" for t in found.trials)
        generations = len({(t.study, t.generation) for t in found.trials})
        paragraphs.append(f"{len(found.trials)} trials in {generations} generations, {pruned} pruned, judged on `valid_fit`.")
    hyper = json.dumps(manifest["hyper_parameters"], indent=1, sort_keys=True, ensure_ascii=False)
    paragraphs.append(f"```json\n{hyper.replace('```', '')}\n```")
    if found.candidates:
        rows = [(_md(_TITLES.get(c["name"], c["name"])), number(c["log_loss"]), number(c["auc"])) for c in found.candidates]
        paragraphs += ["Chosen by log loss on `valid_select`, after calibration there:",
                       _table(("candidate", "log loss", "AUC"), rows)]  # fmt: skip
    return paragraphs


def _card_metrics(manifest: Mapping[str, Any], found: Material) -> list[str]:
    evaluation = found.evaluation
    said = (
        f"On the same {evaluation.rows:,} test rows, {evaluation.positives / evaluation.rows:.1%} of them positive; "
        f"{evaluation.confidence:.0%} intervals from {evaluation.resamples:,} paired bootstrap resamples."
    )
    head = ("model", *(METRIC_TITLES[m] for m in METRICS))
    rows = [
        (_md(model_title(name, manifest["chosen"])),
         *(f"{number(evaluation.metrics[name][m].value)} ({span(evaluation.metrics[name][m])})" for m in METRICS))
        for name in ordered(evaluation)
    ]  # fmt: skip
    metric = metric_words(evaluation.metric)
    gains = [
        f"- against {_md(model_title(name, ''))}: {number(gain[evaluation.metric].value, sign=True)} "
        f"({span(gain[evaluation.metric], sign=True)})"
        for name, gain in evaluation.gains.items()
    ]
    return [said, _table(head, rows), f"Gain in {metric}, above 0 is better:", "\n".join(gains)]


def _card_slices(spec: Spec, found: Material) -> list[str]:
    evaluation = found.evaluation
    judged = [s for s in ranked(evaluation.slices, spec.gate.slice_min_rows) if s.rows >= spec.gate.slice_min_rows]
    if not judged:
        return ["No slice is large enough to judge, or the spec names none (`gate.slices`)."]
    metric, ours = metric_words(evaluation.metric), CHALLENGER
    rows = [
        (f"{_md(s.name)} = {_md(s.value)}", f"{s.rows:,}", number(s.metrics[ours]["auc"]), number(s.metrics[ours]["log_loss"]),
         f"{number(s.gain.value, sign=True)} ({span(s.gain, sign=True)})")
        for s in judged[:WEAKEST]
    ]  # fmt: skip
    lost = sum(_loses(s) for s in judged)
    said = f"The slices where it gains least in {metric} on {bar_title(evaluation)}; in {lost} of {len(judged)} it is worse."
    return [said, _table(("slice", "rows", "AUC", "log loss", "gain"), rows)]


def _card_limits(spec: Spec, manifest: Mapping[str, Any], found: Material) -> list[str]:
    counts, evaluation = manifest["counts"], found.evaluation
    limits = [
        f"{counts['unlabelled']:,} of {counts['rows']:,} rows have no outcome and are in no part: an answer holds for rows "
        "that will have one.",
        f"Calibration error on test: {number(evaluation.metrics[CHALLENGER]['ece'].value)}.",
    ]
    small = sum(s.rows < spec.gate.slice_min_rows for s in evaluation.slices)
    if small:
        limits.append(f"{small} slices have fewer than {spec.gate.slice_min_rows:,} rows; nothing can be said of them.")
    if spec.timed:
        begin, end = manifest["test_window_us"]
        limits.append(f"Its quality was measured from {moment(begin)} to {moment(end)}; later it must be measured again.")
    else:
        limits.append("The table has no time: no guarantee is made for data that come later.")
    return ["\n".join(f"- {line}" for line in limits)]


def _card_gate(spec: Spec, manifest: Mapping[str, Any], found: Material) -> list[str]:
    gate, verdict = spec.gate, found.verdict
    said = (
        f"The gate compares the challenger with {bar_title(found.evaluation)} on the same rows: the lower end of the "
        f"{gate.confidence:.0%} interval of the gain in {metric_words(gate.metric)} must exceed {gate.min_gain:g}. "
        f"{verdict.get('seen_before', 0):,} of the {found.evaluation.rows:,} test rows had been read by the gate of an earlier "
        "run."
    )
    rules = [f"- {'passed' if why['passed'] else '**refused**'}: {_md(why['text'])}" for why in _whys(manifest, found)]
    return [said, "\n".join(rules)]


def _card_again(spec: Spec, manifest: Mapping[str, Any]) -> list[str]:
    commands = [f"git checkout {manifest['git_commit']}"] if manifest["git_commit"] else []
    commands += [f"millrace sample {spec.pipeline}"] if spec.sample else []
    as_of = f" --as-of {manifest['as_of']}" if spec.timed else ""
    commands.append(f"millrace run {spec.pipeline}{as_of}")
    return [
        "```sh\n" + "\n".join(commands) + "\n```",
        "On the same data, from an empty home and on the same kind of machine, the run ends with result digest "
        f"`{manifest['result_digest']}`.",
    ]
