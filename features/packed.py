"""How the cells of a served store are packed: one value per key and view, fixed-width rows, then words as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pyarrow as pa

from features.facts import Columns, int_times
from features.steps import TIME, Steps
from features.views import Stored, stored_views
from pipelines.manifest import digest_of
from pipelines.spec import Spec

ROWS = "rows"  # the view that holds the rows source itself
LAYOUT_TAG, KEY_TAG = "millrace.layout", "millrace.key"  # of views of ours in Feast's registry


@dataclass(frozen=True)
class Layout:
    """How one view is packed: int64 `times`, then float64 `numbers`, then `words` as JSON."""

    view: str
    times: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype([(c, "<i8") for c in self.times] + [(c, "<f8") for c in self.numbers])

    @cached_property
    def when(self) -> slice:
        """Where the times of the steps are among the eight-byte cells of packed rows."""
        return slice(self.times.index(TIME), None, self.width // 8)

    @cached_property
    def width(self) -> int:
        """Bytes of a packed row."""
        return self.dtype.itemsize

    def end(self, packed: bytes) -> int:
        """Where the rows of a packed value end, which begin at 4, and its words begin."""
        return 4 + int.from_bytes(packed[:4], "little") * self.width


def layouts(spec: Spec) -> dict[str, Layout]:
    """The packing of every view of a spec, and of its rows."""
    found = {s.name: _layout(s) for s in stored_views(spec)}
    columns = spec.row_source.columns
    times = tuple(c for c, column in columns.items() if column.type == "timestamp")
    words = tuple(c for c, column in columns.items() if column.type == "string")
    numbers = tuple(c for c in columns if c not in times and c not in words)
    found[ROWS] = Layout(ROWS, ("_live_from", "_live_to", "_closed_at", *times), numbers, words)
    return found


def layout_digest(spec: Spec) -> str:
    """Names how the cells of a spec are packed: what is packed otherwise cannot be read."""
    told = [{f.name: getattr(layout, f.name) for f in fields(layout)} for layout in layouts(spec).values()]
    return digest_of(told)[:16]


def _layout(stored: Stored) -> Layout:
    first = ("_order", TIME, "_live_to") if stored.kind == "sequence" else (TIME, *stored.integers)
    times = tuple(c for c, kind in stored.values if kind == "timestamp")
    words = tuple(c for c, kind in stored.values if kind == "string")
    numbers = tuple(c for c, kind in stored.values if kind not in ("timestamp", "string"))
    return Layout(stored.name, (*first, *times), numbers, words)


def pack(layout: Layout, table: pa.Table, start: np.ndarray) -> Iterator[bytes]:
    """One packed value per key: its count, its fixed-width rows, and its words (start: K + 1)."""
    rows = np.empty(table.num_rows, layout.dtype)
    for name in layout.times:
        column = table[name]
        rows[name] = int_times(column) if pa.types.is_timestamp(column.type) else column.to_numpy()
    for name in layout.numbers:
        column = table[name].cast(pa.int64()) if pa.types.is_boolean(table[name].type) else table[name]
        rows[name] = column.cast(pa.float64(), safe=False).combine_chunks().fill_null(float("nan")).to_numpy(zero_copy_only=False)
    words = [table[name].to_pylist() for name in layout.words]
    for lo, hi in zip(start[:-1].tolist(), start[1:].tolist(), strict=True):
        tail = json.dumps([column[lo:hi] for column in words]).encode() if words else b""
        yield (hi - lo).to_bytes(4, "little") + rows[lo:hi].tobytes() + tail


def pack_steps(layout: Layout, steps: Steps) -> Iterator[tuple[str, bytes]]:
    """The keys that have steps, and what `pack` gives of them as a table."""
    rows = np.empty(len(steps.t), layout.dtype)
    for name in layout.times:
        rows[name] = steps.t if name == TIME else steps.columns[name]
    body, width, start = rows.tobytes(), layout.width, steps.start.tolist()
    for key, lo, hi in zip(steps.keys.to_pylist(), start[:-1], start[1:], strict=True):
        if lo < hi:
            yield key, (hi - lo).to_bytes(4, "little") + body[lo * width : hi * width]


def unpack(layout: Layout, blobs: Sequence[bytes]) -> tuple[np.ndarray, Columns]:
    """The rows of K packed values one after another: where each begins (K + 1), and their columns."""
    begins, bodies = [0], []
    words: dict[str, list] = {name: [] for name in layout.words}
    for blob in blobs:
        end = layout.end(blob)
        begins.append(begins[-1] + (end - 4) // layout.width)
        bodies.append(blob[4:end])
        if layout.words and end > 4:
            for name, values in zip(layout.words, json.loads(blob[end:]), strict=True):
                words[name] += values
    rows = np.frombuffer(b"".join(bodies), layout.dtype)
    columns: Columns = {name: rows[name] for name in (*layout.times, *layout.numbers)}
    for name, listed in words.items():
        column = np.empty(len(listed), object)
        column[:] = listed
        columns[name] = column
    return np.array(begins), columns
