"""Facts as versions: what was known of a fact, from when and until when.

All times are int64 µs UTC. Shapes: N facts or versions.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.keys import KNOWN, codes_of, filled, grouped, key_arrays, one_chunk, rows_among, text_keys, true
from pipelines.clock import MISSING, NEVER
from pipelines.spec import Condition, Open, Source, Spec, Window

T = TypeVar("T")
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Versions:
    """Fact versions sorted by fact key and known-at; version i is live for known_from[i] ≤ t < known_to[i]."""

    table: pa.Table
    fact: np.ndarray
    known_from: np.ndarray
    known_to: np.ndarray

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """Which rows belong to a fact that some of `rows` (a mask, or positions) belong to: all its versions (bool, N)."""
        some = np.zeros(len(self.fact) + 1, bool)
        some[self.fact[rows]] = True
        return some[self.fact]


def int_times(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """µs of a timestamp column, MISSING where null."""
    return filled(one_chunk(column).cast(pa.timestamp("us", "UTC")).cast(pa.int64()), MISSING)


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64 values of a number or bool column, NaN where null; of whole numbers from 2^53 on the nearest."""
    array = one_chunk(column)
    array = array.cast(pa.int64()) if pa.types.is_boolean(array.type) else array
    return filled(array.cast(pa.float64(), safe=False), float("nan"))


def versions(table: pa.Table, source: Source) -> Versions:
    """The life of each fact version; `table` as `ingest.read_table` gives it."""
    other = np.zeros(table.num_rows, bool)  # than the row before
    for name in source.key:
        column = one_chunk(table[name])
        other[1:] |= filled(pc.not_equal(column[1:], column[:-1]), True)
    known = int_times(table[KNOWN])
    known_to = np.append(np.where(other[1:], NEVER, known[1:]), NEVER)[: len(known)]
    return Versions(table, np.cumsum(other), known, known_to)


class Facts:
    """The sources of one snapshot, each prepared when it is first needed."""

    def __init__(self, spec: Spec, tables: Mapping[str, pa.Table]) -> None:
        self.spec, self.tables = spec, tables
        self.large = threading.Lock()  # held while a view is built of many facts: one at a time, on any number of cores
        self._made: dict[tuple[object, ...], object] = {}
        self._lock = threading.RLock()

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What is made under this name, the first time that it is asked for."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return cast(T, self._made[key])

    def versions(self, source: str) -> Versions:
        return self.once(("versions", source), lambda: versions(self.tables[source], self.spec.sources[source]))

    def of_rows(self, source: str, rows: np.ndarray) -> "Facts":
        """These facts, but of one source only some rows, each with the life that it has among all."""
        v = self.versions(source)
        life = Versions(v.table.take(pa.array(rows)), v.fact[rows], v.known_from[rows], v.known_to[rows])
        some = Facts(self.spec, {**self.tables, source: life.table})
        some.once(("versions", source), lambda: life)
        return some

    def names(self, source: str, key: Sequence[str]) -> pa.Array:
        """Text key of each row of a source."""
        table = self.tables[source]
        return self.once(("names", source, *key), lambda: text_keys(key_arrays(table, key), table.num_rows))

    def times(self, source: str, column: str) -> np.ndarray:
        """µs of a time column of a source, MISSING where null."""
        return self.once(("times", source, column), lambda: int_times(self.tables[source][column]))

    def touched(self, new: Mapping[str, pa.Table], source: str, others: Sequence[str], joined: Sequence[str] = ()) -> np.ndarray:
        """Rows of a source that `new` facts touch, also those of `others`, which are `joined` to it: all versions of a fact."""
        key = self.spec.sources[source].key
        by = ((source, *key), *((other, *(joined or key)) for other in others))

        def make() -> np.ndarray:
            found = [rows_among(self.tables[source], key, new[name]) for name, *key in by if name in new]
            return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))

        return self.once(("touched", source, *by), make)

    def narrowed(self, source: str, rows: np.ndarray, others: Sequence[str], joined: Sequence[str] = ()) -> "Facts":
        """The facts that these rows of a source belong to, with all their versions, and of `others` what is joined to them."""
        key = joined or self.spec.sources[source].key
        some = self.tables[source].filter(pa.array(self.versions(source).whole(rows)))
        joint = {name: self.tables[name].take(pa.array(rows_among(self.tables[name], key, some))) for name in others}
        return Facts(self.spec, {**joint, source: some})

    def floats(self, source: str, column: str) -> np.ndarray:
        """float64 values of a column of a source, NaN where null."""
        return self.once(("floats", source, column), lambda: floats(self.tables[source][column]))

    def holds(self, source: str, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
        """`holds` of a column of a source."""
        return self.once(("holds", source, condition), lambda: holds(condition, self.tables[source][condition.column]))

    def over(self, shape: Window | Open) -> np.ndarray:
        """µs of the time of each row that the windows of a view lie over, MISSING where null."""
        return self.times(shape.source, shape.over or str(self.spec.sources[shape.source].event_time))

    def closed_at(self, source: str, closed_by: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """When a fact with the key of each of these rows was first known in any of the closing sources (rows)."""
        key, table = self.spec.sources[source].key, self.tables[source]
        if len(rows) > max(self.tables[name].num_rows for name in (source, *closed_by)) // 4:

            def make() -> np.ndarray:
                every = [(self.names(c, key), int_times(self.tables[c][KNOWN])) for c in closed_by]
                return first_known(self.names(source, key), every)

            return self.once(("closed", source, *closed_by), make)[rows]
        some, closing = table.select([*key]).take(pa.array(rows)), []
        for name in closed_by:  # a look at one column leaves few to be compared whole
            facts = self.tables[name].select([*key, KNOWN])
            facts = facts.filter(pc.is_in(facts[key[0]], value_set=one_chunk(some[key[0]])))
            closing.append((text_keys(key_arrays(facts, key), facts.num_rows), int_times(facts[KNOWN])))
        return first_known(text_keys(key_arrays(some, key), len(rows)), closing)


def first_known(names: pa.Array, closing: Sequence[tuple[pa.Array, np.ndarray]]) -> np.ndarray:
    """When each of N keys was first known among closing facts (their keys and known-at), NEVER where not."""
    keys, codes = grouped(names)
    earliest = np.full(len(keys) + 1, NEVER)
    for closing_names, known in closing:
        at = codes_of(closing_names, keys)
        np.minimum.at(earliest, at[at >= 0], known[at >= 0])
    return earliest[codes]


def closing_facts(spec: Spec, tables: Mapping[str, pa.Table]) -> list[tuple[pa.Array, np.ndarray]]:
    """Row keys and known-at of the facts that close a row."""
    closing = [tables[name] for name in spec.closed_by]
    return [(text_keys(key_arrays(c, spec.row_key), c.num_rows), int_times(c[KNOWN])) for c in closing]


def holds(condition: Condition, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Where a condition is true, and where its column is not null (both bool, N)."""
    ((operator, bound),) = condition.comparison().items()
    compare = {"gt": pc.greater, "ge": pc.greater_equal, "lt": pc.less, "le": pc.less_equal, "eq": pc.equal}[operator]
    if isinstance(bound, int | float) and not isinstance(bound, bool) and pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    return true(compare(column, bound)), true(column.is_valid())
