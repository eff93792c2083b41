"""The served store, read: one packed row per key and view, without Feast or pandas. `features.feed` writes it."""

import copy
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from features.cells import PUSHED, WAIT_S, Held, Meta, Moved, NoCells, open_cells, place_of
from features.facts import Columns, int_times
from features.frame import assemble
from features.keys import request_key, text_key
from features.steps import TIME, Steps, as_of, previous
from features.views import RECENT, Stored, absent, stored_views
from pipelines.clock import MISSING, NEVER, Anchor, iso
from pipelines.errors import MillraceError
from pipelines.manifest import digest_of
from pipelines.spec import Sequence as Chain
from pipelines.spec import Spec

T = TypeVar("T")
FEW_ROWS = 64  # up to so many, rows are looked for one by one
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
    width, begins, bodies = layout.width, [0], []
    words: dict[str, list] = {name: [] for name in layout.words}
    for blob in blobs:
        n = int.from_bytes(blob[:4], "little")
        begins.append(begins[-1] + n)
        bodies.append(blob[4 : 4 + n * width])
        if layout.words and n:
            for name, values in zip(layout.words, json.loads(blob[4 + n * width :]), strict=True):
                words[name] += values
    rows = np.frombuffer(b"".join(bodies), layout.dtype)
    columns: Columns = {name: rows[name] for name in (*layout.times, *layout.numbers)}
    for name, listed in words.items():
        column = np.empty(len(listed), object)
        column[:] = listed
        columns[name] = column
    return np.array(begins), columns


Keys = Mapping[tuple[str, ...], list[str | None]]  # of a view's key columns: the texts of the asked rows
Rows = tuple[np.ndarray, Columns, np.ndarray]  # where each distinct key begins, their rows, and each asked key's place


def read_cells(
    cells: Held, wanted: Mapping[str, tuple[Layout, Sequence[str | None]]], check: Callable[[], object] = dict
) -> dict[str, Rows]:  # fmt: skip
    """By view: rows of the distinct keys, where each begins, and the position of each asked key (−1: none).

    `check` is called before anything is unpacked.
    """
    distinct = [(view, sorted({k for k in keys if k is not None})) for view, (_, keys) in wanted.items()]
    held, found = cells.get(distinct), {}
    check()
    for (view, (layout, keys)), packed in zip(wanted.items(), held, strict=True):
        start, columns = unpack(layout, list(packed.values()))
        place = {key: i for i, key in enumerate(packed)}
        found[view] = start, columns, np.array([-1 if k is None else place.get(k, -1) for k in keys], np.int64)
    return found


def served_store(at: str, pipeline: str, folder: Path) -> Path | str:
    """Where a store lies whose place in the home is `folder`: there, or on the server `at` (`serve.store` of a spec)."""
    return f"{at}#{pipeline}/{folder.name}" if at else folder


def anchor_of(meta: Meta) -> Anchor:
    """The pair of data and wall time of a feed, from what it wrote about itself."""
    return Anchor(int(meta["data_us"]), int(meta["wall_us"]))


@dataclass(frozen=True)
class Looked:
    """What the store knows about R requested rows at one instant.

    `own`: row columns after request fields stood in; `raw` as `frame.assemble` takes it; `unknown` (R): no stored row;
    `closed_at` (R) µs or NEVER; `events`: view → event time (R) of latest views, MISSING where none; `aging`: those
    of them that have a ttl; `snapshot`: digest of what the store had been fed; `pushed`: number of the last pushed event.
    """

    own: Columns
    raw: dict[str, dict[str, Columns]]
    unknown: np.ndarray
    closed_at: np.ndarray
    events: dict[str, np.ndarray]
    aging: frozenset[str]
    snapshot: str
    pushed: int


class OnlineStore:
    """A reader of the served store of one spec. One per process; not shared between threads."""

    def __init__(self, spec: Spec, store: Path | str, *, wait_s: float = WAIT_S) -> None:
        self.spec, self.layouts, self.stored = spec, layouts(spec), stored_views(spec)
        self.cells: Held
        self.cells, self.reads, self.place = open_cells(store, wait_s=wait_s), 0, place_of(store)
        self.format = layout_digest(spec)
        self.last = self.check_format()  # what was known of the store when it was read last

    def check_format(self) -> dict[str, str]:
        """What the last feed wrote about itself. Raises MillraceError when another version of the code has fed the store."""
        meta = self.meta()
        if not meta:
            raise MillraceError(f"the served store {self.place} is not there: run `millrace run {self.spec.pipeline}` to feed it")
        if meta["format"] != self.format:
            raise MillraceError(
                "the served store was fed by another version of Millrace, which packs it otherwise: "
                f"run `millrace run {self.spec.pipeline}` and serve its release"
            )
        self.last = meta
        return meta

    def without_cells(self) -> "OnlineStore":
        """The same store with nothing in it but its clock: what is left while its server does not answer."""
        empty = copy.copy(self)
        empty.cells, empty.reads = NoCells(self.last), 0
        return empty

    def meta(self) -> Meta:
        """What the last feed wrote about itself."""
        return self.cells.meta()

    def anchor(self) -> Anchor:
        """The pair of data and wall time of the last feed."""
        self.last = self.meta()
        return anchor_of(self.last)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One state of the store for everything that is read inside, the clock's anchor too, while a feed goes on."""
        if self.reads:
            yield
            return
        with self.cells.reading():
            self.reads = 1
            try:
                yield
            finally:
                self.reads = 0

    def in_one_state(self, read: Callable[[], T]) -> T:
        """What `read` gives, all of it from one state of the store: where that is fed meanwhile, it is called again."""
        while not self.reads:
            with suppress(Moved), self.reading():
                return read()
        return read()

    def read(self, wanted: Mapping[str, Sequence[str | None]]) -> dict[str, Rows]:
        """See `read_cells`. Raises MillraceError as `check_format` does."""
        with self.reading():
            return read_cells(self.cells, {view: (self.layouts[view], keys) for view, keys in wanted.items()}, self.check_format)

    def look_up(self, requests: Sequence[Mapping[str, object]], now: int) -> Looked:
        """Everything that is known at `now` about the requested rows. Timestamps in requests are int µs."""
        with self.reading():
            own, unknown, closed = self._rows(requests, now)
            raw, events = self.views_at(own, np.full(len(requests), now))
        meta = self.last
        aging = frozenset(n for n, v in self.spec.features.views.items() if v.latest is not None and v.latest.ttl)
        return Looked(own, raw, unknown, closed, events, aging, meta["snapshot"], int(meta.get(PUSHED, 0)))

    def _rows(self, requests: Sequence[Mapping[str, object]], now: int) -> tuple[Columns, np.ndarray, np.ndarray]:
        start, columns, at = self.read({ROWS: [request_key(r, self.spec.row_key) for r in requests]})[ROWS]
        found = as_of(start, columns["_live_from"], at, np.full(len(requests), now))
        safe, there = np.maximum(found, 0), found >= 0
        if self.spec.predict_at is not None and there.any():
            due = columns[self.spec.predict_at.column][safe]
            there &= (due == MISSING) | (due >= now - RECENT)
        own: Columns = {}
        for name, column in self.spec.row_source.columns.items():
            asked = np.array([r.get(name) for r in requests], object)
            own[name] = _column(column.type, columns[name][safe] if len(columns[name]) else None, there, asked)
        closed = np.where(there, columns["_closed_at"][safe], NEVER) if there.any() else np.full(len(requests), NEVER)
        return own, ~there, closed

    def views_at(self, own: Columns, t: np.ndarray) -> tuple[dict[str, dict[str, Columns]], dict[str, np.ndarray]]:
        """What `frame.assemble` takes for rows at their times, and the event times of the latest views."""
        raw: dict[str, dict[str, Columns]] = {name: {} for name in self.spec.features.views}
        keys = own_keys(self.spec, own, (stored.key for stored in self.stored), len(t))
        events = {}
        for stored, picked in (self._picked_few if len(t) <= FEW_ROWS else self._picked)(own, t, keys):
            raw[stored.view][stored.name] = picked
            if stored.kind == "steps" and "_event" in picked:  # the view itself, not how it was some time ago
                events[stored.view] = picked["_event"]
        return raw, events

    def _picked(self, own: Columns, t: np.ndarray, keys: Keys) -> Iterator[tuple[Stored, Columns]]:
        packed = self.read({stored.name: keys[stored.key] for stored in self.stored})
        for stored in self.stored:
            start, columns, at = packed[stored.name]
            yield stored, _many(stored, columns, self._found(stored, start, columns, at, own, t))

    def _found(
        self, stored: Stored, start: np.ndarray, columns: Columns, at: np.ndarray, own: Columns, t: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """The rows of a view that hold for keys at places `at` at times t, −1 where none."""
        shape = self.spec.features.views[stored.view].shape
        if not isinstance(shape, Chain):
            return as_of(start, columns[TIME], at, t)
        live = columns[TIME], columns["_live_to"]
        return previous(start, columns["_order"], *live, at, t, own[shape.order], shape.within)

    def _picked_few(self, own: Columns, t: np.ndarray, keys: Keys) -> Iterator[tuple[Stored, Columns]]:
        """The same for few rows: of the packed values only what holds at their times is unpacked."""
        with self.reading():
            held = self.cells.get([(s.name, sorted({k for k in keys[s.key] if k is not None})) for s in self.stored])
            self.check_format()
        times = t.tolist()
        for stored, cells in zip(self.stored, held, strict=True):
            layout, packed = self.layouts[stored.name], [cells.get(key, b"") for key in keys[stored.key]]  # type: ignore[arg-type]
            if stored.kind == "sequence":
                start, columns = unpack(layout, packed)
                found = self._found(stored, start, columns, np.arange(len(t)), own, t)
                yield stored, _many(stored, columns, found)
            else:
                yield stored, _few(stored, layout, packed, [newest(layout, p, at) for p, at in zip(packed, times, strict=True)])


def _many(stored: Stored, columns: Columns, found: np.ndarray) -> Columns:
    """What a view holds for the rows that are asked about: `found` (R), −1 where there is nothing."""
    there, safe = found >= 0, np.maximum(found, 0)
    count = np.count_nonzero(there)
    known, whole = count > 0, count == len(found)
    picked: Columns = {}
    for name in stored.integers:
        values = columns[name][safe] if known else np.full(len(found), absent(name))
        picked[name] = values if whole or not known else np.where(there, values, absent(name))
    for name, kind in stored.values:
        picked[name] = _column(kind, columns[name][safe] if len(columns[name]) else None, there, None)
    return picked


def newest(layout: Layout, packed: bytes, now: int) -> int:
    """The packed row of the newest step with time ≤ now, −1 where none."""
    end = 4 + int.from_bytes(packed[:4], "little") * layout.width
    return bisect_right(memoryview(packed)[4:end].cast("q")[layout.when], now) - 1 if end > 4 else -1


def _few(stored: Stored, layout: Layout, packed: Sequence[bytes], rows: Sequence[int]) -> Columns:
    """What `_many` gives for a row of each of some packed values, −1 where there is none."""
    width, there = layout.width, [(p, row) for p, row in zip(packed, rows, strict=True) if row >= 0]
    cells = np.frombuffer(bytearray().join([p[4 + row * width : 4 + (row + 1) * width] for p, row in there]), layout.dtype)
    columns: Columns = {name: cells[name] for name in (*stored.integers, *(n for n, kind in stored.values if kind != "string"))}
    for i, name in enumerate(layout.words):
        columns[name] = np.array([_words(layout, p)[i][row] for p, row in there], object)
    if len(there) == len(packed):
        return columns
    return _many(stored, columns, np.where(np.array(rows) < 0, -1, np.cumsum(np.array(rows) >= 0) - 1))


def _words(layout: Layout, packed: bytes) -> list[list[str | None]]:
    """The words of a packed value, column by column."""
    words: list[list[str | None]] = json.loads(packed[4 + int.from_bytes(packed[:4], "little") * layout.width :])
    return words


def own_keys(spec: Spec, own: Columns, keys: Iterable[tuple[str, ...]], rows: int) -> dict[tuple[str, ...], list[str | None]]:
    """Text keys of rows given as frame columns: integers and truths that became floats are themselves again."""
    wanted, columns = set(keys), {}
    for name in {name for key in wanted for name in key}:
        kind = {"bool": bool, "string": str}.get(spec.row_source.columns[name].type, int)
        columns[name] = [None if v is None or v != v or v == MISSING else kind(v) for v in own[name].tolist()]
    return {key: [text_key([columns[name][i] for name in key]) for i in range(rows)] for key in wanted}


def _column(kind: str, stored: np.ndarray | None, there: np.ndarray, asked: np.ndarray | None) -> np.ndarray:
    """A frame column: the stored value where there is one, else the asked value, else missing."""
    rows = len(there)
    if stored is not None and there.all():
        return stored
    if kind == "string":
        values = np.full(rows, None, object)
    elif kind == "timestamp":
        values = np.full(rows, MISSING)
    else:
        values = np.full(rows, np.nan)
    if asked is not None:
        given = ~there & np.array([v is not None for v in asked], bool)
        if given.any():
            number = {"string": str, "timestamp": int}.get(kind, float)
            values[given] = [number(v) for v in asked[given]]
    if stored is not None:
        values[there] = stored[there]
    return values


@dataclass(frozen=True)
class Served:
    """Features of R requested rows at `now` (µs), with what a caller should know about them."""

    now: int
    frame: Columns
    looked: Looked

    def part(self, rows: slice) -> "Served":
        """The same of some of the rows, without what they were derived from."""
        looked = self.looked
        own, events = ({n: v[rows] for n, v in some.items()} for some in (looked.own, looked.events))
        some = replace(looked, own=own, raw={}, unknown=looked.unknown[rows], closed_at=looked.closed_at[rows], events=events)
        return Served(self.now, {n: v[rows] for n, v in self.frame.items()}, some)

    def missing(self, row: int) -> list[str]:
        """Features without a value."""
        found = []
        for name, values in self.frame.items():
            value = values[row]
            if value is None or value != value or (values.dtype.kind == "i" and value == MISSING):
                found.append(name)
        return found

    def stale(self, row: int, after: int | None) -> list[str]:
        """Latest views with a ttl whose newest fact is older than `after` (µs), or too old to count."""
        if after is None:
            return []
        events = {name: int(e[row]) for name, e in self.looked.events.items() if name in self.looked.aging}
        return [name for name, event in events.items() if event != MISSING and self.now - event > after]

    def event_times(self, row: int) -> dict[str, str]:
        """Event time of the newest fact of each latest view."""
        return {n: iso(int(e[row])) for n, e in self.looked.events.items() if e[row] != MISSING}


def serve_features(store: OnlineStore, requests: Sequence[Mapping[str, object]], now: int | Callable[[], int]) -> Served:
    """The frame of the requested rows at `now` (also asked for in the state of the store that is read): the same functions
    as in training, on what the store holds."""

    def look() -> tuple[int, Looked]:
        at = now if isinstance(now, int) else now()
        return at, store.look_up(requests, at)

    at, looked = store.in_one_state(look)
    frame = assemble(store.spec, looked.own, looked.raw, np.full(len(requests), at))
    return Served(at, frame, looked)
