"""What the views of a spec are stored as, and the features that are derived from what was looked up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.facts import Columns
from pipelines.clock import DAY_US, MISSING, duration_text
from pipelines.spec import Latest, Open, Source, Spec, View, Window
from pipelines.spec import Sequence as Chain

RECENT = 7 * DAY_US  # how far back the served store still knows a row, and what came before it
EWM = ("weight", "weighted", "weight_before", "weighted_before")  # sums anchored at the bucket of t, and at the one before


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


def others_of(shape: Window | Open | Latest | Chain) -> tuple[str, ...]:
    """The sources that a view takes facts from beside its own: those that close its plans, or complete them."""
    return shape.closed_by if isinstance(shape, Open) else tuple(shape.facts) if isinstance(shape, Chain) else ()


def reach(shape: Window | Open | Chain) -> int:
    """How far from an asked time, or from the order of an asked plan, a fact may lie that counts, µs."""
    return shape.within if isinstance(shape, Chain) else max((*shape.last, *(shape.next if isinstance(shape, Window) else ())))


def held(column: str, key: Sequence[str]) -> str:
    """Name under which a view keeps a value: the name of a key column is taken by the key."""
    return f"_{column}" if column in key else column


def absent(name: str) -> int:
    """What an integer column of a stored view holds where there is no step, or no fact to take it from."""
    return MISSING if name in ("_event", "_order", "_newest") or name.endswith(("_min", "_max", "_newest")) else 0


def window_columns(shape: Window) -> tuple[str, ...]:
    """The integers that a window view is kept as."""
    found = ["_count"]
    for column in shape.added:
        found += [f"_{column}_n", f"_{column}_sum"] + [f"_{column}_squares"] * (column in shape.std)
    for share, condition in shape.share.items():
        found += [f"_{condition.column}_n", f"_{share}_hits"]
    for name, columns in (("min", shape.min), ("max", shape.max), ("nunique", shape.nunique), ("newest", shape.newest)):
        found += [f"_{column}_{name}" for column in columns]
    found += ["_newest"] * shape.since
    for column in shape.ewm.columns if shape.ewm else ():
        found += [f"_{column}_{part}" for part in EWM]
    return tuple(dict.fromkeys(found))


def stored_views(spec: Spec) -> list[Stored]:
    """Every table that the features of a spec are kept in: one per view and window length."""
    return [stored for name, view in spec.features.views.items() for stored in stored_of(spec, name, view)]


def stored_of(spec: Spec, name: str, view: View) -> list[Stored]:
    """The tables of one view."""
    found = []
    shape, source = view.shape, spec.sources[view.shape.source]
    if isinstance(shape, Window):
        for ahead, lengths in ((False, shape.last), (True, shape.next)):
            for length in lengths:
                title = f"{name}_{'next_' if ahead else ''}{duration_text(length)}"
                found.append(Stored(title, name, "steps", shape.key, window_columns(shape), (), length, ahead))
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


def stored_for(spec: Spec, name: str, feature: str) -> tuple[str, ...]:
    """The stored views that a feature of a view, or of no view, is made of."""
    if name not in spec.features.views:
        return ()
    prefix, column = feature.split("__", 1)
    shape = spec.features.views[name].shape
    ago = column.rpartition("_change_")[2] if isinstance(shape, Latest) and column not in shape.columns else ""
    return (prefix, f"{prefix}_ago_{ago}") if ago else (prefix,)


def resolution(source: Source, name: str) -> float:
    """Smallest step of a column that window sums keep: whole numbers, unless a float64 column declares another."""
    column = source.columns[name]
    return column.resolution or 1.0 if column.type == "float64" else 1.0


def feature_names(spec: Spec, name: str, view: View) -> dict[str, str]:
    """The features of a view: name → number | category."""
    shape, source = view.shape, spec.sources[view.shape.source]
    kinds = {"string": "category"}
    found: dict[str, str] = {}
    if isinstance(shape, Window):
        for prefix in (stored.name for stored in stored_of(spec, name, view)):
            found |= {f"{prefix}__count": "number"} if shape.count else {}
            found |= {f"{prefix}__{c}_sum": "number" for c in shape.sum}
            found |= {f"{prefix}__{c}_mean": "number" for c in shape.mean}
            found |= {f"{prefix}__{c}_std": "number" for c in shape.std}
            found |= {f"{prefix}__{c}_share": "number" for c in shape.share}
            for kind, columns in (("min", shape.min), ("max", shape.max), ("nunique", shape.nunique), ("newest", shape.newest)):
                found |= {f"{prefix}__{c}_{kind}": "number" for c in columns}
            found |= {f"{prefix}__minutes_since": "number"} if shape.since else {}
            found |= {f"{prefix}__{c}_ewm": "number" for c in (shape.ewm.columns if shape.ewm else ())}
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
        lengths = {f"{name}_{duration_text(length)}": length for length in shape.last} if shape.ewm else {}
        for prefix, columns in raw.items():
            if shape.count:
                found[f"{prefix}__count"] = columns["_count"].astype(np.float64)
            for c in shape.sum:
                found[f"{prefix}__{c}_sum"] = columns[f"_{c}_sum"].astype(np.float64) * resolution(source, c)
            for c in shape.mean:
                n, total = columns[f"_{c}_n"], columns[f"_{c}_sum"]
                found[f"{prefix}__{c}_mean"] = _ratio(total, n) * resolution(source, c)
            for c in shape.std:
                n, total, squares = (columns[f"_{c}_{part}"] for part in ("n", "sum", "squares"))
                variance = _ratio(squares, n) - _ratio(total, n) ** 2
                found[f"{prefix}__{c}_std"] = np.sqrt(np.maximum(variance, 0.0)) * resolution(source, c)
            for c, condition in shape.share.items():
                found[f"{prefix}__{c}_share"] = _ratio(columns[f"_{c}_hits"], columns[f"_{condition.column}_n"])
            for kind, names in (("min", shape.min), ("max", shape.max), ("newest", shape.newest)):
                for c in names:
                    found[f"{prefix}__{c}_{kind}"] = _unless_missing(columns[f"_{c}_{kind}"]) * resolution(source, c)
            for c in shape.nunique:
                found[f"{prefix}__{c}_nunique"] = columns[f"_{c}_nunique"].astype(np.float64)
            if shape.since:
                newest = columns["_newest"]
                found[f"{prefix}__minutes_since"] = _unless_missing(np.where(newest == MISSING, MISSING, t - newest)) / 60e6
            for c in shape.ewm.columns if shape.ewm else ():
                assert shape.ewm is not None
                n, total, n_before, total_before = (columns[f"_{c}_{part}"] for part in EWM)
                older = 2.0 ** (-lengths[prefix] / shape.ewm.half_life)
                weighted = _ratio(total + total_before * older, n + n_before * older)
                found[f"{prefix}__{c}_ewm"] = weighted * resolution(source, c)
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
    if null_key.any():
        for feature, values in found.items():
            missing: Any = None if values.dtype == object else np.nan
            found[feature] = np.where(null_key, missing, values)
    return found


def _unless_missing(values: np.ndarray) -> np.ndarray:
    """int64 as float64, MISSING as NaN."""
    return np.where(values == MISSING, np.nan, values.astype(np.float64))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b as float64, NaN where b is 0."""
    if len(b) == 1:  # the same without an array's costs
        below = float(b[0])
        return np.array([float(a[0]) / below if below else np.nan])
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b != 0)
