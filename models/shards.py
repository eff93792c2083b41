"""Training rows that are streamed from Parquet, so that a rank holds two windows of them and no more.

The file lies in a random order of rows, so each of its row groups is a random sample of them all. An epoch takes the row
groups in a new order, WINDOW at a time, and the rows of these in a new order again. So every row comes once an epoch
(less what is left over at its end), a batch is a random sample of all rows, and which rows can share a batch changes with each
epoch: only rows of one row group stay within a window of each other. The order depends on seed and epoch alone.

N rows, X scaled columns, C categories.
"""

from collections import deque
from collections.abc import Iterator, Sequence
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
        """From the one that holds place `first` on; the next one is read ahead."""
        groups = shuffled(len(self.sizes), seed).split(WINDOW)
        ends = [*accumulate(int(self.sizes[some.numpy()].sum()) for some in groups)]
        begin = next((i for i, end in enumerate(ends) if first < end), len(ends))
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as reader:
            coming = deque[Future[Window]]()
            for i in range(begin, len(groups)):
                coming.append(reader.submit(self._window, groups[i].tolist(), (seed * 1_000_003 + i + 1) % 2**63, ends[i]))
                if len(coming) > 1:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _window(self, groups: Sequence[int], seed: int, end: int) -> "Window":
        """Reads row groups. Raises MillraceError for a file that is damaged."""
        try:
            with pq.ParquetFile(self.path) as file:
                found = [file.read_row_group(i, use_threads=False) for i in groups]
        except (OSError, pa.ArrowException) as error:
            raise MillraceError(f"{self.path} cannot be read ({error}); remove {self.path.parent}, it is made again") from error
        scaled, codes = _matrix(found, SCALED, np.float32), _matrix(found, CODE, np.int64)
        rows = Resident(torch.from_numpy(scaled), torch.from_numpy(codes), torch.from_numpy(_column(found, LABEL)))
        return Window(end - len(rows), end, shuffled(len(rows), seed), torch.from_numpy(_column(found, NUMBER)), rows)


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


def _matrix(tables: Sequence[pa.Table], prefix: str, kind: type) -> np.ndarray:
    """The columns of a prefix side by side: (rows, columns)."""
    names = [name for name in tables[0].column_names if name.startswith(prefix)]
    found: np.ndarray = np.empty((sum(map(len, tables)), len(names)), kind)
    at = 0
    for table in tables:
        for i, name in enumerate(names):
            found[at : at + len(table), i] = table[name].to_numpy()
        at += len(table)
    return found


def _column(tables: Sequence[pa.Table], name: str) -> np.ndarray:
    return np.concatenate([table[name].to_numpy() for table in tables])


def _joined(parts: Sequence[tuple[Tensor, Batch]]) -> tuple[Tensor, Batch]:
    columns = zip(*(batch for _, batch in parts), strict=True)
    return torch.cat([numbers for numbers, _ in parts]), tuple(torch.cat(column) for column in columns)
