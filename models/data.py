"""Training rows for ranks, in memory, and a loader whose order depends on (seed, epoch) alone.

N rows, B rows of a global batch, F + M scaled columns, C categories, L tokens of the longest text of a batch.
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
from features.tokens import Tokens
from models.arrays import Arrays, Shape

Batch = tuple[Tensor, ...]  # INPUTS, tokens only where there are texts, and the label
INPUTS = ("scaled", "codes", "tokens")
T = TypeVar("T")
BLOCK = 8  # batches made at a time: threads that hand over each one would wait for each other
POOL = 50  # batches among whose rows those of like length are brought together
JUDGED, JUDGED_TEXTS = 8_192, 256  # rows that are judged at a time


class Rows(Protocol):
    """The training rows of all ranks; a seed puts them in an order."""

    def __len__(self) -> int: ...

    def blocks(self, seed: int, shape: Shape, first: int, rank: int, world: int) -> Iterator[Batch]:
        """What a rank has of the global batches from number `first` on, BLOCK of them at a time."""

    def between(self, seed: int, shape: Shape, begin: int, end: int) -> tuple[Tensor, Batch]:
        """The rows at these places of the order: their numbers, oldest row 0, and their values."""


class Loader:
    """Batches of one rank. Every world size sees the same global batches, cut `[rank::world]`; resumes exactly.

    Yields (scaled float32 (B / world, F + M), codes int64 (B / world, C), label float32 (B / world)), and before the label
    tokens int64 (B / world, L) where there are texts, made ahead of time;
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
            for batch in zip(*(column.split(self.shape.batch // self.world) for column in block), strict=True):
                self.position += 1
                yield batch

    @property
    def _seed(self) -> int:
        return self.seed * 1_000_003 + self.epoch

    def last(self, batches: int = 1) -> tuple[Tensor, Batch]:
        """The rows of the last global batches, all ranks' together: their numbers, and their values."""
        end = self.position * self.shape.batch
        return self.data.between(self._seed, self.shape, end - batches * self.shape.batch, end)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def _pinned(batch: Batch) -> Batch:
    return tuple(column.pin_memory() for column in batch)


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
    """Rows of one part in memory. Tokens lie in a file that is mapped into it; they are padded when they are taken."""

    scaled: Tensor
    codes: Tensor
    label: Tensor
    tokens: Tokens | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> Batch:
        """A batch of these rows."""
        scaled, codes, label = (column.index_select(0, rows) for column in (self.scaled, self.codes, self.label))
        if self.tokens is None:
            return scaled, codes, label
        return scaled, codes, torch.from_numpy(self.tokens.take(rows.numpy()).padded()), label

    def inputs(self) -> Batch:
        """What a network is given for all rows."""
        return self.take(torch.arange(len(self)))[:-1]

    def judged(self) -> Iterator[tuple[Tensor, Batch]]:
        """Numbers of rows and what a network is given for them, each row once; texts of like length together."""
        order, size = torch.arange(len(self)), JUDGED
        if self.tokens is not None:
            order, size = torch.from_numpy(np.argsort(self.tokens.lengths, kind="stable")), JUDGED_TEXTS
        for rows in order.split(size):
            yield rows, self.take(rows)[:-1]

    def blocks(self, seed: int, shape: Shape, first: int, rank: int, world: int) -> Iterator[Batch]:
        order = self._order(seed, shape)
        for begin, end in bounds(shape, first, BLOCK if self.tokens is None else 1):
            yield self.take(order[begin:end][rank::world])  # world divides the batch

    def between(self, seed: int, shape: Shape, begin: int, end: int) -> tuple[Tensor, Batch]:
        rows = self._order(seed, shape)[begin:end]
        return rows, self.take(rows)

    def _order(self, seed: int, shape: Shape) -> Tensor:
        order = shuffled(len(self), seed)
        return order if self.tokens is None else by_length(order, torch.from_numpy(self.tokens.lengths), shape, seed)


def by_length(order: Tensor, lengths: Tensor, shape: Shape, seed: int) -> Tensor:
    """An epoch whose batches hold rows of like length: POOL batches of rows by length, then all batches in a new order."""
    pools = order[: shape.steps * shape.batch].split(POOL * shape.batch)
    batches = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools]).view(shape.steps, shape.batch)
    return batches[shuffled(shape.steps, seed)].flatten()


def bounds(shape: Shape, first: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Where blocks of batches begin and end in the order of the rows."""
    for i in range(first, shape.steps, block):
        yield i * shape.batch, min(i + block, shape.steps) * shape.batch


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def resident(arrays: Arrays, part: str, newest: int | None = None) -> Resident:
    """The rows of a part, or only its `newest`; rows are sorted by time."""
    rows = np.flatnonzero(arrays.part == PARTS.index(part))
    rows = rows if newest is None else rows[-newest:]
    columns = (arrays.scaled, arrays.codes, arrays.label)
    scaled, codes, label = (torch.from_numpy(np.ascontiguousarray(column[rows])) for column in columns)
    return Resident(scaled, codes, label, arrays.tokens.take(rows) if arrays.tokens is not None else None)
