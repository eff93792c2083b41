"""A row that the served store has: the endpoint answers it before it says that it is ready, and shows it as the example."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from deploy.requests import Field
from features.keys import request_key
from features.online import OnlineStore
from features.packed import ROWS
from pipelines.clock import MISSING

LOOKED_AT = 4_000  # rows of the store, of which the one is shown that is asked about soonest


def example(store: OnlineStore, fields: Mapping[str, Field], now: int) -> dict[str, Any] | None:
    """The row key, timestamps as µs, of a row that can be asked about at `now`; None where the store has none."""
    spec = store.spec
    with store.reading():
        keys = store.cells.keys(ROWS)
        keys = keys[:: -(-len(keys) // LOOKED_AT) or 1]
        if not keys:
            return None
        if spec.row_key == ("row_digest",):
            return {"row_digest": keys[0]}
        _, columns, _ = store.read({ROWS: keys})[ROWS]
    begin, end = columns["_live_from"], columns["_live_to"]
    open_now = np.flatnonzero((begin <= now) & (now < end) & (columns["_closed_at"] > now))
    if not len(open_now):
        return None
    at = spec.predict_at
    if at is not None:
        due = columns[at.column][open_now]
        gap = np.where(due == MISSING, np.iinfo(np.int64).max, np.abs(due - at.lead - now))
        open_now = open_now[np.argsort(gap, kind="stable")]
    row = {name: _typed(columns[name][open_now[0]], fields[name].type) for name in spec.row_key}
    return row if request_key(row, spec.row_key) in set(keys) else None


def stand_in(fields: Mapping[str, Field], now: int) -> dict[str, Any]:
    """A row key of the right types, for a store without rows."""
    values = {"string": "none", "text": "none", "int64": 0, "float64": 0.0, "bool": False, "timestamp": now}
    return {name: values[field.type] for name, field in fields.items() if field.required}


def _typed(value: Any, kind: str) -> Any:
    return {"int64": int, "timestamp": int, "bool": bool, "float64": float}.get(kind, str)(value)
