"""Rows that break a rule of their own: which they are, and why. A function of the tables and the spec alone.

Rules on a row are those on its key, its values, the order of its columns, its known-at, and references that every row must
meet. Rules on a table (rows, shares of nulls, references of a share) set nothing aside: they refuse.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.keys import KNOWN, one_chunk, text_keys, true
from pipelines.spec import Column, Source, Spec

Why = tuple[str, str]  # rule, and its columns: ("order", "due, end")


@dataclass(frozen=True)
class BadRows:
    """Per reason a mask over the rows of a table, and whether more rows are bad than the spec lets be set aside."""

    reasons: Mapping[Why, np.ndarray]
    rows: int
    share: float  # that may be set aside

    @property
    def mask(self) -> np.ndarray:
        return np.logical_or.reduce([np.zeros(self.rows, bool), *self.reasons.values()])

    @property
    def counts(self) -> dict[Why, int]:
        return {why: int(mask.sum()) for why, mask in self.reasons.items() if mask.any()}

    @property
    def too_many(self) -> bool:
        return int(self.mask.sum()) > self.share * self.rows + 1e-9


def bad_rows(spec: Spec, tables: Mapping[str, pa.Table]) -> dict[str, BadRows]:
    """The bad rows of every source that may set some aside. `tables`: all versions, sorted by key and known-at.

    What refers to a row that is set aside is bad in turn.
    """
    reasons = {name: dict(own_reasons(s, tables[name])) for name, s in spec.sources.items() if s.quarantine}
    links = [_Link(spec, name, number, tables) for name in reasons for number in range(len(spec.sources[name].references))]
    found: dict[str, BadRows] = {}
    grown = True
    while grown:
        found = {name: BadRows(why, tables[name].num_rows, spec.sources[name].quarantine) for name, why in reasons.items()}
        grown = bool(sum(link.grow(reasons[link.name], found) for link in links if link.whole))
    return found


class _Link:
    """A reference from a source that sets rows aside."""

    def __init__(self, spec: Spec, name: str, number: int, tables: Mapping[str, pa.Table]) -> None:
        reference = spec.sources[name].references[number]
        self.name, self.to, self.whole = name, reference.to, reference.share == 1
        self.why = ("references", ", ".join(reference.columns))
        if self.whole:
            self.keys, self.known = (
                text_keys([tables[t][c] for c in reference.columns], tables[t].num_rows) for t in (name, reference.to)
            )

    def grow(self, reasons: dict[Why, np.ndarray], found: Mapping[str, BadRows]) -> bool:
        """Adds the rows whose target is not there, or is bad; false when these were known."""
        known = self.known.filter(pa.array(~found[self.to].mask)) if self.to in found else self.known
        lost = true(pc.invert(pc.is_in(self.keys, value_set=known))) & true(self.keys.is_valid())
        before = reasons.get(self.why, np.zeros(len(lost), bool))
        reasons[self.why] = before | lost
        return bool((lost & ~before).any())


def own_reasons(source: Source, table: pa.Table) -> Iterator[tuple[Why, np.ndarray]]:
    """What is wrong with rows (mask over N), seen from themselves, in the order of the contract."""
    columns = {name: one_chunk(table[name]) for name in (*source.columns, KNOWN)}
    labels = [source.known_at.column or "known-at"] if source.known_at else []
    yield ("key", ", ".join([*source.key, *labels])), _twice(source, table)
    for name, declared in source.columns.items():
        if source.nulls(name) == 0:
            yield ("nulls", name), true(columns[name].is_null())
        for rule, mask in _value_masks(columns[name], declared):
            yield (rule, name), mask
    event, known = source.event_time, source.known_at
    if source.kind == "observation" and event and known:
        yield ("known_at", f"{event}, {known.column or 'known-at'}"), true(pc.greater(columns[event], columns[KNOWN]))
    for low, high in source.order:
        yield ("order", f"{low}, {high}"), true(pc.greater(_finite(columns[low]), _finite(columns[high])))


def _value_masks(array: pa.Array, declared: Column) -> Iterator[tuple[str, np.ndarray]]:
    if declared.type == "float64":
        yield "finite", true(pc.invert(pc.is_finite(array)))
    if declared.min is not None or declared.max is not None:
        numbers, outside = _finite(array), np.zeros(len(array), bool)
        if declared.min is not None:
            outside |= true(pc.less(numbers, declared.min))
        if declared.max is not None:
            outside |= true(pc.greater(numbers, declared.max))
        yield "range", outside
    if declared.values is not None:
        listed = pa.array(declared.values, pa.string())
        yield "values", true(pc.invert(pc.is_in(array, value_set=listed))) & true(array.is_valid())
    if declared.pattern is not None:
        expression = re.compile(declared.pattern)
        match = [v for v in array.unique().to_pylist() if v is not None and expression.search(v)]
        yield "pattern", true(pc.invert(pc.is_in(array, value_set=pa.array(match, pa.string())))) & true(array.is_valid())


def _twice(source: Source, table: pa.Table) -> np.ndarray:
    """Rows that share key and known-at with one of other values. Which of them is right nobody can say."""
    twice = np.zeros(table.num_rows, bool)
    names = text_keys([table[k] for k in source.key], table.num_rows)
    known = one_chunk(table[KNOWN]).cast(pa.int64())
    same = true(pc.and_(pc.equal(names[1:], names[:-1]), pc.equal(known[1:], known[:-1])))
    twice[1:] |= same
    twice[:-1] |= same
    return twice


def _finite(array: pa.Array) -> pa.Array:
    """NaN and infinity have a rule of their own."""
    return pc.if_else(pc.is_finite(array), array, pa.scalar(None, array.type)) if pa.types.is_floating(array.type) else array
