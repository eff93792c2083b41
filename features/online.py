"""The served store, read: one packed row per key and view, without Feast or pandas. `features.feed` writes it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from features.cells import PUSHED, WAIT_S, Held, Meta, Moved, NoCells, open_cells, place_of
from features.facts import Columns
from features.few import FEW_ROWS, Few
from features.frame import compose, derive_all
from features.keys import request_key, text_key
from features.packed import ROWS, Layout, layout_digest, layouts, unpack
from features.steps import TIME, as_of, previous
from features.views import RECENT, Stored, absent, stored_views
from pipelines.clock import MISSING, NEVER, Anchor, iso
from pipelines.errors import MillraceError
from pipelines.spec import Sequence as Chain
from pipelines.spec import Spec

T = TypeVar("T")
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

    `own`: row columns after request fields stood in; `of_views`: the features of all views; `unknown` (R): no stored row;
    `closed_at` (R) µs or NEVER; `events`: view → event time (R) of latest views, MISSING where none; `aging`: those
    of them that have a ttl; `snapshot`: digest of what the store had been fed; `pushed`: number of the last pushed event.
    """

    own: Columns
    of_views: Columns
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
        self.few = Few(spec, self.stored, self.layouts)
        self.aging = frozenset(n for n, v in spec.features.views.items() if v.latest is not None and v.latest.ttl)
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
            of_views, events = self.features_at(own, np.full(len(requests), now))
        meta = self.last
        return Looked(own, of_views, unknown, closed, events, self.aging, meta["snapshot"], int(meta.get(PUSHED, 0)))

    def _rows(self, requests: Sequence[Mapping[str, object]], now: int) -> tuple[Columns, np.ndarray, np.ndarray]:
        start, columns, at = self.read({ROWS: [request_key(r, self.spec.row_key) for r in requests]})[ROWS]
        found = as_of(start, columns["_live_from"], at, np.full(len(requests), now))
        safe, there = np.maximum(found, 0), found >= 0
        if self.spec.predict_at is not None and there.any():
            due = columns[self.spec.predict_at.column][safe]
            there &= (due == MISSING) | (due >= now - RECENT)
        source = self.spec.row_source.columns
        if there.all():
            return {name: columns[name][safe] for name in source}, ~there, columns["_closed_at"][safe]
        own: Columns = {}
        for name, column in source.items():
            asked = np.array([r.get(name) for r in requests], object)
            own[name] = _column(column.type, columns[name][safe] if len(columns[name]) else None, there, asked)
        closed = np.where(there, columns["_closed_at"][safe], NEVER) if there.any() else np.full(len(requests), NEVER)
        return own, ~there, closed

    def features_at(self, own: Columns, t: np.ndarray) -> tuple[Columns, dict[str, np.ndarray]]:
        """The features of all views for rows at their times, and the event times of the latest views."""
        keys = own_keys(self.spec, own, (stored.key for stored in self.stored), len(t))
        if 0 < len(t) <= FEW_ROWS:
            return self._of_few(own, t, keys)
        raw = self.views_at(own, t, keys)
        events = {view: raw[view][view]["_event"] for view in self.few.events}
        return derive_all(self.spec, raw, t, own), events

    def views_at(self, own: Columns, t: np.ndarray, keys: Keys) -> dict[str, dict[str, Columns]]:
        """What the stored views hold for rows at their times, as `frame.derive_all` takes it."""
        packed = self.read({stored.name: keys[stored.key] for stored in self.stored})
        raw: dict[str, dict[str, Columns]] = {name: {} for name in self.spec.features.views}
        for stored in self.stored:
            start, columns, at = packed[stored.name]
            raw[stored.view][stored.name] = _many(stored, columns, self._found(stored, start, columns, at, own, t))
        return raw

    def _of_few(self, own: Columns, t: np.ndarray, keys: Keys) -> tuple[Columns, dict[str, np.ndarray]]:
        distinct = {key: sorted({k for k in texts if k is not None}) for key, texts in keys.items()}
        with self.reading():
            held = self.cells.get([(s.name, distinct[s.key]) for s in self.stored])
            self.check_format()
        packed = [[cells.get(key, b"") for key in keys[s.key]] for s, cells in zip(self.stored, held, strict=True)]  # type: ignore[arg-type]
        null = {key: np.array([k is None for k in texts]) for key, texts in keys.items() if None in texts}
        return self.few.features(packed, t, own, null)

    def _found(
        self, stored: Stored, start: np.ndarray, columns: Columns, at: np.ndarray, own: Columns, t: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """The rows of a view that hold for keys at places `at` at times t, −1 where none."""
        shape = self.spec.features.views[stored.view].shape
        if not isinstance(shape, Chain):
            return as_of(start, columns[TIME], at, t)
        live = columns[TIME], columns["_live_to"]
        return previous(start, columns["_order"], *live, at, t, own[shape.order], shape.within)


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
        unknown, closed = looked.unknown[rows], looked.closed_at[rows]
        some = replace(looked, own=own, of_views={}, unknown=unknown, closed_at=closed, events=events)
        return Served(self.now, {n: v[rows] for n, v in self.frame.items()}, some)

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
    return Served(at, compose(store.spec, looked.own, looked.of_views), looked)
