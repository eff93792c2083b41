"""Features as functions of (key, t), kept as steps.

A window value changes when an event becomes known, when it is corrected, and when it falls out of the window. So it
is a step function of t, and a fact version lies in a window exactly for t in one half-open interval [enter, exit):

    last w   t − w < over ≤ t      enter = max(known_from, over)        exit = min(known_to, over + w)
    next w   t < over ≤ t + w      enter = max(known_from, over − w)    exit = min(known_to, over)
    open     …and not yet closed   enter = max(known_from, over)        exit = min(known_to, over + w, closed_at)

The stored form of every view is the table of its steps, sorted by key and time. The one merge function is `as_of`:
the newest step not later than t. Training reads it for many (key, t) at once, the endpoint for one; after the last
event the steps at which facts fall out of the window are stored already. Nothing known later changes a step at or
before the watermark. All times are int64 µs UTC, all sums int64.

Shapes: N facts or steps, Q queries, K keys.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.ingest import KNOWN
from features.keys import codes_of, filled, grouped, key_arrays, one_chunk, text_keys
from pipelines.clock import MISSING, NEVER, duration_text
from pipelines.errors import MillraceError
from pipelines.spec import Condition, Latest, Open, Source, Spec, View, Window
from pipelines.spec import Sequence as Chain

T = TypeVar("T")
Columns = dict[str, np.ndarray]
KEY = "_key"  # of stored views: text of the key. Names of ours begin with _, as no column of a source should
TIME = "_time"  # of stored views: when a step, or a state of a sequence, begins
LIMIT = 2**62  # sums of window values must stay below


@dataclass(frozen=True)
class Steps:
    """Step functions by key: key `i` has the rows start[i]:start[i+1], with increasing `t`."""

    keys: pa.Array
    start: np.ndarray
    t: np.ndarray
    columns: Columns


@dataclass(frozen=True)
class Versions:
    """Fact versions sorted by fact key and known-at; version i is live for known_from[i] ≤ t < known_to[i]."""

    table: pa.Table
    fact: np.ndarray
    known_from: np.ndarray
    known_to: np.ndarray


def int_times(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """µs of a timestamp column, MISSING where null."""
    return filled(one_chunk(column).cast(pa.timestamp("us", "UTC")).cast(pa.int64()), MISSING)


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64 values of a number or bool column, NaN where null."""
    array = one_chunk(column)
    array = array.cast(pa.int64()) if pa.types.is_boolean(array.type) else array
    return filled(array.cast(pa.float64()), float("nan"))


def versions(table: pa.Table, source: Source) -> Versions:
    """The life of each fact version; `table` as `ingest.read_table` gives it."""
    other = np.zeros(max(table.num_rows - 1, 0), bool)  # than the row before
    for name in source.key:
        column = one_chunk(table[name])
        other |= pc.not_equal(column[1:], column[:-1]).fill_null(True).to_numpy(zero_copy_only=False)
    known = int_times(table[KNOWN])
    if not len(known):
        return Versions(table, known, known, known)
    fact = np.concatenate([[0], np.cumsum(other)])
    known_to = np.append(np.where(other, NEVER, known[1:]), NEVER)
    return Versions(table, fact, known, known_to)


class Facts:
    """The sources of one snapshot, each prepared when it is first needed. Values are right for every t ≥ since."""

    def __init__(self, spec: Spec, tables: Mapping[str, pa.Table], since: int = MISSING) -> None:
        self.spec, self.tables, self.since = spec, tables, since
        self._made: dict[tuple[object, ...], object] = {}
        self._lock = threading.RLock()

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return cast(T, self._made[key])

    def versions(self, source: str) -> Versions:
        return self._once(("versions", source), lambda: versions(self.tables[source], self.spec.sources[source]))

    def names(self, source: str, key: Sequence[str]) -> pa.Array:
        """Text key of each row of a source."""
        table = self.tables[source]
        return self._once(("names", source, *key), lambda: text_keys(key_arrays(table, key), table.num_rows))

    def closed_at(self, source: str, closed_by: Sequence[str]) -> np.ndarray:
        """When a fact with the key of each row was first known in any of the closing sources (N)."""
        key = self.spec.sources[source].key

        def make() -> np.ndarray:
            closing = [(self.names(c, key), int_times(self.tables[c][KNOWN])) for c in closed_by]
            return first_known(self.names(source, key), closing)

        return self._once(("closed", source, *closed_by), make)


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


def order_of(codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Positions that sort by (code, t), stable. Fast where the two fit into one integer and are nearly sorted."""
    if not len(t):
        return np.zeros(0, np.int64)
    low, high = int(t.min()), int(t.max())
    if (int(codes.max()) + 1) * (high - low + 1) < LIMIT:
        return np.argsort(codes * (high - low + 1) + (t - low), kind="stable")
    return np.lexsort((t, codes))


def bisect(start: np.ndarray, values: np.ndarray, codes: np.ndarray, x: np.ndarray, *, right: bool) -> np.ndarray:
    """Where x[q] goes into the run of its code: values[start[code]:start[code + 1]] are sorted (Q, codes ≥ 0)."""
    side: Literal["left", "right"] = "right" if right else "left"
    if len(x) == 1:
        lo, hi = start[codes[0]], start[codes[0] + 1]
        return lo + np.searchsorted(values[lo:hi], x, side=side)
    if not len(values):
        return start[codes]
    low, high = int(values.min()), int(values.max())
    width = high - low + 3  # room for "before all" and "after all"
    if (len(start) - 1) * width < LIMIT:
        line = np.repeat(np.arange(len(start) - 1) * width, np.diff(start)) + (values - low)
        return np.searchsorted(line, codes * width + (np.clip(x, low - 1, high + 1) - low), side=side)
    lo, hi = start[codes], start[codes + 1]
    while (active := lo < hi).any():
        middle = (lo + hi) >> 1
        at = values[np.minimum(middle, len(values) - 1)]
        below = active & ((at <= x) if right else (at < x))
        lo, hi = np.where(below, middle + 1, lo), np.where(active & ~below, middle, hi)
    return lo


def as_of(start: np.ndarray, step_t: np.ndarray, codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The merge function: for each (key code, t) the row of the newest step with step_t ≤ t, −1 where none (Q)."""
    if len(start) < 2:
        return np.full(len(t), -1)
    safe = np.maximum(codes, 0)
    at = bisect(start, step_t, safe, t, right=True) - 1
    return np.where((codes >= 0) & (at >= start[safe]), at, -1)


@dataclass(frozen=True)
class Group:
    """Fact versions by group key and time: N of them, in that order, at `row` of the table."""

    keys: pa.Array
    first: np.ndarray  # for each key a row of the table that has it
    code: np.ndarray
    over: np.ndarray
    row: np.ndarray
    known_from: np.ndarray
    known_to: np.ndarray


def group_versions(facts: Versions, key: Sequence[str], over: np.ndarray, ends: np.ndarray, since: int) -> Group:
    """The versions that have a group key and a time `over`, and whose span may end after `since` (at `ends`)."""
    keys, codes = grouped(text_keys(key_arrays(facts.table, key), facts.table.num_rows))
    there = (codes >= 0) & (over != MISSING)
    row = np.flatnonzero(there & (facts.known_from < facts.known_to) & (np.minimum(facts.known_to, ends) > since))
    row = row[order_of(codes[row], over[row])]
    return Group(keys, first_rows(keys, codes), codes[row], over[row], row, facts.known_from[row], facts.known_to[row])


def first_rows(keys: pa.Array, codes: np.ndarray) -> np.ndarray:
    """For each key the first row with its code."""
    first = np.zeros(len(keys) + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return first[:-1]


Move = tuple[np.ndarray, np.ndarray, Columns]


def accumulate(keys: pa.Array, codes: np.ndarray, moves: Sequence[Move]) -> Steps:
    """Steps of running sums. Each move is (t (N), where it counts (N), name → int64 (N) that is added from t on)."""
    code = np.concatenate([codes[counts] for _, counts, _ in moves])
    t = np.concatenate([t[counts] for t, counts, _ in moves])
    order = order_of(code, t)
    code, t = code[order], t[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t = code[last], t[last]
    start = np.searchsorted(code, np.arange(len(keys) + 1))
    columns: Columns = {}
    for name in dict.fromkeys(name for _, _, values in moves for name in values):
        parts = [values[name][counts] if name in values else np.zeros(np.count_nonzero(counts), np.int64)
                 for _, counts, values in moves]  # fmt: skip
        # int64 wraps around, and the difference of two wrapped sums is right as long as it fits itself
        total = np.cumsum(np.concatenate(parts)[order])[last]
        before = np.concatenate([[0], total])[start[:-1]]
        columns[name] = total - np.repeat(before, np.diff(start))
    return Steps(keys, start, t, columns)


def resolution(source: Source, name: str) -> float:
    """Smallest step of a column that window sums keep: whole numbers, unless a float64 column declares another."""
    column = source.columns[name]
    return column.resolution or 1.0 if column.type == "float64" else 1.0


def _scaled(values: np.ndarray, source: Source, name: str, power: int) -> np.ndarray:
    """Values in whole steps of their resolution (int64, 0 where NaN). Raises MillraceError where a power overflows."""
    scaled = np.rint(np.where(np.isnan(values), 0.0, values) / resolution(source, name))
    if len(scaled) and not float(np.abs(scaled).max()) ** power < LIMIT:
        raise MillraceError(f"column {name!r}: {np.nanmax(np.abs(values)):g} is too large for its resolution")
    return scaled.astype(np.int64)


def holds(condition: Condition, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Where a condition is true, and where its column is not null (both bool, N)."""
    ((operator, bound),) = condition.comparison().items()
    compare = {"gt": pc.greater, "ge": pc.greater_equal, "lt": pc.less, "le": pc.less_equal, "eq": pc.equal}[operator]
    if isinstance(bound, int | float) and not isinstance(bound, bool) and pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    true = compare(column, bound).fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
    return true, column.is_valid().to_numpy(zero_copy_only=False).astype(bool)


def window_values(source: Source, shape: Window, table: pa.Table, rows: np.ndarray) -> Columns:
    """What each fact adds to the sums of a window view (int64, N: the rows)."""
    at = pa.array(rows)
    found: Columns = {"_count": np.ones(len(rows), np.int64)}
    for name in dict.fromkeys((*shape.mean, *shape.std)):
        values = floats(table[name].take(at))
        found[f"_{name}_n"] = (~np.isnan(values)).astype(np.int64)
        found[f"_{name}_sum"] = _scaled(values, source, name, 1 + (name in shape.std))
        if name in shape.std:
            found[f"_{name}_squares"] = found[f"_{name}_sum"] ** 2
    for name, condition in shape.share.items():
        true, there = holds(condition, table[condition.column].take(at))
        found.setdefault(f"_{condition.column}_n", there.astype(np.int64))
        found[f"_{name}_hits"] = true.astype(np.int64)
    return found


def edges(over: np.ndarray, length: int, *, ahead: bool) -> tuple[np.ndarray, np.ndarray]:
    """A fact at `over` is in the window of t for begin ≤ t < end: (t − w, t], or (t, t + w] when `ahead`."""
    return (over - length, over) if ahead else (over, over + length)


def window_steps(group: Group, values: Columns, length: int, *, ahead: bool, since: int) -> Steps:
    """Steps of a window view: counts and sums of the facts in (t − w, t], or in (t, t + w] when `ahead`."""
    begin, end = edges(group.over, length, ahead=ahead)
    enter = np.maximum(np.maximum(group.known_from, begin), since)
    leave = np.minimum(group.known_to, end)
    stays = enter < leave
    less = {name: -value for name, value in values.items()}
    steps = accumulate(group.keys, group.code, [(enter, stays, values), (leave, stays & (leave < NEVER), less)])
    most = int(steps.columns["_count"].max(initial=0))
    for name, value in values.items():
        if most * float(np.abs(value).max(initial=0)) >= LIMIT:
            raise MillraceError(f"window sum of {name!r} may overflow: give its column a coarser resolution")
    return steps


def open_steps(group: Group, closed_at: np.ndarray, length: int, since: int) -> Steps:
    """Steps of a backlog view: plans due in (t − w, t], those still open among them, and the sum of their due times.

    `closed_at` (N): when a closing fact of the plan was first known, NEVER where none.
    """
    begin, end = edges(group.over, length, ahead=False)
    enter = np.maximum(np.maximum(group.known_from, begin), since)
    leave = np.minimum(group.known_to, end)
    closes = np.minimum(leave, closed_at)
    one, still = np.ones(len(enter), np.int64), enter < closes
    more = {"_due": one, "_open": still.astype(np.int64), "_over": np.where(still, group.over, 0)}
    moves = [
        (enter, enter < leave, more),
        (leave, (enter < leave) & (leave < NEVER), {"_due": -one}),
        (closes, still & (closes < NEVER), {"_open": -one, "_over": -group.over}),
    ]
    return accumulate(group.keys, group.code, moves)


def latest_steps(source: Source, shape: Latest, facts: Versions) -> Steps:
    """Steps of a latest view: column `row` is the position of the newest live version in `facts` (−1: expired or
    none), column `_event` its event time, also when expired."""
    table = facts.table
    keys, codes = grouped(text_keys(key_arrays(table, shape.key), table.num_rows))
    event = int_times(table[source.event_time]) if source.event_time else np.zeros(len(codes), np.int64)
    usable = np.flatnonzero((codes >= 0) & (event != MISSING) & (facts.known_from < facts.known_to))
    moved = np.unique(codes[usable][facts.known_to[usable] < NEVER])  # keys with corrections: exact sweep
    swept = np.isin(codes[usable], moved)
    plain = usable[~swept]
    order = plain[np.lexsort((facts.fact[plain], event[plain], facts.known_from[plain], codes[plain]))]
    code, row = codes[order], order
    first = np.append(True, code[1:] != code[:-1]) if len(code) else np.zeros(0, bool)
    best = _running_max(event[order], first)
    newest = event[order] >= best
    code, row = code[newest], row[newest]
    t = facts.known_from[row]
    parts = [(code, t, row, event[row]), *_sweep(facts, codes, event, usable[swept])]
    code, t, row, seen = (np.concatenate(x) for x in zip(*parts, strict=True))
    if shape.ttl is not None:
        code, t, row, seen = _expire(code, t, row, seen, shape.ttl)
    order = np.lexsort((np.arange(len(t)), t, code))
    code, t, row, seen = code[order], t[order], row[order], seen[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t, row, seen = code[last], t[last], row[last], seen[last]
    return Steps(keys, np.searchsorted(code, np.arange(len(keys) + 1)), t, {"row": row, "_event": seen})


def _running_max(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Running maximum that begins anew where `first` is true."""
    if len(values) == 0:
        return values
    ranks = np.unique(values, return_inverse=True)[1].astype(np.int64)
    group = np.cumsum(first) - 1
    width = int(ranks.max()) + 1
    top = np.maximum.accumulate(ranks + group * width) - group * width
    return np.sort(np.unique(values))[top]


Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _sweep(facts: Versions, codes: np.ndarray, event: np.ndarray, rows: np.ndarray) -> list[Part]:
    """Newest live version at each instant at which it changes, for the keys where versions are superseded."""
    found: list[tuple[int, int, int, int]] = []
    order = rows[order_of(codes[rows], facts.known_from[rows])]
    for group in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []:
        code, best, new = int(codes[group[0]]), -1, 0
        heap: list[tuple[int, int, int, int]] = []  # newest first; what has ended is dropped when it comes up
        row = group.tolist()
        begins, ends = facts.known_from[group].tolist(), facts.known_to[group].tolist()
        events, fact = event[group].tolist(), facts.fact[group].tolist()
        for t in sorted({*begins, *ends} - {NEVER}):
            while new < len(begins) and begins[new] <= t:
                heappush(heap, (-events[new], -begins[new], -fact[new], new))
                new += 1
            while heap and ends[heap[0][3]] <= t:
                heappop(heap)
            newest = heap[0][3] if heap else -1
            if newest != best:
                best = newest
                found.append((code, t, row[best] if heap else -1, events[best] if heap else MISSING))
    if not found:
        return []
    codes_at, t_at, row_at, seen_at = (np.array(x, np.int64) for x in zip(*found, strict=True))
    return [(codes_at, t_at, row_at, seen_at)]


def _expire(code: np.ndarray, t: np.ndarray, row: np.ndarray, seen: np.ndarray, ttl: int) -> Part:
    """Adds the step at which each value has become too old (event < t − ttl), unless a newer one came before."""
    order = np.lexsort((t, code))
    code, t, row, seen = code[order], t[order], row[order], seen[order]
    end = np.where(row >= 0, seen + ttl + 1, NEVER)
    row = np.where(end <= t, -1, row)
    following = np.append(np.where(code[1:] == code[:-1], t[1:], NEVER), NEVER) if len(t) else t
    ends = (end > t) & (end < following) & (row >= 0)
    none = np.full(int(ends.sum()), -1)
    return (np.concatenate([code, code[ends]]), np.concatenate([t, end[ends]]),
            np.concatenate([row, none]), np.concatenate([seen, seen[ends]]))  # fmt: skip


def sequence_table(facts: Facts, shape: Chain) -> pa.Table:
    """The plans of each chain with what was known of them: one row per plan and state, live for [live_from, live_to).

    Sorted by chain key, `order`, and which of equal ones counts (known last, then greatest fact key).
    """
    plans, plan_key = facts.versions(shape.source), facts.spec.sources[shape.source].key
    others = {name: facts.versions(name) for name in shape.facts}
    keys = facts.names(shape.source, plan_key).take(pa.array(np.flatnonzero(np.diff(plans.fact, prepend=-1))))
    codes = {name: codes_of(facts.names(name, plan_key), keys) for name in shape.facts}
    code = np.concatenate([plans.fact, *codes.values()])
    t = np.concatenate([plans.known_from, *(v.known_from for v in others.values())])
    code, t = code[code >= 0], t[code >= 0]
    order = order_of(code, t)
    code, t = code[order], t[order]
    keep = np.append(True, (code[1:] != code[:-1]) | (t[1:] != t[:-1]))[: len(code)]
    code, t = code[keep], t[keep]
    until = np.append(np.where(code[1:] == code[:-1], t[1:], NEVER), NEVER)[: len(code)]
    plan = as_of(_starts(plans.fact, len(keys)), plans.known_from, code, t)
    due = int_times(plans.table[shape.order])[np.maximum(plan, 0)] if len(plan) else plan
    chains, chain_of = grouped(text_keys(key_arrays(plans.table, shape.key), plans.table.num_rows))
    chain = np.where(plan >= 0, chain_of[np.maximum(plan, 0)], -1) if len(plan) else plan
    kept = np.flatnonzero((chain >= 0) & (due != MISSING) & (until > facts.since))
    known = plans.known_from[plan[kept]]
    kept = kept[np.lexsort((known, due[kept], chain[kept]))]  # ties: by fact, then time, as they are
    code, t, until, due, chain, at = (x[kept] for x in (code, t, until, due, chain, plan))
    columns = {name: plans.table[name].take(pa.array(at)) for name in shape.key}
    columns |= {held(name, shape.key): plans.table[name].take(pa.array(at)) for name in shape.columns}
    for name, v in others.items():
        rows = np.flatnonzero(codes[name] >= 0)
        rows = rows[order_of(codes[name][rows], v.known_from[rows])]
        found = as_of(_starts(codes[name][rows], len(keys)), v.known_from[rows], code, t)
        take = pa.array(rows[np.maximum(found, 0)] if len(rows) else found, mask=found < 0)
        for column in shape.facts[name]:
            columns[f"_{name}_{column}"] = pa.array(floats(v.table[column].take(take)), from_pandas=True)
    return pa.table({KEY: repeated(chains, chain), **columns, "_order": due, "_live_to": until, TIME: stamps(t)})


def _starts(sorted_codes: np.ndarray, n_keys: int) -> np.ndarray:
    return np.searchsorted(sorted_codes, np.arange(n_keys + 1))


def previous(
    start: np.ndarray, order: np.ndarray, live_from: np.ndarray, live_to: np.ndarray,
    codes: np.ndarray, t: np.ndarray, own: np.ndarray, within: int,
) -> np.ndarray:  # fmt: skip
    """For each (chain, t, own order) the row of the newest live plan with own − within ≤ order < own, −1 if none."""
    found = np.full(len(t), -1)
    if len(start) < 2:
        return found
    known, safe = (codes >= 0) & (own != MISSING), np.maximum(codes, 0)
    lo = start[safe]
    at = bisect(start, order, safe, own, right=False) - 1
    todo = np.flatnonzero(known & (at >= lo))
    while len(todo):
        i = at[todo]
        near = order[i] >= own[todo] - within
        live = near & (live_from[i] <= t[todo]) & (t[todo] < live_to[i])
        found[todo[live]] = i[live]
        at[todo] -= 1
        todo = todo[near & ~live & (at[todo] >= lo[todo])]
    return found


@dataclass(frozen=True)
class Stored:
    """One stored view: its name, the view of the spec that it serves, and what is in it."""

    name: str
    view: str
    kind: str  # steps | ago | sequence
    key: tuple[str, ...]
    integers: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()  # (column, declared type) of latest and sequence views
    length: int = 0
    ahead: bool = False

    def source_column(self, name: str) -> str:
        """The column of the source whose values are kept as `name`."""
        return next((c for c in self.key if held(c, self.key) == name), name)


def held(column: str, key: Sequence[str]) -> str:
    """Name under which a view keeps a value: the name of a key column is taken by the key."""
    return f"_{column}" if column in key else column


def stored_views(spec: Spec) -> list[Stored]:
    """Every table that the features of a spec are kept in: one per view and window length."""
    found = []
    for name, view in spec.features.views.items():
        shape = view.shape
        source = spec.sources[shape.source]
        if isinstance(shape, Window):
            integers = ["_count"]
            for column in dict.fromkeys((*shape.mean, *shape.std)):
                integers += [f"_{column}_n", f"_{column}_sum"] + [f"_{column}_squares"] * (column in shape.std)
            for share, condition in shape.share.items():
                integers += [f"_{condition.column}_n", f"_{share}_hits"]
            integers = list(dict.fromkeys(integers))
            for ahead, lengths in ((False, shape.last), (True, shape.next)):
                for length in lengths:
                    title = f"{name}_{'next_' if ahead else ''}{duration_text(length)}"
                    found.append(Stored(title, name, "steps", shape.key, tuple(integers), (), length, ahead))
        elif isinstance(shape, Open):
            for length in shape.last:
                title = f"{name}_{duration_text(length)}"
                found.append(Stored(title, name, "steps", shape.key, ("_due", "_open", "_over"), (), length))
        elif isinstance(shape, Latest):
            change = shape.change
            both = dict.fromkeys((*shape.columns, *(change.columns if change else ())))
            typed = tuple((held(c, shape.key), source.columns[c].type) for c in both)
            found.append(Stored(name, name, "steps", shape.key, ("_event",), typed))
            for ago in change.over if change else ():
                assert change is not None
                title = f"{name}_ago_{duration_text(ago)}"
                some = tuple((held(c, shape.key), source.columns[c].type) for c in change.columns)
                found.append(Stored(title, name, "ago", shape.key, ("_event",), some, ago))
        else:
            typed = tuple((held(c, shape.key), source.columns[c].type) for c in shape.columns)
            typed += tuple((f"_{s}_{c}", "float64") for s, cs in shape.facts.items() for c in cs)
            found.append(Stored(name, name, "sequence", shape.key, ("_order",), typed))
    return found


def build_views(facts: Facts, name: str) -> Iterator[tuple[Stored, pa.Table]]:
    """The stored tables of a view of the spec, right for every t ≥ `facts.since`.

    Columns: text `key` and key columns, step time, and what the view holds; sorted by key and time. A sequence is as
    `sequence_table` gives it.
    """
    shape, since = facts.spec.features.views[name].shape, facts.since
    views = [stored for stored in stored_views(facts.spec) if stored.view == name]
    if isinstance(shape, Chain):
        yield views[0], sequence_table(facts, shape)
        return
    source, v = facts.spec.sources[shape.source], facts.versions(shape.source)
    if isinstance(shape, Latest):
        steps = latest_steps(source, shape, v)
        first = first_rows(*grouped(text_keys(key_arrays(v.table, shape.key), v.table.num_rows)))
        for stored in views:
            moved = replace(steps, t=steps.t + (stored.length if stored.kind == "ago" else 0))
            yield stored, step_table(stored, moved, v.table, first)
        return
    over = int_times(v.table[shape.over or source.event_time])
    longest = max((*shape.last, *(shape.next if isinstance(shape, Window) else ())))
    group = group_versions(v, shape.key, over, over + longest, since)
    if isinstance(shape, Window):
        values = window_values(source, shape, v.table, group.row)
        for stored in views:
            steps = window_steps(group, values, stored.length, ahead=stored.ahead, since=since)
            yield stored, step_table(stored, steps, v.table, group.first)
    else:
        closed_at = facts.closed_at(shape.source, shape.closed_by)[group.row]
        for stored in views:
            steps = open_steps(group, closed_at, stored.length, since)
            yield stored, step_table(stored, steps, v.table, group.first)


def step_table(stored: Stored, steps: Steps, table: pa.Table, first: np.ndarray) -> pa.Table:
    """Steps as they are stored; `first`: for each key a row of the fact table that has it."""
    code = np.repeat(np.arange(len(steps.keys)), np.diff(steps.start))
    columns = {KEY: repeated(steps.keys, code)}
    for name in stored.key:
        columns[name] = repeated(one_chunk(table[name].take(pa.array(first))), code)
    columns |= {name: pa.array(steps.columns[name]) for name in stored.integers}
    if stored.values:
        row = steps.columns["row"]
        rows = pa.array(np.maximum(row, 0), mask=row < 0)
        columns |= {name: table[stored.source_column(name)].take(rows) for name, _ in stored.values}
    return pa.table({**columns, TIME: stamps(steps.t)})


def repeated(values: pa.Array, codes: np.ndarray) -> pa.Array:
    """values[codes]; texts as codes of a dictionary, so that many rows cost little."""
    if not pa.types.is_string(values.type):
        return values.take(pa.array(codes))
    encoded = values.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices.take(pa.array(codes)), encoded.dictionary)


def stamps(t: np.ndarray) -> pa.Array:
    """int64 µs as timestamps."""
    return pa.array(t).cast(pa.timestamp("us", "UTC"))


def feature_names(spec: Spec, name: str, view: View) -> dict[str, str]:
    """The features of a view: name → number | category."""
    shape, source = view.shape, spec.sources[view.shape.source]
    kinds = {"string": "category"}
    found: dict[str, str] = {}
    if isinstance(shape, Window):
        for prefix in (s.name for s in stored_views(spec) if s.view == name):
            found |= {f"{prefix}__count": "number"} if shape.count else {}
            found |= {f"{prefix}__{c}_mean": "number" for c in shape.mean}
            found |= {f"{prefix}__{c}_std": "number" for c in shape.std}
            found |= {f"{prefix}__{c}_share": "number" for c in shape.share}
    elif isinstance(shape, Open):
        for length in shape.last:
            prefix = f"{name}_{duration_text(length)}"
            found |= {f"{prefix}__{c}": "number" for c in ("due", "open", "open_share", "late_mean")}
    elif isinstance(shape, Latest):
        found = {f"{name}__{c}": kinds.get(source.columns[c].type, "number") for c in shape.columns}
        for ago in shape.change.over if shape.change else ():
            assert shape.change is not None
            found |= {f"{name}__{c}_change_{duration_text(ago)}": "number" for c in shape.change.columns}
    else:
        found = {f"{name}__gap_min": "number"}
        for c in shape.columns:
            kind = source.columns[c].type
            found[f"{name}__{c}" + ("_min" if kind == "timestamp" else "")] = kinds.get(kind, "number")
        found |= {f"{name}__{s}_{c}": "number" for s, cs in shape.facts.items() for c in cs}
    return found


def derive(
    spec: Spec, name: str, raw: Mapping[str, Columns], t: np.ndarray, own: Columns, null_key: np.ndarray
) -> Columns:
    """The features of one view from what was looked up: the only place where sums become means.

    `raw`: stored view → column → values (Q): int64, 0 where there is no step; float64 with NaN, or objects with
    None. `own`: request fields as int64 µs. `null_key` (Q): where part of the key is null.
    """
    shape = spec.features.views[name].shape
    source = spec.sources[shape.source]
    found: Columns = {}
    if isinstance(shape, Window):
        for prefix, columns in raw.items():
            if shape.count:
                found[f"{prefix}__count"] = columns["_count"].astype(np.float64)
            for c in shape.mean:
                n, total = columns[f"_{c}_n"], columns[f"_{c}_sum"]
                found[f"{prefix}__{c}_mean"] = _ratio(total, n) * resolution(source, c)
            for c in shape.std:
                n, total, squares = (columns[f"_{c}_{part}"] for part in ("n", "sum", "squares"))
                variance = _ratio(squares, n) - _ratio(total, n) ** 2
                found[f"{prefix}__{c}_std"] = np.sqrt(np.maximum(variance, 0.0)) * resolution(source, c)
            for c, condition in shape.share.items():
                found[f"{prefix}__{c}_share"] = _ratio(columns[f"_{c}_hits"], columns[f"_{condition.column}_n"])
    elif isinstance(shape, Open):
        for prefix, columns in raw.items():
            due, still = columns["_due"], columns["_open"]
            found[f"{prefix}__due"], found[f"{prefix}__open"] = due.astype(np.float64), still.astype(np.float64)
            found[f"{prefix}__open_share"] = _ratio(still, due)
            with np.errstate(over="ignore"):
                late = still * t - columns["_over"]
            found[f"{prefix}__late_mean"] = _ratio(late, still) / 60e6
    elif isinstance(shape, Latest):
        found = {f"{name}__{c}": raw[name][held(c, shape.key)] for c in shape.columns}
        for ago in shape.change.over if shape.change else ():
            assert shape.change is not None
            before = raw[f"{name}_ago_{duration_text(ago)}"]
            for c in shape.change.columns:
                kept = held(c, shape.key)
                found[f"{name}__{c}_change_{duration_text(ago)}"] = raw[name][kept] - before[kept]
    else:
        columns = raw[name]
        there = columns["_order"] != MISSING
        gap = np.where(there, own[shape.order] - np.where(there, columns["_order"], 0), 0)
        found[f"{name}__gap_min"] = np.where(there, gap / 60e6, np.nan)
        for c in shape.columns:
            values = columns[held(c, shape.key)]
            if source.columns[c].type == "timestamp":
                known = values != MISSING
                found[f"{name}__{c}_min"] = np.where(known, (t - np.where(known, values, 0)) / 60e6, np.nan)
            else:
                found[f"{name}__{c}"] = values
        found |= {f"{name}__{s}_{c}": columns[f"_{s}_{c}"] for s, cs in shape.facts.items() for c in cs}
    for feature, values in found.items():
        if null_key.any():
            missing: Any = None if values.dtype == object else np.nan
            found[feature] = np.where(null_key, missing, values)
    return found


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b as float64, NaN where b is 0."""
    zero = b == 0
    return np.where(zero, np.nan, a.astype(np.float64) / np.where(zero, 1, b).astype(np.float64))
