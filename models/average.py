"""Weights averaged over the steps of a training, judged and shipped in place of the last ones. n counts steps from 1."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.strategy import fill, local, whole
from pipelines.spec import Train


def share_of_newest(train: Train, step: int, steps: int) -> float:
    """What the weights after this step weigh in the average, all before them the rest.

    `ema` keeps min(ema, (1 + n) / (10 + n)), so that the first weights, which are random, do not linger; `swa` is the
    plain mean of the last steps, and the newest weights alone until these begin.
    """
    if train.ema is not None:
        return 1 - min(train.ema, (1 + step) / (10 + step))
    assert train.swa is not None
    return 1 / max(1, step - (steps - max(1, round(train.swa * steps))))


class Average:
    """A running average of these weights, on their device; each rank keeps that of its part."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._mean = [w.detach().clone() for w in weights]
        self._ours, self._weights = [local(m) for m in self._mean], [local(w.detach()) for w in weights]

    def update(self, share: float) -> None:
        """Adds the weights as they are, which count this share."""
        torch._foreach_lerp_(self._ours, self._weights, share)

    def state(self) -> list[Tensor]:
        """The whole average, for a checkpoint."""
        return [whole(m) for m in self._mean]

    def load(self, state: Sequence[Tensor]) -> None:
        fill(self._mean, state)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the average within, and afterwards what they were."""
        held = [w.clone() for w in self._weights]
        torch._foreach_copy_(self._weights, self._ours)
        yield
        torch._foreach_copy_(self._weights, held)
