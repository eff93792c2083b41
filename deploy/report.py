"""The pages of a run: `report.html`, one file that needs nothing else, and `model_card.md` beside it.

Both are templates, in files of their own; here is what they are told, and how they word it.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from deploy import plots
from deploy.compiled import table
from deploy.findings import MODEL_TITLES, Findings, gather, groups, models, slices, tone
from features.contract_page import percent
from features.rows import PARTS, split_bounds
from models.evaluate import CHALLENGER, CHAMPION, HIGHER_IS_BETTER, METRICS, PRIOR, Evaluation, Interval
from models.gate import SAME
from pipelines.clock import duration_text
from pipelines.home import Home
from pipelines.manifest import FORMAT_VERSION, write_atomic
from pipelines.run import Run
from pipelines.spec import Spec

METRIC_TITLES = {
    "auc": "AUC", "log_loss": "Log loss", "brier": "Brier score", "ece": "Calibration error", "pr_auc": "PR-AUC",
}  # fmt: skip
_USES = {
    "train": "the models learn from it", "valid_fit": "early stopping and tuning",
    "valid_select": "calibration, blend and choice", "test": "read by the gate only",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A headline figure: labels, values and colours below one another, the first value large. Only a gain has a tone."""

    name: str
    label: str
    note: str
    rows: tuple[tuple[str, Interval, str], ...]
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A source table: rows, how many more than before, identical ones counted once, rows set aside, expectations that hold."""

    name: str
    rows: int
    change: int | None
    duplicates: int | None
    set_aside: int
    checks: int
    passed: int


@dataclass(frozen=True)
class Part:
    """A part of the split, its share of positives if it has labels, and its times (µs UTC) in a split by time."""

    name: str
    use: str
    rows: int
    positive: float | None
    begin: int | None
    end: int | None


def write_report(spec: Spec, home: Home, run: Run, manifest: Mapping[str, Any]) -> None:
    """Writes `report.html` and `model_card.md` into the run's folder; the same inputs give the same bytes.

    MillraceError: the evaluation of the run is gone.
    """
    found = gather(spec, home, run, manifest)
    for page in ("report.html", "model_card.md"):
        write_atomic(run.folder(home) / page, render(found, page))


def render(found: Findings, page: str) -> str:
    """The text of a page, `report.html` or `model_card.md`."""
    manifest, evaluation = found.manifest, found.evaluation
    with plots.style():
        return environment().get_template(f"{page}.j2").render(
            found=found, spec=found.spec, run=found.run, manifest=manifest, evaluation=evaluation, plots=plots,
            lead=_lead(found), whys=_whys(found), tiles=list(_tiles(found)), asked=_asked(found.spec), curl=_curl(found),
            tables=_tables(found), funnel=_funnel(found), parts=_parts(found), models=models(evaluation),
            title=lambda name: model_title(name, manifest["chosen"]), challenger=CHALLENGER, metrics=METRICS,
            metric_titles=METRIC_TITLES, higher=HIGHER_IS_BETTER, best=_best(evaluation), bar=_bar(evaluation),
            gain_in=metric_words(evaluation.metric), slices=slices(found), groups=groups(found),
            parameters=_parameters(found), provenance=_provenance(found), format_version=FORMAT_VERSION,
            used=list(_used(manifest.get("training", {}).get("usage", {}))),
            inference=table(manifest["inference"]["table"]) if manifest.get("inference") else [],
        )  # fmt: skip

def environment() -> Environment:
    """What the templates of this folder are filled in by, with the words that they use."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html.j2"]), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {
        "num": number, "span": _span, "moment": moment, "duration": duration_text, "percent": percent, "value": _value,
        "count": lambda value: f"{value:,}", "words": lambda text: str(text).replace("_", " "), "capital": _capital,
        "json": lambda value: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str),
        "md": _markdown, "tone": tone,
    }  # fmt: skip
    return made


# What the pages show


def _tiles(found: Findings) -> Iterator[Tile]:
    """Two metrics of the challenger, and what it gains on the bar and on the baseline."""
    evaluation = found.evaluation
    compared = [m for m in (CHALLENGER, "gbdt", evaluation.bar) if m in evaluation.metrics]
    for metric in ("auc", "log_loss"):
        rows = tuple((MODEL_TITLES[m].split(",")[0], evaluation.metrics[m][metric], m) for m in compared)
        yield Tile(metric, METRIC_TITLES[metric], f"{'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better", rows)
    for other in dict.fromkeys((evaluation.bar, "gbdt")):
        if other in evaluation.gains:
            gain = evaluation.gains[other][evaluation.metric]
            against = {"gbdt": "LightGBM", PRIOR: "the base rate"}.get(other, "the champion")
            note, colour = f"in {metric_words(evaluation.metric)}; above 0 is better", tone(gain) or "odd"
            yield Tile(f"gain-{other}", f"Gain on {against}", note, (("", gain, colour),), colour)
    if found.manifest["chosen"] == "gbdt":
        error, note = evaluation.metrics[CHALLENGER]["ece"], "lower is better; the baseline itself is chosen"
        yield Tile("ece", METRIC_TITLES["ece"], note, (("", error, CHALLENGER),))


def _whys(found: Findings) -> list[tuple[bool, str]]:
    """The rules of the gate and the preflight: passed or not, and why."""
    rules = [(rule["passed"], _capital(rule["reason"])) for rule in found.verdict["rules"]]
    flight = found.manifest["preflight"]
    if flight and flight["passed"]:
        compared = f"{flight['feature_rows']:,} feature rows and {flight['entity_rows']:,} requests by key"
        rules.append((True, f"Served as it was trained: {compared}, {flight['cells']:,} cells equal"))
    elif flight:
        rules += [(False, f"Preflight: {reason}") for reason in flight["reasons"]]
    return rules


def _tables(found: Findings) -> list[Table]:
    """Largest first."""
    arrived = {a.table: a for a in found.contract.arrived} if found.contract else {}
    listed = []
    for name, rows in found.manifest["snapshot_rows"].items():
        verdicts = [c.verdict for c in found.contract.checks if c.table == name] if found.contract else []
        before, twice = (arrived[name].previous, arrived[name].duplicates) if name in arrived else (None, None)
        change = None if before is None else rows - before
        aside = found.manifest.get("set_aside", {}).get(name, 0)
        listed.append(Table(name, rows, change, twice, aside, len(verdicts), verdicts.count("passed")))
    return sorted(listed, key=lambda t: (-t.rows, t.name))


def _funnel(found: Findings) -> Iterator[tuple[str, int, str]]:
    """From keys to the rows of the parts: words, rows, and whether it is a `sum` or a `loss`."""
    spec, counts = found.spec, found.manifest["counts"]
    words = {
        "without_version_in_time": "not known yet when they would have been asked about",
        "closed_before_asked": f"already closed by then ({', '.join(spec.closed_by)})",
    }
    yield f"keys in {spec.rows.source}", counts["keys"], "sum"
    for name, rows in counts.items():
        if rows and name not in {*PARTS, "keys", "rows", "unlabelled"}:
            yield words.get(name, name.replace("_", " ")), rows, "loss"
    yield "rows to predict", counts["rows"], "sum"
    yield f"no outcome in {spec.label.source} by the time of this run", counts["unlabelled"], "loss"
    used = sum(counts[p] for p in PARTS)
    outside = counts["rows"] - counts["unlabelled"] - used
    if outside:
        yield "labelled, but before the first part, in a gap between parts, or known too late", outside, "loss"
    yield "rows with a label and a part", used, "sum"


def _parts(found: Findings) -> list[Part]:
    spec, rows = found.spec, found.manifest["counts"]
    bounds: Sequence[tuple[int | None, int | None, int | None]] = [(None, None, None)] * len(PARTS)
    if spec.timed:
        bounds = split_bounds(spec, found.run.as_of_us)
    return [
        Part(name, _USES[name], rows[name], found.shares.get(name), begin, end)
        for name, (begin, end, _) in zip(PARTS, bounds, strict=True)
    ]


def _best(evaluation: Evaluation) -> dict[str, str]:
    """Metric → the model that is best in it, the prior apart."""
    found = {}
    for metric in METRICS:
        values = {m: v for m, of in evaluation.metrics.items() if m != PRIOR and (v := of[metric].value) is not None}
        if values:
            found[metric] = (max if metric in HIGHER_IS_BETTER else min)(values, key=values.__getitem__)
    return found


def _parameters(found: Findings) -> dict[str, list[str]]:
    """Study → the names of the parameters that it searched."""
    studies = dict.fromkeys(t.study for t in found.trials)
    return {s: list(dict.fromkeys(name for t in found.trials if t.study == s for name in t.params)) for s in studies}


def _provenance(found: Findings) -> list[tuple[str, str]]:
    run, manifest = found.run, found.manifest
    listed = [
        ("Result digest", manifest["result_digest"]), ("Snapshot", run.snapshot), ("Spec", run.spec_digest),
        ("Feature definitions", manifest["defs_digest"]), ("Code", run.code), ("Lock file", manifest["lock_digest"]),
        ("Git commit", manifest["git_commit"]), ("Champion before", run.parent), ("Run", run.run_id),
    ]  # fmt: skip
    return [(name, value) for name, value in listed if value]


def _used(usage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What training made of its device, as lines of a table."""
    if not usage:
        return
    if "step_ms" in usage:
        yield "Rows per second", f"{usage['rows_per_s']:,}, {usage['step_ms']:.3g} ms a step"
        parts = sorted(usage["split"].items(), key=lambda item: -item[1])
        yield "A step's time", ", ".join(f"{part.replace('_', '-')} {share:.1%}" for part, share in parts)
        yield "Device busy", f"{usage['busy_share']:.1%}"
    if "mfu" in usage:
        speed, peak = (usage[f"{which}flops_per_s"] / 1e9 for which in ("", "peak_"))
        yield "Matrix products", f"{speed:,.3g} GFLOP/s on {usage['ranks']} rank(s)"
        yield "MFU", f"{usage['mfu']:.2%} of {peak:,.3g} GFLOP/s a rank ({usage['peak']})"
    about = "estimated" if usage["estimated"] else "measured"
    yield "Energy", f"{usage['joules']:,.4g} J {about}, {usage['watts']:,.3g} W ({usage['meter']})"
    yield "Carbon", f"{usage['grams']:,.3g} g CO2 at {usage['grams_per_kwh']:g} g per kWh"
    if usage["rest_s"]:
        yield "Rest", f"{usage['rest_s']:,.3g} s and {usage['rest_joules']:,.3g} J for train.power"
    if usage["joules_per_loss"] is not None:
        bare = usage["joules_per_loss_unpaced"]
        less = f", {bare:,.3g} J without rest" if usage["rest_s"] and bare is not None else ""
        yield "Energy per log loss", f"{usage['joules_per_loss']:,.3g} J{less}, by what it lies below that of a constant"


# Words


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A figure as a person reads it, with a true minus, none before a zero; a dash where it is undefined."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def moment(us: int) -> str:
    """A time (µs UTC) for people: `30 Dec 2013, 12:00 UTC`."""
    at = datetime.fromtimestamp(us // 1_000_000, UTC)
    return f"{at.day} {at:%b %Y, %H:%M}{f':{at:%S}' if at.second else ''} UTC"


def metric_words(metric: str) -> str:
    """A metric within a sentence: `log loss`, but `AUC`."""
    title = METRIC_TITLES[metric]
    return title if "AUC" in title else title.lower()


def model_title(name: str, chosen: str) -> str:
    """What a model is called on the pages; the challenger says what it is made of."""
    title = MODEL_TITLES.get(name, name.replace("_", " "))
    return f"{title}: {MODEL_TITLES.get(chosen, chosen)}" if name == CHALLENGER else title


def _span(found: Interval, *, sign: bool = False) -> str:
    """The bounds of an interval."""
    if found.low is None or found.high is None:
        return "no interval"
    return f"{number(found.low, sign=sign)} to {number(found.high, sign=sign)}"


def _value(value: Any) -> str:
    """A parameter for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _capital(text: str) -> str:
    named = ":" in text.partition(" ")[0].rstrip(":")  # a release is written as it is
    return text if named else text[:1].upper() + text[1:]


def _markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;")


def _bar(evaluation: Evaluation) -> str:
    """What the challenger had to beat."""
    return "the champion" if evaluation.bar == CHAMPION else "a model that knows only the base rate"


def _lead(found: Findings) -> str:
    """What the outcome of the run means."""
    release = found.manifest["release"]
    same = any(rule["name"] == SAME for rule in found.verdict["rules"])
    if found.manifest["outcome"] == "promoted" and same:
        return f"{release} is the champion: the same model as {found.run.parent}, packaged anew, and answers as it was trained."
    if found.manifest["outcome"] == "promoted":
        return f"{release} is the champion: it is better than {_bar(found.evaluation)}, and answers as it was trained."
    if found.manifest["outcome"] == "challenger":
        return f"{release} is better than {_bar(found.evaluation)}; it now has to prove itself on live traffic."
    if found.manifest["outcome"] == "unchanged":
        return f"The challenger equals the champion {release}, which goes on serving."
    return f"What serves stays as it is: {release}." if release else "There is no champion yet, and nothing is served."


def _asked(spec: Spec) -> str:
    if spec.predict_at is None:
        return f"once for each row of {spec.rows.source}"
    before, slack = duration_text(spec.predict_at.lead), duration_text(spec.predict_at.tolerance)
    return f"for each row of {spec.rows.source}, {before} before its {spec.predict_at.column} (give or take {slack})"


def _curl(found: Findings) -> str:
    """A request for the command line; empty where nothing serves or no row is open."""
    if not found.request or not found.manifest["release"]:
        return ""
    body = json.dumps({"rows": [found.request]}, ensure_ascii=False)
    url = f"http://127.0.0.1:{found.spec.serve.port}/predict"
    return f"curl -s {url} \\\n  -H 'content-type: application/json' \\\n  -d {shlex.quote(body)}"
