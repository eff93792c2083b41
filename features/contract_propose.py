"""What landed → the rules that a spec could state of it. What the spec says already is kept, not tightened."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.ingest import Snapshot, read_table
from features.keys import one_chunk, text_keys
from pipelines.home import Home
from pipelines.spec import Column, Source, Spec

ENOUGH = 30  # rows from which a rule on all of them means something
LISTED = 20  # most values that are listed as the only ones
PUNCTUATION = "-_.:/"

Rules = dict[str, Any]


def propose(spec: Spec, home: Home, snapshot: Snapshot) -> dict[str, Rules]:
    """Source → fields of the spec that it does not have yet: nulls, ranges, values, patterns, order, references, rows.

    Every proposed rule holds on the snapshot. Lists are whole: what the spec has, and what is new.
    """
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    found = {}
    for name, source in spec.sources.items():
        columns = {c: dict(_column_rules(source, c, one_chunk(tables[name][c]))) for c in source.columns}
        changed = {c: {"type": source.columns[c].type, **rules} for c, rules in columns.items() if rules}
        rules: Rules = {"columns": changed} if changed else {}
        if order := list(_order(source, tables[name])):
            rules["order"] = [*map(list, source.order), *order]
        if references := list(_references(spec, tables, name)):
            kept = [r.model_dump(exclude_defaults=True) for r in source.references]
            rules["references"] = [{**r, "columns": list(r["columns"])} for r in (*kept, *references)]
        if source.rows_min == 1 and tables[name].num_rows >= 2 * ENOUGH:
            rules["rows_min"] = int(_rounded(tables[name].num_rows / 2, down=True))
        if rules:
            found[name] = rules
    return found


def count_rules(proposal: dict[str, Rules], spec: Spec) -> int:
    """How many rules a proposal adds."""
    total = 0
    for name, rules in proposal.items():
        source = spec.sources[name]
        total += sum(len({*column} - {"type"}) for column in rules.get("columns", {}).values()) + ("rows_min" in rules)
        total += sum(len(rules[part]) - len(getattr(source, part)) for part in ("order", "references") if part in rules)
    return total


def _column_rules(source: Source, name: str, array: pa.Array) -> Iterator[tuple[str, Any]]:
    declared, nulls = source.columns[name], array.null_count
    if nulls and declared.nulls == 0 and source.nulls(name) == declared.nulls and name not in source.key:
        share = min(1.0, _rounded(1.5 * nulls / len(array) + 3 / len(array)))
        yield "nulls", share
    there = array.drop_null()
    if len(there) < ENOUGH:
        return
    if declared.type in ("int64", "float64") and declared.min is None and declared.max is None:
        yield from _range(there, key=name in source.key)
    if declared.type == "string" and declared.values is None and declared.pattern is None:
        yield from _text(there, declared)


def _range(there: pa.Array, *, key: bool) -> Iterator[tuple[str, Any]]:
    """Least and greatest value with a tenth of their distance on either side, to two digits; a key only grows."""
    values = np.asarray(there.to_numpy(zero_copy_only=False), float)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    margin = (high - low) / 10 or abs(high) / 10 or 1.0
    least = _rounded(low - margin, down=True) if low < 0 else max(0.0, _rounded(low - margin, down=True))
    whole = pa.types.is_integer(there.type)
    yield "min", int(least) if whole else least
    if not key:
        most = _rounded(high + margin) if high > 0 else min(0.0, _rounded(high + margin))
        yield "max", int(most) if whole else most


def _rounded(value: float, *, down: bool = False) -> float:
    """Two significant digits, away from what it bounds."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    number = (math.floor if down else math.ceil)(round(value / step, 9))
    return float(f"{number * step:.12g}")


def _text(there: pa.Array, declared: Column) -> Iterator[tuple[str, Any]]:
    counts = pc.value_counts(there)
    values, often = counts.field("values").to_pylist(), counts.field("counts").to_numpy()
    if len(values) <= LISTED and len(there) >= ENOUGH * len(values) and often.min() >= 3:
        yield "values", sorted(values)
    elif pattern := _pattern(values):
        yield "pattern", pattern


def _pattern(values: list[str]) -> str:
    """`^[A-Z0-9]{2,6}$`: the kinds of signs and the lengths of all values; empty for free text."""
    signs = set().union(*values)
    kinds = {"A-Z": str.isupper, "a-z": str.islower, "0-9": str.isdigit}
    used = [kind for kind, is_one in kinds.items() if any(is_one(s) and s.isascii() for s in signs)]
    other = sorted(s for s in signs if not (s.isascii() and s.isalnum()))
    lengths = {len(value) for value in values}
    if not signs or min(lengths) == 0 or max(lengths) > 40 or not set(other) <= set(PUNCTUATION):
        return ""
    least, most = min(lengths), max(lengths)
    often = f"{{{least}}}" if least == most else f"{{{least},{most}}}"
    return f"^[{''.join(used)}{''.join(re.escape(s) for s in other)}]{often}$"


def _order(source: Source, table: pa.Table) -> Iterator[list[str]]:
    """Pairs of times that are in order in every row, those left out that follow from others."""
    times = [name for name, column in source.columns.items() if column.type == "timestamp"]
    pairs = {(a, b) for a in times for b in times if a != b and _in_order(table[a], table[b])}
    known = set(source.order)
    if source.kind == "observation" and source.event_time and source.known_at and source.known_at.column:
        known.add((source.event_time, source.known_at.column))
    for a, b in sorted(pairs - known):
        if not any((a, c) in pairs | known and (c, b) in pairs | known for c in times):
            yield [a, b]


def _in_order(low: pa.ChunkedArray, high: pa.ChunkedArray) -> bool:
    both = pc.less_equal(low, high)
    enough = len(both) - both.null_count >= ENOUGH
    return enough and bool(pc.all(both).as_py()) and bool(pc.any(pc.less(low, high)).as_py())


def _references(spec: Spec, tables: dict[str, pa.Table], name: str) -> Iterator[Rules]:
    """Keys of other sources that this one holds under the same names: all of them found, or a share."""
    source = spec.sources[name]
    for to, other in spec.sources.items():
        if to == name or any(r.to == to for r in source.references) or not set(other.key) <= set(source.columns):
            continue
        if any(source.columns[c].type != other.columns[c].type for c in other.key):
            continue
        keys, known = (text_keys([tables[t][c] for c in other.key], tables[t].num_rows) for t in (name, to))
        keys = keys.drop_null()
        if len(keys) < ENOUGH:
            continue
        share = float(np.mean(pc.is_in(keys, value_set=known).to_numpy(zero_copy_only=False)))
        alike = set(other.key) == set(source.key)  # two tables of one thing: neither need be whole, unless it is now
        if share == 1 and not (alike and _older(source, other)):
            yield {"to": to, "columns": list(other.key)}
        elif not alike and share >= 0.5:
            yield {"to": to, "columns": list(other.key), "share": math.floor(95 * share) / 100}


def _older(source: Source, other: Source) -> bool:
    """Whether facts of the source come before those of the other: a plan before what became of it."""
    return source.kind == "plan" and other.kind == "observation"
