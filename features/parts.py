"""Stored views in parts, so that a new day costs what a day costs.

A part is right for begin ≤ t < end; the last one has no end. It is a function of the facts known before its end alone: facts
that become known later leave its file as it is, and the next snapshot takes it over. It begins with what holds then: of each
key the step that counts one µs before, of a chain the plans that may still be asked for. `views/NAME/BEGIN.parquet` is one.

Times are int64 µs UTC. Shapes: N facts known, K keys.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.facts import Facts, int_times
from features.keys import KNOWN, key_runs, one_chunk
from features.steps import KEY, TIME
from features.views import RECENT, Stored, stored_of
from features.windows import build_views, stamps
from pipelines.clock import DAY_US, MISSING, NEVER
from pipelines.spec import Latest, Open, Spec, View, Window
from pipelines.spec import Sequence as Chain

FACTS = 25_000  # a part has at least so many facts of its source, or a fiftieth of those before it


@dataclass(frozen=True)
class Base:
    """A feature folder of an earlier snapshot: its files, and when the first fact of each source that it lacks was known."""

    folder: Path
    files: frozenset[str]
    fresh: dict[str, int] = field(default_factory=dict)

    def has(self, view: View, files: Sequence[str], end: int) -> bool:
        """Whether these parts of a view, which end at `end`, are as they would be made now."""
        known = min((self.fresh[source] for source in _sources(view.shape)), default=NEVER)
        return end <= known and self.files.issuperset(files)


def write_parts(facts: Facts, name: str, folder: Path, since: int, base: Base | None) -> int:
    """Writes the parts of a view of the spec that are needed for t ≥ since into a feature folder; the number of rows.

    Those that `base` has are linked to.
    """
    view = facts.spec.features.views[name]
    stored = stored_of(facts.spec, name, view)
    begins, carried = edges(facts, name), carry(facts.spec, view.shape)
    begins = begins[max(sum(begin <= since for begin in begins) - 1, 0) :]
    spans = list(zip(begins, [*begins[1:], NEVER], strict=True))
    done = 0
    while base and done < len(spans) - 1:
        begin, end = spans[done]
        files = [part_file(s.name, begin) for s in stored]
        if not base.has(view, [*files, *(part_file(s.name, end) for s in stored)], end):
            break
        for file in files:
            _link(base.folder / file, folder / file)
        done += 1
    begin = spans[done][0]
    for s, table in build_views(facts, name, begin if begin == MISSING else begin - 1, carried):
        for begin, end in spans[done:]:
            write_part(cut(s, table, begin, end, carried), folder / part_file(s.name, begin))
    return sum(pq.read_metadata(folder / part_file(s.name, begin)).num_rows for s in stored for begin in begins)


def edges(facts: Facts, name: str) -> list[int]:
    """When the parts of a view begin: the first at MISSING, others at a midnight. More facts later do not move them.

    What a part begins with is the reason why it is no shorter than facts matter. A view of the latest values is one part.
    """
    shape = facts.spec.features.views[name].shape
    carried, found = carry(facts.spec, shape), [MISSING]
    known = np.sort(int_times(facts.tables[shape.source][KNOWN]))
    known = known[known > 0]
    if carried is None or not len(known):
        return found
    at, last = 0, int(known[0])
    while (at := at + max(FACTS, at // 50)) < len(known):
        edge = max(int(known[at]), last + carried)
        edge += DAY_US - edge % DAY_US
        at = int(np.searchsorted(known, edge))
        if at < len(known):
            found.append(edge)
            last = edge
    return found


def carry(spec: Spec, shape: Window | Open | Latest | Chain) -> int | None:
    """How long before t a fact may lie that a view gives for t; none where that is not bounded."""
    if isinstance(shape, Window):
        return max((*shape.last, *shape.next))
    if isinstance(shape, Open):
        return max(shape.last)
    if isinstance(shape, Chain) and spec.predict_at and spec.predict_at.column == shape.order and spec.predict_at.lead >= 0:
        return shape.within + RECENT  # rows that are older are not served
    return None


def cut(stored: Stored, table: pa.Table, begin: int, end: int, carried: int | None) -> pa.Table:
    """One part of steps, or of the states of a chain, that are right for t ≥ begin − 1."""
    if (begin, end) == (MISSING, NEVER):
        return table
    t = int_times(table[TIME])
    keep = t < end
    if stored.kind == "sequence":
        live_to = table["_live_to"].to_numpy()
        if begin != MISSING:
            assert carried is not None
            keep &= (live_to > begin) & (table["_order"].to_numpy() >= begin - carried)
            t = np.maximum(t, begin)
        at = table.schema.get_field_index("_live_to")
        table = table.set_column(at, "_live_to", pa.array(np.minimum(live_to, end)))
    elif begin != MISSING:
        before = t < begin
        start = key_runs(table[KEY])[1]
        last = np.zeros(len(t) + 1, bool)  # before the part, of its key
        last[start[:-1] + np.add.reduceat(before, start[:-1], dtype=np.int64) - 1] = len(start) > 1
        held = table[stored.integers[0]].to_numpy() > 0  # the number of facts that count
        keep &= ~before | (last[:-1] & before & held)
        t = np.maximum(t, begin - 1)
    table = table.set_column(table.schema.get_field_index(TIME), TIME, stamps(t)).filter(pa.array(keep))
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(i, table.column_names[i], _compact(one_chunk(column)))
    return table


def _compact(array: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary of those that occur, in the order in which they do; neighbours are mostly equal."""
    codes = array.indices.to_numpy()
    used, first = np.unique(codes[np.flatnonzero(np.diff(codes, prepend=-1))], return_index=True)
    used = used[np.argsort(first)]
    place = np.zeros(len(array.dictionary), np.int32)
    place[used] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(pa.array(place[codes]), array.dictionary.take(pa.array(used)))


def _sources(shape: Window | Open | Latest | Chain) -> Iterable[str]:
    more = shape.closed_by if isinstance(shape, Open) else shape.facts if isinstance(shape, Chain) else ()
    return (shape.source, *more)


# Files


def part_file(view: str, begin: int) -> str:
    """Where a part lies in a feature folder."""
    return f"views/{view}/{max(begin, 0):020d}.parquet"


def write_part(table: pa.Table, path: Path) -> None:
    """Sorted integers as packed differences, everything else as codes of a dictionary: small without compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = [f.name for f in table.schema if pa.types.is_int64(f.type) or pa.types.is_timestamp(f.type)]
    pq.write_table(
        table, path, compression="none", write_statistics=False, store_schema=False,
        use_dictionary=[name for name in table.column_names if name not in packed],
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
    )  # fmt: skip


def _link(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(old, new)


def read_view(folder: Path, view: str, since: int = MISSING) -> pa.Table:
    """What a stored view holds for t ≥ since: by key and time, or by chain and order of the plans."""
    files = sorted((folder / "views" / view).glob("*.parquet"))
    begins = [int(path.stem) for path in files]
    tables: list[pa.Table] = []
    for path, begin in list(zip(files, begins, strict=True))[max(sum(b <= since for b in begins) - 1, 0) :]:
        table = pq.read_table(path, use_threads=False, read_dictionary=[KEY])
        if tables and "_live_to" not in table.column_names:
            table = table.filter(pa.array(int_times(table[TIME]) >= begin))  # what it begins with is known
        tables.append(table)
    if len(tables) == 1:
        return tables[0]
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    by = [(KEY, "ascending")] + [("_order", "ascending")] * ("_order" in table.column_names)
    plain = table.set_column(table.schema.get_field_index(KEY), KEY, table[KEY].cast(pa.string()))
    order = pc.sort_indices(plain.append_column("_place", pa.array(np.arange(len(plain)))), [*by, ("_place", "ascending")])
    return table.take(order)
