"""`python -m bench.precision`: what mixed precision and `torch.compile` bring, on the device that is here.

A BERT encoder on texts of one length: BERT base, 128 tokens, batches of 64 on a GPU, on a CPU one of 2 × 128, 32 tokens. And an
MLP of 2 × 256 on 40 numbers, batches of 4,096. Each way of training is a process of its own, rounds in turn, medians; on a CPU
one thread. The first step, in which the compiler works, is told by itself.

Figures: `device`, `encoder`, `bf16_speedup` (of the encoder: rows per second over those of float32), `mfu` of the encoder by
precision (products of matrices a second, over those of one large product on the same device); `mlp_bf16_speedup`,
`mlp_compile_speedup`, `mlp_bf16_compile_speedup`, `compile_s`; `log_loss` on valid_fit after an epoch of each. On a CPU the
speedups are named `..._cpu`: no figure of a GPU is claimed without one.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.record import options, report
from bench.train_loop import apart, ours, settings, write
from features.preprocess import Batch, Preprocess
from features.tokens import Reader, Tokens
from features.trainset import TrainingSet
from models.arrays import Arrays, write_arrays
from models.candidate import devices
from models.custom import build
from models.data import resident
from models.usage import KINDS, flops_per_row, matmul_peak
from pipelines.spec import Train

WAYS = {
    "float32": {},
    "bf16": {"precision": "bf16-mixed"},
    "compile": {"compile": True},
    "bf16_compile": {"precision": "bf16-mixed", "compile": True},
}
BERT = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072}
SMALL = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
VOCABULARY = 30_522


def texts(rows: int, length: int) -> TrainingSet:
    """Random tokens, and a label that one of them tells; the last hundredth is valid_fit."""
    rng = np.random.default_rng(0)
    values = rng.integers(4, VOCABULARY, (rows, length)).astype(np.int32)
    label = rng.integers(0, 2, rows)
    values[:, length // 2] = 1_000 + label
    ends = np.arange(1, rows + 1) * length
    batch = Batch(np.empty((rows, 0)), np.empty((rows, 0), np.int64), np.empty((rows, 0), np.float32),
                  Tokens(values.ravel(), ends - length, ends, VOCABULARY, 0))  # fmt: skip
    fitted = Preprocess((), (), (), (), (), (), (), (), Reader(("text",), {}, length, 0, VOCABULARY))
    part = (np.arange(rows) >= rows - rows // 100).astype(np.int8)
    return TrainingSet({}, batch, label.astype(np.float64), part, np.arange(rows), np.empty(0, object), {}, fitted, {})


def write_texts(rows: int, length: int, folder: Path, train: Train) -> dict[str, float]:
    """The texts, as a rank finds them."""
    write_arrays(texts(rows, length), folder, train)
    return {}


def share_of_peak(arrays: Path, train: Train, rows_per_s: float) -> dict[str, float]:
    """How many products of matrices a second that many rows are, over what one large product reaches."""
    found = Arrays.load(arrays)
    device = torch.device("cuda" if devices() else "cpu")
    torch.set_num_threads(1)
    flops = flops_per_row(build(train, found.preprocess, 1, 1), resident(found, "valid_fit", 2))
    return {"mfu": flops * rows_per_s / matmul_peak(device, KINDS.get(train.precision, torch.float32))}


def main() -> None:
    """Measures and reports."""
    told = options("precision")
    gpu = bool(devices())
    rounds, count, width = (1, 30_000, 128) if told.quick else (2, 60_000, 256)
    encoder, length, size = (BERT, 128, 64) if gpu else (SMALL, 32, 32)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    mlp = {way: settings("memory", 4_096, network={"width": width, "depth": 2, "frequencies": 0, "dropout": 0.0}, **more)
           for way, more in WAYS.items()}  # fmt: skip
    read = {way: settings("memory", size, encoder=encoder, network={"width": 64, "depth": 1}, **WAYS[way])
            for way in ("float32", "bf16")}  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {}
    try:
        apart(write, count, work / "numbers", mlp["float32"])
        apart(write_texts, size * (40 if told.quick else 200), length, work / "texts", read["float32"])
        for _ in range(rounds):
            for name, folder, ways in (("mlp", "numbers", mlp), ("encoder", "texts", read)):
                for way, train in ways.items():
                    found.setdefault(f"{name} {way}", []).append(apart(ours, work / folder, work, train))
        rates = {way: statistics.median(run["rows_per_s"] for run in found[f"encoder {way}"]) for way in read}
        mfu = {way: round(apart(share_of_peak, work / "texts", read[way], rate)["mfu"], 4) for way, rate in rates.items()}
    finally:
        shutil.rmtree(work, ignore_errors=True)

    def speedup(name: str, way: str) -> float:
        pairs = zip(found[f"{name} {way}"], found[f"{name} float32"], strict=True)
        return round(statistics.median(a["rows_per_s"] / b["rows_per_s"] for a, b in pairs), 3)

    here = "" if gpu else "_cpu"
    figures = {
        "device": torch.cuda.get_device_name() if gpu else "cpu", "encoder": "BERT base" if gpu else "2 x 128",
        f"bf16_speedup{here}": speedup("encoder", "bf16"), "mfu": mfu,
        **{f"mlp_{way}_speedup{here}": speedup("mlp", way) for way in list(WAYS)[1:]},
        "compile_s": round(statistics.median(run["first_step_s"] for run in found["mlp compile"]), 1),
        "log_loss": {name: round(runs[0]["log_loss"], 5) for name, runs in found.items()},
    }  # fmt: skip
    rows = [{"what": name, "rows_per_s": [round(r["rows_per_s"]) for r in runs]} for name, runs in found.items()]
    report("precision", figures, rows, told.json)


if __name__ == "__main__":
    main()
