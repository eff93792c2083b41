"""What the views of a spec are stored as, and the features that are derived from what was looked up."""

from collections.abc import Callable, Mapping, Sequence
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


def stored_for(spec: Spec) -> dict[str, set[str]]:
    """The stored views that each feature of the views is made of."""
    every = (made for name, view in spec.features.views.items() for made in made_of(spec, name, view).items())
    return {feature: {stored for stored, _ in made.of if stored != OWN} for feature, made in every}


def resolution(source: Source, name: str) -> float:
    """Smallest step of a column that window sums keep: whole numbers, unless a float64 column declares another."""
    column = source.columns[name]
    return column.resolution or 1.0 if column.type == "float64" else 1.0


@dataclass(frozen=True)
class Made:
    """How a feature of a view is made: a formula, the columns that go into it, each (stored view or OWN, column), and numbers.

    `older`: what a sum that is one window older counts for (ewm).
    """

    formula: str
    of: tuple[tuple[str, str], ...]
    scale: float = 1.0
    older: float = 0.0
    kind: str = "number"  # number | category


OWN = ""  # the row itself, in place of a stored view


def made_of(spec: Spec, name: str, view: View) -> dict[str, Made]:
    """The features of a view, by name."""
    shape, source = view.shape, spec.sources[view.shape.source]
    tables = stored_of(spec, name, view)
    if isinstance(shape, Window):
        return {f"{s.name}__{n}": made for s in tables for n, made in _made_of_window(shape, source, s).items()}
    if isinstance(shape, Open):
        parts = {"due": ("number", "_due"), "open": ("number", "_open"), "open_share": ("ratio", "_open", "_due"),
                 "late_mean": ("late", "_open", "_over")}  # fmt: skip
        return {f"{s.name}__{n}": Made(f, tuple((s.name, c) for c in of)) for s in tables for n, (f, *of) in parts.items()}
    kinds = {c: "category" if source.columns[c].type == "string" else "number" for c in shape.columns}
    if isinstance(shape, Latest):
        made = {f"{name}__{c}": Made("value", ((name, held(c, shape.key)),), kind=kinds[c]) for c in shape.columns}
        for ago in shape.change.over if shape.change else ():
            assert shape.change is not None
            before = f"{name}_ago_{duration_text(ago)}"
            for c in shape.change.columns:
                both = tuple((stored, held(c, shape.key)) for stored in (name, before))
                made[f"{name}__{c}_change_{duration_text(ago)}"] = Made("change", both)
        return made
    made = {f"{name}__gap_min": Made("gap", ((OWN, shape.order), (name, "_order")))}
    for c in shape.columns:
        timed = source.columns[c].type == "timestamp"
        of = ((name, held(c, shape.key)),)
        made[f"{name}__{c}" + ("_min" if timed else "")] = Made("age" if timed else "value", of, kind=kinds[c])
    return made | {f"{name}__{s}_{c}": Made("value", ((name, f"_{s}_{c}"),)) for s, cs in shape.facts.items() for c in cs}


def _made_of_window(shape: Window, source: Source, stored: Stored) -> dict[str, Made]:
    def of(formula: str, *columns: str, scale: float = 1.0, older: float = 0.0) -> Made:
        return Made(formula, tuple((stored.name, column) for column in columns), scale, older)

    made = {"count": of("number", "_count")} if shape.count else {}
    step = {c: resolution(source, c) for c in (*shape.added, *shape.min, *shape.max, *shape.newest)}
    made |= {f"{c}_sum": of("number", f"_{c}_sum", scale=step[c]) for c in shape.sum}
    made |= {f"{c}_mean": of("ratio", f"_{c}_sum", f"_{c}_n", scale=step[c]) for c in shape.mean}
    made |= {f"{c}_std": of("spread", f"_{c}_n", f"_{c}_sum", f"_{c}_squares", scale=step[c]) for c in shape.std}
    made |= {f"{c}_share": of("ratio", f"_{c}_hits", f"_{told.column}_n") for c, told in shape.share.items()}
    for word, columns in (("min", shape.min), ("max", shape.max)):
        made |= {f"{c}_{word}": of("known", f"_{c}_{word}", scale=step[c]) for c in columns}
    made |= {f"{c}_nunique": of("number", f"_{c}_nunique") for c in shape.nunique}
    made |= {f"{c}_newest": of("known", f"_{c}_newest", scale=step[c]) for c in shape.newest}
    made |= {"minutes_since": of("since", "_newest")} if shape.since else {}
    for c in shape.ewm.columns if shape.ewm else ():
        assert shape.ewm is not None
        older = 2.0 ** (-stored.length / shape.ewm.half_life)
        made[f"{c}_ewm"] = of("ewm", *(f"_{c}_{part}" for part in EWM), scale=resolution(source, c), older=older)
    return made


def derive(
    spec: Spec, name: str, raw: Mapping[str, Columns], t: np.ndarray, own: Columns, null_key: np.ndarray
) -> Columns:
    """The features of one view from what was looked up.

    `raw`: stored view → column → values (Q): int64, 0 where there is no step; float64 with NaN, or objects with
    None. `own`: request fields as int64 µs. `null_key` (Q): where part of the key is null.
    """
    found: Columns = {}
    for feature, made in made_of(spec, name, spec.features.views[name]).items():
        columns = [own[c] if stored == OWN else raw[stored][c] for stored, c in made.of]
        found[feature] = FORMULAS[made.formula](*columns, t=t, scale=made.scale, older=made.older)
    return without_key(found, null_key) if null_key.any() else found


def without_key(found: Columns, null_key: np.ndarray) -> Columns:
    """The same with nothing where part of the key is null (Q)."""
    nothing: dict[bool, Any] = {True: None, False: np.nan}
    return {name: np.where(null_key, nothing[values.dtype == object], values) for name, values in found.items()}


# The only place where sums become means. Each takes arrays of one shape, integers unless it says otherwise, and gives float64;
# t µs, `scale` and `older` fit to them: a thousand rows of one feature, or one row of many


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b as float64, NaN where b is 0."""
    return np.divide(a, b, out=np.full(b.shape, np.nan), where=b != 0)


def _unless_missing(values: np.ndarray) -> np.ndarray:
    """int64 as float64, MISSING as NaN."""
    return np.where(values == MISSING, np.nan, values.astype(np.float64))


def _spread(n: np.ndarray, total: np.ndarray, squares: np.ndarray, *, scale: Any, **_: Any) -> np.ndarray:
    variance = _ratio(squares, n) - _ratio(total, n) ** 2
    return np.sqrt(np.maximum(variance, 0.0)) * scale


def _ewm(
    n: np.ndarray, total: np.ndarray, n_before: np.ndarray, total_before: np.ndarray, *, scale: Any, older: Any, **_: Any
) -> np.ndarray:  # fmt: skip
    return _ratio(total + total_before * older, n + n_before * older) * scale


def _since(newest: np.ndarray, *, t: np.ndarray, **_: Any) -> np.ndarray:
    return _unless_missing(np.where(newest == MISSING, MISSING, t - newest)) / 60e6


def _gap(own: np.ndarray, order: np.ndarray, **_: Any) -> np.ndarray:
    there = order != MISSING
    return np.where(there, (own - np.where(there, order, 0)) / 60e6, np.nan)


def _age(values: np.ndarray, *, t: np.ndarray, **_: Any) -> np.ndarray:
    known = values != MISSING
    return np.where(known, (t - np.where(known, values, 0)) / 60e6, np.nan)


FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "number": lambda values, *, scale, **_: values.astype(np.float64) * scale,
    "ratio": lambda a, b, *, scale, **_: _ratio(a, b) * scale,
    "spread": _spread,
    "known": lambda values, *, scale, **_: _unless_missing(values) * scale,
    "since": _since,
    "ewm": _ewm,
    "late": lambda still, over, *, t, **_: _ratio(still * t - over, still) / 60e6,  # sums of int64 may wrap, and wrap back
    "value": lambda values, **_: values,  # float64, or objects
    "change": lambda now, before, **_: now - before,  # float64
    "gap": _gap,
    "age": _age,
}
