"""A learning rate for `learning_rate: auto`: a tenth of that up to which the loss falls while the rate grows step by step.

The range test of Smith (2017, arXiv:1506.01186). It depends on seed, rows and network alone:
every rank finds the same by itself on the CPU, and a job that is resumed reads what it found at first.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.data import Loader
from pipelines.errors import UsageError
from pipelines.manifest import read_json, write_json

RATES = np.geomspace(1e-5, 1.0, 100)
SMOOTH = 0.9  # of the mean loss before stays at each step
WORSE = 1.5  # times the least loss, at which the search ends
BELOW = 10.0  # times below the rate of the least loss: there it has begun to be too large


def find_rate(net: nn.Module, loader: Loader, decay: float, beat: Callable[[], None]) -> float:
    """Two significant digits. Raises UsageError where no rate lowers the loss. `net` is used up."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay)
    batches = (batch for _ in count() for batch in loader)
    mean, losses = 0.0, list[float]()
    for step, (rate, (*inputs, label)) in enumerate(zip(RATES, batches, strict=False)):
        torch.manual_seed(loader.seed * 1_009 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = binary_cross_entropy_with_logits(net(*inputs), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        beat()
        mean = SMOOTH * mean + (1 - SMOOTH) * float(loss.detach())
        losses.append(mean / (1 - SMOOTH ** (step + 1)))
        if not losses[-1] < WORSE * min(losses):
            break
    least = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    if least == 0:
        raise UsageError("train.learning_rate auto: no rate from 1e-05 to 1 lowers the loss; give a number")
    return float(f"{RATES[least] / BELOW:.2g}")


def found_rate(folder: Path, find: Callable[[], float]) -> tuple[float, bool]:
    """The rate of the job in this folder, and whether it was found only now."""
    path = folder / "learning_rate.json"
    if path.is_file():
        return float(read_json(path)["learning_rate"]), False
    rate = find()
    write_json(path, {"learning_rate": rate})
    return rate, True
