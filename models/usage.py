"""What a training made of its device: where a step's time went, FLOP/s against the device's peak, joules, g CO2.

It stands in the run's record and in no digest.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.clock import PARTS
from models.data import Resident
from models.energy import Tally, total
from models.evaluate import log_loss

if TYPE_CHECKING:
    from models.train import Keeper

KINDS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class AllReduce:
    """How long a rank's backward waits for the others' gradients, after its own are there (DDP on a CPU). `seconds` of it.

    The first backward shows which gradient comes last. No callback: Lightning would ask it a dozen times a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.seconds = self.there = 0.0
        self.latest: torch.Tensor | None = None
        self.hooks = {p: p.register_post_accumulate_grad_hook(self._comes) for p in parameters if p.requires_grad}

    def _comes(self, gradient_of: torch.Tensor) -> None:
        self.there, self.latest = time.perf_counter(), gradient_of

    def done(self, now: float) -> None:
        """The backward has ended."""
        self.seconds, self.there = self.seconds + (now - self.there if self.there else 0.0), 0.0
        if len(self.hooks) > 1:
            for p in [p for p in self.hooks if p is not self.latest]:
                self.hooks.pop(p).remove()


def flops_per_row(net: nn.Module, rows: Resident) -> float:
    """Floating-point operations of the matrix products of forward and backward. Leaves the network as it was."""
    was = net.training
    net.eval()  # no mean of a BatchNorm moves, and nothing is computed twice to spare memory
    try:
        with FlopCounterMode(display=False) as counter:
            answer = net(*rows.inputs()).sum()
            torch.autograd.grad(answer, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    finally:
        net.train(was)
    return float(counter.get_total_flops()) / len(rows)


def matmul_peak(device: torch.device, kind: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five: what this device can do, as training uses it."""
    n = 512 if device.type == "cpu" else 8_192
    a, b, best = torch.ones(n, n, dtype=kind, device=device), torch.ones(n, n, dtype=kind, device=device), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def usage(keeper: "Keeper", net: nn.Module, few: Resident) -> dict[str, Any]:
    """The record of a training that has ended, of rank 0 since its last start; energy is that of all ranks and starts."""
    return {**_energy(keeper), **_steps(keeper, net, few)}


def _energy(keeper: "Keeper") -> dict[str, Any]:
    power, meter, first = keeper.job.train.power, keeper.energy.meter, Tally(keeper.folder / "energy-0")
    joules, rest = total(keeper.folder, "joules"), total(keeper.folder, "rest_joules")
    label = keeper.valid.label.numpy().astype(np.float64)
    best = keeper.curve[keeper.best_epoch - 1].log_loss if keeper.best_epoch else None
    gain = log_loss(label, np.full(len(label), label.mean())) - best if best is not None else 0.0
    return {
        "meter": meter.name, "estimated": meter.estimated, "joules": round(joules, 3),
        "watts": round(joules / max(1e-9, first["seconds"]), 3), "grams": round(power.grams_of(joules), 6),
        "grams_per_kwh": power.grams_per_kwh, "rest_s": round(first["rest_s"], 3), "rest_joules": round(rest, 3),
        "joules_per_loss": round(joules / gain, 3) if gain > 0 else None,  # of log loss below that of a constant
        "joules_per_loss_unpaced": round((joules - rest) / gain, 3) if gain > 0 and not power.gpu_limit else None,
    }  # fmt: skip


def _steps(keeper: "Keeper", net: nn.Module, few: Resident) -> dict[str, Any]:
    clock, shape, world, reduce = keeper.clock.figures(), keeper.loader.shape, keeper.loader.world, keeper.reduce
    seconds = {**{part: clock[f"{part}_s"] for part in PARTS}, "checkpoint": clock["stall_s"]}
    whole = sum(seconds.values())
    if not clock["steps"]:
        return {}
    step, waits = whole / clock["steps"], min(reduce.seconds, seconds["backward"]) if reduce else 0.0
    split = {part: round(s / whole, 4) for part, s in seconds.items()}
    if reduce:
        split |= {"backward": round((seconds["backward"] - waits) / whole, 4), "all_reduce": round(waits / whole, 4)}
    found: dict[str, Any] = {"step_ms": round(step * 1e3, 4), "split": split, "rows_per_s": round(shape.batch / step)}
    first = Tally(keeper.folder / "energy-0")
    worked = sum(seconds[p] for p in ("forward", "backward", "optimizer")) - waits
    device = torch.device("cpu") if keeper.job.accelerator == "cpu" else torch.device("cuda", torch.cuda.current_device())
    found["busy_share"] = round(worked / whole if device.type == "cpu" else first["busy_s"] / max(1e-9, first["seconds"]), 4)
    with suppress(Exception):  # a user's own network may be one that cannot be counted
        kind = KINDS.get(keeper.job.train.precision, torch.float32)
        flops, peak = flops_per_row(net, few), matmul_peak(device, kind)
        speed = flops * shape.batch / world / step
        found |= {"flops_per_row": round(flops), "flops_per_s": round(speed * world), "ranks": world,
                  "peak_flops_per_s": round(peak), "peak": f"a product of matrices in {str(kind)[6:]}, measured",
                  "mfu": round(speed / peak, 4)}  # fmt: skip
    return found
