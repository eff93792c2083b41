"""The newest of the facts that are known: which row of any table of facts a key sees at a time.

Of the facts of a key, in the order in which they become known, only those can be seen that are at least as new as all
before. These are steps, read by `steps.as_of`.

Shapes: N facts, Q rows asked for, K keys. Times are int64 µs, or ns where the facts have finer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa

from features.facts import int_times
from features.keys import codes_of, filled, one_chunk
from features.steps import as_of, is_newest, order_of, starts
from pipelines.clock import MISSING


@dataclass(frozen=True)
class NewestKnown:
    """Facts by key code and known-at: key i has start[i]:start[i + 1] of `known`, `event` and `row`."""

    codes: "Codes"
    start: np.ndarray
    known: np.ndarray
    event: np.ndarray
    row: np.ndarray
    unit: str
    ttl: timedelta | None

    def find(self, keys: Sequence[pa.ChunkedArray], at: pa.ChunkedArray) -> np.ndarray:
        """For each of Q keys and times the row of the table that it sees, −1 where none (int64)."""
        t, late = instants(at, self.unit)
        found = seen_at(self.start, self.known, self.codes.of(keys, len(t)), t)
        if not len(self.row):
            return found
        alive, there = found >= 0, np.maximum(found, 0)
        if self.ttl:
            limit = self.ttl // timedelta(microseconds=1) * (1000 if self.unit == "ns" else 1)
            alive &= self.event[there] >= t + late - limit
        return np.where(alive, self.row[there], -1)


def newest_known(
    keys: Sequence[pa.ChunkedArray], event: pa.ChunkedArray, created: pa.ChunkedArray | None, ttl: timedelta | None
) -> NewestKnown:
    """Facts with keys, event and created times, made ready: known at the later of both, for ever where `ttl` is none or 0."""
    stamps = [event] if created is None else [event, created]
    unit = unit_of(stamps)
    codes = Codes(keys, len(event))
    happened, *rest = (times(column, unit) for column in stamps)
    written = rest[0] if rest else happened
    row = np.flatnonzero((codes.stored >= 0) & (happened != MISSING) & (written != MISSING))
    order, code, known = sort_facts(codes.stored[row], np.maximum(happened, written)[row], happened[row], written[row])
    row = row[order]
    happened = happened[row]
    newest = is_newest(starts(code, codes.count), happened)
    return NewestKnown(codes, starts(code[newest], codes.count), known[newest], happened[newest], row[newest], unit, ttl)


def unit_of(columns: Sequence[pa.ChunkedArray]) -> str:
    """`us`, or `ns` where a time is finer than that."""
    fine = [c for c in columns if pa.types.is_timestamp(c.type) and c.type.unit == "ns"]
    return "ns" if any((filled(one_chunk(c).cast(pa.int64()), 0) % 1000).any() for c in fine) else "us"


def times(column: pa.ChunkedArray, unit: str) -> np.ndarray:
    """Times in a unit, MISSING where null."""
    if unit == "us":
        return int_times(column)
    return filled(one_chunk(column).cast(pa.timestamp("ns", "UTC")).cast(pa.int64()), MISSING)


def instants(column: pa.ChunkedArray, unit: str) -> tuple[np.ndarray, np.ndarray | int]:
    """Times of rows in a unit, rounded down, and what rounding them up would add (1 or 0); MISSING where null."""
    if unit == "ns" or unit_of([column]) == "us":
        return times(column, unit), 0
    t = times(column, "ns")
    none = t == MISSING
    return np.where(none, MISSING, t // 1000), ~none & (t % 1000 > 0)


def sort_facts(code: np.ndarray, *by: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the order of code (≥ 0, < 2^32), then of each of `by`, stable; code and by[0] in that order.

    Fast where by[0] is nearly sorted and rarely equal.
    """
    order = np.arange(len(code)) if (by[0][1:] >= by[0][:-1]).all() else np.argsort(by[0], kind="stable")
    for shift in range(0, int(code.max(initial=0)).bit_length(), 16):  # numpy sorts 16 bits by counting
        digit = (code >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    code, first = code[order], by[0][order]
    same = (code[1:] == code[:-1]) & (first[1:] == first[:-1])
    if len(by) > 1 and same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        order[tied] = order[tied][np.lexsort((*(values[order[tied]] for values in by[::-1]), code[tied]))]
    return order, code, first


def seen_at(start: np.ndarray, step_t: np.ndarray, codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """`steps.as_of`, asked in order of key and time: a search that moves forward finds its place in the cache."""
    order = order_of(codes, t)
    found = np.empty(len(t), np.int64)
    found[order] = as_of(start, step_t, codes[order], t[order])
    return found


class Codes:
    """Keys as small integers: equal exactly where all columns are equal, −1 where one is null or not stored."""

    def __init__(self, columns: Sequence[pa.ChunkedArray], length: int) -> None:
        self.levels: list[pa.Array] = []
        self.pairs: list[pa.Array] = []  # of a code so far and a level of the next column, as one integer
        self.stored, self.count = np.zeros(length, np.int64), 1
        for i, column in enumerate(columns):
            encoded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            part = one_chunk(encoded)
            self.levels.append(part.dictionary)
            self.stored = self._both(self.stored, filled(part.indices, -1).astype(np.int64), len(part.dictionary))
            if i:
                pair = pa.array(self.stored, mask=self.stored < 0).dictionary_encode()
                self.pairs.append(pair.dictionary)
                self.stored = filled(pair.indices, -1).astype(np.int64)
            self.count = len(self.pairs[-1] if i else part.dictionary)

    def of(self, columns: Sequence[pa.ChunkedArray], length: int) -> np.ndarray:
        """Codes of keys that are asked for (int64, length)."""
        code = np.zeros(length, np.int64)
        for i, (column, level) in enumerate(zip(columns, self.levels, strict=True)):
            code = self._both(code, positions(column, level), len(level))
            if i:
                code = positions(pa.array(code, mask=code < 0), self.pairs[i - 1])
        return code

    @staticmethod
    def _both(code: np.ndarray, part: np.ndarray, levels: int) -> np.ndarray:
        return np.where((code < 0) | (part < 0), -1, code * levels + part)


def positions(column: pa.Array | pa.ChunkedArray, level: pa.Array) -> np.ndarray:
    """`codes_of`, by hashing the shorter of the two: few rows may be asked of many keys."""
    if len(column) >= len(level):
        return codes_of(column, level)
    own = one_chunk(column.dictionary_encode())
    at = codes_of(level, own.dictionary)
    there = np.flatnonzero(at >= 0)
    place = np.full(len(own.dictionary) + 1, -1)
    place[at[there]] = there
    return place[filled(own.indices, len(own.dictionary))]
