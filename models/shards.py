"""Training rows that are streamed from Parquet, so that a rank holds two windows of them and no more.

The file lies in a random order of rows, so each of its row groups is a random sample of them all. An epoch takes the row
groups in a new order, WINDOW at a time, and the rows of these in a new order again. So every row comes once an epoch
(less what is left over at its end), a batch is a random sample of all rows, and which rows can share a batch changes with each
epoch: only rows of one row group stay within a window of each other. The order depends on seed and epoch alone.

N rows, X scaled columns, C categories.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.arrays import CODE, LABEL, NUMBER, SCALED, Shape
from models.data import Batch, Resident, bounds, shuffled
from pipelines.errors import MillraceError

WINDOW = 16  # row groups


class Shards:
    """The rows of a file that `models.arrays.write_shards` has written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self.scaled, self.codes = ([n for n in file.schema_arrow.names if n.startswith(prefix)] for prefix in (SCALED, CODE))
            self.sizes = np.array([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def blocks(self, seed: int, shape: Shape, first: int, rank: int, world: int) -> Iterator[Batch]:
        wanted = (np.arange(begin + rank, min(end, len(self)), world) for begin, end in bounds(shape, first))
        return (batch for _, batch in self._taken(seed, first * shape.batch, wanted))

    def between(self, seed: int, shape: Shape, begin: int, end: int) -> tuple[Tensor, Batch]:
        return next(self._taken(seed, begin, iter([np.arange(begin, min(end, len(self)))])))

    def _taken(self, seed: int, first: int, wanted: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Batch]]:
        """Numbers and values of rows; `wanted`: their places in the order of a seed, rising, from `first` on."""
        windows = self._windows(seed, first)
        window = next(windows)
        for places in wanted:
            parts = [window.at(places)]
            while len(places) and places[-1] >= window.end:
                window = next(windows)
                parts.append(window.at(places))
            yield parts[0] if len(parts) == 1 else _joined(parts)

    def _windows(self, seed: int, first: int) -> Iterator["Window"]:
        """From the one that holds place `first` on; the next one is read ahead, into the memory of the one before."""
        groups = shuffled(len(self.sizes), seed).split(WINDOW)
        ends = [*accumulate(int(self.sizes[some.numpy()].sum()) for some in groups)]
        begin = next((i for i, end in enumerate(ends) if first < end), len(ends))
        rooms = [self._room(int(np.diff(ends, prepend=0).max())) for _ in range(2)]
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as reader:
            coming = deque[Future[Window]]()
            for i in range(begin, len(groups)):
                own = (seed * 1_000_003 + i + 1) % 2**63
                coming.append(reader.submit(self._window, groups[i].tolist(), own, ends[i], rooms[i % 2]))
                if len(coming) > 1:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _room(self, rows: int) -> tuple[Tensor, Resident]:
        """Memory for numbers and values of rows; fresh for each window it would cost more page faults than reading does."""

        def empty(*shape: int, kind: type = np.float32) -> Tensor:
            return torch.from_numpy(np.empty(shape, kind))  # NumPy asks for huge pages

        values = Resident(empty(rows, len(self.scaled)), empty(rows, len(self.codes), kind=np.int64), empty(rows))
        return empty(rows, kind=np.int64), values

    def _window(self, groups: list[int], seed: int, end: int, room: tuple[Tensor, Resident]) -> "Window":
        """Reads row groups into `room`. Raises MillraceError for a file that is damaged."""
        numbers, rows = room
        wanted = [*zip(self.scaled, rows.scaled.numpy().T, strict=True), *zip(self.codes, rows.codes.numpy().T, strict=True),
                  (LABEL, rows.label.numpy()), (NUMBER, numbers.numpy())]  # fmt: skip
        count = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for i in groups:
                    for batch in file.read_row_group(i, use_threads=False).to_batches():
                        for name, column in wanted:  # arrow's to_numpy would import pandas: 0.3 s without a step
                            column[count : count + len(batch)] = np.from_dlpack(batch[name])
                        count += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise MillraceError(f"{self.path} cannot be read ({error}); remove {self.path.parent}, it is made again") from error
        return Window(end - count, end, shuffled(count, seed), numbers, rows)


@dataclass(frozen=True)
class Window:
    """The rows that come at the places [begin, end) of an epoch, in `order`."""

    begin: int
    end: int
    order: Tensor
    numbers: Tensor
    rows: Resident

    def at(self, places: np.ndarray) -> tuple[Tensor, Batch]:
        """Numbers and values of the rows at those of the places that lie in the window."""
        inside = places[(self.begin <= places) & (places < self.end)] - self.begin
        rows = self.order.index_select(0, torch.from_numpy(inside))
        return self.numbers.index_select(0, rows), self.rows.take(rows)


def _joined(parts: list[tuple[Tensor, Batch]]) -> tuple[Tensor, Batch]:
    columns = zip(*(batch for _, batch in parts), strict=True)
    return torch.cat([numbers for numbers, _ in parts]), tuple(torch.cat(column) for column in columns)
