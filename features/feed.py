"""The served store, written: the steps that still matter, one packed row per key and view.

For every key the newest step not later than the anchor is kept and all later ones, so the store answers for every instant
from the anchor on, also when no event arrives. It only goes forward. Facts that arrive later change the cells of the keys
that they touch and no others: a day, or a second of pushed events, costs what it touches.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.cells import Change, Event, Meta, Update, open_cells, writable_cells
from features.facts import Facts, int_times
from features.keys import key_runs, rows_among, text_keys
from features.packed import ROWS, Layout, layout_digest, layouts, pack, pack_steps
from features.parts import by_key, view_by_key
from features.rows import online_rows
from features.steps import KEY, TIME
from features.views import RECENT, others_of
from features.windows import build_sums, build_views
from pipelines.clock import Anchor
from pipelines.spec import Latest, Open, Spec, Window
from pipelines.spec import Sequence as Chain

Tables = Mapping[str, pa.Table]
PART = 50_000  # keys that are packed at a time


Fresh = Callable[[], tuple[Sequence[Event], Iterable[Change]]]  # events that a store is to hold, and cells that change


def feed(
    spec: Spec, features: Path, store: Path | str, anchor: Anchor, snapshot: str, *, newest: Mapping[str, int] | None = None,
    fresh: Fresh = lambda: ((), ()), again: bool = False,
) -> bool:  # fmt: skip
    """Brings the served store to the state of a feature folder, from `anchor.data_us` on.

    False, and nothing written, where the store is already at this snapshot or beyond this time, unless `again`. `newest`:
    known-at (µs) of the newest fact by source. `fresh`: pushed events that the snapshot may lack, asked for in the transaction.
    """

    def decide(held: Meta) -> Update | None:
        if not again and _up_to(spec, held, anchor, snapshot):
            return None
        events, changes = fresh()
        over = {(view, key): packed for view, key, packed in changes}
        base = (cell for cell in _cells(spec, features, anchor.data_us) if cell[:2] not in over)
        more = ((view, key, packed) for (view, key), packed in over.items() if packed is not None)
        meta = {**_meta(spec, anchor, snapshot, newest or {}), "whole_us": str(anchor.data_us)}
        return Update(meta, chain(base, more), events=events)

    return writable_cells(store, durable=False).feed(decide)


def feed_changes(
    spec: Spec, store: Path | str, anchor: Anchor, snapshot: str, *, since: str, newest: Mapping[str, int], fresh: Fresh
) -> bool:  # fmt: skip
    """Moves a served store from snapshot `since` on by the cells that changed; False where it is not at `since` (any more)."""

    def decide(held: Meta) -> Update | None:
        meta = _meta(spec, anchor, snapshot, newest)
        at_since = held.get("snapshot") == since and held["format"] == meta["format"]
        if not at_since or int(held["data_us"]) > anchor.data_us:
            return None
        events, changes = fresh()
        return Update(meta, changes, whole=False, events=events)

    return writable_cells(store, durable=False).feed(decide)


def is_fed(spec: Spec, store: Path | str, anchor: Anchor, snapshot: str) -> bool:
    """Whether a feed would write nothing."""
    return _up_to(spec, open_cells(store).meta(), anchor, snapshot)


def _up_to(spec: Spec, held: Meta, anchor: Anchor, snapshot: str) -> bool:
    same = bool(held) and (held["snapshot"], held["format"]) == (snapshot, layout_digest(spec))
    return bool(held) and (int(held["data_us"]), same) >= (anchor.data_us, True)


def _meta(spec: Spec, anchor: Anchor, snapshot: str, newest: Mapping[str, int]) -> Meta:
    return {"format": layout_digest(spec), "snapshot": snapshot, "data_us": str(anchor.data_us),
            "wall_us": str(anchor.wall_us), "newest": json.dumps(dict(newest))}  # fmt: skip


def _cells(spec: Spec, features: Path, anchor: int) -> Iterator[Change]:
    """Every packed row that is needed from the anchor on."""
    for layout in layouts(spec).values():
        columns = [*dict.fromkeys((KEY, *layout.times, *layout.numbers, *layout.words))]
        if layout.view == ROWS:
            found = by_key(features / "online_rows.parquet", columns)
        else:
            found = view_by_key(features, layout.view, _first(spec, layout, anchor), columns)
        for table in found:
            for key, packed in _packed(spec, layout, table, anchor):
                yield layout.view, key, packed


def _first(spec: Spec, layout: Layout, anchor: int) -> int:
    """From which time on, or order of plans, a view is needed from the anchor on."""
    if layout.times[0] != "_order":
        return anchor
    shape = spec.features.views[layout.view].shape
    assert isinstance(shape, Chain)
    return anchor - RECENT - shape.within


def _packed(spec: Spec, layout: Layout, table: pa.Table, anchor: int) -> Iterator[tuple[str, bytes]]:
    """The keys of a view that are needed from the anchor on, and their packed rows."""
    if layout.view == ROWS:
        table = table.filter(pc.greater(table["_live_to"], anchor))
    elif layout.times[0] == "_order":
        near = pc.greater_equal(table["_order"], _first(spec, layout, anchor))
        table = table.filter(pc.and_(near, pc.greater(table["_live_to"], anchor)))
    elif table.num_rows:
        later = int_times(table[TIME]) > anchor
        needed = later | np.append(later[1:], False)
        needed[key_runs(table[KEY])[1][1:] - 1] = True
        table = table if needed.all() else table.filter(pa.array(needed))
    if not table.num_rows:
        return
    keys, start = key_runs(table[KEY])
    for i in range(0, len(keys), PART):
        bounds = start[i : i + PART + 1]
        part = table.slice(bounds[0], bounds[-1] - bounds[0])
        yield from zip(keys.slice(i, PART).to_pylist(), pack(layout, part, bounds - bounds[0]), strict=True)


# What new facts change


def changed_cells(spec: Spec, tables: Tables, new: Tables, anchor: int) -> Iterator[Change]:
    """The cells, right from `anchor` (µs) on, that the facts `new` (source → rows) change; `tables` hold them too."""
    every, packing = Facts(spec, tables), layouts(spec)
    for name, view in spec.features.views.items():
        source, others = view.shape.source, others_of(view.shape)
        touched = every.touched(new, source, others)
        keys = _keys(every, source, view.shape.key, touched)
        if not len(keys):
            continue
        if isinstance(view.shape, Window | Open):
            for stored, _, steps in build_sums(every, name, anchor, only=keys):
                yield from _of_keys(stored.name, keys, pack_steps(packing[stored.name], steps))
            continue
        facts, since = every, anchor
        if isinstance(view.shape, Chain):
            facts = every.narrowed(source, _sharing(every, source, view.shape.key, touched), others)
            since = _first(spec, packing[name], anchor)
        for stored, table in build_views(facts, name, since, only=keys):
            yield from _of_keys(stored.name, keys, _packed(spec, packing[stored.name], table, anchor))
    source, key = spec.rows.source, spec.row_key
    touched = every.touched(new, source, spec.closed_by, key)
    keys = _keys(every, source, key, touched)
    if len(keys):
        asked = every.narrowed(source, _sharing(every, source, key, touched), spec.closed_by, key)
        table = online_rows(spec, asked.tables, anchor)
        table = table.set_column(table.schema.get_field_index(KEY), KEY, table[KEY].dictionary_encode())
        yield from _of_keys(ROWS, keys, _packed(spec, packing[ROWS], table, anchor))


def _keys(every: Facts, source: str, key: Sequence[str], rows: np.ndarray) -> pa.Array:
    """The distinct keys of some rows of a source."""
    if not len(rows):
        return pa.array([], pa.string())
    some, table = pa.array(rows), every.tables[source]
    return text_keys([table[name].take(some) for name in key], len(rows)).drop_null().unique()


def _sharing(every: Facts, source: str, key: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The rows of a source whose key is that of some rows of it."""
    table = every.tables[source]
    return rows_among(table, key, table.take(pa.array(rows)))


def _of_keys(view: str, keys: pa.Array, packed: Iterator[tuple[str, bytes]]) -> Iterator[Change]:
    found = dict(packed)
    for key in keys.to_pylist():
        yield view, key, found.get(key)


def recent(spec: Spec, tables: Tables, since: int) -> Tables:
    """The facts that can still matter from `since` (µs) on, with all versions of each.

    Kept whole are sources of which a view takes the latest, however old; else facts that name a time, or became known, no
    longer ago than the longest window reaches back, and what closes or completes a plan that is kept.
    """
    shapes = [view.shape for view in spec.features.views.values()]
    reach = max([0, *(length for s in shapes if isinstance(s, Window | Open) for length in s.last),
                 *(s.within for s in shapes if isinstance(s, Chain))])  # fmt: skip
    after, every, kept = since - RECENT - reach, Facts(spec, tables), {}
    for name, table in tables.items():
        young = np.zeros(table.num_rows, bool)
        for column in table.schema.names:
            if pa.types.is_timestamp(table.schema.field(column).type):
                young |= int_times(table[column]) >= after
        kept[name] = young | any(isinstance(s, Latest) and s.source == name for s in shapes)
    for source, others in [*_completed(spec), (spec.rows.source, spec.closed_by)]:
        key = spec.sources[source].key if source != spec.rows.source else spec.row_key
        for other in others:
            kept[other][rows_among(tables[other], key, tables[source].filter(pa.array(kept[source])))] = True
    found = {}
    for name, table in tables.items():
        found[name] = table.filter(pa.array(every.versions(name).whole(kept[name]))).combine_chunks()
    return found


def _completed(spec: Spec) -> Iterator[tuple[str, Sequence[str]]]:
    """Plans, and the sources with their key that close or complete them, by view."""
    for view in spec.features.views.values():
        yield view.shape.source, others_of(view.shape)
