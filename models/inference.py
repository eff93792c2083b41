"""What answers for a trained model: candidates made from each member, checked, measured here, and one chosen. B rows.

A candidate has to answer as the member does: within a bound of the final probability, on real rows and on those where an engine
is likeliest to differ; each row alone as among others, to the bit. It replaces the default where it is clearly faster.
"""

import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from features.preprocess import UNSEEN, Batch, Preprocess
from models.engines import DEFAULT, ENGINES, Engine, target
from models.score import Model, Scorer
from models.trees_onnx import thresholds, write_trees
from pipelines.errors import UsageError
from pipelines.manifest import digest_of

FASTER, SLOWER = 1.3, 0.95  # a candidate replaces what is before it from so many times its speed at 1 row, and so at 256
LIGHT = {"onnxruntime", "onnxruntime32", "openvino", "lightgbm"}  # made within a second: candidates of every run
WITH = {"aotinductor": ("torch",), "iree": ("iree-base-compiler",), "treelite": ("treelite",)}  # what making needs besides
REAL, SNAPPED, ALONE = 2_000, 300, 64  # rows that answers are compared on, that are moved to splits, that are asked one by one
ROUNDS, CALLS, ENOUGH_S = 5, {1: 60, 256: 6}, 3.0  # rounds end early where a model is slow


@dataclass(frozen=True)
class Line:
    """One candidate for one member, as the table shows it.

    `gap` and `edge_gap`: largest difference of the final probability on real rows, and on rows at splits, with what is missing,
    unseen or infinite. `us`: microseconds of 1 and of 256 rows; `speed`: how many times as fast as the default.
    """

    member: str
    engine: str
    precision: str
    state: str
    why: str = ""
    gap: float | None = None
    edge_gap: float | None = None
    exact: bool = False
    alone: bool = True
    made_s: float = 0.0
    us: tuple[float, float] | None = None
    speed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Checked:
    """Rows that candidates are compared on: real ones first, `real` of them, then made ones."""

    batch: Batch
    real: int


@dataclass(frozen=True)
class Form:
    """A candidate that was made: its file, and what answers by it."""

    engine: Engine
    path: Path
    scorer: Scorer


@dataclass(frozen=True)
class Trial:
    """What candidates for members of a candidate of the model have to answer: raw logits by member, and probabilities."""

    model: Model
    name: str
    raw: Mapping[str, np.ndarray]
    reference: np.ndarray
    rows: Checked
    bound: float


def hardware() -> dict[str, Any]:
    """What a choice holds for: CPU, cores, what the CPU can do, and the versions of what is installed of the engines."""
    names = sorted({p for e in ENGINES for p in e.packages} | {p for some in WITH.values() for p in some}
                   | {"lightgbm", "numpy", "onnxruntime"})  # fmt: skip
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "target": digest_of(target())[:16],
            "versions": {n: v for n in names if (v := version_of(n))}}  # fmt: skip


def cpu_name() -> str:
    """What the CPU calls itself."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"(?m)^model name\s*:\s*(.*)$", path.read_text() if path.is_file() else "")
    return found[1] if found else platform.processor() or platform.machine()


def version_of(package: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def not_installed(engine: Engine) -> list[str]:
    """Packages that making and serving by an engine needs and that are not here."""
    return [p for p in (*engine.packages, *WITH.get(engine.name, ())) if not version_of(p)]


def check_engines(names: Sequence[str]) -> None:
    """Raises UsageError for a named engine whose packages are not here: before anything is trained."""
    for engine in ENGINES:
        if engine.name in names and (missing := not_installed(engine)):
            raise UsageError(f"serve.inference {engine.name}: not installed: pip install {' '.join(missing)}")


# Rows


def checked_rows(preprocess: Preprocess, batch: Batch, texts: Sequence[str]) -> Checked:
    """The newest rows of a part, and made ones: on the splits of these boosters, and with what is missing, unseen or infinite."""
    share = 1 if batch.tokens is None else 10  # an encoder takes milliseconds a row
    batch = batch.take(np.arange(max(0, len(batch) - REAL // share), len(batch)))
    few = batch.take(np.linspace(0, len(batch) - 1, min(SNAPPED // share, len(batch))).astype(int))
    made = [*snapped(few.numbers, texts), *(np.full_like(few.numbers, v) for v in (np.nan, np.inf, -np.inf, 0.0, 1e300))]
    holes = np.where(np.random.default_rng(0).random(few.numbers.shape) < 0.5, np.nan, few.numbers)
    codes = [*(few.codes for _ in made), np.full_like(few.codes, UNSEEN)]
    numbers = np.concatenate([batch.numbers, *made, holes])
    again = np.concatenate([np.arange(len(batch)), *([np.linspace(0, len(batch) - 1, len(few)).astype(int)] * len(codes))])
    tokens = batch.tokens.take(again) if batch.tokens is not None else None
    return Checked(preprocess.inputs(numbers, np.concatenate([batch.codes, *codes]), tokens), len(batch))


def snapped(numbers: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
    """Rows each of whose numbers was moved to the nearest split by it: at it, the next float64 and float32 to either side."""
    splits: dict[int, np.ndarray] = {}
    for text in texts:
        for column, values in thresholds(text).items():
            splits[column] = np.union1d(splits.get(column, values), values)
    at = numbers.copy()
    for column, values in splits.items():
        if column < at.shape[1]:
            values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
            there, place = at[:, column], np.searchsorted(values, at[:, column]).clip(1, max(len(values) - 1, 1))
            low, high = values[place - 1], values[np.minimum(place, len(values) - 1)]
            at[:, column] = np.where(np.isnan(there), there, np.where(there - low < high - there, low, high))
    with np.errstate(over="ignore"):
        narrow = at.astype(np.float32)
    sides = [np.nextafter(at, side) for side in (-np.inf, np.inf)]
    narrow_sides = [np.nextafter(narrow, np.float32(side)) for side in (-np.inf, np.inf)]
    return [at, *sides, *(values.astype(np.float64) for values in (narrow, *narrow_sides))]


# Candidates


def compare(
    model: Model, name: str, rows: Checked, wanted: set[str], bound: float, work: Path, network: Callable[[], Any],
    named: Sequence[str] = ("auto",), peers: Mapping[str, Form] | None = None,
) -> tuple[list[Line], dict[str, Form]]:  # fmt: skip
    """The table for the members of a candidate, and what is chosen for each member.

    `wanted`: engines that are made; `named`: those that are taken wherever they pass. `network` makes the trained network in
    PyTorch, for engines that begin with it. `peers`: by member, what is measured beside and never chosen.
    """
    raw = {member: model.raw(member, rows.batch) for member in model.candidates[name]}
    trial, lines, chosen = Trial(model, name, raw, model.answer(name, raw), rows, bound), list[Line](), dict[str, Form]()
    for member in (m for m in raw if model.members[m].kind in DEFAULT):
        some, forms = _candidates(trial, member, wanted, work, network, named)
        if peers and member in peers:
            peer = peers[member]
            forms[peer.engine.name], beside = peer, Line(member, peer.engine.name, peer.engine.precision, "peer")
            some.append(_judged(beside, peer, replace(trial, bound=np.inf)))
        some = measured(some, forms, rows.batch)
        best = pick([line for line in some if line.state == "passed"], named)
        chosen[member] = forms[best]
        lines += [replace(line, state="chosen") if line.engine == best else line for line in some]
    return lines, chosen


def _candidates(
    trial: Trial, member: str, wanted: set[str], work: Path, network: Callable[[], Any], named: Sequence[str]
) -> tuple[list[Line], dict[str, Form]]:  # fmt: skip
    """A line for each engine of a member, and what was made of them and answers with numbers, by name: the default first."""
    lines, forms, kind = list[Line](), dict[str, Form](), trial.model.members[member].kind
    for engine in (e for e in ENGINES if e.kind == kind):
        line, form = Line(member, engine.name, engine.precision, "passed"), None
        if engine.name == DEFAULT[kind]:
            path = trial.model.folder / trial.model.members[member].file
            line, form = replace(line, gap=0.0, edge_gap=0.0, exact=True), Form(engine, path, engine.load(path))
        elif missing := not_installed(engine):
            line = replace(line, state="not installed", why=f"pip install {' '.join(missing)}")
        elif engine.name not in wanted:
            line = replace(line, state="not tried", why=f"serve.inference: {engine.name}, or python -m bench.export")
        else:
            line, form = _made(line, engine, trial.model, work, network)
            line = _judged(line, form, trial) if form else line
            if line.state == "passed" and not line.alone and ("auto" in named or engine.name not in named):
                line = replace(line, state="dropped", why="a row alone is answered otherwise than among others")
        lines.append(line)
        if form and line.gap is not None:
            forms[engine.name] = form
    return lines, forms


def _made(line: Line, engine: Engine, model: Model, work: Path, network: Callable[[], Any]) -> tuple[Line, Form | None]:
    """A candidate, made and loaded; or why it could not be."""
    member, began = model.members[line.member], time.perf_counter()
    source = work / member.file
    path = work / f"{member.name}{engine.suffix}"
    try:
        if not source.exists():
            shutil.copyfile(model.folder / member.file, source)
        if member.kind == "gbdt":
            _write_trees(engine, source, path)
        elif path != source:
            from models.export import FORMS  # PyTorch: seconds, which most candidates do not need

            net, inputs = network()
            FORMS[engine.name](net, inputs, source, path)
        form = Form(engine, path, engine.load(path))
    except Exception as error:  # whatever a compiler says
        return replace(line, state="failed", why=_words(error)), None
    return replace(line, made_s=round(time.perf_counter() - began, 2)), form


def _write_trees(engine: Engine, source: Path, path: Path) -> None:
    text = source.read_text(encoding="utf-8")
    if engine.name.startswith("onnxruntime"):
        write_trees(text, path, np.float64 if engine.precision == "float64" else np.float32)
    elif engine.name == "treelite":
        import tl2cgen
        import treelite

        booster = treelite.frontend.load_lightgbm_model(str(source))
        tl2cgen.export_lib(booster, toolchain="gcc", libpath=str(path), params={"parallel_comp": 0}, verbose=False)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _judged(line: Line, form: Form, trial: Trial) -> Line:
    """A candidate's answers beside the member's own."""
    rows = trial.rows
    try:
        found = form.scorer.logit(rows.batch)
        few = np.linspace(0, len(rows.batch) - 1, min(ALONE, len(rows.batch))).astype(int)
        by_itself = np.array([form.scorer.logit(rows.batch.take(np.array([i])))[0] for i in few])
    except Exception as error:
        return replace(line, state="failed", why=_words(error))
    answers = trial.model.answer(trial.name, {**trial.raw, line.member: found})
    off = np.abs(answers - trial.reference)
    gap, edge = (float(part.max(initial=0.0)) for part in (off[: rows.real], off[rows.real :]))
    alone = bool(np.array_equal(by_itself, found[few], equal_nan=True))
    line = replace(line, gap=gap, edge_gap=edge, exact=np.array_equal(found, trial.raw[line.member]), alone=alone)
    wrong = int((~np.isfinite(answers)).sum())
    if wrong:
        return replace(line, state="dropped", why=f"{wrong:,} of {len(off):,} answers are no numbers", gap=None, edge_gap=None)
    if not max(gap, edge) <= trial.bound:
        over = [int((part > trial.bound).sum()) for part in (off[: rows.real], off[rows.real :])]
        return replace(line, state="dropped", why=f"{over[0]:,} of {rows.real:,} real rows and {over[1]:,} of "
                       f"{len(off) - rows.real:,} made ones differ by more than {trial.bound:g}")  # fmt: skip
    return line


def measured(lines: Sequence[Line], forms: Mapping[str, Form], batch: Batch) -> list[Line]:
    """The lines with what their candidates take, in turn: medians of rounds, and of the ratios to the default within a round."""
    took: dict[str, dict[int, list[float]]] = {name: {size: [] for size in CALLS} for name in forms}
    parts_of = {size: [batch.take(np.arange(i, i + size) % len(batch)) for i in range(0, calls * size, size)]
                for size, calls in CALLS.items()}  # fmt: skip
    began = time.perf_counter()
    for _ in range(ROUNDS):
        if time.perf_counter() - began > ENOUGH_S:
            break
        for size, parts in parts_of.items():
            for name, form in forms.items():
                form.scorer.logit(parts[0])
                took[name][size].append(_median_us(form.scorer, parts))
    base = next(iter(forms))
    found = []
    for line in lines:
        if line.engine in took:
            mine = took[line.engine]
            us = tuple(round(statistics.median(mine[size]), 2) for size in CALLS)
            speed = tuple(round(statistics.median(b / m for b, m in zip(took[base][size], mine[size], strict=True)), 3)
                          for size in CALLS)  # fmt: skip
            line = replace(line, us=(us[0], us[1]), speed=(speed[0], speed[1]))
        found.append(line)
    return found


def _median_us(scorer: Scorer, parts: Sequence[Batch]) -> float:
    took = []
    for part in parts:
        began = time.perf_counter_ns()
        scorer.logit(part)
        took.append((time.perf_counter_ns() - began) / 1e3)
    return statistics.median(took)


def pick(lines: Sequence[Line], named: Sequence[str] = ("auto",)) -> str:
    """The engine that answers: the first of those named that passed, else the default; by `auto` a later one where it is clearly
    faster at one row than what is before it, and no slower at 256.
    """
    best = lines[0]
    if "auto" not in named:
        return next((name for name in named if name in {line.engine for line in lines}), best.engine)
    for line in lines[1:]:
        assert line.speed is not None and best.speed is not None
        one, many = (mine / theirs for mine, theirs in zip(line.speed, best.speed, strict=True))
        if one >= FASTER and many >= SLOWER:
            best = line
    return best.engine
