"""Training rows for ranks: memory-mapped arrays, and a loader whose order depends on (seed, epoch) alone.

N rows, B rows of a global batch, F + M scaled columns, C categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from features.rows import PARTS
from models.arrays import Arrays, Shape


class Loader:
    """Batches of one rank. Every world size sees the same global batches, cut `[rank::world]`; resumes exactly.

    Yields (scaled float32 (B / world, F + M), codes int64 (B / world, C), label float32 (B / world)).
    """

    def __init__(self, data: "Resident", shape: Shape, seed: int, rank: int, world: int) -> None:
        self.data, self.shape, self.seed, self.rank, self.world = data, shape, seed, rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.shape.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.position >= self.shape.steps:  # Lightning leaves the last epoch after its last item
            self.epoch, self.position = self.epoch + 1, 0
        order = self._order()
        while self.position < self.shape.steps:
            begin = self.position * self.shape.batch
            self.position += 1
            yield self.data.take(order[begin : begin + self.shape.batch][self.rank :: self.world])

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.data.label), generator=generator)

    def last_rows(self, batches: int = 1) -> Tensor:
        """Which rows the last global batches held, all ranks' together."""
        end = self.position * self.shape.batch
        return self._order()[end - batches * self.shape.batch : end]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


@dataclass(frozen=True)
class Resident:
    """Rows of one part in memory."""

    scaled: Tensor
    codes: Tensor
    label: Tensor

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of these rows."""
        return self.scaled[rows], self.codes[rows], self.label[rows]


def resident(arrays: Arrays, part: str, newest: int | None = None) -> Resident:
    """The rows of a part, or only its `newest`; rows are sorted by time."""
    rows = np.flatnonzero(arrays.part == PARTS.index(part))
    rows = rows if newest is None else rows[-newest:]
    columns = (arrays.scaled, arrays.codes, arrays.label)
    return Resident(*(torch.from_numpy(np.ascontiguousarray(column[rows])) for column in columns))
