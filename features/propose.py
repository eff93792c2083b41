"""`features: auto`: which features the types and keys of the sources suggest, as an ordinary spec.

Nothing here looks at a label. What could never be known in time is not proposed, and is said to be refused; what is
proposed is a spec like a hand-made one, so that everything behind it (steps, store, endpoint, skew) is the same.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from features.facts import int_times
from features.frame import feature_list
from features.views import made_of, stored_of
from pipelines.clock import MISSING, duration_text, duration_us
from pipelines.spec import Latest, Open, Sequence, Source, Spec, View, Window

NUMBERS = ("int64", "float64", "bool")
KEYS = ("string", "int64", "bool")
PAIRED = 6  # most columns of which pairs are proposed: groups of two, ratios
EXPECTED = 0.5  # facts in a window, fewest
CHAINED = (0.1, 20.0)  # plans of one chain a day, fewest and most
DAY = duration_us("1d")


@dataclass(frozen=True)
class Dropped:
    """Features that go for one reason, in one word and in a sentence."""

    features: tuple[str, ...]
    group: str
    reason: str
    why: str


@dataclass(frozen=True)
class Proposal:
    """A spec whose features are explicit, those that were written by hand, and what was refused on the way to it."""

    spec: Spec
    written: tuple[str, ...]
    dropped: tuple[Dropped, ...]


def propose(spec: Spec) -> Proposal:
    """Every feature that the types and keys suggest, beside those that are written: a function of the spec alone."""
    written, rows = spec.features, spec.row_source
    label = (spec.label.source, spec.label.column)
    own = [c for c, column in rows.columns.items() if column.type in ("string", *NUMBERS) and (spec.rows.source, c) != label]
    own = [c for c in own if spec.row_key != (c,)]
    features: dict[str, Any] = {
        "row": [*written.row, *(c for c in own if c not in written.row)],
        "derived": {**_derived(spec, own), **_dump(written.derived)},
        "views": {**_views(spec), **_dump(written.views)},
        "functions": [f.model_dump(mode="json") for f in written.functions],
    }
    if written.calendar:
        features["calendar"] = written.calendar.model_dump(mode="json")
    elif spec.predict_at and written.auto:
        features["calendar"] = {
            "column": spec.predict_at.column, "timezone": written.auto.timezone,
            "parts": ["minute_of_day", "hour", "weekday", "day", "month", "day_of_year"],
        }  # fmt: skip
    return Proposal(with_features(spec, features), tuple(f.name for f in feature_list(spec)), tuple(_never(spec)))


def with_features(spec: Spec, features: Mapping[str, Any]) -> Spec:
    """The spec with other features, checked anew."""
    return Spec.model_validate({**spec.model_dump(mode="json", by_alias=True), "features": features})


def _dump(models: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model.model_dump(mode="json", by_alias=True) for name, model in models.items()}


def _derived(spec: Spec, own: list[str]) -> dict[str, Any]:
    """Minutes between the times of a row, and ratios of its numbers and of those minutes."""
    columns = spec.row_source.columns
    times = [c for c, column in columns.items() if column.type == "timestamp"]
    found: dict[str, Any] = {}
    if len(times) <= PAIRED:
        found = {_name("minutes", a, "to", b): {"minutes": [a, b]} for a, b in combinations(times, 2)}
    numbers = [c for c in own if columns[c].type in ("int64", "float64") and c not in spec.row_key]
    if len(numbers) <= PAIRED:
        pairs = [*combinations(numbers, 2), *((a, b) for a in numbers for b in found)]
        found |= {_name(a, "per", b): {"ratio": [a, b]} for a, b in pairs}
    return {name: made for name, made in found.items() if name not in columns}


def _name(*parts: str) -> str:
    """A name that a view may have, from names of sources and columns."""
    name = re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower()).strip("_")
    return name if name[:1].isalpha() else f"v_{name}"


def _views(spec: Spec) -> dict[str, Any]:
    """Windows of events by each group, the newest state of what the row names, plans ahead, backlog, the plan before."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, source in spec.sources.items():
        if source.kind == "plan":
            found += _plans(spec, name)
        elif _names_row(spec, source) and not _is_outcome(spec, name):
            found += _state(spec, name)
        elif spec.timed:
            found += _events(spec, name)
    views: dict[str, Any] = {}
    for name, view in found:
        while name in (*views, "rows"):  # two sources or columns whose names differ in signs alone
            name += "x"
        views[name] = view
    return {name: view for name, view in views.items() if name not in spec.features.views}


def _is_outcome(spec: Spec, name: str) -> bool:
    """Whether a fact of the row's own key tells, or ends, what is asked."""
    return name == spec.label.source or name in spec.closed_by


def _names_row(spec: Spec, source: Source) -> bool:
    """Whether the row names a fact of this source: its key, but for the event time, are columns of the row."""
    key = [c for c in source.key if c != source.event_time]
    own = spec.row_source.columns
    return bool(key) and all(c in own and own[c].type == source.columns[c].type != "float64" for c in key)


def _groups(spec: Spec, source: Source) -> Iterator[tuple[str, ...]]:
    """Everything, each column that source and rows share, pairs of these, and the row key without its times."""
    own = spec.row_source.columns
    shared = [c for c, column in source.columns.items() if column.type in KEYS and c in own and own[c].type == column.type]
    shared = [c for c in shared if spec.row_key != (c,)]  # it names one row: nothing comes before it
    chain = tuple(c for c in spec.row_key if c in shared)
    found: list[tuple[str, ...]] = [(), *((c,) for c in shared)]
    if len(shared) <= PAIRED:
        found += combinations(shared, 2)
    if chain != spec.row_key and chain not in found and tuple(reversed(chain)) not in found:
        found.append(chain)
    yield from found


def _measures(source: Source, group: tuple[str, ...]) -> list[str]:
    """Number columns that can be summed."""
    return [
        c for c, column in source.columns.items()
        if c not in (*source.key, *group) and (column.type in ("int64", "bool") or column.resolution)
    ]  # fmt: skip


def _texts(spec: Spec) -> list[str]:
    assert spec.features.auto is not None
    return [duration_text(length) for length in spec.features.auto.last]


def _events(spec: Spec, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Counts, means and, of the label's source, the share of positives; the newest values and how old they are."""
    source, last = spec.sources[name], _texts(spec)
    label = spec.label.model_dump(mode="json", exclude={"source"}, exclude_none=True)
    for group in _groups(spec, source):
        title = _name(name, *(("by", *group) if group else ("all",)))
        share = {"positive": label} if name == spec.label.source else {}
        measures = _measures(source, group)
        both = {"from": name, "key": list(group)}
        yield title, {"window": {**both, "last": last, "mean": measures, "share": share}}
        yield f"{title}_newest", {"window": {**both, "last": last[-1:], "count": False, "newest": measures, "since": True}}


def _plans(spec: Spec, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """How much is planned soon, how often this was planned (its frequency), the backlog, and the plan before this one."""
    source, last = spec.sources[name], _texts(spec)
    columns = source.columns
    outcomes = [c for c in dict.fromkeys((*spec.closed_by, spec.label.source)) if set(source.key) <= set(spec.sources[c].columns)]
    closes = [c for c in outcomes if c in spec.closed_by and name == spec.rows.source]
    for group in _groups(spec, source):
        title = _name(name, *(("by", *group) if group else ("all",)))
        both = {"from": name, "key": list(group)}
        yield title, {"window": {**both, "next": last[:2]}}
        if group:
            yield f"{title}_frequency", {"window": {**both, "last": last[-1:]}}
        if closes:
            yield f"{title}_open", {"open": {**both, "over": source.event_time, "last": last[:2], "closed_by": closes}}
        chained = name == spec.rows.source and len(group) == 1 and group[0] not in spec.row_key
        if chained and source.event_time != "event_timestamp":  # Feast's name for the time of a row
            described = [c for c in columns if columns[c].type in ("string", *NUMBERS) and c not in (*source.key, *group)]
            facts = {c: _measures(spec.sources[c], group) for c in outcomes if c != name}
            yield f"{title}_before", {"sequence": {
                **both, "order": source.event_time, "within": "1d", "columns": described,
                "facts": {c: found for c, found in facts.items() if found},
            }}  # fmt: skip


def _state(spec: Spec, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The newest fact that the row names; and where facts follow one another, how its numbers changed."""
    source = spec.sources[name]
    key = [c for c in source.key if c != source.event_time]
    if name == spec.rows.source:
        return
    shown = [c for c, column in source.columns.items() if c not in key and column.type in ("string", *NUMBERS)]
    numbers = [c for c in shown if source.columns[c].type in ("int64", "float64")]
    if not shown:
        return
    latest: dict[str, Any] = {"from": name, "key": key, "columns": shown}
    if source.event_time in source.key and numbers:  # facts follow one another
        latest["change"] = {"columns": numbers, "over": _texts(spec)[:3]}
    yield _name(name), {"latest": latest}


def _never(spec: Spec) -> Iterator[Dropped]:
    """What a row's own outcome would tell: refused by rule, whatever its figures."""
    if not spec.timed:
        yield Dropped((f"{spec.label.source}.{spec.label.column}",), spec.label.source, "label", "it is the label")
        return
    for name in dict.fromkeys((spec.label.source, *spec.closed_by)):
        source = spec.sources[name]
        known = {*source.key, *spec.row_source.columns}
        columns = [spec.label.column] if name == spec.rows.source else [c for c in source.columns if c not in known]
        told = "it tells the outcome of its own row" if name == spec.label.source else "by then the row is closed"
        why = f"{told}; facts of other rows are used as known at the time"
        yield Dropped(tuple(f"{name}.{c}" for c in columns), name, "known only after", why)


# What the tables say without a label


def thin(proposal: Proposal, tables: Mapping[str, pa.Table]) -> Proposal:
    """The proposal without windows in which hardly a fact falls, and groups that name what a smaller one names.

    `tables` hold what was known by the end of training.
    """
    spec, written = proposal.spec, set(proposal.written)
    sizes, dropped, views = _Sizes(spec, tables), list(proposal.dropped), {}
    for name, view in spec.features.views.items():
        kept = tuple(made_of(spec, name, view))
        shape = view.shape
        if isinstance(shape, Latest) or not written.isdisjoint(kept):
            views[name] = view
            continue
        same = sizes.same_groups(shape)
        if same is not None:
            words = f"{', '.join(shape.key)} names the same groups as {', '.join(same) or 'no key at all'}"
            dropped.append(Dropped(kept, name, "same groups", words))
            continue
        sparse = _sparse(spec, name, view, sizes)
        dropped += sparse
        gone = {feature for drop in sparse for feature in drop.features}
        smaller = only_needed(spec, name, view, [f for f in kept if f not in gone])
        if smaller is not None:
            views[name] = smaller
    features = {**spec.features.model_dump(mode="json", by_alias=True), "views": _dump(views)}
    return Proposal(with_features(spec, features), proposal.written, tuple(dropped))


class _Sizes:
    """How many facts each group of a source has, and over what time."""

    def __init__(self, spec: Spec, tables: Mapping[str, pa.Table]) -> None:
        self.spec, self.tables = spec, tables
        self._counts: dict[tuple[str, ...], np.ndarray] = {}

    def counts(self, source: str, key: tuple[str, ...]) -> np.ndarray:
        """Facts of each group."""
        if (source, *key) not in self._counts:
            table = self.tables[source].select([*key]).drop_null() if key else self.tables[source]
            counted = table.group_by([*key]).aggregate([([], "count_all")]) if key else None
            self._counts[source, *key] = counted["count_all"].to_numpy() if counted else np.array([table.num_rows])
        return self._counts[source, *key]

    def expected(self, shape: Window | Open | Sequence, length: int) -> float:
        """Facts in a window of this length, for the group of an average fact."""
        source = self.spec.sources[shape.source]
        assert source.event_time
        times = int_times(self.tables[shape.source][source.event_time])
        times = times[times != MISSING]
        counts = self.counts(shape.source, shape.key).astype(np.float64)
        if not len(times) or not counts.sum():
            return 0.0
        span = max(int(times.max()) - int(times.min()), length)
        return float((counts**2).sum() / counts.sum()) * length / span

    def same_groups(self, shape: Window | Open | Sequence) -> tuple[str, ...] | None:
        """A part of the key that names as many groups as the whole."""
        own = len(self.counts(shape.source, shape.key))
        for size in range(len(shape.key)):
            for part in combinations(shape.key, size):
                if own <= 1.02 * len(self.counts(shape.source, part)):
                    return part
        return None


def _sparse(spec: Spec, name: str, view: View, sizes: _Sizes) -> list[Dropped]:
    shape, found = view.shape, list[Dropped]()
    if isinstance(shape, Sequence):
        least, most = CHAINED
        facts = sizes.expected(shape, DAY)
        if not least <= facts <= most:
            word = "too sparse" if facts < least else "too dense"
            found.append(Dropped(tuple(made_of(spec, name, view)), name, word, f"a day has {facts:.2g} of one chain"))
        return found
    assert isinstance(shape, Window | Open)
    for stored in stored_of(spec, name, view):
        facts = sizes.expected(shape, stored.length)
        if facts < EXPECTED:
            gone = tuple(f for f in made_of(spec, name, view) if f.startswith(f"{stored.name}__"))
            found.append(Dropped(gone, name, "too sparse", f"such a window holds {facts:.2g} facts"))
    return found


# Back to what was chosen

_PARTS = ("last", "next", "sum", "mean", "std", "min", "max", "nunique", "newest", "columns", "over", "share", "facts", "change",
          "ewm", "count", "since")  # fmt: skip


def chosen(spec: Spec, kept: Iterable[str]) -> Spec:
    """The spec with these features alone: nothing is stored or served that they do not need."""
    only = set(kept)
    written = spec.features
    views = {n: only_needed(spec, n, v, [f for f in made_of(spec, n, v) if f in only]) for n, v in written.views.items()}
    derived = {n for n in written.derived if n in only}
    derived |= {part for n in derived for part in written.derived[n].ratio or () if part in written.derived}
    body = written.model_dump(mode="json", by_alias=True)
    body |= {
        "auto": None, "only": [f.name for f in feature_list(spec) if f.name in only],
        "row": [c for c in written.row if c in only],
        "views": _dump({n: v for n, v in views.items() if v is not None}),
        "derived": _dump({n: d for n, d in written.derived.items() if n in derived}),
    }  # fmt: skip
    if written.calendar:
        parts = [p for p in written.calendar.parts if f"local_{p}" in only]
        body["calendar"] = {**body["calendar"], "parts": parts} if parts else None
    return with_features(spec, body)


def only_needed(spec: Spec, name: str, view: View, kept: Iterable[str]) -> View | None:
    """The view without whatever none of the kept features needs; None where there are none."""
    wanted = set(kept)
    if not wanted:
        return None
    shape = next(iter(view.model_dump(exclude_none=True)))
    for path in list(_removable(view.shape.model_dump(mode="json", by_alias=True))):
        body = _without(view.shape.model_dump(mode="json", by_alias=True), path)
        try:
            smaller = View.model_validate({shape: body})
        except ValidationError:  # the last of what a shape must have
            continue
        if wanted <= set(made_of(spec, name, smaller)):
            view = smaller
    return view


def _removable(body: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where something stands that a shape may lack, innermost first."""
    for field in _PARTS:
        value = body.get(field)
        if isinstance(value, Mapping):
            for inner, part in value.items():
                yield from ((field, inner, str(item)) for item in (part if isinstance(part, list) else ()))
                yield (field, inner)
            yield (field,)
        elif isinstance(value, list):
            yield from ((field, str(item)) for item in value)
        elif value is True:
            yield (field,)


def _without(body: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The body without what stands at a path: an item of a list, an entry of a mapping, a field."""
    first, *rest = path
    value = body.get(first)
    if rest and isinstance(value, list):
        return {**body, first: [item for item in value if str(item) != rest[0]]}
    if rest and isinstance(value, Mapping):
        return {**body, first: _without(dict(value), tuple(rest))}
    if value is True:
        return {**body, first: False}
    return {key: item for key, item in body.items() if key != first}
