"""`python -m bench.train_loop`: the training loop against one written by hand, on a table of two million rows × 40 numbers.

An MLP of 2 × 128, float32, one thread, batches of 4,096 (and 1,024). Every measurement is a process of its own, forked in turn
with its peers; ratios are medians of rounds. By hand: the same network, optimiser and schedule in ten lines of PyTorch on
tensors in memory, which lack what a run needs to resume, to judge, and to notice a loss that is not finite.

Figures: `ratio_to_handwritten` (rows per second over those by hand), `ratio_to_handwritten_1024`, `speedup_vs_row_dataset` (over
Lightning on a Dataset that gives one row at a time), `streaming_ratio_to_resident` (rows streamed from Parquet, over rows in
memory), `data_wait_share` and `busy_share` (of the loop's time: until the next batch is there; forward, backward, optimiser), by
feed; and the memory that the rows need in the process that trains, by feed.
"""

import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from bench.record import options, report
from features.preprocess import Batch, Preprocess
from features.trainset import TrainingSet
from models.arrays import Arrays, epoch_shape, write_arrays
from models.candidate import devices
from models.data import resident, shuffled
from models.job import Job
from models.module import TabularModule
from models.net import build_net
from models.train import main as train_main
from models.train import quiet
from pipelines.manifest import read_json
from pipelines.spec import Network, Train

COLUMNS = 40
NETWORK = Network(width=128, depth=2, frequencies=0, dropout=0.0)


def table(rows: int) -> TrainingSet:
    """Numbers that are standardised already, and a label that some of them explain; the last hundredth is valid_fit."""
    rng = np.random.default_rng(0)
    scaled = rng.standard_normal((rows, COLUMNS), np.float32)
    label = (rng.random(rows) < 1 / (1 + np.exp(-scaled[:, :4].sum(1)))).astype(np.float64)
    part = (np.arange(rows) >= rows - rows // 100).astype(np.int8)
    names, flat = tuple(f"x{i}" for i in range(COLUMNS)), (0.0,) * COLUMNS
    fitted = Preprocess(names, (), (-9.0,) * COLUMNS, (9.0,) * COLUMNS, flat, (1.0,) * COLUMNS, (), ())
    batch = Batch(np.empty((rows, 0)), np.empty((rows, 0), np.int64), scaled)
    return TrainingSet({}, batch, label, part, np.arange(rows), np.empty(0, object), {}, fitted, {})


def settings(feed: str, batch: int, **more: Any) -> Train:
    given = {"network": NETWORK, "max_epochs": 1, "batch_size": batch, "feed": feed, "checkpoint_every": 3_600_000_000}
    return Train.model_validate({**given, **more})


def write(rows: int, folder: Path, train: Train) -> dict[str, float]:
    """The table, as a rank finds it."""
    began = time.perf_counter()
    write_arrays(table(rows), folder, train)
    return {"seconds": time.perf_counter() - began}


def ours(arrays: Path, work: Path, train: Train) -> dict[str, float]:
    """One epoch of the product's training, as a rank runs it."""
    folder = Path(tempfile.mkdtemp(dir=work))
    Job(str(arrays), train, 1, 1, export=False, accelerator="gpu" if devices() else "cpu").prepare(folder)
    train_main(folder)
    told, (epoch,) = read_json(folder / "timing.json"), read_json(folder / "result.json")["curve"]
    return {**told, "rows_per_s": train.batch_size / told["step_quiet_s"], "rss_mb": peak_mb(), "log_loss": epoch["log_loss"]}


def plain(arrays: Path, batch: int, rank: int = 0, world: int = 1) -> tuple[nn.Module, Callable[[int], None], int]:
    """By hand on tensors in memory: the network, a step of a rank's share of the batch of a number, and how many steps."""
    torch.set_num_threads(1)
    found = Arrays.load(arrays)
    rows = resident(found, "train")
    shape = epoch_shape(len(rows), batch, world)
    net: nn.Module = build_net(found.preprocess, Train(network=NETWORK), 1)
    net = DistributedDataParallel(net) if world > 1 else net
    made: Any = TabularModule(net, settings("memory", batch), shape.steps).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    order = shuffled(len(rows), 1)

    def step(i: int) -> None:
        some = order[i * batch : (i + 1) * batch][rank::world]
        loss = binary_cross_entropy_with_logits(net(rows.scaled[some], rows.codes[some]), rows.label[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return net, step, shape.steps


def by_hand(arrays: Path, batch: int) -> dict[str, float]:
    """One epoch of a plain loop."""
    _, step, steps = plain(arrays, batch)
    step(0)  # the first also allocates
    began = time.perf_counter()
    for i in range(1, steps):
        step(i)
    return {"rows_per_s": (steps - 1) * batch / (time.perf_counter() - began)}


class RowByRow(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Rows as most tutorials give them."""

    def __init__(self, arrays: Arrays) -> None:
        self.rows = resident(arrays, "train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows.scaled[i], self.rows.codes[i], self.rows.label[i]


def row_dataset(arrays: Path, batch: int, steps: int) -> dict[str, float]:
    """Some steps of Lightning's Trainer on a DataLoader of single rows."""
    torch.set_num_threads(1)
    quiet()
    found = Arrays.load(arrays)
    module = TabularModule(build_net(found.preprocess, Train(network=NETWORK), 1), settings("memory", batch), steps)
    silent: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    began = 0.0

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            nonlocal began
            began = time.perf_counter() if batch_idx == 1 else began

    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=steps, callbacks=[Start()], **silent)
    trainer.fit(module, DataLoader(RowByRow(found), batch_size=batch, shuffle=True))
    return {"rows_per_s": (steps - 1) * batch / (time.perf_counter() - began)}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(measure: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
    """What a function finds in a process of its own."""
    fork = multiprocessing.get_context("fork")  # imports are over, no thread has begun
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: theirs.send(measure(*given)))
    child.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    child.join()
    return found


def main() -> None:
    """Measures and reports."""
    told = options("train_loop")
    rounds, count = (1, 100_000) if told.quick else (5, 2_000_000)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    found: dict[str, list[dict[str, float]]] = {}
    try:
        made = {}
        for feed in ("memory", "stream"):
            made[feed] = work / feed
            apart(write, count, made[feed], settings(feed, 4_096))
        for _ in range(rounds):
            for name, measure, given in (
                ("by hand, 4,096", by_hand, (made["memory"], 4_096)),
                ("memory, 4,096", ours, (made["memory"], work, settings("memory", 4_096))),
                ("stream, 4,096", ours, (made["stream"], work, settings("stream", 4_096))),
                ("by hand, 1,024", by_hand, (made["memory"], 1_024)),
                ("memory, 1,024", ours, (made["memory"], work, settings("memory", 1_024))),
                ("row by row, 4,096", row_dataset, (made["memory"], 4_096, 8 if told.quick else 25)),
            ):
                found.setdefault(name, []).append(apart(measure, *given))
    finally:
        shutil.rmtree(work, ignore_errors=True)

    def ratio(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return round(statistics.median(a["rows_per_s"] / b["rows_per_s"] for a, b in pairs), 3)

    def share(name: str, *parts: str) -> float:
        whole = [sum(r[f"{p}_s"] for p in ("data", "forward", "backward", "optimizer", "other")) for r in found[name]]
        some = [sum(r[f"{p}_s"] for p in parts) for r in found[name]]
        return round(statistics.median(a / b for a, b in zip(some, whole, strict=True)), 4)

    feeds = {"memory": "memory, 4,096", "stream": "stream, 4,096"}
    figures = {
        "ratio_to_handwritten": ratio("memory, 4,096", "by hand, 4,096"),
        "ratio_to_handwritten_1024": ratio("memory, 1,024", "by hand, 1,024"),
        "speedup_vs_row_dataset": ratio("memory, 4,096", "row by row, 4,096"),
        "streaming_ratio_to_resident": ratio("stream, 4,096", "memory, 4,096"),
        "data_wait_share": {feed: share(name, "data") for feed, name in feeds.items()},
        "busy_share": {feed: share(name, "forward", "backward", "optimizer") for feed, name in feeds.items()},
        "peak_rss_mb": {feed: round(statistics.median(r["rss_mb"] for r in found[name])) for feed, name in feeds.items()},
        "table_mb": round(count * (COLUMNS + 1) * 4 / 2**20),
    }  # fmt: skip
    rows = [{"what": name, "rows_per_s": [round(r["rows_per_s"]) for r in runs]} for name, runs in found.items()]
    report("train_loop", figures, rows, told.json)


if __name__ == "__main__":
    main()
