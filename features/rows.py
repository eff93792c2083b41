"""Prediction rows: which keys are asked about, when, what came of them, and the part of the split they fall in."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.facts import closing_facts, first_known, holds, int_times, versions
from features.keys import codes_of, grouped, key_arrays, rows_among, text_keys
from features.steps import KEY
from features.views import RECENT, stored_views
from pipelines.clock import MISSING, NEVER
from pipelines.errors import Refused
from pipelines.spec import HashSplit, Spec, TimeSplit

PARTS = ("train", "valid_fit", "valid_select", "test")


@dataclass(frozen=True)
class Rows:
    """One row per key (N): its version's columns, time of prediction, label and part.

    `label`: 1, 0, or −1 where there is none; `part`: index into PARTS, −1 for none. Sorted by (t, key).
    """

    table: pa.Table
    key: pa.Array
    t: np.ndarray
    label: np.ndarray
    label_known: np.ndarray
    part: np.ndarray
    counts: dict[str, int]


def prediction_rows(spec: Spec, tables: Mapping[str, pa.Table], as_of: int) -> Rows:
    """The rows that a model is made from. Raises Refused when a part is empty or holds one class only."""
    rows = find_rows(spec, tables, as_of)
    _refuse_thin_parts(rows)
    return rows


def find_rows(spec: Spec, tables: Mapping[str, pa.Table], as_of: int) -> Rows:
    """The rows of SEMANTICS 3 and 5, as far as known at `as_of`."""
    source = spec.row_source
    v = versions(tables[spec.rows.source], source)
    names = text_keys(key_arrays(v.table, spec.row_key), v.table.num_rows)
    keys, codes = grouped(names)
    counts = {"keys": len(keys)}
    if spec.predict_at is not None:
        due = int_times(v.table[spec.predict_at.column])
        t = np.where(due == MISSING, MISSING, due - spec.predict_at.lead)
        usable = (codes >= 0) & (due != MISSING) & (v.known_from <= np.minimum(t, as_of))
    else:
        t = np.zeros(len(codes), np.int64)
        usable = codes >= 0
    chosen = np.full(len(keys), -1)
    picked = np.flatnonzero(usable)
    order = picked[np.lexsort((v.known_from[picked], codes[picked]))]
    chosen[codes[order]] = order  # the last assignment, the newest version, stays
    counts["without_version_in_time"] = int((chosen < 0).sum())
    chosen = chosen[chosen >= 0]
    if spec.closed_by:
        closed = first_known(names.take(pa.array(chosen)), closing_facts(spec, tables))
        too_late = closed <= t[chosen]
        counts["closed_before_asked"] = int(too_late.sum())
        chosen = chosen[~too_late]
    table, t, name = v.table.take(pa.array(chosen)), t[chosen], names.take(pa.array(chosen))
    label, label_known = labels(spec, tables, name, as_of)
    order = np.lexsort((codes[chosen], t))
    table, t, name = table.take(pa.array(order)).combine_chunks(), t[order], name.take(pa.array(order))
    label, label_known = label[order], label_known[order]
    part = _parts(spec, name, t, label, label_known, as_of)
    counts["rows"] = len(t)
    counts["unlabelled"] = int((label < 0).sum())
    counts |= {p: int((part == i).sum()) for i, p in enumerate(PARTS)}
    return Rows(table, name, t, label, label_known, part, counts)


def labels(spec: Spec, tables: Mapping[str, pa.Table], name: pa.Array, as_of: int) -> tuple[np.ndarray, np.ndarray]:
    """Label (1, 0, −1) and its known-at (NEVER where none) of each key, newest version known at `as_of`."""
    facts = tables[spec.label.source]
    v = versions(facts, spec.sources[spec.label.source])
    codes = codes_of(text_keys(key_arrays(v.table, spec.row_key), v.table.num_rows), name)
    true, there = holds(spec.label, v.table[spec.label.column])
    live = (codes >= 0) & ((v.known_from <= as_of) & (as_of < v.known_to) if spec.timed else True)
    label, known = np.full(len(name), -1, np.int8), np.full(len(name), NEVER)
    at = np.flatnonzero(live)
    at = at[np.lexsort((v.fact[at], v.known_from[at]))]  # of several facts for a key the newest known stays
    label[codes[at]] = np.where(there[at], true[at], -1)
    known[codes[at]] = np.where(there[at], v.known_from[at], NEVER)
    return label, known


def _parts(
    spec: Spec, name: pa.Array, t: np.ndarray, label: np.ndarray, known: np.ndarray, as_of: int
) -> np.ndarray:
    part = np.full(len(t), -1, np.int8)
    if isinstance(spec.split, TimeSplit):
        for i, (begin, end, label_by) in enumerate(split_bounds(spec, as_of)):
            part[(t > begin) & (t <= end) & (known <= label_by) & (label >= 0)] = i
    else:
        part = np.where(label >= 0, hash_parts(spec.split, spec.seed, name), -1).astype(np.int8)
    return part


def _refuse_thin_parts(rows: Rows) -> None:
    for i, p in enumerate(PARTS):
        seen = set(rows.label[rows.part == i].tolist())
        if not seen:
            raise Refused(
                f"split.{p} has no row with a known label; make it longer, or land more data "
                f"({len(rows.t)} rows, {int((rows.label >= 0).sum())} with a label)"
            )
        if len(seen) == 1 and p != "valid_select":
            raise Refused(
                f"split.{p}: every label is {bool(seen.pop())}; a model needs both: check label in the spec"
            )


def split_bounds(spec: Spec, as_of: int) -> list[tuple[int, int, int]]:
    """(begin, end, label known by) of each part: a row belongs to it when begin < t ≤ end."""
    split = spec.split
    assert isinstance(split, TimeSplit) and spec.label_delay is not None
    end, label_by, bounds = as_of - spec.label_delay, as_of, []
    for p in reversed(PARTS):
        begin = end - getattr(split, p)
        bounds.append((begin, end, label_by))
        end, label_by = begin - split.purge, begin
    return bounds[::-1]


def seen_until(spec: Spec, as_of: int) -> int:
    """Label cut of train and validation: later rows are new to the model. MISSING without time."""
    return split_bounds(spec, as_of)[2][2] if spec.timed else MISSING


def hash_parts(split: HashSplit, seed: int, name: pa.Array) -> np.ndarray:
    """Part of each key by a seeded hash: equal keys fall into one part (N)."""
    edges = np.cumsum([split.train, split.valid_fit, split.valid_select])
    draws = [
        int.from_bytes(hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()[:8], "big") / 2**64
        for key in name.to_pylist()
    ]
    return np.searchsorted(edges, np.array(draws), side="right")


# Rows that a request may name


def _refuse_large_keys(spec: Spec, table: pa.Table) -> None:
    """A group that a whole number names is looked up by it when served, and there numbers are float64."""
    columns = spec.row_source.columns
    for name in sorted({c for stored in stored_views(spec) for c in stored.key if columns[c].type == "int64"}):
        limits = pc.min_max(table[name]).as_py()
        if limits["min"] is not None and max(-limits["min"], limits["max"]) >= 2**53:
            raise Refused(
                f"source {spec.rows.source!r}: column {name!r}, a key of features, holds whole numbers of 2^53 or more, "
                "which are not exact as features: write that column as text"
            )


def online_rows(spec: Spec, tables: Mapping[str, pa.Table], now: int) -> pa.Table:
    """Versions of the rows source that a request may name from `now` (µs) on: _key, _live_from, _live_to, _closed_at and
    the columns. Raises Refused for keys that are not exact as numbers."""
    _refuse_large_keys(spec, tables[spec.rows.source])
    v = versions(tables[spec.rows.source], spec.row_source)
    table, times = v.table, {"_live_from": v.known_from, "_live_to": v.known_to}
    for name, values in times.items():
        table = table.append_column(name, pa.array(values))
    if spec.predict_at is not None:
        due = int_times(table[spec.predict_at.column])
        table = table.filter(pa.array((due >= now - RECENT) | (due == MISSING)))
    names = text_keys(key_arrays(table, spec.row_key), table.num_rows)
    closing = {name: tables[name].take(pa.array(rows_among(tables[name], spec.row_key, table))) for name in spec.closed_by}
    closed = first_known(names, closing_facts(spec, closing))
    table = table.append_column(KEY, names).append_column("_closed_at", pa.array(closed)).filter(pc.is_valid(names))
    table = table.select([*spec.row_source.columns, KEY, *times, "_closed_at"])
    return table.take(pc.sort_indices(table, [(KEY, "ascending"), ("_live_from", "ascending")])).combine_chunks()
