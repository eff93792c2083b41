"""The stage between verdict and bento: in what form each member of the chosen model is packaged."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from features.preprocess import Batch, Preprocess
from features.trainset import load_training_set
from models.engines import DEFAULT, target
from models.inference import LIGHT, Form, Line, checked_rows, compare, hardware
from models.score import Member, Model
from models.served import SERVED
from pipelines.manifest import Note, read_json, write_json, write_page
from pipelines.spec import Spec

EXACT = 1e-6  # largest difference of a probability by which preflight calls two answers the same


def compile_into(spec: Spec, model_folder: Path, data_folder: Path, study: Path, out: Path) -> Note:
    """The stage: writes `inference.json` and the files that it names; the table with its times beside, outside of all digests."""
    words, bound = spec.serve.inference, spec.serve.max_gap
    model = Model.load(model_folder)
    preprocess = Preprocess.load(model_folder / "preprocess.json")
    data = load_training_set(data_folder)
    batch = data.batch.take(data.rows("valid_select"))
    with tempfile.TemporaryDirectory(dir=out) as work:
        rows = checked_rows(preprocess, batch, tree_texts(model, model.chosen))
        lines, chosen = compare(model, model.chosen, rows, wanted(words, bound), bound, Path(work),
                                network_of(spec, model_folder, study, batch), words)  # fmt: skip
        others = {name: form for name, form in chosen.items() if form.engine.name != DEFAULT[form.engine.kind]}
        members = {name: _kept(form, lines, model.members[name], out) for name, form in others.items()}
    write_json(out / SERVED, {
        "members": members, "bound": bound,
        "packages": sorted({p for form in chosen.values() for p in form.engine.packages}),
    })  # fmt: skip
    write_json(out / "volatile" / "measured.json", {"hardware": hardware(), "bound": bound, "table": [asdict(x) for x in lines]})
    write_page(out / "volatile" / "page.md", f"{spec.pipeline}: what answers", [("Candidates", table(lines))])
    return Note(said(lines, words))


def wanted(words: Sequence[str], bound: float) -> set[str]:
    """Engines that are made for these words of `serve.inference`: what is light, or what is named."""
    named = set(words) - {"auto", "native"}
    return named | LIGHT | ({"int8"} if bound > EXACT else set()) if "auto" in words else named


def tree_texts(model: Model, name: str) -> list[str]:
    """The boosters of a candidate."""
    members = [model.members[m] for m in model.candidates[name]]
    return [(model.folder / m.file).read_text(encoding="utf-8") for m in members if m.kind == "gbdt"]


def network_of(spec: Spec, model: Path, study: Path, batch: Batch) -> Callable[[], Any]:
    """Makes the trained network in PyTorch, and two rows as it reads them."""

    def make() -> Any:
        import torch
        from safetensors.torch import load_file

        from models.custom import build
        from models.tune import apply

        best = read_json(study / "best.json")
        train = apply(spec.training, dict(best["network"]["params"]) if "network" in best else {})
        net = build(train, Preprocess.load(model / "preprocess.json"), spec.seed, 1)
        net.load_state_dict(load_file(model / "network.safetensors"))
        two = batch.take(np.arange(2))
        inputs = [two.scaled, two.codes, *([two.tokens.padded()] if two.tokens is not None else [])]
        return net.eval(), tuple(map(torch.from_numpy, inputs))

    return make


def _kept(form: Form, lines: Sequence[Line], member: Member, out: Path) -> dict[str, Any]:
    """Copies a candidate's file to stay, unless it is the member's own; what the bundle says of it."""
    exact = next(x.exact for x in lines if (x.member, x.engine) == (member.name, form.engine.name))
    if form.path.name != member.file:
        shutil.copyfile(form.path, out / form.path.name)
    return {"engine": form.engine.name, "file": form.path.name, "exact": exact,
            "target": target() if form.engine.machine else []}  # fmt: skip


def said(lines: Sequence[Line], words: Sequence[str]) -> str:
    """What the stage says of itself: what answers for each member, and what was named in vain."""
    chosen = ", ".join(f"{x.member} by {x.engine} ({x.precision})" for x in lines if x.state == "chosen")
    vain = [f"{x.engine} for {x.member} {x.state}: {x.why}" for x in lines
            if x.engine in words and x.state in ("dropped", "failed", "not installed")]  # fmt: skip
    tried = sum(x.state in ("chosen", "passed", "dropped", "failed") for x in lines)
    return "; ".join([chosen or "as it was trained", f"{tried} candidates", *vain])


def table(lines: Sequence[Mapping[str, Any] | Line]) -> list[tuple[str, ...]]:
    """The table for a page: a head and a line for each candidate."""
    rows: list[tuple[str, ...]] = [("member", "engine", "computes in", "", "largest difference", "on made rows", "1 row",
                                    "256 rows", "times as fast")]  # fmt: skip
    for line in lines:
        x = line if isinstance(line, Mapping) else asdict(line)
        gaps = ["" if x[n] is None else f"{x[n]:.2g}" for n in ("gap", "edge_gap")]
        times = [f"{us:,.0f} µs" for us in x["us"]] if x["us"] else ["", ""]
        speed = ", ".join(f"{s:.2f}" for s in x["speed"]) if x["speed"] else ""
        state = f"{x['state']}: {x['why']}" if x["why"] else x["state"]
        rows.append((x["member"], x["engine"], x["precision"], state, *gaps, *times, speed))
    return rows
