"""From what was looked up to what the model sees: one function for the training set and for a request.

Numbers are float64 with NaN for missing, categories and texts are objects with None; times are int64 µs with MISSING.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from features.facts import Columns, floats, int_times
from features.keys import filled, one_chunk
from features.views import derive, made_of
from pipelines.clock import MISSING
from pipelines.errors import UsageError, nearest
from pipelines.spec import Calendar, Derived, Spec

QUARTER, HOUR, DAY = 900_000_000, 3_600_000_000, 86_400_000_000


@dataclass(frozen=True)
class Feature:
    """One column of the frame, and the view or part of the spec that it comes from."""

    name: str
    kind: Literal["number", "category", "text"]
    group: str


def feature_list(spec: Spec) -> tuple[Feature, ...]:
    """Every feature of a spec, in the order of the frame. Raises UsageError for a name twice, or for one that is none."""
    held = _listed.get(id(spec))
    if held is None or held[0] is not spec:  # a spec cannot be hashed, and a request asks again and again
        if len(_listed) >= 16:
            _listed.clear()
        held = _listed[id(spec)] = spec, _list(spec)
    return held[1]


_listed: dict[int, tuple[Spec, tuple[Feature, ...]]] = {}


def _list(spec: Spec) -> tuple[Feature, ...]:
    source = spec.row_source
    found = []
    for name in spec.features.row:
        kind: Literal["number", "category"] = "category" if source.columns[name].type == "string" else "number"
        found.append(Feature(name, kind, "row"))
    found += [Feature(name, "text", "row") for name in spec.features.texts]
    if spec.features.calendar:
        found += [Feature(f"local_{part}", "number", "calendar") for part in spec.features.calendar.parts]
    for name, view in spec.features.views.items():
        found += [Feature(f, made.kind, name) for f, made in made_of(spec, name, view).items()]  # type: ignore[arg-type]
    found += [Feature(name, "number", "derived") for name in spec.features.derived]
    for function in spec.features.functions:
        found += [Feature(f, "number", function.call.partition(":")[2]) for f in function.outputs]
    known = [feature.name for feature in found]
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise UsageError(f"{spec.pipeline}: two features are named {twice!r}: rename one")
    _check_log(spec, {feature.name: feature.kind for feature in found})
    if not spec.features.only:
        return tuple(found)
    for name in spec.features.only:
        if name not in known:
            raise UsageError(f"{spec.pipeline}: features.only {name!r} is not a feature{nearest(name, known)}")
    only = frozenset(spec.features.only)
    return tuple(feature for feature in found if feature.name in only)


def _check_log(spec: Spec, kinds: Mapping[str, str]) -> None:
    """Raises UsageError where the prediction log cannot do without a field, or hash it."""
    given = {n: "category" if c.type == "string" else "number" for n, c in spec.row_source.columns.items()}
    kinds = {**given, **kinds}
    for option in ("log_drop", "log_hash"):
        for name in getattr(spec.serve, option):
            where = f"{spec.pipeline}: serve.{option} {name!r}"
            if name in spec.row_key:
                raise UsageError(f"{where} is part of the row key, by which labels find an answer: see serve.log_keep")
            if name not in kinds:
                raise UsageError(f"{where} is neither a feature nor a field of a request{nearest(name, list(kinds))}")
            if option == "log_hash" and kinds[name] == "number":
                raise UsageError(f"{where} is no text, and numbers are guessed from their hashes: drop it (serve.log_drop)")


def own_columns(spec: Spec, table: pa.Table) -> Columns:
    """The declared columns of the rows source as arrays (N)."""
    return {
        name: as_array(table[name], column.type)
        for name, column in spec.row_source.columns.items()
        if name in table.column_names
    }


def as_array(column: pa.Array | pa.ChunkedArray, declared: str) -> np.ndarray:
    """A column as the frame holds it: objects, int64 µs or float64."""
    if declared == "string":
        texts = one_chunk(column).dictionary_encode()
        words = np.array([*texts.dictionary.to_pylist(), None], dtype=object)
        return words[filled(texts.indices, len(words) - 1)]
    return int_times(column) if declared == "timestamp" else floats(column)


def arrow_columns(frame: Columns) -> dict[str, pa.Array]:
    """The columns of a frame as Parquet holds them: text or float64."""
    return {name: pa.array(v, pa.string() if v.dtype == object else pa.float64()) for name, v in frame.items()}


def is_missing(values: np.ndarray) -> np.ndarray:
    """Where a column of the frame is missing (bool, N)."""
    if values.dtype == object:
        return np.asarray(values == None, bool)  # noqa: E711 — element by element
    return values == MISSING if values.dtype.kind == "i" else np.isnan(values)


def assemble(spec: Spec, own: Columns, raw: Mapping[str, Mapping[str, Columns]], t: np.ndarray) -> Columns:
    """The features of N rows. `raw`: view → stored view → column → values, as `views.derive` takes them."""
    return compose(spec, own, derive_all(spec, raw, t, own))


def derive_all(spec: Spec, raw: Mapping[str, Mapping[str, Columns]], t: np.ndarray, own: Columns) -> Columns:
    """The features of all views (N)."""
    null = {key: null_keys(own, key, len(t)) for key in {view.shape.key for view in spec.features.views.values()}}
    found: Columns = {}
    for name, view in spec.features.views.items():
        found |= derive(spec, name, raw[name], t, own, null[view.shape.key])
    return found


def compose(spec: Spec, own: Columns, of_views: Columns) -> Columns:
    """The features of N rows from those of all views."""
    frame: Columns = {name: own[name] for name in (*spec.features.row, *spec.features.texts)}
    if spec.features.calendar:
        frame |= local_parts(spec.features.calendar, own[spec.features.calendar.column])
    frame |= of_views
    frame |= derived_numbers(spec.features.derived, own)
    for function in spec.features.functions:
        inputs = {name: frame[name] if name in frame else own[name] for name in function.inputs}
        outputs = resolve(function.call)(inputs)
        frame |= {name: np.asarray(outputs[name], np.float64) for name in function.outputs}
    return {feature.name: frame[feature.name] for feature in feature_list(spec)}


def derived_numbers(derived: Mapping[str, Derived], own: Columns) -> Columns:
    """Minutes between timestamps of the row, and ratios of its numbers and of those minutes (N)."""
    found: Columns = {}
    for name, made in derived.items():
        if made.minutes:
            begin, end = (own[column] for column in made.minutes)
            there = (begin != MISSING) & (end != MISSING)
            found[name] = np.where(there, np.where(there, end, 0) - np.where(there, begin, 0), np.nan) / 60e6
    for name, made in derived.items():
        if made.ratio:
            above, below = (found[column] if column in found else own[column] for column in made.ratio)
            found[name] = np.divide(above, below, out=np.full(len(below), np.nan), where=below != 0)
    return found


def null_keys(own: Columns, key: Sequence[str], rows: int) -> np.ndarray:
    """Where part of a key is missing (bool, N): such a key equals none, not even another missing one."""
    return np.logical_or.reduce([np.zeros(rows, bool), *(is_missing(own[column]) for column in key)])


@cache
def resolve(call: str) -> Callable[..., Columns]:
    """The function named `module:function`. Raises UsageError when it is not there."""
    module, _, name = call.partition(":")
    try:
        found: Callable[..., Columns] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"function {call!r} cannot be found ({error}); write module:function") from None
    return found


def local_parts(calendar: Calendar, t: np.ndarray) -> Columns:
    """Parts of a time in local time, each float64 with NaN where the time is missing (N)."""
    there = t != MISSING
    local = np.where(there, t, 0) + _offsets(calendar.timezone, np.where(there, t, 0))
    return {f"local_{part}": np.where(there, _PARTS[part](local).astype(np.float64), np.nan) for part in calendar.parts}


def _date(local: np.ndarray, unit: str) -> np.ndarray:
    return (local // DAY).astype("datetime64[D]").astype(f"datetime64[{unit}]")


_PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "minute_of_day": lambda local: local % DAY // 60_000_000,
    "hour": lambda local: local % DAY // HOUR,
    "weekday": lambda local: (local // DAY + 3) % 7,  # 1970-01-01 was a Thursday; Monday is 0
    "day": lambda local: (_date(local, "D") - _date(local, "M")).astype(np.int64) + 1,
    "month": lambda local: _date(local, "M").astype(np.int64) % 12 + 1,
    "day_of_year": lambda local: (_date(local, "D") - _date(local, "Y")).astype(np.int64) + 1,
}


def _offsets(timezone: str, t: np.ndarray) -> np.ndarray:
    if len(t) == 1:
        return np.array([_offset(timezone, int(t[0]) // QUARTER)])
    quarters, inverse = np.unique(t // QUARTER, return_inverse=True)  # clocks change on a quarter of an hour
    return np.array([_offset(timezone, int(quarter)) for quarter in quarters], np.int64)[inverse]


@cache
def _offset(timezone: str, quarter: int) -> int:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(minutes=15 * quarter)
    offset = moment.astimezone(ZoneInfo(timezone)).utcoffset()
    assert offset is not None
    return offset // timedelta(microseconds=1)
