"""The newest of the facts that are known: which row of any table of facts a key sees at a time.

Of the facts of a key, in the order in which they become known, only those can be seen that are at least as new as all
before. These are steps, read by `steps.as_of`. Facts may be made ready in several parts, one after the other: of what the
parts show, the newest is seen.

Shapes: N facts, Q rows asked for, K keys. Times are int64 µs, or ns where the facts have finer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import pyarrow as pa

from features.facts import int_times
from features.keys import codes_of, filled, one_chunk
from features.steps import as_of, is_newest, order_of, starts
from pipelines.clock import MISSING


@dataclass(frozen=True)
class NewestKnown:
    """Facts by key code and known-at: key i has start[i]:start[i + 1] of `known`, `event`, `created` and `row`."""

    codes: "Codes"
    start: np.ndarray
    known: np.ndarray
    event: np.ndarray
    created: np.ndarray
    row: np.ndarray
    unit: str
    ttl: timedelta | None

    def seen(self, keys: Sequence[pa.ChunkedArray], at: pa.ChunkedArray) -> np.ndarray:
        """For each of Q keys and times the fact that it sees, as a position here, −1 where none (int64)."""
        t, late = instants(at, self.unit)
        found = seen_at(self.start, self.known, self.codes.of(keys, len(t)), t)
        if not self.ttl or not len(self.row):
            return found
        limit = self.ttl // timedelta(microseconds=1) * (1000 if self.unit == "ns" else 1)
        alive = (found >= 0) & (self.event[np.maximum(found, 0)] >= t + late - limit)
        return np.where(alive, found, -1)


def newest_known(
    keys: Sequence[pa.ChunkedArray], event: pa.ChunkedArray, created: pa.ChunkedArray | None, ttl: timedelta | None, *,
    first: int = 0, unit: str = "",
) -> NewestKnown:  # fmt: skip
    """Facts with keys, event and created times, made ready: known at the later of both, for ever where `ttl` is none or 0.

    `first`: the number of their first row; `unit`: of their times, found out unless told.
    """
    stamps = [event] if created is None else [event, created]
    unit = unit or unit_of(stamps)
    codes, code = Codes.made(keys, len(event))
    happened, *rest = (times(column, unit) for column in stamps)
    written = rest[0] if rest else happened
    row = np.flatnonzero((code >= 0) & (happened != MISSING) & (written != MISSING))
    order, code, known = sort_facts(code[row], np.maximum(happened, written)[row], happened[row], written[row])
    row = row[order]
    happened = happened[row]
    newest = is_newest(starts(code, codes.count), happened)
    row = row[newest]
    return NewestKnown(codes, starts(code[newest], codes.count), known[newest], happened[newest], written[row], row + first, unit,
                       ttl)  # fmt: skip


def rows_seen(parts: Sequence[NewestKnown], keys: Sequence[pa.ChunkedArray], at: pa.ChunkedArray) -> np.ndarray:
    """For each of Q keys and times the row that it sees among the facts of all parts, −1 where none (int64)."""
    row, event, created = (np.full(len(at), -1), np.full(len(at), MISSING), np.full(len(at), MISSING))
    for part in parts:
        found = part.seen(keys, at)
        some = np.flatnonzero(found >= 0)
        found = found[some]
        happened, written = part.event[found], part.created[found]
        newer = (happened > event[some]) | ((happened == event[some]) & (written >= created[some]))
        some, found = some[newer], found[newer]
        row[some], event[some], created[some] = part.row[found], happened[newer], written[newer]
    return row


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


@dataclass
class Codes:
    """Keys as small integers: equal exactly where all columns are equal, −1 where one is null or not stored."""

    levels: list[pa.Array] = field(default_factory=list)
    pairs: list[pa.Array] = field(default_factory=list)  # of a code so far and a level of the next column, as one integer
    count: int = 1

    @classmethod
    def made(cls, columns: Sequence[pa.ChunkedArray], length: int) -> tuple["Codes", np.ndarray]:
        """The codes of keys that are stored, and those keys as codes (int64, length)."""
        found, code = cls(), np.zeros(length, np.int64)
        for i, column in enumerate(columns):
            encoded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            part = one_chunk(encoded)
            found.levels.append(part.dictionary)
            code = cls._both(code, filled(part.indices, -1).astype(np.int64), len(part.dictionary))
            if i:
                pair = pa.array(code, mask=code < 0).dictionary_encode()
                found.pairs.append(pair.dictionary)
                code = filled(pair.indices, -1).astype(np.int64)
            found.count = len(found.pairs[-1] if i else part.dictionary)
        return found, code

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
