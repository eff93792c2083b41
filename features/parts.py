"""Stored views in parts, so that a new day costs what a day costs.

`views/NAME/BEGIN.parquet` is a part. The next snapshot takes over the files that its new facts leave as they are.

- Windows and backlogs: it is right for begin ≤ t < end, the last one has no end; a function of the facts known before its end
  alone. It begins with what holds then: of each key the step that counts one µs before.
- Chains: it is right for plans with begin ≤ order < end, at any t; a function of the plans that were ever due in between, or
  `within` before begin, which it holds too.
- A view of the latest values is one part.

Times are int64 µs UTC. Shapes: N facts known, K keys.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.facts import Facts, int_times
from features.keys import KNOWN, grouped, key_runs, one_chunk
from features.steps import KEY, TIME
from features.views import Stored, others_of, reach, stored_of
from features.windows import RANGE, build_views, in_ranges, stamps
from pipelines.clock import DAY_US, MISSING, NEVER
from pipelines.spec import Latest, Open, Window
from pipelines.spec import Sequence as Chain

GROUP = 2**18  # rows of a part that are written, and read, at once
FACTS = 25_000  # a part has at least so many facts of its source, or a fiftieth of those before it


@dataclass(frozen=True)
class Base:
    """A feature folder of an earlier snapshot: its files, and the facts of each source that it lacks."""

    folder: Path
    files: frozenset[str]
    new: Mapping[str, pa.Table]

    def settled(self, facts: Facts, shape: Window | Open | Latest | Chain) -> int:
        """The parts of a view that end by then are as they would be made now."""
        if not isinstance(shape, Chain):
            return min(int(int_times(self.new[name][KNOWN]).min(initial=NEVER)) for name in (shape.source, *others_of(shape)))
        due = facts.times(shape.source, shape.order)[facts.touched(self.new, shape.source, others_of(shape))]
        return int(due[due != MISSING].min(initial=NEVER))


def write_parts(facts: Facts, name: str, folder: Path, since: int, base: Base | None) -> dict[str, int]:
    """Writes the parts of a view of the spec that are needed for t ≥ since into a feature folder; the rows by stored view.

    Those that `base` has are linked to.
    """
    view = facts.spec.features.views[name]
    stored, shape, begins = stored_of(facts.spec, name, view), view.shape, edges(facts, name)
    if not isinstance(shape, Chain):
        begins = begins[max(sum(begin <= since for begin in begins) - 1, 0) :]
    done, settled = 0, base.settled(facts, shape) if base else MISSING
    while base and done < len(begins) - 1 and begins[done + 1] <= settled:
        files = [part_file(s.name, begins[done]) for s in stored]
        if not base.files.issuperset([*files, *(part_file(s.name, begins[done + 1]) for s in stored)]):
            break
        for file in files:
            _link(base.folder / file, folder / file)
        done += 1
    left = begins[done:]
    growing = {part_file(s.name, begin): Part(folder / part_file(s.name, begin)) for s in stored for begin in left}
    first = left[0] if left[0] == MISSING else left[0] - (shape.within if isinstance(shape, Chain) else 1)
    with facts.large if facts.tables[shape.source].num_rows > RANGE else nullcontext():
        for some, last in in_ranges(facts, name, first):
            for s, table in build_views(some, name, first):
                for begin, rows in zip(left, cut(s, shape, table, left), strict=True):
                    growing[part_file(s.name, begin)].add(rows, last=last)
    return {s.name: sum(pq.read_metadata(folder / part_file(s.name, b)).num_rows for b in begins) for s in stored}


def edges(facts: Facts, name: str) -> list[int]:
    """When the parts of a view begin: the first at MISSING, others at a midnight. More facts later do not move them.

    What a part begins with is the reason why it is no shorter than facts matter.
    """
    shape, found = facts.spec.features.views[name].shape, [MISSING]
    known = np.sort(int_times(facts.tables[shape.source][KNOWN]))
    known = known[known > 0]
    if isinstance(shape, Latest) or not len(known):
        return found
    at, last = 0, int(known[0])
    while (at := at + max(FACTS, at // 50)) < len(known):
        edge = max(int(known[at]), last + reach(shape))
        edge += DAY_US - edge % DAY_US
        at = int(np.searchsorted(known, edge))
        if at < len(known):
            found.append(edge)
            last = edge
    return found


def cut(
    stored: Stored, shape: Window | Open | Latest | Chain, table: pa.Table, begins: Sequence[int]
) -> Iterator[pa.Table]:  # fmt: skip
    """The parts of a stored view, in turn, from what `build_views` gives for the first of `begins`."""
    if len(begins) == 1 and begins[0] == MISSING:
        yield table
        return
    t = int_times(table[TIME])
    if isinstance(shape, Chain):  # a plan is in every part that holds plans which it may come before
        order = table["_order"].to_numpy()
        first, last = (np.searchsorted(begins, at, side="right") - 1 for at in (order, order + shape.within))
    else:  # a step with facts that count is in every part until its key's next step
        first = np.maximum(np.searchsorted(begins, t, side="right") - 1, 0)
        last = np.append(first[1:], 0)[: len(first)]
        last[key_runs(table[KEY])[1][1:] - 1] = len(begins) - 1
        last = np.where(table[stored.integers[0]].to_numpy() > 0, last, first)
    first = np.maximum(first, 0)
    copies = np.maximum(last - first + 1, 0)
    row = np.repeat(np.arange(len(t)), copies)
    part = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
    order = np.argsort(part.astype(np.uint16), kind="stable")
    row, part = row[order], part[order]
    table = table.take(pa.array(row)).combine_chunks()
    if not isinstance(shape, Chain):
        t = np.maximum(t[row], (np.maximum(begins, MISSING + 1) - 1)[part])
        table = table.set_column(table.schema.get_field_index(TIME), TIME, stamps(t))
    at = np.searchsorted(part, np.arange(len(begins) + 1))
    yield from (table.slice(at[i], size) for i, size in enumerate(np.diff(at)))


def _compact(array: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary of those that occur, in the order in which they do; neighbours are mostly equal."""
    if array.null_count:
        return array.dictionary_decode().dictionary_encode()
    codes = array.indices.to_numpy()
    used, first = np.unique(codes[np.flatnonzero(np.diff(codes, prepend=-1))], return_index=True)
    used = used[np.argsort(first)]
    place = np.zeros(len(array.dictionary), np.int32)
    place[used] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(pa.array(place[codes]), array.dictionary.take(pa.array(used)))


# Files


def part_file(view: str, begin: int) -> str:
    """Where a part lies in a feature folder."""
    return f"views/{view}/{max(begin, 0):020d}.parquet"


class Part:
    """A part whose rows come in order, some at a time: its file is the same whatever they come in.

    Sorted integers as packed differences, everything else as codes of a dictionary: small without compression.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, list[pa.Table]()
        self._file: pq.ParquetWriter | None = None

    def add(self, table: pa.Table, *, last: bool) -> None:
        """Takes more rows, and writes them as far as they fill row groups; the last also where they do not."""
        self._rest.append(table)
        while (rows := sum(some.num_rows for some in self._rest)) > GROUP:
            self._write(GROUP)
        if last:
            self._write(rows).close()
            self._rest.clear()

    def _write(self, rows: int) -> pq.ParquetWriter:
        table = pa.concat_tables(self._rest)
        self._rest, table = [table.slice(rows)], table.slice(0, rows).unify_dictionaries().combine_chunks()
        for i, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(i, table.column_names[i], _compact(one_chunk(column)))
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            packed = [f.name for f in table.schema if pa.types.is_int64(f.type) or pa.types.is_timestamp(f.type)]
            self._file = pq.ParquetWriter(
                self._path, table.schema, compression="none", write_statistics=False, store_schema=False,
                use_dictionary=[name for name in table.column_names if name not in packed],
                column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
            )  # fmt: skip
        self._file.write_table(table)
        return self._file


def write_part(table: pa.Table, path: Path) -> None:
    """Writes a part as it is."""
    Part(path).add(table, last=True)


def _link(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(old, new)


def by_key(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of a view, which are sorted by key, a row group at a time; those of one key come together."""
    file = pq.ParquetFile(path, read_dictionary=[KEY])
    rest = file.schema_arrow.empty_table().select(columns)
    for group in range(file.num_row_groups):
        read = file.read_row_group(group, columns, use_threads=False)
        table = pa.concat_tables([rest, read]) if rest.num_rows else read
        cut = key_runs(table[KEY])[1][-2] if table.num_rows and group + 1 < file.num_row_groups else table.num_rows
        rest = table.slice(cut)
        yield table.slice(0, cut)


def view_by_key(folder: Path, view: str, since: int, columns: list[str]) -> Iterator[pa.Table]:
    """What `read_view` gives, in tables of whole keys: one after the other where a single part holds it."""
    files = _needed(folder, view, since)
    if len(files) == 1:
        yield from by_key(files[0], columns)
    else:
        yield read_view(folder, view, since, columns)


def _needed(folder: Path, view: str, since: int) -> list[Path]:
    """The parts of a view that hold what is right for t, or plans with an order, ≥ since."""
    files = sorted((folder / "views" / view).glob("*.parquet"))
    return files[max(sum(int(path.stem) <= since for path in files) - 1, 0) :]


def read_view(folder: Path, view: str, since: int = MISSING, columns: list[str] | None = None) -> pa.Table:
    """What a stored view holds for t, or plans with an order, ≥ since, or some columns of it: by key and time, or order."""
    tables: list[pa.Table] = []
    for path in _needed(folder, view, since):
        table = pq.read_table(path, columns=columns, use_threads=False, read_dictionary=[KEY])
        if tables:  # what it begins with is known
            begins = table["_order"].to_numpy() if "_order" in table.column_names else int_times(table[TIME])
            table = table.filter(pa.array(begins >= int(path.stem)))
        tables.append(table)
    if len(tables) == 1:
        return tables[0]
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    _, codes = grouped(one_chunk(table[KEY]).cast(pa.string()))
    return table.take(pa.array(np.argsort(codes, kind="stable")))
