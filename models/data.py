"""Training rows for ranks, in memory, and a loader whose order depends on (seed, epoch) alone.

N rows, B rows of a global batch, F + M scaled columns, C categories.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from features.rows import PARTS
from models.arrays import Arrays, Shape

Batch = tuple[Tensor, Tensor, Tensor]
T = TypeVar("T")
BLOCK = 8  # batches made at a time: threads that hand over each one would wait for each other


class Rows(Protocol):
    """The training rows of all ranks; a seed puts them in an order."""

    def __len__(self) -> int: ...

    def blocks(self, seed: int, shape: Shape, first: int, rank: int, world: int) -> Iterator[Batch]:
        """What a rank has of the global batches from number `first` on, BLOCK of them at a time."""

    def between(self, seed: int, begin: int, end: int) -> tuple[Tensor, Batch]:
        """The rows at these places of the order: their numbers, oldest row 0, and their values."""


class Loader:
    """Batches of one rank. Every world size sees the same global batches, cut `[rank::world]`; resumes exactly.

    Yields (scaled float32 (B / world, F + M), codes int64 (B / world, C), label float32 (B / world)), made ahead of time;
    `pinned`: in memory from which a GPU copies by itself.
    """

    def __init__(self, data: Rows, shape: Shape, seed: int, rank: int, world: int, *, pinned: bool = False) -> None:
        self.data, self.shape, self.seed, self.rank, self.world, self.pinned = data, shape, seed, rank, world, pinned
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.shape.steps

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= self.shape.steps:  # Lightning leaves the last epoch after its last item
            self.epoch, self.position = self.epoch + 1, 0
        blocks = self.data.blocks(self._seed, self.shape, self.position, self.rank, self.world)
        for block in ahead(map(_pinned, blocks) if self.pinned else blocks):
            for scaled, codes, label in zip(*(column.split(self.shape.batch // self.world) for column in block), strict=True):
                self.position += 1
                yield scaled, codes, label

    @property
    def _seed(self) -> int:
        return self.seed * 1_000_003 + self.epoch

    def last(self, batches: int = 1) -> tuple[Tensor, Batch]:
        """The rows of the last global batches, all ranks' together: their numbers, and their values."""
        end = self.position * self.shape.batch
        return self.data.between(self._seed, end - batches * self.shape.batch, end)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def _pinned(batch: Batch) -> Batch:
    scaled, codes, label = batch
    return scaled.pin_memory(), codes.pin_memory(), label.pin_memory()


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same items, made by a thread while those before are used; what it raises is raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not over.is_set():
            with suppress(queue.Full):
                made.put((item, error), timeout=0.1)
                return True
        return False

    def make() -> None:
        torch.set_num_threads(1)  # each thread has a number of its own, and what it starts spins
        try:
            if all(put(item, None) for item in items):
                put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        over.set()


@dataclass(frozen=True)
class Resident:
    """Rows of one part in memory."""

    scaled: Tensor
    codes: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> Batch:
        """A batch of these rows."""
        return self.scaled.index_select(0, rows), self.codes.index_select(0, rows), self.label.index_select(0, rows)

    def blocks(self, seed: int, shape: Shape, first: int, rank: int, world: int) -> Iterator[Batch]:
        order = shuffled(len(self), seed)
        for begin, end in bounds(shape, first):
            yield self.take(order[begin:end][rank::world])  # world divides the batch

    def between(self, seed: int, begin: int, end: int) -> tuple[Tensor, Batch]:
        rows = shuffled(len(self), seed)[begin:end]
        return rows, self.take(rows)


def bounds(shape: Shape, first: int) -> Iterator[tuple[int, int]]:
    """Where blocks of batches begin and end in the order of the rows."""
    for i in range(first, shape.steps, BLOCK):
        yield i * shape.batch, min(i + BLOCK, shape.steps) * shape.batch


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def resident(arrays: Arrays, part: str, newest: int | None = None) -> Resident:
    """The rows of a part, or only its `newest`; rows are sorted by time."""
    rows = np.flatnonzero(arrays.part == PARTS.index(part))
    rows = rows if newest is None else rows[-newest:]
    columns = (arrays.scaled, arrays.codes, arrays.label)
    return Resident(*(torch.from_numpy(np.ascontiguousarray(column[rows])) for column in columns))
