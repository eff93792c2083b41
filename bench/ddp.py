"""`python -m bench.ddp`: two ranks against one, and against DistributedDataParallel by hand, on this machine's cores (gloo).

The network and table of `bench.train_loop`, a global batch of 8,192 rows, one thread to a rank. Rounds in turn; ratios are
medians. What a rank waits for the others is told from steps by hand with and without the all-reduce (`no_sync`).

Figures: `efficiency_2` (rows per second of two ranks, over twice those of one), `allreduce_share` (of a step of two ranks by
hand), `ratio_to_handwritten_ddp` (two ranks of the product over two by hand), `weights_max_abs_diff` (one rank and two, after an
epoch), and a **prediction**, not a measurement, for more ranks of the same kind with the same rows to each: an all-reduce in a
ring of p ranks takes 2 (p - 1) latencies and moves 2 (p - 1) / p of the gradient, both fitted to all-reduces of many sizes
on two ranks here (`latency_us`, `bandwidth_gb_s`, `fit_error`); `predicted_efficiency` is the compute time over compute and
all-reduce without overlap, for 2, 4 and 64 ranks. Compute is the step of two ranks without an all-reduce, so what cores
take from each other on this machine is in it.
"""

import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.record import options, report
from bench.train_loop import apart, plain, settings, write
from models.elastic import Zygote, launch, start_zygote
from models.job import Job
from pipelines.manifest import read_json

BATCH = 8_192
SIZES = [2**k for k in range(10, 23, 2)]  # float32 numbers of an all-reduce
RANKS = (2, 4, 64)


def ours(zygote: Zygote, arrays: Path, work: Path, ranks: int, *, export: bool = False) -> tuple[dict[str, Any], Path]:
    """One epoch of the product's training, under its supervisor."""
    folder = Path(tempfile.mkdtemp(dir=work))
    Job(str(arrays), settings("memory", BATCH), 1, 1, export=export).prepare(folder)
    launch(folder, ranks=ranks, max_restarts=0, zygote=zygote)
    return read_json(folder / "timing.json"), folder


def by_hand(rank: int, arrays: Path, synced: bool) -> float:
    """Seconds of a step of a plain loop under DistributedDataParallel, on one of two ranks."""
    net, step, steps = plain(arrays, BATCH, rank, 2)
    assert isinstance(net, DistributedDataParallel)
    dist.barrier()
    began = time.perf_counter()
    with nullcontext() if synced else net.no_sync():
        for i in range(steps):
            step(i)
    return (time.perf_counter() - began) / steps


def reduces(rank: int) -> list[float]:
    """Median seconds of an all-reduce of each size."""
    found = []
    for size in SIZES:
        numbers, times = torch.ones(size), []
        for _ in range(30):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times))
    return found


def on_two(measure: Callable[..., Any], *given: Any) -> Any:
    """What rank 0 of two finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
        found = measure(rank, *given)
        if rank == 0:
            answer.put(found)
        dist.barrier()
        dist.destroy_process_group()

    ranks = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = answer.get()
    for process in ranks:
        process.join()
    return found


def fitted(seconds: list[float]) -> tuple[float, float, float]:
    """Latency (s) and bandwidth (bytes/s) of a ring of two, by least relative squares; and the median relative error."""
    moved = 4.0 * np.array(SIZES)  # 2 (p - 1) / p of it, which is all of it for two ranks
    t = np.array(seconds)
    (two_latencies, per_byte), *_ = np.linalg.lstsq(np.stack([1 / t, moved / t], 1), np.ones(len(t)), rcond=None)
    error = np.median(np.abs(two_latencies + moved * per_byte - t) / t)
    return two_latencies / 2, 1 / per_byte, float(error)


def main() -> None:
    """Measures and reports."""
    told = options("ddp")
    rounds, count = (1, 150_000) if told.quick else (5, 1_000_000)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    one, two, hand, alone, reduced = [], [], [], [], []
    try:
        arrays = work / "arrays"
        apart(write, count, arrays, settings("memory", BATCH))
        zygote = start_zygote()
        for _ in range(rounds):
            one.append(BATCH / ours(zygote, arrays, work, 1)[0]["step_quiet_s"])
            two.append(BATCH / ours(zygote, arrays, work, 2)[0]["step_quiet_s"])
            hand.append(BATCH / on_two(by_hand, arrays, True))
            alone.append(BATCH / on_two(by_hand, arrays, False))
            reduced.append(on_two(reduces))
        weights = [load_file(ours(zygote, arrays, work, n, export=True)[1] / "network.safetensors") for n in (1, 2)]
        numbers = sum(w.numel() for w in weights[0].values())
        diff = max(float((w - weights[1][name]).abs().max()) for name, w in weights[0].items())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    latency, bandwidth, error = fitted([statistics.median(times) for times in zip(*reduced, strict=True)])
    compute = BATCH / statistics.median(alone)

    def predicted(p: int) -> float:
        return round(float(compute / (compute + 2 * (p - 1) * latency + 2 * (p - 1) / p * 4 * numbers / bandwidth)), 3)

    def ratio(a: list[float], b: list[float], by: float = 1.0) -> float:
        return round(statistics.median(x / y / by for x, y in zip(a, b, strict=True)), 3)

    figures = {
        "efficiency_2": ratio(two, one, 2.0), "allreduce_share": round(1 - ratio(hand, alone), 3),
        "ratio_to_handwritten_ddp": ratio(two, hand), "weights_max_abs_diff": diff,
        "predicted_efficiency": {str(p): predicted(p) for p in RANKS}, "prediction": True,
        "latency_us": round(float(latency) * 1e6, 1), "bandwidth_gb_s": round(float(bandwidth) / 1e9, 2),
        "fit_error": round(error, 3), "gradient_numbers": numbers,
    }  # fmt: skip
    rows = [{"what": name, "rows_per_s": [round(v) for v in values]} for name, values in (
        ("one rank", one), ("two ranks", two), ("two by hand", hand), ("two by hand, no all-reduce", alone))]  # fmt: skip
    rows += [{"what": f"all-reduce of {n} numbers", "us": round(statistics.median(t) * 1e6)}
             for n, t in zip(SIZES, zip(*reduced, strict=True), strict=True)]  # fmt: skip
    report("ddp", figures, rows, told.json)


if __name__ == "__main__":
    main()
