"""`python -m bench.export`: what computes the answers: every candidate made from one trained model, checked and measured in one
process, in turn.

A run of flights_demo (--quick: of tumours) trains the model; its network and its LightGBM are taken each by itself, with its own
calibration. All engines are made, also those that a run leaves out because making them takes long. Packages that are not here
are listed (`pip install millrace[compile]`).

Figures: `batch1_speedup_vs_eager` and `batch256_speedup_vs_eager` of the network as it is served, over PyTorch;
`trees_batch1_speedup_vs_native` and `trees_batch256_speedup_vs_native` of the trees over LightGBM's own `predict`;
`parity_max_abs`, the largest difference of a probability between what is served and PyTorch or LightGBM, on `parity_rows`: real
ones, at splits, with what is missing, unseen or infinite; `alone_equal`, whether a row alone is answered as among others;
`float32_max_abs`, the same difference of trees in float32, which are dropped; `engines`, what a run serves by `auto`;
`engines_of_all`, what it would if all were its candidates; `candidates` by what became of them; `stage_s`, what the stage cost
within the run.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import options, released, report
from deploy.compiled import network_of, table, tree_texts
from features.preprocess import Preprocess
from features.trainset import load_training_set
from models.engines import ENGINES, Engine
from models.inference import LIGHT, Form, Line, checked_rows, compare, pick, version_of
from models.score import Model, NetworkScorer
from pipelines.home import Home
from pipelines.manifest import read_json
from pipelines.run import spec_from
from tests.command import QUICK

BOUND = 1e-6
SLOW = {"aotinductor", "iree", "tvm", "treelite", "lleaves"}  # to make; left out with --quick


class Eager(NetworkScorer):
    """The trained network in PyTorch, one thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        torch.set_num_threads(1)
        self._net, self._inputs = make()[0], None

    def _answer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = self._net(*map(torch.from_numpy, inputs.values())).numpy()
        return found


def measure(home: Home, pipeline: str, manifest: Mapping[str, Any], *, quick: bool) -> tuple[dict[str, Any], list[Line]]:
    """Figures, and the lines of the table."""
    paths = {name: home.root / path for name, path in manifest["stage_paths"].items()}
    spec, data = spec_from(home.runs(pipeline) / manifest["run_id"] / "spec.json"), load_training_set(paths["training_set"])
    model, batch = Model.load(paths["train"]), data.batch.take(data.rows("valid_select"))
    rows = checked_rows(Preprocess.load(paths["train"] / "preprocess.json"), batch, tree_texts(model, "gbdt"))
    make = network_of(spec, paths["train"], paths["tune"], batch)
    eager = Form(Engine("eager", "network", "float32", "", NetworkScorer), Path(), Eager(make))
    wanted = {e.name for e in ENGINES} - (SLOW if quick else set())
    lines, chosen = list[Line](), dict[str, Line]()
    for member in ("network", "gbdt"):
        with tempfile.TemporaryDirectory() as work:
            some, _ = compare(model, member, rows, wanted, BOUND, Path(work), make, peers={"network": eager})
        passed = {line.engine: line for line in some if line.state in ("passed", "chosen")}
        chosen[member] = passed[pick([line for name, line in passed.items() if name in LIGHT])]
        lines += some
    net, trees = chosen["network"], chosen["gbdt"]
    peer, narrow = (next(line for line in lines if line.engine == name) for name in ("eager", "onnxruntime32"))
    assert net.speed and trees.speed and peer.speed
    figures = {
        "batch1_speedup_vs_eager": round(net.speed[0] / peer.speed[0], 2),
        "batch256_speedup_vs_eager": round(net.speed[1] / peer.speed[1], 2),
        "trees_batch1_speedup_vs_native": trees.speed[0], "trees_batch256_speedup_vs_native": trees.speed[1],
        "parity_max_abs": worst(peer) + max(worst(net), worst(trees)), "parity_rows": len(rows.batch),
        "alone_equal": net.alone and trees.alone, "float32_max_abs": worst(narrow),
        "engines": {name: f"{line.engine} ({line.precision})" for name, line in chosen.items()},
        "engines_of_all": {x.member: f"{x.engine} ({x.precision})" for x in lines if x.state == "chosen"},
        "candidates": dict(Counter(x.state for x in lines)),
        "stage_s": next(s["seconds"] for s in manifest["stages"] if s["stage"] == "export"),
    }  # fmt: skip
    return figures, lines


def worst(line: Line) -> float:
    """The largest difference of a probability."""
    return max(gap for gap in (line.gap, line.edge_gap) if gap is not None)


def main() -> None:
    """Trains, measures and reports."""
    told = options("export")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    pipeline, sets = ("tumours", QUICK) if told.quick else ("flights_demo", ("serve.latency_budget=5s",))
    try:
        home = released(folder / "home", pipeline, sets)
        manifest = read_json(next(home.runs(pipeline).glob("*/manifest.json")))
        figures, lines = measure(home, pipeline, manifest, quick=told.quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for row in table(lines):
        print("  ".join(f"{cell[:44]:<{width}}" for cell, width in zip(row, (8, 14, 8, 44, 10, 10, 9, 9, 12), strict=True)))
    report("export", figures, [asdict(x) for x in lines], told.json, "onnxruntime", "lightgbm", "torch", "numpy", "onnx",
           *sorted({p for e in ENGINES for p in e.packages if version_of(p)} - {"torch"}))  # fmt: skip


if __name__ == "__main__":
    main()
