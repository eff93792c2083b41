"""The oracle: rows, label, split and features one row at a time, in plain Python, slow and readable.

Written from the text of the semantics, never from the code under test, of which it imports nothing. Times are
int µs UTC, None is null, a table is a list of dicts. `spec` is the YAML file as parsed (durations are texts).

The edges:
- as of t the newest version of a fact with known-at ≤ t is live; the older ones do not exist for t
- past window (t − w, t]; future window (t, t + w]; TTL t − ttl ≤ event time; chain [order − within, order)
- a part of the split is (begin, end]; its labels are known at or before the begin of the next part
- null equals nothing, null included
"""

import math
import operator
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

Value = Any  # int | float | str | bool | None
Version = dict[str, Value]
Key = tuple[Value, ...]
Settings = dict[str, Any]  # a part of the parsed YAML

PARTS = ("train", "valid_fit", "valid_select", "test")
MINUTE = 60e6
_UNITS = {"us": 1, "ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}


class Fact(NamedTuple):
    """One version of a fact: its columns, and what is said of it in time."""

    key: Key
    event_time: int
    known_at: int
    row: Version


class PredictionRow(NamedTuple):
    """A key that is predicted at t, from a version that was known at t."""

    key: Key
    version: Version
    t: int


@dataclass(frozen=True)
class Rows:
    """Prediction rows by t and key; beside them the keys that are not rows."""

    rows: tuple[PredictionRow, ...]
    unknown_in_time: int  # no version with known-at ≤ its own t
    closed: int  # a closing fact was known at t


class Oracle:
    """Answers for one pipeline over its tables; `_arrival` in a row is its arrival stamp, if that counts."""

    def __init__(self, spec: Settings, tables: dict[str, list[Version]]) -> None:
        self.spec = spec
        self.sources: dict[str, Settings] = spec["sources"]
        self.facts = {
            name: read_facts(name, source, tables.get(name, [])) for name, source in self.sources.items()
        }
        self._seen: dict[tuple[str, int], list[Fact]] = {}
        self._groups: dict[tuple[str, int, tuple[str, ...]], dict[Key, list[Fact]]] = {}

    # What is known

    def live(self, source: str, t: int) -> list[Fact]:
        """The newest version known at t of each fact of a source."""
        if (source, t) not in self._seen:
            self._forget()
            newest: dict[Key, Fact] = {}
            for fact in self.facts[source]:
                if self.is_known(fact, t) and (
                    fact.key not in newest or fact.known_at > newest[fact.key].known_at
                ):
                    newest[fact.key] = fact
            self._seen[source, t] = list(newest.values())
        return self._seen[source, t]

    def is_known(self, fact: Fact, t: int) -> bool:
        return fact.known_at <= t

    def live_with(self, source: str, columns: tuple[str, ...], values: Key, t: int) -> list[Fact]:
        """The live facts whose columns equal the values. Null equals nothing; no columns means all facts."""
        if None in values:
            return []
        if (source, t, columns) not in self._groups:
            groups: dict[Key, list[Fact]] = {}
            for fact in self.live(source, t):
                groups.setdefault(tuple(fact.row[column] for column in columns), []).append(fact)
            self._groups[source, t, columns] = groups
        return self._groups[source, t, columns].get(values, [])

    def _forget(self) -> None:
        if len(self._seen) > 200:
            self._seen.clear()
            self._groups.clear()

    # Rows, label, split

    def rows(self, as_of: int) -> Rows:
        """What is predicted, as far as known at `as_of`. A t after `as_of` is listed, it is in no part."""
        keys: dict[Key, list[Fact]] = {}
        for fact in self.facts[self.spec["rows"]["from"]]:
            if fact.known_at <= as_of:
                key = tuple(fact.row[column] for column in self.spec["rows"]["key"])
                keys.setdefault(key, []).append(fact)
        rows, unknown_in_time, closed = [], 0, 0
        for key, versions in keys.items():
            in_time = [v for v in versions if self.is_in_time(v)]
            if not in_time:
                unknown_in_time += 1
                continue
            version = max(in_time, key=lambda v: v.known_at)
            t = self.row_time(version)
            assert t is not None
            if self.is_closed(key, min(t, as_of)):
                closed += 1
            else:
                rows.append(PredictionRow(key, version.row, t))
        return Rows(tuple(sorted(rows, key=lambda row: (row.t, row.key))), unknown_in_time, closed)

    def row_time(self, version: Fact) -> int | None:
        """When a version says that its row is predicted."""
        planned = version.row[self.spec["predict_at"]["column"]]
        return None if planned is None else planned - duration(self.spec["predict_at"]["lead"])

    def is_in_time(self, version: Fact) -> bool:
        t = self.row_time(version)
        return t is not None and version.known_at <= t

    def is_closed(self, key: Key, t: int) -> bool:
        """Whether a closing fact of a row is known at t."""
        columns = tuple(self.spec["rows"]["key"])
        return any(self.live_with(source, columns, key, t) for source in self.spec.get("closed_by", ()))

    def label(self, key: Key, as_of: int) -> tuple[bool | None, int | None]:
        """The outcome by its newest version known at `as_of`, and when that became known; else None, None."""
        settings = self.spec["label"]
        found = self.live_with(settings["from"], tuple(self.spec["rows"]["key"]), key, as_of)
        if not found:
            return None, None
        newest = max(found, key=lambda fact: (fact.known_at, fact.key))
        value = newest.row[settings["column"]]
        return (None, None) if value is None else (holds(settings, value), newest.known_at)

    def parts(self, as_of: int) -> dict[str, tuple[int, int]]:
        """Begin (not in it) and end (in it) of each part, counted back from `as_of` − label_delay."""
        split, found = self.spec["split"], {}
        end = as_of - duration(self.spec["label_delay"])
        for part in reversed(PARTS):
            begin = end - duration(split[part])
            found[part] = begin, end
            end = begin - duration(split["purge"])
        return found

    def part(self, t: int, label_known_at: int | None, as_of: int) -> str | None:
        """The part that a labelled row falls into; None in a gap, outside, or where the label came late."""
        parts = self.parts(as_of)
        for name, (begin, end) in parts.items():
            if begin < t <= end and label_known_at is not None:
                follower = PARTS[PARTS.index(name) + 1 :][:1]
                known_by = parts[follower[0]][0] if follower else as_of
                return name if label_known_at <= known_by else None
        return None

    # Features

    def features(self, version: Version, t: int) -> Version:
        """Row columns, calendar and views of a row (its stored version, or request fields) at t."""
        settings = self.spec["features"]
        found = {column: version.get(column) for column in settings.get("row", ())}
        if settings.get("calendar"):
            found |= calendar(settings["calendar"], version)
        for name, view in settings.get("views", {}).items():
            ((shape, body),) = view.items()
            features = getattr(self, f"{shape}_features")(name, body, version, t)
            unknown_group = any(version.get(column) is None for column in body.get("key", ()))
            found |= dict.fromkeys(features) if unknown_group else features
        return found | derived(settings.get("derived", {}), version)

    def group(self, view: Settings, version: Version, t: int) -> list[Fact]:
        """The live facts of a view's source that carry the row's values of the view's key."""
        columns = tuple(view.get("key", ()))
        return self.live_with(view["from"], columns, tuple(version.get(column) for column in columns), t)

    def in_past(self, time: Value, width: int, t: int) -> bool:
        return time is not None and t - width < time <= t

    def in_future(self, time: Value, width: int, t: int) -> bool:
        return time is not None and t < time <= t + width

    def window_features(self, name: str, view: Settings, version: Version, t: int) -> Version:
        over = view.get("over") or self.sources[view["from"]]["event_time"]
        facts = self.group(view, version, t)
        found: Version = {}
        for text in view.get("last", ()):
            past = [fact for fact in facts if self.in_past(fact.row[over], duration(text), t)]
            found |= self.aggregates(f"{name}_{text}", view, past)
            found |= self.aggregates_by_age(f"{name}_{text}", view, past, over, duration(text), t)
        for text in view.get("next", ()):
            future = [fact for fact in facts if self.in_future(fact.row[over], duration(text), t)]
            found |= self.aggregates(f"{name}_next_{text}", view, future)
        return found

    def aggregates(self, prefix: str, view: Settings, inside: list[Fact]) -> Version:
        found: Version = {}
        if view.get("count", True):
            found[f"{prefix}__count"] = len(inside)
        for column in view.get("sum", ()):
            resolution = self.resolution(view["from"], column)
            found[f"{prefix}__{column}_sum"] = float(sum(steps([f.row[column] for f in inside], resolution))) * resolution
        for column in view.get("mean", ()):
            resolution = self.resolution(view["from"], column)
            found[f"{prefix}__{column}_mean"] = mean([f.row[column] for f in inside], resolution)
        for column in view.get("std", ()):
            resolution = self.resolution(view["from"], column)
            found[f"{prefix}__{column}_std"] = std([f.row[column] for f in inside], resolution)
        for share, condition in view.get("share", {}).items():
            values = [f.row[condition["column"]] for f in inside]
            hits = [holds(condition, value) for value in values if value is not None]
            found[f"{prefix}__{share}_share"] = sum(hits) / len(hits) if hits else None
        for kind, choose in (("min", min), ("max", max)):
            for column in view.get(kind, ()):
                resolution = self.resolution(view["from"], column)
                scaled = steps([f.row[column] for f in inside], resolution)
                found[f"{prefix}__{column}_{kind}"] = choose(scaled) * resolution if scaled else None
        for column in view.get("nunique", ()):
            found[f"{prefix}__{column}_nunique"] = len({f.row[column] for f in inside} - {None})
        return found

    def aggregates_by_age(
        self, prefix: str, view: Settings, inside: list[Fact], over: str, width: int, t: int
    ) -> Version:
        """What depends on which fact is the newest, and on how old each is."""
        found: Version = {}
        newest = max(inside, key=lambda f: (f.row[over], f.known_at, f.key), default=None)
        if view.get("since"):
            found[f"{prefix}__minutes_since"] = (t - newest.row[over]) / MINUTE if newest else None
        for column in view.get("newest", ()):
            resolution = self.resolution(view["from"], column)
            scaled = steps([newest.row[column]] if newest else [], resolution)
            found[f"{prefix}__{column}_newest"] = scaled[0] * resolution if scaled else None
        ewm = view.get("ewm") or {"columns": ()}
        for column in ewm["columns"]:
            resolution, half_life = self.resolution(view["from"], column), duration(ewm["half_life"])
            bucket = t // width
            total, weights = {0: 0, -1: 0}, {0: 0, -1: 0}
            for fact in inside:
                if fact.row[column] is None:
                    continue
                doublings = (fact.row[over] % width) * 1024 // half_life  # 1,024ths of them, from the bucket's edge on
                weight = round(2**16 * 2 ** (doublings % 1024 / 1024)) * 2 ** (doublings // 1024)
                which = fact.row[over] // width - bucket
                total[which] += weight * steps([fact.row[column]], resolution)[0]
                weights[which] += weight
            older = 2.0 ** (-width / half_life)
            weight_sum = weights[0] + weights[-1] * older
            mean_steps = (total[0] + total[-1] * older) / weight_sum if weight_sum else None
            found[f"{prefix}__{column}_ewm"] = None if mean_steps is None else mean_steps * resolution
        return found

    def resolution(self, source: str, column: str) -> float:
        """The step in which a column is summed: as declared for float64, 1 for the others."""
        declared = self.sources[source]["columns"][column]
        if isinstance(declared, dict) and declared["type"] == "float64":
            return float(declared["resolution"])
        return 1.0

    def open_features(self, name: str, view: Settings, version: Version, t: int) -> Version:
        plans = self.group(view, version, t)
        found: Version = {}
        for text in view["last"]:
            due = [plan for plan in plans if self.in_past(plan.row[view["over"]], duration(text), t)]
            still_open = [plan for plan in due if not self.has_closed(view, plan, t)]
            late = len(still_open) * t - sum(plan.row[view["over"]] for plan in still_open)
            found[f"{name}_{text}__due"] = len(due)
            found[f"{name}_{text}__open"] = len(still_open)
            found[f"{name}_{text}__open_share"] = len(still_open) / len(due) if due else None
            found[f"{name}_{text}__late_mean"] = late / len(still_open) / MINUTE if still_open else None
        return found

    def has_closed(self, view: Settings, plan: Fact, t: int) -> bool:
        """Whether a closing fact of a plan is known at t."""
        columns = tuple(self.sources[view["from"]]["key"])
        return any(self.live_with(source, columns, plan.key, t) for source in view["closed_by"])

    def latest_features(self, name: str, view: Settings, version: Version, t: int) -> Version:
        found: Version = {f"{name}__{c}": self.latest_value(view, version, c, t) for c in view["columns"]}
        change = view.get("change") or {"columns": (), "over": ()}
        for column in change["columns"]:
            for text in change["over"]:
                now = self.latest_value(view, version, column, t)
                then = self.latest_value(view, version, column, t - duration(text))
                missing = now is None or then is None
                found[f"{name}__{column}_change_{text}"] = None if missing else now - then
        return found

    def latest_value(self, view: Settings, version: Version, column: str, t: int) -> Value:
        facts = self.group(view, version, t)
        if not facts:
            return None
        newest = max(facts, key=lambda fact: (fact.event_time, fact.known_at, fact.key))
        return newest.row[column] if self.is_fresh(newest, view.get("ttl"), t) else None

    def is_fresh(self, fact: Fact, ttl: str | int | None, t: int) -> bool:
        return ttl is None or t - duration(ttl) <= fact.event_time

    def sequence_features(self, name: str, view: Settings, version: Version, t: int) -> Version:
        previous = self.previous(view, version, t)
        order = version.get(view["order"])
        found: Version = {f"{name}__gap_min": None}
        if previous:
            found[f"{name}__gap_min"] = (order - previous.row[view["order"]]) / MINUTE
        for column in view.get("columns", ()):
            value = previous.row[column] if previous else None
            if column_type(self.sources[view["from"]], column) == "timestamp":
                found[f"{name}__{column}_min"] = None if value is None else (t - value) / MINUTE
            else:
                found[f"{name}__{column}"] = value
        plan_key = tuple(self.sources[view["from"]]["key"])
        for source, columns in view.get("facts", {}).items():
            facts = self.live_with(source, plan_key, previous.key, t) if previous else []
            newest = max(facts, key=lambda fact: (fact.known_at, fact.key), default=None)
            for column in columns:
                found[f"{name}__{source}_{column}"] = newest.row[column] if newest else None
        return found

    def previous(self, view: Settings, version: Version, t: int) -> Fact | None:
        """The plan of the row's chain just before the row's own place in it."""
        order = version.get(view["order"])
        if order is None:
            return None
        earliest = order - duration(view["within"])
        before = [
            fact
            for fact in self.group(view, version, t)
            if fact.row[view["order"]] is not None and earliest <= fact.row[view["order"]] < order
        ]
        return max(before, key=lambda f: (f.row[view["order"]], f.known_at, f.key), default=None)


def read_facts(name: str, source: Settings, rows: list[Version]) -> list[Fact]:
    """The facts of a table, identical rows once. Raises ValueError where a row breaks the rules of facts."""
    facts: dict[tuple[Key, int], Fact] = {}
    for row in rows:
        fact = read_fact(source, row)
        if None in (*fact.key, fact.event_time, fact.known_at):
            raise ValueError(f"{name}: a fact without key, event time or known-at: {row}")
        if source.get("kind", "observation") == "observation" and fact.known_at < fact.event_time:
            raise ValueError(f"{name}: an observation known before its event: {row}")
        if facts.setdefault((fact.key, fact.known_at), fact).row != fact.row:
            raise ValueError(f"{name}: the same key and known-at with other values: {row}")
    return list(facts.values())


def read_fact(source: Settings, row: Version) -> Fact:
    event_time: Value = row.get(source["event_time"])
    known_at: Value
    if source["known_at"].get("arrival"):
        known_at = row["_arrival"]
    elif "lag" in source["known_at"]:
        known_at = None if event_time is None else event_time + duration(source["known_at"]["lag"])
    else:
        known_at = row.get(source["known_at"]["column"])
    key = tuple(row.get(column) for column in source["key"])
    return Fact(key, event_time, known_at, {column: row.get(column) for column in source["columns"]})


def column_type(source: Settings, column: str) -> str:
    declared = source["columns"][column]
    return declared if isinstance(declared, str) else declared["type"]


@cache
def duration(text: str | int) -> int:
    """µs of `90s`, `60m`, `-1h`, `30d`; an integer is µs."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(-?\d+)(us|ms|s|m|h|d)", text)
    if match is None:
        raise ValueError(f"not a duration: {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def holds(condition: Settings, value: Value) -> bool:
    """Whether a value that is not null meets the one comparison of a condition."""
    for name in ("gt", "ge", "lt", "le", "eq"):
        bound = condition.get(name)
        if bound is not None:
            return getattr(operator, name)(value, bound)
    raise ValueError(f"a condition without a comparison: {condition}")


def steps(values: list[Value], resolution: float) -> list[int]:
    """Values that are not null as whole numbers of steps, halves to the even one."""
    return [round(value / resolution) for value in values if value is not None]


def mean(values: list[Value], resolution: float) -> float | None:
    scaled = steps(values, resolution)
    return float(sum(scaled)) / float(len(scaled)) * resolution if scaled else None


def std(values: list[Value], resolution: float) -> float | None:
    """Standard deviation of the population."""
    scaled = steps(values, resolution)
    if not scaled:
        return None
    average = float(sum(scaled)) / float(len(scaled))
    average_square = float(sum(step * step for step in scaled)) / float(len(scaled))
    return math.sqrt(max(0.0, average_square - average * average)) * resolution


def derived(settings: Settings, version: Version) -> Version:
    """Minutes from one time of the row to another, and quotients of its numbers and of those minutes."""
    found: Version = {}
    for name, made in settings.items():
        if made.get("minutes"):
            begin, end = (version.get(column) for column in made["minutes"])
            found[name] = None if begin is None or end is None else float(end - begin) / 60e6
    for name, made in settings.items():
        if made.get("ratio"):
            above, below = (found[part] if part in found else version.get(part) for part in made["ratio"])
            found[name] = None if above is None or not below else float(above) / float(below)
    return found


def calendar(settings: Settings, version: Version) -> Version:
    """Parts of a time as a clock and a calendar on the wall there show it; Monday is 0."""
    time = version.get(settings["column"])
    parts = settings.get("parts", ("minute_of_day", "weekday", "month"))
    if time is None:
        return {f"local_{part}": None for part in parts}
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)
    local = moment.astimezone(ZoneInfo(settings["timezone"]))
    known = {
        "minute_of_day": local.hour * 60 + local.minute,
        "hour": local.hour,
        "weekday": local.weekday(),
        "day": local.day,
        "month": local.month,
        "day_of_year": local.timetuple().tm_yday,
    }
    return {f"local_{part}": known[part] for part in parts}
