"""`millrace runs PIPELINE A B`: two runs side by side, as a page and as words for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy import plots
from deploy.findings import MODEL_TITLES, Learning, learning_of
from deploy.report import METRIC_TITLES, environment, metric_words, number
from deploy.runs import PREFIX, champion_run, flat
from models.evaluate import CHALLENGER, CHAMPION, METRICS, Interval, evaluate
from pipelines.clock import iso
from pipelines.errors import UsageError, nearest
from pipelines.home import Home
from pipelines.manifest import read_json, write_atomic
from pipelines.run import finished, spec_from
from pipelines.spec import Spec

SHOWN = 8  # differences of a section that a terminal shows
_SECTIONS = ("spec", "hyper_parameters", "inputs")
_PINS = ("snapshot", "as_of", "parent", "code")


@dataclass(frozen=True)
class Side:
    """One of two runs that are compared."""

    manifest: Mapping[str, Any]
    spec: Spec
    learning: tuple[Learning, ...]

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])

    def metric(self, name: str) -> Interval:
        return Interval(**self.manifest["metrics"][CHALLENGER][name])


@dataclass(frozen=True)
class Difference:
    """A field that two runs have otherwise; a dash where one has none."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class Compared:
    """Two runs, A and B. `gains`: how much better B is on the `rows` that both were tested on; empty without such."""

    a: Side
    b: Side
    rows: int
    gains: Mapping[str, Interval]
    differences: Mapping[str, tuple[Difference, ...]]

    @property
    def same(self) -> bool:
        return bool(self.a.manifest["result_digest"] == self.b.manifest["result_digest"])


def compare_runs(home: Home, pipeline: str, names: Sequence[str]) -> tuple[Compared, Path]:
    """Two runs side by side, and the page that shows them. Raises UsageError for a run that is not known or left no result."""
    a, b = (_side(home, pipeline, name) for name in names)
    rows, gains = _paired(home, a, b)
    found = Compared(a, b, rows, gains, {name: tuple(differences) for name, differences in _differences(a, b) if differences})
    page = home.runs(pipeline) / "compare" / f"{a.run_id}_{b.run_id}.html"
    counts = _both(a.manifest["counts"], b.manifest["counts"])
    with plots.style():
        text = environment().get_template("compare.html.j2").render(
            found=found, pipeline=pipeline, plots=plots, metrics=METRICS, metric_titles=METRIC_TITLES, curves=_curves(a, b),
            models=MODEL_TITLES, lead=_lead(found), stages=_stages(a, b), counts=counts,
        )  # fmt: skip
    write_atomic(page, text)
    return found, page


def words(found: Compared) -> list[str]:
    """The comparison for a terminal."""
    lines = [f"{'':<18} {'A ' + found.a.run_id:<26} {'B ' + found.b.run_id:<26} B better by"]
    for name in ("outcome", "chosen", "finished_wall_us", "result_digest"):
        shown = [side.manifest[name] for side in (found.a, found.b)]
        a, b = (iso(value)[:16] if name == "finished_wall_us" else value[:PREFIX] for value in shown)
        lines.append(f"{name.removesuffix('_wall_us').replace('_', ' '):<18} {a:<26} {b:<26}".rstrip())
    for metric in METRICS:
        a, b = (_span(side.metric(metric)) for side in (found.a, found.b))
        better = _span(found.gains[metric], sign=True) if found.gains else ""
        lines.append(f"{metric_words(metric):<18} {a:<26} {b:<26} {better}".rstrip())
    for section, differences in found.differences.items():
        lines += [f"{section.replace('_', ' ')}: {d.name}: {d.a} → {d.b}" for d in differences[:SHOWN]]
        more = len(differences) - SHOWN
        lines += [f"{section.replace('_', ' ')}: {more} more on the page"] if more > 0 else []
    return [*lines, _lead(found)]


def _span(found: Interval, *, sign: bool = False) -> str:
    if found.low is None or found.high is None:
        return number(found.value, sign=sign)
    return f"{number(found.value, sign=sign)} ({number(found.low, sign=sign)} to {number(found.high, sign=sign)})"


def _lead(found: Compared) -> str:
    """What the comparison comes to, in a sentence."""
    if found.same:
        return "Both runs have the same result, to the last bit."
    if not found.gains:
        return "The two were tested on other rows: their figures are not on the same scale."
    metric = found.b.spec.gate.metric
    gain = found.gains[metric]
    on = f"on the {found.rows:,} test rows that both have, in {metric_words(metric)}"
    if (gain.low or 0) > 0:
        return f"B is better {on}: its whole interval is above 0."
    if (gain.high or 0) < 0:
        return f"A is better {on}: the whole interval is below 0."
    return f"Neither is clearly better {on}: the interval holds 0."


def _side(home: Home, pipeline: str, name: str) -> Side:
    """The run of this name, or of a name that begins so; `champion`: the one that made the champion."""
    known = {manifest["run_id"]: manifest for manifest in finished(home, pipeline)}
    wanted = champion_run(home, pipeline) or name if name == CHAMPION else name
    fits = [run_id for run_id in known if run_id == wanted] or [run_id for run_id in known if run_id.startswith(wanted)]
    if len(fits) != 1:
        what = f"begins {len(fits)} runs: {', '.join(fits)}" if fits else f"is no run of {pipeline} that has ended"
        raise UsageError(f"{name!r} {what}{nearest(name, list(known))}; `millrace runs {pipeline}` lists them")
    manifest = known[fits[0]]
    if not manifest["result_digest"]:
        raise UsageError(f"run {fits[0]} was refused by its contract and left nothing to compare: {manifest['reasons'][0]}")
    chosen = manifest["stage_paths"].get("autofe")
    spec = spec_from((home.root / chosen if chosen else home.runs(pipeline) / fits[0]) / "spec.json")
    curves = home.root / manifest["stage_paths"]["train"] / "curves.json"
    learning = learning_of({k: v for k, v in read_json(curves).items() if k != "format_version"}) if curves.is_file() else ()
    return Side(manifest, spec, learning)


def _paired(home: Home, a: Side, b: Side) -> tuple[int, Mapping[str, Interval]]:
    """How much better B is on the rows that both were tested on; nothing where there are fewer than the gate wants."""
    tables = []
    for side in (a, b):
        path = home.root / side.manifest["stage_paths"]["evaluate"] / "test.parquet"
        if not path.is_file():
            return 0, {}
        table = pq.read_table(path, columns=["t", "key", "label", CHALLENGER])
        tables.append(table.append_column("row", pc.binary_join_element_wise(table["t"].cast(pa.string()), table["key"], " ")))
    joined = tables[0].join(tables[1], "row", right_suffix="_b", join_type="inner").sort_by("row")
    label = joined["label"].to_numpy()
    if joined.num_rows < b.spec.gate.min_rows or not np.array_equal(label, joined["label_b"].to_numpy()):
        return joined.num_rows, {}
    models = {CHALLENGER: joined[f"{CHALLENGER}_b"].to_numpy(), CHAMPION: joined[CHALLENGER].to_numpy()}
    found = evaluate(label, models, {}, b.spec.gate, b.spec.seed)
    return joined.num_rows, found.gains[CHAMPION]


def _differences(a: Side, b: Side) -> Iterator[tuple[str, list[Difference]]]:
    """By section the fields that are not the same."""
    sides = []
    for side in (a, b):
        pins = {name: side.manifest["inputs"].get(name, "") for name in _PINS}
        pins |= {"lock": side.manifest["lock_digest"], "commit": side.manifest["git_commit"]}
        sides.append({"spec": side.spec.model_dump(mode="json", by_alias=True), "inputs": pins,
                      "hyper_parameters": side.manifest["hyper_parameters"]})  # fmt: skip
    for section in _SECTIONS:
        ours, theirs = (dict(flat(side[section])) for side in sides)
        yield section, [Difference(*one) for one in _both(ours, theirs) if one[1] != one[2]]


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    ours, theirs = ({name: _short(value) for name, value in side.items()} for side in (a, b))
    return [(name, ours.get(name, "–"), theirs.get(name, "–")) for name in dict.fromkeys((*ours, *theirs))]


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{text[:PREFIX]}…" if len(text) == 64 and text.isalnum() else text if len(text) <= 160 else f"{text[:159]}…"


def _stages(a: Side, b: Side) -> list[tuple[str, float | None, float | None]]:
    ours, theirs = ({cost["stage"]: cost["seconds"] for cost in side.manifest["stages"]} for side in (a, b))
    return [(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys((*ours, *theirs))]


def _curves(a: Side, b: Side) -> list[tuple[str, Learning, Learning]]:
    """Model → its learning in A and in B, where both have it."""
    ours, theirs = ({one.model: one for one in side.learning} for side in (a, b))
    return [(model, ours[model], theirs[model]) for model in ours if model in theirs]
