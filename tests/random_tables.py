"""Small random pipelines with everything that makes time hard, the same for the same seed.

All times lie on a coarse grid, many on favourite instants, some one µs beside; windows, TTL, lead and
lag are multiples of the grid. So ties and exact edges are common. Tables keep the rules of facts: an
observation is known at or after its event, and no two versions of a fact share key and known-at.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipelines.clock import duration_text, duration_us
from pipelines.spec import Spec

Row = dict[str, Any]
Settings = dict[str, Any]

GRIDS = ("1s", "1m", "10m", "10m", "30m", "1h", "1h", "7h", "1d")
STARTS = (  # midnight, an odd instant, around the clock change in New York, around the epoch
    1_388_361_600_000_000, 1_388_397_723_456_789, 1_362_873_600_000_000, -7_200_000_000
)  # fmt: skip
ALPHABETS: dict[str, tuple[str, list[Any]]] = {  # group columns: type, values, of which a case uses a few
    "g": ("string", ["a", "b", "a|b", "", "z"]),
    "h": ("int64", [0, 1, -1, 7]),
    "tail": ("string", ["N1", "N2", "N10", "n1"]),
    "flag": ("bool", [True, False]),
}
KEYS = ({"code": "string"}, {"code": "string", "number": "int64"},
        {"day": "timestamp", "code": "string", "number": "int64"})  # fmt: skip
GROUPS: list[list[str]] = [
    [], ["g"], ["h"], ["tail"], ["flag"], ["g", "h"], ["h", "g"], ["tail", "g"], ["code"], ["code", "h"]
]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Fields of a row (a stored version, or made up) that are asked for at t."""

    version: Row
    t: int


@dataclass(frozen=True)
class Case:
    """One random pipeline: spec as parsed YAML, its tables, and an instant to look back from."""

    seed: int
    spec: Settings
    tables: dict[str, list[Row]]
    as_of: int
    requests: tuple[Request, ...]


def seeds(count: int, everyday: int) -> list[Any]:
    """Seeds of a test, the first ones for every day; the others are slow, all together."""
    return [*range(everyday), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(everyday, count))]


def random_case(seed: int) -> Case:
    """A pipeline of 2–4 small sources; its spec is valid."""
    dice = Dice(seed)
    sources = random_sources(dice)
    spec = random_spec(dice, sources)
    Spec.model_validate(spec)
    tables = random_tables(dice, spec)
    known = [known_at(spec["sources"][name], row) for name, rows in tables.items() for row in rows]
    as_of = max(known) if dice.chance(0.4) else dice.moment(2 * dice.span // 3, dice.span + 3)
    return Case(seed, spec, tables, as_of, random_requests(dice, spec, tables))


@dataclass
class Dice:
    """Seeded chance, and the grid of one case."""

    seed: int
    draw: random.Random = field(init=False)
    step: int = field(init=False)  # µs
    start: int = field(init=False)
    span: int = field(init=False)  # steps
    favourites: list[int] = field(init=False)  # steps
    groups: dict[str, list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.step = duration_us(self.draw.choice(GRIDS))
        self.start = self.draw.choice(STARTS)
        self.span = self.draw.randint(10, 36)
        self.favourites = [self.draw.randint(0, self.span) for _ in range(4)]
        self.groups = {name: self.some(values, least=2)[:3] for name, (_, values) in ALPHABETS.items()}

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def some(self, values: Any, least: int = 0) -> list[Any]:
        """A random selection in random order."""
        values = list(values)
        return self.draw.sample(values, self.draw.randint(min(least, len(values)), len(values)))

    def shuffled(self, values: Any) -> list[Any]:
        return self.some(values, least=len(values))

    def one(self, values: Any) -> Any:
        return self.draw.choice(list(values))

    def jitter(self) -> int:
        """µs beside the grid: mostly none, at times one."""
        if self.chance(0.72):
            return 0
        return self.one((-1, 1)) if self.chance(0.7) else self.draw.randrange(self.step)

    def moment(self, low: int, high: int) -> int:
        """An instant, low to high in steps; on a favourite step at times."""
        liked = [step for step in self.favourites if low <= step <= high]
        step = self.one(liked) if liked and self.chance(0.4) else self.draw.randint(low, high)
        return self.start + step * self.step + self.jitter()

    def length(self, low: int, high: int) -> str:
        """A duration of low to high steps, now and then an odd one."""
        if low > 0 and self.chance(0.06):
            return self.one(("1us", duration_text(self.step + 1)))
        return duration_text(self.draw.randint(low, high) * self.step)

    def lengths(self, low: int, high: int) -> list[str]:
        return list(dict.fromkeys(self.length(low, high) for _ in range(self.draw.randint(1, 3))))

    def group(self, column: str) -> Any:
        """A value of a group column: null at times, seldom one that is hardly ever seen."""
        if self.chance(0.12):
            return None
        return self.one(ALPHABETS[column][1] if self.chance(0.1) else self.groups[column])


# Spec


def random_sources(dice: Dice) -> dict[str, Settings]:
    """A plan source and 1–3 observation sources, two of which carry the plan's key."""
    key = dice.one(KEYS)
    resolution = dice.one((0.5, 0.25, 0.1, 1, 3))
    values = {
        "x": {"type": "float64", "nulls": 1.0, "resolution": resolution},
        "n": {"type": "int64", "nulls": 1.0},
        "b": {"type": "bool", "nulls": 1.0},
        "s": {"type": "string", "nulls": 1.0},
    }
    groups = {name: {"type": kind, "nulls": 1.0} for name, (kind, _) in ALPHABETS.items()}
    extra = {"until": {"type": "timestamp", "nulls": 1.0}}
    plan_known = dice.one(
        ({"column": "known"}, {"column": "known"}, {"arrival": True}, {"lag": "-" + dice.length(1, 6)})
    )
    plans = source(dice, key, "due", plan_known, {**groups, **values, **extra})
    found = {"plans": {"kind": "plan", **plans}}
    for name, share in (("outcomes", 1.0), ("closings", 0.6)):
        if dice.chance(share):
            found[name] = source(dice, key, "at", seen_known(dice), {**groups, **values, **extra})
    if dice.chance(0.6):
        reading = dice.one(({"id": "int64"}, {"id": "int64"}, {"g": "string", "at": "timestamp"}))
        columns = {**groups, "code": {"type": "string", "nulls": 1.0}, **values, **extra}
        found["readings"] = source(dice, reading, "at", seen_known(dice), columns)
    return found


def seen_known(dice: Dice) -> Settings:
    column, lag = {"column": "known"}, {"lag": dice.length(0, 3)}
    return dice.one((column, column, {"arrival": True}, lag, {"lag": "0s"}))


def source(dice: Dice, key: dict[str, str], event: str, known: Settings, columns: Settings) -> Settings:
    known_column = {"known": "timestamp"} if "column" in known else {}
    every = {**columns, **key, event: "timestamp", **known_column}
    names = dice.shuffled(every)
    return {"key": dice.shuffled(key), "event_time": event, "known_at": known,
            "columns": {name: every[name] for name in names}}  # fmt: skip


def random_spec(dice: Dice, sources: dict[str, Settings]) -> Settings:
    delay, gap = dice.draw.randint(0, 2), dice.one((0, 0, 1))
    longest = {"train": 16, "valid_fit": 8, "valid_select": 6, "test": 6}
    split = {part: duration_text(dice.draw.randint(2, most) * dice.step) for part, most in longest.items()}
    same_key = [name for name in sources if name in ("outcomes", "closings")]
    features: Settings = {"row": dice.some(("g", "h", "tail", "flag", "x", "n", "b", "s"))}
    if dice.chance(0.5):
        features["calendar"] = random_calendar(dice)
    shapes = (random_window, random_open, random_latest, random_sequence)
    picked = [*shapes, *(dice.one(shapes) for _ in range(dice.draw.randint(1, 4)))]
    features["views"] = {f"{make.__name__.removeprefix('random_')}{i}": make(dice, sources, same_key)
                         for i, make in enumerate(picked)}  # fmt: skip
    features["derived"] = random_derived(random.Random(f"derived {dice.seed}"))
    return {
        "pipeline": "random",
        "title": "Will it?",
        "sources": sources,
        "rows": {"from": "plans", "key": dice.shuffled(sources["plans"]["key"])},
        "predict_at": {"column": dice.one(["due"] * 9 + ["until"]), "lead": dice.length(0, 3),
                       "tolerance": "1us"},
        "closed_by": dice.some(same_key),
        "label": {"from": dice.one(same_key), **random_condition(dice)},
        "label_delay": duration_text(delay * dice.step),
        "split": {**split, "purge": duration_text((delay + gap) * dice.step)},
        "features": features,
        "serve": {"request": ["due", "until", "g", "h", "tail", "flag", "x", "n", "b", "s"]},
    }


def random_condition(dice: Dice) -> Settings:
    column = dice.one("xxnnbs")
    if column == "s":
        return {"column": column, "eq": dice.one(("p", "q", ""))}
    if column == "b":
        return {"column": column, "eq": dice.chance(0.5)}
    return {"column": column, dice.one(("gt", "ge", "lt", "le", "eq")): dice.one((-1, 0, 0.5, 1, 2))}


def random_derived(draw: random.Random) -> Settings:
    """Minutes between times of the plan, and ratios that may need them."""
    if draw.random() < 0.5:
        return {}
    numbers = ("x", "n", "b", "to_end")
    ratios = {f"ratio{i}": {"ratio": [draw.choice(numbers), draw.choice(numbers)]} for i in range(draw.randint(0, 2))}
    return {**ratios, "to_end": {"minutes": draw.sample(["due", "until"], 2)}}


def random_calendar(dice: Dice) -> Settings:
    parts = ("minute_of_day", "hour", "weekday", "day", "month", "day_of_year")
    zone = dice.one(("America/New_York", "UTC", "Asia/Kathmandu", "Australia/Lord_Howe"))
    return {"column": dice.one(("due", "until")), "timezone": zone, "parts": dice.some(parts, least=1)}


def group_of(dice: Dice, settings: Settings) -> list[str]:
    """Group columns that a source has."""
    return dice.one([group for group in GROUPS if set(group) <= set(settings["columns"])])


def random_window(dice: Dice, sources: dict[str, Settings], same_key: list[str]) -> Settings:
    name = dice.one(sources)
    window: Settings = {"from": name, "key": group_of(dice, sources[name])}
    if dice.chance(0.25):
        window["over"] = "until"
    ahead = name == "plans" and dice.chance(0.7)
    if ahead:
        window["next"] = dice.lengths(1, 8)
    if not ahead or dice.chance(0.5):
        window["last"] = dice.lengths(1, 12)
    window |= {"mean": dice.some("xnb"), "std": dice.some("xnb")}
    window["share"] = {f"like{i}": random_condition(dice) for i in range(dice.draw.randint(0, 2))}
    if (window["mean"] or window["std"]) and dice.chance(0.2):
        window["count"] = False
    return {"window": window | random_aggregates(random.Random(repr((dice.seed, window))), sources[name], window)}


def random_aggregates(draw: random.Random, settings: Settings, window: Settings) -> Settings:
    """Aggregates that are not sums, in some windows."""
    if draw.random() < 0.3:
        return {}
    some = {kind: draw.sample("xnb", draw.randint(0, 3)) for kind in ("min", "max", "sum")}
    some["nunique"] = draw.sample([*settings["columns"]], draw.randint(0, 3))
    if "next" in window:
        return some
    longest = max(map(duration_us, window["last"]))
    half_life = duration_text(max(1, longest // draw.choice((1, 2, 3, 7, 15)) + draw.choice((0, 1))))
    some |= {"newest": draw.sample("xnb", draw.randint(0, 3)), "since": draw.random() < 0.5}
    if draw.random() < 0.6:
        some["ewm"] = {"columns": draw.sample("xnb", draw.randint(1, 3)), "half_life": half_life}
    return some


def random_open(dice: Dice, sources: dict[str, Settings], same_key: list[str]) -> Settings:
    group, over = group_of(dice, sources["plans"]), dice.one(("due", "due", "until"))
    return {"open": {"from": "plans", "key": group, "over": over, "last": dice.lengths(1, 10),
                     "closed_by": dice.some(same_key, least=1)}}  # fmt: skip


def random_latest(dice: Dice, sources: dict[str, Settings], same_key: list[str]) -> Settings:
    name = dice.one([*sources, *(["readings"] if "readings" in sources else [])])
    latest: Settings = {"from": name, "key": group_of(dice, sources[name])}
    latest["columns"] = dice.some("xnbs", least=1)
    if dice.chance(0.75):
        latest["ttl"] = dice.length(0 if dice.chance(0.2) else 1, 8)
    if dice.chance(0.6):
        latest["change"] = {"columns": dice.some("xn", least=1), "over": dice.lengths(1, 6)}
    return {"latest": latest}


def random_sequence(dice: Dice, sources: dict[str, Settings], same_key: list[str]) -> Settings:
    facts = {name: dice.some("xnb", least=1) for name in dice.some(same_key)}
    columns = dice.some(("x", "n", "b", "s", "g", "until", "due"))
    group = dice.one((["tail"], ["tail"], ["g"], ["tail", "h"], []))
    return {"sequence": {"from": "plans", "key": group, "order": dice.one(("due", "due", "due", "until")),
                         "within": dice.length(1, 12), "columns": columns, "facts": facts}}  # fmt: skip


# Tables


def random_tables(dice: Dice, spec: Settings) -> dict[str, list[Row]]:
    sources = spec["sources"]
    key = list(sources["plans"]["key"])
    pool = [{"code": code, "number": number, "day": dice.start + day * 86_400_000_000}
            for code in ("K", "L", "k", "K|1") for number in (1, 2, 11) for day in (0, 1)]  # fmt: skip
    pool = [{column: item[column] for column in key} for item in dice.shuffled(pool)]
    keys = list({tuple(item.values()): item for item in pool}.values())
    planned = keys[: dice.draw.randint(3, 20)]
    strangers = keys[len(planned) :][:3]  # facts of plans that nobody announced
    tables: dict[str, list[Row]] = {"plans": []}
    for k in planned:
        tables["plans"] += versions(dice, sources["plans"], k, dice.moment(0, dice.span))
    dues = {tuple(row[c] for c in key): row["due"] for row in tables["plans"]}
    for name in ("outcomes", "closings"):
        if name in sources:
            share = 0.8 if name == "outcomes" else 0.5
            some = [k for k in [*planned, *strangers] if dice.chance(share)] or planned[:1]
            tables[name] = []
            for k in some:
                due = dues.get(tuple(k[c] for c in key), dice.moment(0, dice.span))
                at = due + dice.draw.randint(-3, 5) * dice.step + dice.jitter()
                tables[name] += versions(dice, sources[name], k, at)
    if "readings" in sources:
        tables["readings"] = random_readings(dice, sources["readings"])
    for name, rows in tables.items():
        rows += random_twins(dice, sources[name], rows)
        rows += [dict(row) for row in rows if dice.chance(0.04)]
        dice.draw.shuffle(rows)
        tables[name] = rows
    return tables


def random_readings(dice: Dice, settings: Settings) -> list[Row]:
    rows = []
    for i in range(dice.draw.randint(4, 18)):
        at = dice.moment(0, dice.span)
        key = {"id": i} if "id" in settings["key"] else {"g": dice.one("ab"), "at": at}
        rows += versions(dice, settings, key, at)
    return distinct(settings, rows)


def random_twins(dice: Dice, settings: Settings, rows: list[Row]) -> list[Row]:
    """Further versions of some facts, at the very times and in the groups of other facts."""
    if settings["event_time"] in settings["key"]:
        return []
    twins = []
    for _ in range(len(rows) // 4):
        pattern, other = dice.one(rows), dice.one(rows)
        values = {column: other[column] for column in (*"xnbs", *settings["key"])}
        twins.append({**pattern, **values})
    taken = {identity(settings, row) for row in rows}
    return distinct(settings, [row for row in twins if identity(settings, row) not in taken])


def distinct(settings: Settings, rows: list[Row]) -> list[Row]:
    """The rows without those that repeat key and known-at."""
    return list({identity(settings, row): row for row in rows}.values())


def identity(settings: Settings, row: Row) -> tuple[Any, ...]:
    return (*(row[column] for column in settings["key"]), known_at(settings, row))


def versions(dice: Dice, settings: Settings, key: Row, time: int) -> list[Row]:
    """A fact and its corrections: of values, groups and times."""
    rows: list[Row] = []
    row = {**random_values(dice, settings, time), **key}
    for _ in range(dice.one((1, 1, 1, 2, 2, 3))):
        row = {**row, settings["event_time"]: time, **key}
        rows.append(stamped(dice, settings, row, rows))
        fresh = random_values(dice, settings, time)
        row = {column: fresh.get(column, row[column]) if dice.chance(0.4) else row[column] for column in row}
        if dice.chance(0.5):
            time += dice.draw.randint(-4, 4) * dice.step + dice.jitter()
    return distinct(settings, rows)


def random_values(dice: Dice, settings: Settings, time: int) -> Row:
    """Values of the columns that are no key and no known-at; about one in eight is null."""
    declared = settings["columns"].get("x")
    step = declared["resolution"] / 2
    near = time + dice.draw.randint(-2, 5) * dice.step + dice.jitter()
    values = {"x": dice.draw.randint(-6, 9) * step, "n": dice.draw.randint(-2, 3), "b": dice.chance(0.5),
              "s": dice.one(("p", "q", "")), "until": near, "code": dice.one(("K", "L", "k"))}  # fmt: skip
    values = {column: None if dice.chance(0.12) else value for column, value in values.items()}
    values |= {column: dice.group(column) for column in ALPHABETS}
    return {column: value for column, value in values.items() if column in settings["columns"]}


def stamped(dice: Dice, settings: Settings, row: Row, earlier: list[Row]) -> Row:
    """The row with the time that it became known, by column or arrival."""
    rule = settings["known_at"]
    if "lag" in rule:
        return row
    at = row[settings["event_time"]]
    if settings.get("kind") == "plan":
        known = at - dice.draw.randint(-2, 9) * dice.step + dice.jitter()
        if earlier:
            known = known_at(settings, earlier[-1]) + dice.one((1, dice.step, 2 * dice.step, 4 * dice.step))
    else:
        wait = dice.one((0, 0, 0, 1, dice.step, dice.step, 2 * dice.step + 1, 5 * dice.step))
        known = max([at, *(known_at(settings, row) for row in earlier)]) + wait
    return {**row, rule.get("column", "_arrival"): known}


def known_at(settings: Settings, row: Row) -> int:
    rule = settings["known_at"]
    if "lag" in rule:
        return row[settings["event_time"]] + duration_us(rule["lag"])
    return row[rule.get("column", "_arrival")]


# Requests


def random_requests(dice: Dice, spec: Settings, tables: dict[str, list[Row]]) -> tuple[Request, ...]:
    """Stored versions and made-up fields, at instants on the edges of what the views look at."""
    columns = spec["sources"]["plans"]["columns"]
    lengths = [0, *edge_lengths(spec["features"]["views"])]
    found = []
    for _ in range(8):
        name = dice.one(tables)
        row = dice.one(tables[name])
        settings = spec["sources"][name]
        times = [known_at(settings, row), row[settings["event_time"]], row["until"]]
        event = dice.one([time for time in times if time is not None])
        t = event + dice.one(lengths) + dice.one((-1, 0, 0, 1))
        version = {k: v for k, v in dice.one(tables["plans"]).items() if k in columns}
        if dice.chance(0.4):
            made_up = random_values(dice, spec["sources"]["plans"], t)
            version = {**made_up, "due": dice.moment(0, dice.span), "code": dice.one(("new", "new", "K"))}
            version = {column: value for column, value in version.items() if dice.chance(0.85)}
        found.append(Request(version, t))
    return tuple(found)


def edge_lengths(views: Settings) -> list[int]:
    """Every duration that a view mentions, µs."""
    shapes = [next(iter(view.values())) for view in views.values()]
    texts = [shape.get(name) for shape in shapes for name in ("ttl", "within")]
    texts += [text for shape in shapes for text in shape.get("last", ())]
    texts += [text for shape in shapes for text in shape.get("change", {}).get("over", ())]
    ahead = [text for shape in shapes for text in shape.get("next", ())]
    return [duration_us(text) for text in texts if text] + [-duration_us(text) for text in ahead]
