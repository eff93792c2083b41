"""`python -m bench.precision`: what mixed precision and `torch.compile` bring, on the device that is here.

An MLP of 2 × 256 on 40 numbers, batches of 4,096, each way of training a process of its own, rounds in turn, medians.
On a CPU one thread. The first step, in which the compiler works, is told by itself.

Figures: `device`, `bf16_speedup`, `compile_speedup`, `bf16_compile_speedup` (rows per second over those of float32 without the
compiler), `compile_s`, and `log_loss` on valid_fit after an epoch of each. On a CPU they are named `..._cpu`: no figure of a GPU
is claimed without one.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from bench.record import options, report
from bench.train_loop import apart, ours, settings, write
from models.candidate import devices

WAYS = {
    "float32": {},
    "bf16": {"precision": "bf16-mixed"},
    "compile": {"compile": True},
    "bf16_compile": {"precision": "bf16-mixed", "compile": True},
}


def main() -> None:
    """Measures and reports."""
    told = options("precision")
    rounds, count, width = (1, 30_000, 128) if told.quick else (2, 60_000, 256)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        apart(write, count, work / "arrays", settings("memory", 4_096))
        for _ in range(rounds):
            for way, more in WAYS.items():
                train = settings("memory", 4_096, network={"width": width, "depth": 2, "frequencies": 0, "dropout": 0.0}, **more)
                found[way].append(apart(ours, work / "arrays", work, train))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    here = "" if devices() else "_cpu"
    figures = {"device": torch.cuda.get_device_name() if not here else "cpu"}
    for way in list(WAYS)[1:]:
        pairs = zip(found[way], found["float32"], strict=True)
        figures[f"{way}_speedup{here}"] = round(statistics.median(a["rows_per_s"] / b["rows_per_s"] for a, b in pairs), 3)
    figures["compile_s"] = round(statistics.median(r["first_step_s"] for r in found["compile"]), 1)
    figures["log_loss"] = {way: round(runs[0]["log_loss"], 5) for way, runs in found.items()}
    rows = [{"what": way, "rows_per_s": [round(r["rows_per_s"]) for r in runs]} for way, runs in found.items()]
    report("precision", figures, rows, told.json)


if __name__ == "__main__":
    main()
