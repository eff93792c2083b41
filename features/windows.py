"""From facts to steps: every feature is a function of (key, t).

A window value changes when an event becomes known, when it is corrected, and when it falls out of the window. So it
is a step function of t, and a fact version lies in a window exactly for t in one half-open interval [enter, exit):

    last w   t − w < over ≤ t      enter = max(known_from, over)        exit = min(known_to, over + w)
    next w   t < over ≤ t + w      enter = max(known_from, over − w)    exit = min(known_to, over)
    open     …and not yet closed   enter = max(known_from, over)        exit = min(known_to, over + w, closed_at)

The stored form of every view is the table of its steps, sorted by key and time. The one merge function is `steps.as_of`:
the newest step not later than t. Training reads it for many (key, t) at once, the endpoint for one; after the last
event the steps at which facts fall out of the window are stored already. Nothing known later changes a step at or
before the watermark. All times are int64 µs UTC, all sums int64.

Shapes: N facts or steps, Q queries, K keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.facts import Columns, Facts, Versions, floats, int_times
from features.keys import codes_of, grouped, key_arrays, one_chunk, text_keys, true
from features.ranked import changes, first_live
from features.steps import KEY, LIMIT, TIME, Move, Steps, accumulate, as_of, is_newest, order_of, starts
from features.views import EWM, Stored, held, reach, resolution, stored_of
from pipelines.clock import MISSING, NEVER
from pipelines.errors import MillraceError
from pipelines.spec import Ewm, Latest, Open, Source, Window
from pipelines.spec import Sequence as Chain

RANGE = 500_000  # facts that a view is built from at once


@dataclass(frozen=True)
class Group:
    """Fact versions by group key and time: N of them, in that order, at `row` of the table."""

    keys: pa.Array
    code: np.ndarray
    over: np.ndarray
    row: np.ndarray
    known_from: np.ndarray
    known_to: np.ndarray

    def first(self) -> np.ndarray:
        """For each key a row of the table that has it, 0 where none has."""
        return np.append(self.row, 0)[np.searchsorted(self.code, np.arange(len(self.keys)))]


def group_versions(facts: Facts, shape: Window | Open, since: int, only: pa.Array | None = None) -> Group:
    """The versions that have a group key (one of `only`, distinct) and a time, and that may be in a window after `since`."""
    v, over, length = facts.versions(shape.source), facts.over(shape), reach(shape)
    those = (shape.source, shape.over, length, since)  # views that have them in common share their texts
    row = facts.once(("alive", *those), lambda: alive(v, over, length, since))
    texts = [facts.once(("texts", *those, name), partial(names_of, v, (name,), row)) for name in shape.key]
    names = text_keys(texts, len(row))
    keys, codes = grouped(names) if only is None else (only, codes_of(names, only))
    row, codes = row[codes >= 0], codes[codes >= 0]
    order = order_of(codes, over[row])
    row, codes = row[order], codes[order]
    return Group(keys, codes, over[row], row, v.known_from[row], v.known_to[row])


def alive(facts: Versions, over: np.ndarray, length: int, since: int) -> np.ndarray:
    """Positions of the versions that have a time `over`, and whose span in a window of that length may end after `since`."""
    ends = (facts.known_to > since) & (over > max(since - length, MISSING))
    return np.flatnonzero(ends & (over != MISSING) & (facts.known_from < facts.known_to))


def names_of(facts: Versions, key: Sequence[str], rows: np.ndarray) -> pa.Array:
    """Text key of some rows."""
    some = facts.table.select([*key])
    some = some if len(rows) == some.num_rows else some.take(pa.array(rows))
    return text_keys(key_arrays(some, key), len(rows))


def in_ranges(facts: Facts, name: str, since: int) -> Iterator[tuple[Facts, bool]]:
    """The facts that a view needs for t ≥ since, in the order of its keys, about RANGE of them at once; and which are the last.

    Those of one key come together; what few facts or a chain are made of comes at once.
    """
    shape = facts.spec.features.views[name].shape
    if isinstance(shape, Chain) or facts.tables[shape.source].num_rows <= RANGE:
        yield facts, True
        return
    v = facts.versions(shape.source)
    rows = np.arange(len(v.fact)) if isinstance(shape, Latest) else alive(v, facts.over(shape), reach(shape), since)
    if (count := -(-len(rows) // RANGE)) <= 1:
        yield facts, True
        return
    sample = names_of(v, shape.key, np.random.default_rng(0).choice(rows, 200 * count))
    sample = sample.take(pc.sort_indices(sample)).drop_null()
    bounds = [sample[len(sample) * i // count] for i in range(1, count) if len(sample)]
    place = np.full(len(v.fact), count, np.uint16)
    for some in np.split(rows, range(RANGE, len(rows), RANGE)):
        names = names_of(v, shape.key, some)
        place[some] = sum((true(pc.greater_equal(names, bound)) for bound in bounds), np.zeros(len(some), np.uint16))
    del rows, some, names
    for i in range(count):
        yield facts.of_rows(shape.source, np.flatnonzero(place == i)), i == count - 1


def first_rows(keys: pa.Array, codes: np.ndarray) -> np.ndarray:
    """For each key the first row with its code."""
    first = np.zeros(len(keys) + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return first[:-1]


def _scaled(values: np.ndarray, source: Source, name: str, power: int) -> np.ndarray:
    """Values in whole steps of their resolution (int64, 0 where NaN). Raises MillraceError where a power overflows."""
    scaled = np.rint(np.where(np.isnan(values), 0.0, values) / resolution(source, name))
    if len(scaled) and source.columns[name].type == "int64" and np.abs(scaled).max() >= 2**53:
        raise MillraceError(f"column {name!r} holds whole numbers of 2^53 or more, which windows cannot add up exactly")
    if len(scaled) and not float(np.abs(scaled).max()) ** power < LIMIT:
        raise MillraceError(f"column {name!r}: {np.nanmax(np.abs(values)):g} is too large for its resolution")
    return scaled.astype(np.int64)


def window_values(facts: Facts, shape: Window, rows: np.ndarray) -> Columns:
    """What each fact adds to the sums of a window view (int64, N: the rows)."""
    source = facts.spec.sources[shape.source]
    found: Columns = {"_count": np.ones(len(rows), np.int64)}
    for name in shape.added:
        values = facts.floats(shape.source, name)[rows]
        found[f"_{name}_n"] = (~np.isnan(values)).astype(np.int64)
        found[f"_{name}_sum"] = _scaled(values, source, name, 1 + (name in shape.std))
        if name in shape.std:
            found[f"_{name}_squares"] = found[f"_{name}_sum"] ** 2
    for name, condition in shape.share.items():
        true, there = (mask[rows] for mask in facts.holds(shape.source, condition))
        found.setdefault(f"_{condition.column}_n", there.astype(np.int64))
        found[f"_{name}_hits"] = true.astype(np.int64)
    return found


def edges(over: np.ndarray, length: int, *, ahead: bool) -> tuple[np.ndarray, np.ndarray]:
    """A fact at `over` is in the window of t for begin ≤ t < end: (t − w, t], or (t, t + w] when `ahead`."""
    return (over - length, over) if ahead else (over, over + length)


@dataclass(frozen=True)
class Ranked:
    """Columns of a window view that are taken from the live fact that ranks first.

    `rank`: of each fact of the group, −1 where it takes no part; `values`: MISSING for null.
    """

    rank: np.ndarray
    values: Columns


@dataclass(frozen=True)
class WindowFacts:
    """What each fact of a group (N) gives to a window view, whatever the window's length.

    `numbers`: columns in whole steps of their resolution, MISSING for null.
    """

    group: Group
    sums: Columns
    numbers: Columns
    ranked: list[Ranked]
    distinct: dict[str, "Pairs"]


@dataclass(frozen=True)
class Pairs:
    """The pairs of key and value, in order (P): the code of each one's key; and which pair each fact is (N, −1: null)."""

    key: np.ndarray
    fact: np.ndarray


def _pairs(group: Group, values: np.ndarray) -> Pairs:
    """`values`: codes, −1 for null (N)."""
    there, width = np.flatnonzero(values >= 0), int(values.max(initial=0)) + 1
    pairs, pair = np.unique(group.code[there] * width + values[there], return_inverse=True)
    fact = np.full(len(values), -1)
    fact[there] = pair
    return Pairs(pairs // width, fact)


def window_facts(facts: Facts, shape: Window, group: Group) -> WindowFacts:
    """Reads the columns of a window view once."""
    source, v, numbers = facts.spec.sources[shape.source], facts.versions(shape.source), {}
    for name in dict.fromkeys((*shape.min, *shape.max, *shape.newest, *(shape.ewm.columns if shape.ewm else ()))):
        values = facts.floats(shape.source, name)[group.row]
        numbers[name] = np.where(np.isnan(values), MISSING, _scaled(values, source, name, 1))
    ranked = []
    for suffix, sign, columns in (("min", -1, shape.min), ("max", 1, shape.max)):
        for name in columns:
            there = numbers[name] != MISSING
            rank = np.full(len(there), -1)
            rank[there] = _ranks(sign * numbers[name][there])
            ranked.append(Ranked(rank, {f"_{name}_{suffix}": numbers[name]}))
    taken = {f"_{name}_newest": numbers[name] for name in shape.newest} | ({"_newest": group.over} if shape.since else {})
    if taken:
        ranked.append(Ranked(_ranks(group.over, group.known_from, v.fact[group.row]), taken))
    distinct = {name: _pairs(group, grouped(one_chunk(v.table[name].take(pa.array(group.row))))[1]) for name in shape.nunique}
    return WindowFacts(group, window_values(facts, shape, group.row), numbers, ranked, distinct)


def _ranks(*by: np.ndarray) -> np.ndarray:
    """Place of each in the order of the first, then the second array, and so on."""
    rank = np.empty(len(by[0]), np.int64)
    rank[np.lexsort(by[::-1])] = np.arange(len(rank))
    return rank


def window_steps(shape: Window, of: WindowFacts, length: int, *, ahead: bool, since: int) -> Steps:
    """Steps of a window view: aggregates of the facts in (t − w, t], or in (t, t + w] when `ahead`."""
    group = of.group
    begin, end = edges(group.over, length, ahead=ahead)
    enter = np.maximum(np.maximum(group.known_from, begin), since)
    leave = np.minimum(group.known_to, end)
    moves = _span(enter, leave, of.sums)
    if of.ranked:
        came, stays, values = moves[0]
        moves[0] = (came, stays, values | {"_entered": of.sums["_count"]})
    if shape.ewm is not None:
        moves += ewm_moves(shape.ewm, of, enter, leave, length)
    steps = accumulate(group.keys, group.code, moves)
    most = int(steps.columns["_count"].max(initial=0))
    for name, value in ((n, v) for _, _, columns in moves[::2] for n, v in columns.items()):  # what comes leaves again
        if most * float(np.abs(value).max(initial=0)) >= LIMIT:
            raise MillraceError(f"window sum of {name!r} may overflow: give its column a coarser resolution")
    at = np.repeat(np.arange(len(group.keys)), np.diff(steps.start)) if of.distinct or of.ranked else steps.t
    for name, pairs in of.distinct.items():
        steps.columns[f"_{name}_nunique"] = distinct(pairs, group, enter, leave, at, steps.t)
    if of.ranked:
        entered, live = steps.columns.pop("_entered"), steps.columns["_count"]
        ranks = [ranked.rank for ranked in of.ranked]
        first = first_live(group.code, enter, leave, ranks, at, steps.t, entered, live, len(group.keys))
        for ranked, found in zip(of.ranked, first, strict=True):
            steps.columns.update({name: np.append(column, MISSING)[found] for name, column in ranked.values.items()})
    return steps


def _span(enter: np.ndarray, leave: np.ndarray, values: Columns) -> list[Move]:
    """Values that count for enter ≤ t < leave."""
    stays = enter < leave
    less = {name: -value for name, value in values.items()}
    return [(enter, stays, values), (leave, stays & (leave < NEVER), less)]


def ewm_moves(ewm: Ewm, of: WindowFacts, enter: np.ndarray, leave: np.ndarray, length: int) -> list[Move]:
    """Sums of weights and weighted values, anchored at the edges of buckets as long as the window.

    A weight doubles with each half-life from the edge on, in 1,024 steps, as a whole number. A window touches the bucket
    of t and the one before, which are summed apart, so nothing is ever rescaled: sums stay exact.
    """
    edge = of.group.over // length * length
    age = (of.group.over - edge) * 1024 // ewm.half_life
    weight = np.array([round(2**16 * 2 ** (k / 1024)) for k in range(1024)])[age % 1024] << (age // 1024)
    now: Columns = {}
    for name in ewm.columns:
        there = of.numbers[name] != MISSING
        steps = np.where(there, of.numbers[name], 0)
        if len(steps) and not float(np.abs(steps).max()) * float(weight.max()) < LIMIT:
            raise MillraceError(f"ewm of {name!r} may overflow: give its column a coarser resolution")
        now[f"_{name}_{EWM[0]}"] = np.where(there, weight, 0)
        now[f"_{name}_{EWM[1]}"] = steps * weight
    before = {f"{name}_before": value for name, value in now.items()}
    turn = edge + length
    return _span(enter, np.minimum(leave, turn), now) + _span(np.maximum(enter, turn), leave, before)


def distinct(pairs: Pairs, group: Group, enter: np.ndarray, leave: np.ndarray, at: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Distinct values among the live facts of each key (code `at`) at each instant (Q)."""
    there = np.flatnonzero((pairs.fact >= 0) & (enter < leave))
    one = {"n": np.ones(len(there), np.int64)}
    live = accumulate(pa.array(pairs.key), pairs.fact[there], _span(enter[there], leave[there], one))
    of = np.repeat(pairs.key, np.diff(live.start))
    n = live.columns["n"]
    before = np.append(0, n[:-1])[: len(n)]
    before[live.start[:-1][np.diff(live.start) > 0]] = 0
    move = np.sign(n) - np.sign(before)  # a value comes, or goes
    steps = accumulate(group.keys, of, [(live.t, move != 0, {"n": move})])
    found = as_of(steps.start, steps.t, at, t)
    return np.append(steps.columns["n"], 0)[found]


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


def latest_steps(source: Source, shape: Latest, facts: Versions, names: pa.Array) -> Steps:
    """Steps of a latest view: column `row` is the position of the newest live version in `facts` (−1: expired or
    none), column `_event` its event time, also when expired. `names`: key of each version, null where it has none."""
    table, (keys, codes) = facts.table, grouped(names)
    event = int_times(table[source.event_time]) if source.event_time else np.zeros(len(codes), np.int64)
    usable = np.flatnonzero((codes >= 0) & (event != MISSING) & (facts.known_from < facts.known_to))
    moved = np.unique(codes[usable][facts.known_to[usable] < NEVER])  # keys with corrections: exact sweep
    swept = np.isin(codes[usable], moved)
    plain = usable[~swept]
    order = plain[np.lexsort((facts.fact[plain], event[plain], facts.known_from[plain], codes[plain]))]
    row = order[is_newest(starts(codes[order], len(keys)), event[order])]
    code, t = codes[row], facts.known_from[row]
    torn = usable[swept]
    rank = _ranks(event[torn], facts.known_from[torn], facts.fact[torn])
    code_2, t_2, first = changes(codes[torn], facts.known_from[torn], facts.known_to[torn], rank)
    row_2 = np.append(torn, -1)[first]
    seen_2 = np.where(row_2 >= 0, event[row_2], MISSING) if len(row_2) else row_2
    parts = [(code, t, row, event[row]), (code_2, t_2, row_2, seen_2)]
    code, t, row, seen = (np.concatenate(x) for x in zip(*parts, strict=True))
    if shape.ttl is not None:
        code, t, row, seen = _expire(code, t, row, seen, shape.ttl)
    order = np.lexsort((np.arange(len(t)), t, code))
    code, t, row, seen = code[order], t[order], row[order], seen[order]
    last = np.append((code[1:] != code[:-1]) | (t[1:] != t[:-1]), True) if len(t) else np.zeros(0, bool)
    code, t, row, seen = code[last], t[last], row[last], seen[last]
    return Steps(keys, starts(code, len(keys)), t, {"row": row, "_event": seen})


Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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


def sequence_table(facts: Facts, shape: Chain, since: int) -> pa.Table:
    """The plans of each chain with what was known of them: one row per plan and state, live for [live_from, live_to).

    At least the states with `order` ≥ since. Sorted by chain key, `order`, and which of equal ones counts (known last, then
    greatest fact key).
    """
    if since != MISSING:
        facts = facts.narrowed(shape.source, facts.times(shape.source, shape.order) >= since, tuple(shape.facts))
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
    plan = as_of(starts(plans.fact, len(keys)), plans.known_from, code, t)
    due = int_times(plans.table[shape.order])[np.maximum(plan, 0)] if len(plan) else plan
    chains, chain_of = grouped(text_keys(key_arrays(plans.table, shape.key), plans.table.num_rows))
    chain = np.where(plan >= 0, chain_of[np.maximum(plan, 0)], -1) if len(plan) else plan
    kept = np.flatnonzero((chain >= 0) & (due != MISSING))
    known = plans.known_from[plan[kept]]
    kept = kept[np.lexsort((known, due[kept], chain[kept]))]  # ties: by fact, then time, as they are
    code, t, until, due, chain, at = (x[kept] for x in (code, t, until, due, chain, plan))
    columns = {name: plans.table[name].take(pa.array(at)) for name in shape.key}
    columns |= {held(name, shape.key): plans.table[name].take(pa.array(at)) for name in shape.columns}
    for name, v in others.items():
        rows = np.flatnonzero(codes[name] >= 0)
        rows = rows[order_of(codes[name][rows], v.known_from[rows])]
        found = as_of(starts(codes[name][rows], len(keys)), v.known_from[rows], code, t)
        take = pa.array(rows[np.maximum(found, 0)] if len(rows) else found, mask=found < 0)
        for column in shape.facts[name]:
            columns[f"_{name}_{column}"] = pa.array(floats(v.table[column].take(take)), from_pandas=True)
    return pa.table({KEY: repeated(chains, chain), **columns, "_order": due, "_live_to": until, TIME: stamps(t)})


def build_views(
    facts: Facts, name: str, since: int = MISSING, *, only: pa.Array | None = None
) -> Iterator[tuple[Stored, pa.Table]]:  # fmt: skip
    """The stored tables of a view of the spec, right for every t ≥ since; of all keys, or of `only` these (a chain of all).

    Columns: text `key` and key columns, step time, and what the view holds; sorted by key and time. A sequence is as
    `sequence_table` gives it, and right for every order ≥ since.
    """
    view = facts.spec.features.views[name]
    shape, views = view.shape, stored_of(facts.spec, name, view)
    if isinstance(shape, Chain):
        yield views[0], sequence_table(facts, shape, since)
        return
    source, v = facts.spec.sources[shape.source], facts.versions(shape.source)
    if isinstance(shape, Latest):
        names = facts.names(shape.source, shape.key)
        if only is not None:
            names = pc.if_else(pc.is_in(names, value_set=only), names, pa.scalar(None, names.type))
        steps, first = latest_steps(source, shape, v, names), first_rows(*grouped(names))
        for stored in views:
            moved = replace(steps, t=steps.t + (stored.length if stored.kind == "ago" else 0))
            yield stored, step_table(stored, moved, v.table, first)
        return
    for stored, group, steps in build_sums(facts, name, since, only=only):
        yield stored, step_table(stored, steps, v.table, group.first())


def build_sums(
    facts: Facts, name: str, since: int, *, only: pa.Array | None = None
) -> Iterator[tuple[Stored, Group, Steps]]:  # fmt: skip
    """The facts of a window or backlog view, of all keys or of `only` these, and the steps of what it is stored as: none is
    before `since`."""
    view = facts.spec.features.views[name]
    shape, views = view.shape, stored_of(facts.spec, name, view)
    assert isinstance(shape, Window | Open)
    group = group_versions(facts, shape, since, only)
    if isinstance(shape, Window):
        of = window_facts(facts, shape, group)
        for stored in views:
            yield stored, group, window_steps(shape, of, stored.length, ahead=stored.ahead, since=since)
    else:
        closed_at = facts.closed_at(shape.source, shape.closed_by, group.row)
        for stored in views:
            yield stored, group, open_steps(group, closed_at, stored.length, since)


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
