"""Skew: what was served against what training computes for the same key and instant, by the path of training.

`known_features` is the frame of logged requests as one snapshot knows it. A served cell that differs from it by the
snapshot that the served store held is skew; one that changes with a newer snapshot was answered before its facts landed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from features.facts import Columns, int_times, versions
from features.frame import is_missing
from features.ingest import ARROW, Snapshot, read_table
from features.keys import codes_of, grouped, key_arrays, request_key, text_keys
from features.steps import as_of, order_of, starts
from features.store import features_from, historical_features
from features.views import RECENT
from pipelines.clock import MISSING
from pipelines.home import Home
from pipelines.spec import Spec

Asked = Sequence[Mapping[str, object]]  # requests as parsed: timestamps are int µs


@dataclass(frozen=True)
class Known:
    """The frame (N) of requests as one snapshot knows it; `kept` (bool, N): rows that the served store keeps at all."""

    frame: Columns
    kept: np.ndarray


def known_features(spec: Spec, home: Home, snapshot: Snapshot, asked: Asked, t: np.ndarray) -> Known:
    """What training computes for requests at their instants t (µs) from what `snapshot` knows.

    Raises MillraceError or Refused where the snapshot's facts cannot be read or joined.
    """
    rows = asked_rows(spec, read_table(spec, home, snapshot, spec.rows.source), asked, t)
    built = features_from(spec, home, snapshot, int(t.min()))
    kept = np.ones(len(t), bool)
    if spec.predict_at is not None:
        due = int_times(rows[spec.predict_at.column])
        kept = (due == MISSING) | (due >= t - RECENT)
    return Known(historical_features(spec, home, built, rows, t), kept)


def asked_rows(spec: Spec, table: pa.Table, asked: Asked, t: np.ndarray) -> pa.Table:
    """Columns of the rows source (N): the version of each asked key known at its t; where none is, the request's fields."""
    columns = spec.row_source.columns
    v = versions(table, spec.row_source)
    keys, wanted = grouped(pa.array([request_key(row, spec.row_key) for row in asked], pa.string()))
    codes = codes_of(text_keys(key_arrays(v.table, spec.row_key), v.table.num_rows), keys)
    stored = np.flatnonzero(codes >= 0)
    stored = stored[order_of(codes[stored], v.known_from[stored])]
    start = starts(codes[stored], len(keys))
    found = as_of(start, v.known_from[stored], wanted, t)
    given = pa.table({name: _given(column.type, [row.get(name) for row in asked]) for name, column in columns.items()})
    both = pa.concat_tables([v.table.select(given.column_names), given])
    at = v.table.num_rows + np.arange(len(t))
    at[found >= 0] = stored[found[found >= 0]]
    return both.take(pa.array(at)).combine_chunks()


def _given(kind: str, values: list[object]) -> pa.Array:
    return pa.array(values, pa.int64() if kind == "timestamp" else ARROW[kind]).cast(ARROW[kind])


def different(one: Columns, other: Columns) -> Columns:
    """Where two frames of the same features are not exactly equal (bool, N); missing equals missing."""
    found = {}
    for name, a in one.items():
        b = other[name]
        found[name] = ~((a == b) | (is_missing(a) & is_missing(b)))
    return found
