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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.ingest import KNOWN
from features.keys import codes_of, key_arrays, sorted_unique, text_keys
from pipelines.clock import MISSING, NEVER, duration_text
from pipelines.errors import MillraceError
from pipelines.spec import Condition, Latest, Open, Source, Spec, View, Window
from pipelines.spec import Sequence as Chain

Columns = dict[str, np.ndarray]
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
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return array.fill_null(MISSING).to_numpy(zero_copy_only=False)


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64 values of a number or bool column, NaN where null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.int64()) if pa.types.is_boolean(array.type) else array
    return array.cast(pa.float64()).fill_null(float("nan")).to_numpy(zero_copy_only=False)


def versions(table: pa.Table, source: Source) -> Versions:
    """The life of each fact version; `table` as `ingest.read_table` gives it."""
    names = text_keys(key_arrays(table, source.key), table.num_rows)
    fact = codes_of(names, pc.unique(names))
    known = int_times(table[KNOWN])
    superseded = np.append(fact[1:] == fact[:-1], False) if len(fact) else np.zeros(0, bool)
    known_to = np.where(superseded, np.append(known[1:], NEVER), NEVER) if len(fact) else known
    return Versions(table, fact, known, known_to)


def bisect(values: np.ndarray, lo: np.ndarray, hi: np.ndarray, x: np.ndarray, *, right: bool) -> np.ndarray:
    """Insertion points of x[q] into the sorted values[lo[q]:hi[q]], as numpy.searchsorted would give."""
    if len(x) == 1:
        side = "right" if right else "left"
        return lo + np.searchsorted(values[lo[0] : hi[0]], x, side=side)
    lo, hi = lo.copy(), hi.copy()
    if len(values) == 0:
        return lo
    while (active := lo < hi).any():
        mid = (lo + hi) >> 1
        at = values[np.minimum(mid, len(values) - 1)]
        below = active & ((at <= x) if right else (at < x))
        lo = np.where(below, mid + 1, lo)
        hi = np.where(active & ~below, mid, hi)
    return lo


def as_of(start: np.ndarray, step_t: np.ndarray, codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The merge function: for each (key code, t) the row of the newest step with step_t ≤ t, −1 where none (Q)."""
    known = codes >= 0
    safe = np.where(known, codes, 0)
    if len(start) < 2:
        return np.full(len(t), -1)
    lo, hi = start[safe], np.where(known, start[safe + 1], start[safe])
    at = bisect(step_t, lo, hi, t, right=True) - 1
    return np.where(known & (at >= lo), at, -1)


Span = tuple[np.ndarray, np.ndarray, Columns]


def accumulate(keys: pa.Array, codes: np.ndarray, spans: Sequence[Span], since: int = MISSING) -> Steps:
    """Steps of the running sums of facts that enter and leave, right for every t ≥ since.

    Each span is (enter (N), exit (N), values: name → int64 (N)): what each fact adds while enter ≤ t < exit.
    """
    where, when, change = [], [], {name: [] for span in spans for name in span[2]}
    for enter, leave, values in spans:
        enter = np.maximum(enter, since)
        counts = (enter < leave) & (codes >= 0)
        leaves = counts & (leave < NEVER)
        where += [codes[counts], codes[leaves]]
        when += [enter[counts], leave[leaves]]
        for name, listed in change.items():
            value = values.get(name, np.zeros(len(codes), np.int64))
            listed += [value[counts], -value[leaves]]
    code, t = np.concatenate(where), np.concatenate(when)
    order = np.lexsort((t, code))
    code, t = code[order], t[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t = code[last], t[last]
    start = np.searchsorted(code, np.arange(len(keys) + 1))
    columns = {}
    for name, listed in change.items():
        # int64 wraps around, and the difference of two wrapped sums is right as long as it fits itself
        total = np.cumsum(np.concatenate(listed)[order])[last]
        before = np.concatenate([[0], total])[start[:-1]]
        columns[name] = total - np.repeat(before, np.diff(start))
    return Steps(keys, start, t, columns)


def _scaled(table: pa.Table, source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a column in whole steps of its resolution (int64, 0 where null), and where they are not null."""
    values = floats(table[name])
    there = ~np.isnan(values)
    scaled = np.rint(np.where(there, values, 0.0) / resolution(source, name))
    if len(scaled) and not np.abs(scaled).max() < LIMIT:
        raise MillraceError(f"column {name!r}: {np.nanmax(np.abs(values)):g} is too large for its resolution")
    return scaled.astype(np.int64), there


def resolution(source: Source, name: str) -> float:
    """Smallest step of a column that window sums keep: whole numbers, unless a float64 column declares another."""
    column = source.columns[name]
    return column.resolution or 1.0 if column.type == "float64" else 1.0


def holds(condition: Condition, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Where a condition is true, and where its column is not null (both bool, N)."""
    ((operator, bound),) = condition.comparison().items()
    compare = {"gt": pc.greater, "ge": pc.greater_equal, "lt": pc.less, "le": pc.less_equal, "eq": pc.equal}[operator]
    if isinstance(bound, int | float) and not isinstance(bound, bool) and pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    true = compare(column, bound).fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
    return true, column.is_valid().to_numpy(zero_copy_only=False).astype(bool)


def window_steps(
    source: Source, shape: Window, facts: Versions, length: int, *, ahead: bool, since: int = MISSING
) -> Steps:
    """Steps of a window view: counts and sums of the facts in (t − w, t], or in (t, t + w] when `ahead`."""
    table = facts.table
    names = text_keys(key_arrays(table, shape.key), table.num_rows)
    keys = sorted_unique(names)
    over = int_times(table[shape.over or source.event_time])
    values: Columns = {"count": np.ones(len(over), np.int64)}
    for name in dict.fromkeys((*shape.mean, *shape.std)):
        scaled, there = _scaled(table, source, name)
        values[f"{name}_n"] = there.astype(np.int64)
        values[f"{name}_sum"] = scaled
        if name in shape.std:
            values[f"{name}_squares"] = scaled * scaled
    for name, condition in shape.share.items():
        true, there = holds(condition, table[condition.column])
        values[f"{name}_n"] = there.astype(np.int64)
        values[f"{name}_hits"] = true.astype(np.int64)
    enter, leave = _span(facts, over, length, ahead=ahead)
    steps = accumulate(keys, codes_of(names, keys), [(enter, leave, values)], since)
    most = int(steps.columns["count"].max(initial=0))
    for name, value in values.items():
        if most * float(np.abs(value).max(initial=0)) >= LIMIT:
            raise MillraceError(f"window sum of {name!r} may overflow: give its column a coarser resolution")
    return steps


def _span(facts: Versions, over: np.ndarray, length: int, *, ahead: bool) -> tuple[np.ndarray, np.ndarray]:
    there = over != MISSING
    over = np.where(there, over, 0)
    begin, end = (over - length, over) if ahead else (over, over + length)
    return np.maximum(facts.known_from, begin), np.where(there, np.minimum(facts.known_to, end), MISSING)


def open_steps(
    shape: Open, facts: Versions, closed_at: np.ndarray, length: int, since: int = MISSING
) -> Steps:
    """Steps of a backlog view: plans due in (t − w, t], those still open among them, and the sum of their due times.

    `closed_at` (N): when a closing fact of the version's plan was first known, NEVER where none.
    """
    names = text_keys(key_arrays(facts.table, shape.key), facts.table.num_rows)
    keys = sorted_unique(names)
    over = int_times(facts.table[shape.over])
    enter, leave = _span(facts, over, length, ahead=False)
    one = np.ones(len(over), np.int64)
    due = (enter, leave, {"due": one})
    still = (enter, np.minimum(leave, closed_at), {"open": one, "open_over": over})
    return accumulate(keys, codes_of(names, keys), [due, still], since)


def first_known(plan: pa.Table, closing: Sequence[pa.Table], key: Sequence[str]) -> np.ndarray:
    """When a fact with the key of each row of `plan` was first known in any closing table (N), NEVER where none."""
    names = text_keys(key_arrays(plan, key), plan.num_rows)
    keys = sorted_unique(names)
    earliest = np.full(len(keys) + 1, NEVER)
    for table in closing:
        codes = codes_of(text_keys(key_arrays(table, key), table.num_rows), keys)
        known = int_times(table[KNOWN])
        np.minimum.at(earliest, codes[codes >= 0], known[codes >= 0])
    return earliest[codes_of(names, keys)]


def latest_steps(source: Source, shape: Latest, facts: Versions) -> Steps:
    """Steps of a latest view: column `row` is the position of the newest live version in `facts` (−1: expired or
    none), column `event` its event time, also when expired."""
    table = facts.table
    names = text_keys(key_arrays(table, shape.key), table.num_rows)
    keys = sorted_unique(names)
    codes = codes_of(names, keys)
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
    parts = [(code, t, row, event[row])] + _sweep(facts, codes, event, usable[swept])
    code, t, row, seen = (np.concatenate(x) for x in zip(*parts, strict=True))
    if shape.ttl is not None:
        code, t, row, seen = _expire(code, t, row, seen, shape.ttl)
    order = np.lexsort((np.arange(len(t)), t, code))
    code, t, row, seen = code[order], t[order], row[order], seen[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t, row, seen = code[last], t[last], row[last], seen[last]
    return Steps(keys, np.searchsorted(code, np.arange(len(keys) + 1)), t, {"row": row, "event": seen})


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
    """Newest live version at each instant, for the keys where versions are superseded."""
    found: list[tuple[int, int, int, int]] = []
    order = rows[np.argsort(codes[rows], kind="stable")]
    for group in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []:
        changes = np.unique(np.concatenate([facts.known_from[group], facts.known_to[group]]))
        for t in changes[changes < NEVER]:
            live = group[(facts.known_from[group] <= t) & (t < facts.known_to[group])]
            best = max(live, key=lambda i: (event[i], facts.known_from[i], facts.fact[i]), default=-1)
            found.append((codes[group[0]], t, best, event[best] if best >= 0 else MISSING))
    if not found:
        return []
    code, t, row, seen = (np.array(x, np.int64) for x in zip(*found, strict=True))
    return [(code, t, row, seen)]


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


def sequence_table(spec: Spec, shape: Chain, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The plans of each chain with what was known of them: one row per plan and state, live for [live_from, live_to).

    Sorted by chain key, `order`, and which of equal ones counts (known last, then greatest fact key).
    """
    source = spec.sources[shape.source]
    plans = versions(tables[shape.source], source)
    names = text_keys(key_arrays(plans.table, source.key), plans.table.num_rows)
    facts_of = {name: versions(tables[name], spec.sources[name]) for name in shape.facts}
    keys = pc.unique(names)
    plan_code = codes_of(names, keys)
    fact_codes = {
        name: codes_of(text_keys(key_arrays(v.table, source.key), v.table.num_rows), keys)
        for name, v in facts_of.items()
    }
    code = np.concatenate([plan_code, *fact_codes.values()])
    t = np.concatenate([plans.known_from, *(v.known_from for v in facts_of.values())])
    order = np.lexsort((t, code))
    code, t = code[order], t[order]
    keep = (code >= 0) & np.append(True, (code[1:] != code[:-1]) | (t[1:] != t[:-1]))[: len(code)]
    code, t = code[keep], t[keep]
    until = np.append(np.where(code[1:] == code[:-1], t[1:], NEVER), NEVER)[: len(code)]
    plan = as_of(_starts(plan_code, len(keys)), plans.known_from, code, t)
    columns: dict[str, pa.Array] = {}
    for name, v in facts_of.items():
        sort = np.lexsort((v.known_from, fact_codes[name]))
        sort = sort[fact_codes[name][sort] >= 0]
        at = as_of(_starts(fact_codes[name][sort], len(keys)), v.known_from[sort], code, t)
        rows = pa.array(np.where(at >= 0, sort[np.maximum(at, 0)], -1) if len(sort) else at, mask=at < 0)
        for column in shape.facts[name]:
            columns[f"{name}_{column}"] = pa.array(floats(v.table[column].take(rows)), from_pandas=True)
    there = plan >= 0
    for column in (*shape.key, *shape.columns):
        columns.setdefault(column, plans.table[column].take(pa.array(plan, mask=~there)).combine_chunks())
    due = int_times(plans.table[shape.order])[np.maximum(plan, 0)] if len(plan) else plan
    result = pa.table(
        {**columns, "order": due, "live_from": t, "live_to": until,
         "known_from": plans.known_from[np.maximum(plan, 0)] if len(plan) else plan, "fact": code}
    )  # fmt: skip
    chain = text_keys(key_arrays(result, shape.key), result.num_rows)
    result = result.append_column("chain", chain)
    result = result.filter(pa.array(there & (due != MISSING) & chain.is_valid().to_numpy(zero_copy_only=False)))
    ordering = ("chain", "order", "known_from", "fact", "live_from")
    return result.take(pc.sort_indices(result, [(c, "ascending") for c in ordering])).combine_chunks()


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
    known = (codes >= 0) & (own != MISSING)
    lo = start[np.where(known, codes, 0)]
    hi = start[np.where(known, codes, 0) + 1]
    at = bisect(order, lo, hi, own, right=False) - 1
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


def stored_views(spec: Spec) -> list[Stored]:
    """Every table that the features of a spec are kept in: one per view and window length."""
    found = []
    for name, view in spec.features.views.items():
        shape = view.shape
        source = spec.sources[shape.source]
        if isinstance(shape, Window):
            integers = ["count"]
            for column in dict.fromkeys((*shape.mean, *shape.std)):
                integers += [f"{column}_n", f"{column}_sum"] + [f"{column}_squares"] * (column in shape.std)
            for share in shape.share:
                integers += [f"{share}_n", f"{share}_hits"]
            for ahead, lengths in ((False, shape.last), (True, shape.next)):
                for length in lengths:
                    title = f"{name}_{'next_' if ahead else ''}{duration_text(length)}"
                    found.append(Stored(title, name, "steps", shape.key, tuple(integers), (), length, ahead))
        elif isinstance(shape, Open):
            for length in shape.last:
                title = f"{name}_{duration_text(length)}"
                found.append(Stored(title, name, "steps", shape.key, ("due", "open", "open_over"), (), length))
        elif isinstance(shape, Latest):
            change = shape.change
            both = dict.fromkeys((*shape.columns, *(change.columns if change else ())))
            typed = tuple((c, source.columns[c].type) for c in both)
            found.append(Stored(name, name, "steps", shape.key, ("event",), typed))
            for ago in change.over if change else ():
                assert change is not None
                title = f"{name}_ago_{duration_text(ago)}"
                some = tuple((c, source.columns[c].type) for c in change.columns)
                found.append(Stored(title, name, "ago", shape.key, ("event",), some, ago))
        else:
            typed = tuple((c, source.columns[c].type) for c in shape.columns)
            typed += tuple((f"{s}_{c}", "float64") for s, cs in shape.facts.items() for c in cs)
            found.append(Stored(name, name, "sequence", shape.key, ("order",), typed))
    return found


def build_view(spec: Spec, stored: Stored, tables: Mapping[str, pa.Table], since: int = MISSING) -> pa.Table:
    """The stored table of one view: text `key`, key columns, step time `t` and columns, right for every t ≥ since.

    A sequence is as `sequence_table` gives it.
    """
    shape = spec.features.views[stored.view].shape
    if isinstance(shape, Chain):
        table = sequence_table(spec, shape, tables)
        return table.filter(pc.greater(table["live_to"], since)) if since > MISSING else table
    source = spec.sources[shape.source]
    facts = versions(tables[shape.source], source)
    if isinstance(shape, Window):
        steps = window_steps(source, shape, facts, stored.length, ahead=stored.ahead, since=since)
    elif isinstance(shape, Open):
        closed_at = first_known(facts.table, [tables[c] for c in shape.closed_by], source.key)
        steps = open_steps(shape, facts, closed_at, stored.length, since)
    else:
        steps = latest_steps(source, shape, facts)
    table = {name: pa.array(values) for name, values in steps.columns.items() if name != "row"}
    if stored.values:
        row = steps.columns["row"]
        rows = pa.array(np.maximum(row, 0), mask=row < 0)
        table |= {name: facts.table[name].take(rows).combine_chunks() for name, _ in stored.values}
    counts = np.diff(steps.start)
    key = steps.keys.take(pa.array(np.repeat(np.arange(len(steps.keys)), counts)))
    t = steps.t + (stored.length if stored.kind == "ago" else 0)
    first = facts.table.num_rows and {
        name: facts.table[name].take(pa.array(_first_rows(facts, shape.key, steps.keys))) for name in shape.key
    }
    parts = {
        name: first[name].take(pa.array(np.repeat(np.arange(len(steps.keys)), counts))).combine_chunks()
        for name in (shape.key if first else ())
    } or {name: facts.table[name].slice(0, 0).combine_chunks() for name in shape.key}
    return pa.table({"key": key, **parts, "t": t, **table})


def _first_rows(facts: Versions, key: Sequence[str], keys: pa.Array) -> np.ndarray:
    """A row of the facts that shows the columns of each key."""
    names = text_keys(key_arrays(facts.table, key), facts.table.num_rows)
    codes = codes_of(names, keys)
    rows = np.zeros(len(keys), np.int64)
    there = codes >= 0
    rows[codes[there][::-1]] = np.flatnonzero(there)[::-1]
    return rows


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


def derive(spec: Spec, name: str, raw: Mapping[str, Columns], t: np.ndarray, own: Columns, null_key: np.ndarray) -> Columns:
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
                found[f"{prefix}__count"] = columns["count"].astype(np.float64)
            for c in shape.mean:
                n, total = columns[f"{c}_n"], columns[f"{c}_sum"]
                found[f"{prefix}__{c}_mean"] = _ratio(total, n) * resolution(source, c)
            for c in shape.std:
                n, total, squares = (columns[f"{c}_{part}"] for part in ("n", "sum", "squares"))
                variance = _ratio(squares, n) - _ratio(total, n) ** 2
                found[f"{prefix}__{c}_std"] = np.sqrt(np.maximum(variance, 0.0)) * resolution(source, c)
            for c in shape.share:
                found[f"{prefix}__{c}_share"] = _ratio(columns[f"{c}_hits"], columns[f"{c}_n"])
    elif isinstance(shape, Open):
        for prefix, columns in raw.items():
            due, still = columns["due"], columns["open"]
            found[f"{prefix}__due"], found[f"{prefix}__open"] = due.astype(np.float64), still.astype(np.float64)
            found[f"{prefix}__open_share"] = _ratio(still, due)
            with np.errstate(over="ignore"):
                late = still * t - columns["open_over"]
            found[f"{prefix}__late_mean"] = _ratio(late, still) / 60e6
    elif isinstance(shape, Latest):
        found = {f"{name}__{c}": raw[name][c] for c in shape.columns}
        for ago in shape.change.over if shape.change else ():
            assert shape.change is not None
            before = raw[f"{name}_ago_{duration_text(ago)}"]
            for c in shape.change.columns:
                found[f"{name}__{c}_change_{duration_text(ago)}"] = raw[name][c] - before[c]
    else:
        columns = raw[name]
        there = columns["order"] != MISSING
        gap = np.where(there, own[shape.order] - np.where(there, columns["order"], 0), 0)
        found[f"{name}__gap_min"] = np.where(there, gap / 60e6, np.nan)
        for c in shape.columns:
            if source.columns[c].type == "timestamp":
                known = columns[c] != MISSING
                found[f"{name}__{c}_min"] = np.where(known, (t - np.where(known, columns[c], 0)) / 60e6, np.nan)
            else:
                found[f"{name}__{c}"] = columns[c]
        found |= {f"{name}__{s}_{c}": columns[f"{s}_{c}"] for s, cs in shape.facts.items() for c in cs}
    for feature, values in found.items():
        if null_key.any():
            missing = None if values.dtype == object else np.nan
            found[feature] = np.where(null_key, missing, values)
    return found


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b as float64, NaN where b is 0."""
    zero = b == 0
    return np.where(zero, np.nan, a.astype(np.float64) / np.where(zero, 1, b).astype(np.float64))
