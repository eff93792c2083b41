"""The spec: one frozen, typed description of a pipeline, read from one YAML file.

YAML says what, Python says how. Every field has its meaning and unit here, and its default only here.
"""

import re
from collections import Counter
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, available_timezones

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from pipelines.clock import duration_text, duration_us
from pipelines.errors import UsageError, nearest
from pipelines.trainer import refused

HERE = Path(__file__).parent
_DURATION_SCHEMA = {"type": "string", "pattern": r"^-?\d+(us|ms|s|m|h|d)$", "examples": ["60m", "1h", "30d"]}
Duration = Annotated[
    int, BeforeValidator(duration_us), PlainSerializer(duration_text), WithJsonSchema(_DURATION_SCHEMA)
]


def _above_zero(us: int) -> int:
    if us <= 0:
        raise ValueError(f"{duration_text(us)} is not above 0s")
    return us


def _not_below_zero(us: int) -> int:
    if us < 0:
        raise ValueError(f"{duration_text(us)} is below 0s")
    return us


def _zone(name: str) -> str:
    try:
        return ZoneInfo(name).key
    except (KeyError, ValueError, OSError):
        known = sorted(available_timezones())
        raise ValueError(f"no time zone is named {name!r}{nearest(name, known)}: write one such as America/New_York") from None


def _rate(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    with suppress(TypeError, ValueError):  # YAML takes 1e-3 for a text
        if not isinstance(value, bool) and 0 < (rate := float(value)) < float("inf"):
            return rate
    raise ValueError(f"{value!r} is no learning rate: write a number above 0, or auto")


def _listed(value: Any) -> Any:
    """One word as a list of it; none, or nothing, as an empty list."""
    listed = [] if value in (None, "none") else [value] if isinstance(value, str) else value
    return [v for i, v in enumerate(listed) if v not in listed[:i]] if isinstance(listed, list | tuple) else listed


TrackerName = Literal["mlflow", "tensorboard", "wandb"]
Trackers = Annotated[
    tuple[TrackerName, ...], BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"enum": ["none", *get_args(TrackerName)]},
                              {"type": "array", "items": {"enum": [*get_args(TrackerName)]}, "uniqueItems": True}]}),
]  # fmt: skip
EngineName = Literal["auto", "native", "onnxruntime", "openvino", "torchscript", "aotinductor", "iree", "tvm", "int8", "bf16",
                     "onnxruntime32", "treelite", "lleaves"]  # fmt: skip
EngineNames = Annotated[
    tuple[EngineName, ...], BeforeValidator(_listed), Field(min_length=1),
    WithJsonSchema({"anyOf": [{"enum": [*get_args(EngineName)]},
                              {"type": "array", "items": {"enum": [*get_args(EngineName)]}, "uniqueItems": True}]}),
]  # fmt: skip
Rate = Annotated[
    float | Literal["auto"], BeforeValidator(_rate),
    WithJsonSchema({"anyOf": [{"exclusiveMinimum": 0, "type": "number"}, {"const": "auto"}]}),
]  # fmt: skip
Length = Annotated[Duration, AfterValidator(_above_zero)]
Delay = Annotated[Duration, AfterValidator(_not_below_zero)]
Zone = Annotated[str, AfterValidator(_zone)]
ColumnType = Literal["string", "int64", "float64", "bool", "timestamp"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Condition(Model):
    """A test on one number: exactly one of the comparisons."""

    column: str = Field(description="column that is compared")
    gt: float | None = Field(None, description="true when greater")
    ge: float | None = Field(None, description="true when greater or equal")
    lt: float | None = Field(None, description="true when less")
    le: float | None = Field(None, description="true when less or equal")
    eq: float | str | bool | None = Field(None, description="true when equal")

    @model_validator(mode="after")
    def _one(self) -> "Condition":
        if len(self.comparison()) != 1:
            raise ValueError("give exactly one of gt, ge, lt, le, eq")
        return self

    def comparison(self) -> dict[str, float | str | bool]:
        found = {name: getattr(self, name) for name in ("gt", "ge", "lt", "le", "eq")}
        return {name: value for name, value in found.items() if value is not None}


class Label(Condition):
    """What is predicted: true or false, from the newest version of a fact known at `as_of`."""

    source: str = Field(alias="from", description="source that holds the outcome, found by the row key")


class KnownAt(Model):
    """When a fact became known: exactly one of the three. There is no default."""

    column: str | None = Field(None, description="column that holds the time")
    lag: Duration | None = Field(None, description="time after the event time (0s is said, not assumed)")
    arrival: bool = Field(False, description="when the landing file was first seen")

    @model_validator(mode="after")
    def _one(self) -> "KnownAt":
        if (self.column is not None) + (self.lag is not None) + self.arrival != 1:
            raise ValueError("give exactly one of column, lag, arrival")
        return self


class Column(Model):
    """Type of a column and what its values may be. The contract is made from this."""

    type: ColumnType = Field(description="type after reading; timestamps are UTC microseconds")
    nulls: float = Field(0.0, ge=0, le=1, description="largest share of nulls that is accepted")
    min: float | None = Field(None, description="smallest value accepted")
    max: float | None = Field(None, description="largest value accepted")
    values: tuple[str, ...] | None = Field(None, description="the only values accepted")
    pattern: str | None = Field(None, description="regular expression that every value matches")
    resolution: float | None = Field(
        None, gt=0, description="smallest step kept in window sums; needed for float64 columns that are summed"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Column":
        if (self.min is not None or self.max is not None) and self.type not in ("int64", "float64"):
            raise ValueError(f"min and max are for numbers, this column is {self.type}")
        if (self.values is not None or self.pattern is not None) and self.type != "string":
            raise ValueError(f"values and pattern are for strings, this column is {self.type}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no value would do")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self


class Reference(Model):
    """Foreign key: values of `columns` are found in source `to`."""

    to: str = Field(description="source that must hold the values")
    columns: tuple[str, ...] = Field(description="columns, named alike in both sources")
    share: float = Field(1.0, ge=0, le=1, description="smallest share of non-null values that must be found")


class Drift(Model):
    """Bounds from the past: what newly landed must resemble the days of the snapshot accepted before."""

    days: int = Field(14, ge=2, description="fewest past days; with fewer nothing is judged yet")
    tolerance: float = Field(0.5, ge=0, description="how far beyond the extremes of the past, in distances between them")
    columns: tuple[str, ...] | None = Field(None, description="columns whose values are judged; default: all")


class Sample(Model):
    """Where the sample data of a pipeline comes from."""

    call: str | None = Field(None, description="module:function that writes the landing files")
    package: str | None = Field(None, description="installed Python package that ships the table")
    file: str | None = Field(None, description="path of a CSV file inside that package's distribution")
    source: str | None = Field(None, description="source that the CSV file fills")
    skip_rows: int = Field(0, ge=0, description="lines to skip at the head of the CSV file")
    column_names: tuple[str, ...] | None = Field(None, description="names, where the CSV file has no header")


class Source(Model):
    """A landing table: facts, each with a key, an event time and a known-at."""

    kind: Literal["observation", "plan"] = Field(
        "observation", description="observation: known at or after its event; plan: announced before it"
    )
    key: tuple[str, ...] = Field(description="columns that name a fact; a later version is a correction")
    event_time: str | None = Field(None, description="timestamp column: when it happened, or is planned")
    known_at: KnownAt | None = Field(None, description="when a fact became known")
    columns: dict[str, Column] = Field(description="every column that is read, with what it may hold")
    order: tuple[tuple[str, str], ...] = Field((), description="pairs [a, b] of columns with a ≤ b in every row")
    references: tuple[Reference, ...] = Field((), description="foreign keys")
    rows_min: int = Field(1, ge=1, description="fewest rows accepted")
    rows_shrink: float = Field(0.0, ge=0, le=1, description="largest loss of rows against the previous snapshot")
    drift: Drift | None = Field(None, description="judge what newly landed by the days before; {} is enough")
    quarantine: float = Field(
        0.0, ge=0, lt=1, description="largest share of rows that may be set aside for a rule on rows; 0: one bad row refuses"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_columns(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("columns"), dict):
            short = {k: {"type": v} if isinstance(v, str) else v for k, v in data["columns"].items()}
            data = {**data, "columns": short}
        return data

    def nulls(self, column: str) -> float:
        """Largest share of nulls accepted in a column: none in keys and times."""
        never = {*self.key, self.event_time, self.known_at.column if self.known_at else None}
        return 0.0 if column in never else self.columns[column].nulls


class Rows(Model):
    """What is predicted: one row for each key of one source."""

    source: str = Field(alias="from", description="source whose newest version describes the row")
    key: tuple[str, ...] | Literal["row_digest"] = Field(
        description="columns that name a row, or row_digest where the table has no key (time: none)"
    )


class PredictAt(Model):
    """When a row is predicted: `lead` before the time in its `column`."""

    column: str = Field(description="timestamp column of the rows source")
    lead: Duration = Field(description="how long before that time the prediction is made")
    tolerance: Delay = Field(description="how far from that instant a request still counts as in time")


class Ewm(Model):
    """An exponentially weighted mean: a fact counts half as much for each half-life that it is old."""

    columns: tuple[str, ...] = Field(description="number columns")
    half_life: Duration = Field(description="age at which a fact counts half; a window has at most 16 of them")


class Window(Model):
    """Aggregates over the facts of a key in time windows ending (`last`) or beginning (`next`) at t."""

    source: str = Field(alias="from", description="source of the facts")
    key: tuple[str, ...] = Field((), description="columns that name the group; empty: all facts")
    over: str | None = Field(None, description="timestamp column that the window is on; default: event time")
    last: tuple[Duration, ...] = Field((), description="lengths of past windows (t − w, t]")
    next: tuple[Duration, ...] = Field((), description="lengths of future windows (t, t + w], over plans")
    count: bool = Field(True, description="number of facts")
    sum: tuple[str, ...] = Field((), description="number columns whose sum is taken; 0 of no fact")
    mean: tuple[str, ...] = Field((), description="number columns whose mean is taken")
    std: tuple[str, ...] = Field((), description="number columns whose standard deviation is taken")
    share: dict[str, Condition] = Field({}, description="name → condition whose share of facts is taken")
    min: tuple[str, ...] = Field((), description="number columns whose least value is taken")
    max: tuple[str, ...] = Field((), description="number columns whose greatest value is taken")
    nunique: tuple[str, ...] = Field((), description="columns whose distinct values are counted")
    newest: tuple[str, ...] = Field((), description="number columns whose value in the newest fact is taken")
    since: bool = Field(False, description="minutes since the newest fact in the window")
    ewm: Ewm | None = Field(None, description="exponentially weighted means")

    @property
    def added(self) -> tuple[str, ...]:
        """The columns whose values are added up."""
        return tuple(dict.fromkeys((*self.sum, *self.mean, *self.std)))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns that are kept in whole steps of their resolution."""
        ewm = self.ewm.columns if self.ewm else ()
        return tuple(dict.fromkeys((*self.added, *self.min, *self.max, *self.newest, *ewm)))

    @model_validator(mode="after")
    def _some(self) -> "Window":
        if self.next and (self.newest or self.since or self.ewm):
            raise ValueError("newest, since and ewm look back: give them last: windows in a view of their own")
        if self.ewm and not 0 < max(self.last, default=1) <= 16 * self.ewm.half_life:
            raise ValueError("ewm: a window has at most 16 half-lives; shorten last, or give a longer half_life")
        if not (self.last or self.next):
            raise ValueError("give the window lengths: last: [1h] or next: [1h]")
        if any(w <= 0 for w in (*self.last, *self.next)):
            raise ValueError("a window length must be positive")
        return self


class Open(Model):
    """The backlog: plans due in (t − w, t] that no closing fact known at t has closed."""

    source: str = Field(alias="from", description="source of the plans")
    key: tuple[str, ...] = Field((), description="columns that name the group; empty: all plans")
    over: str = Field(description="timestamp column: when the plan is due")
    last: tuple[Length, ...] = Field(min_length=1, description="window lengths")
    closed_by: tuple[str, ...] = Field(min_length=1, description="sources with the plan's key that close it")


class Change(Model):
    """Value now minus the value that was known some time ago."""

    columns: tuple[str, ...] = Field(min_length=1, description="number columns")
    over: tuple[Length, ...] = Field(min_length=1, description="how long ago")


class Latest(Model):
    """Columns of the newest fact of a key known at t, not older than `ttl`."""

    source: str = Field(alias="from", description="source of the facts")
    key: tuple[str, ...] = Field(description="columns that name the group")
    columns: tuple[str, ...] = Field(min_length=1, description="columns that become features")
    ttl: Delay | None = Field(None, description="oldest event time accepted: t − ttl ≤ event time")
    change: Change | None = Field(None, description="differences against earlier values")


class Sequence(Model):
    """The plan of the same key just before the row's own: what it was, and what is known of it at t."""

    source: str = Field(alias="from", description="source of the plans")
    key: tuple[str, ...] = Field(description="columns that name the chain, such as an aircraft")
    order: str = Field(description="timestamp column; the row's own value is a request field")
    within: Length = Field(description="how far back the previous plan may lie")
    columns: tuple[str, ...] = Field((), description="columns of the previous plan that become features")
    facts: dict[str, tuple[str, ...]] = Field(
        {}, description="source → number columns of the newest version known at t, found by the plan's key"
    )


class View(Model):
    """One group of features: exactly one of the four shapes."""

    window: Window | None = None
    open: Open | None = None
    latest: Latest | None = None
    sequence: Sequence | None = None

    @model_validator(mode="after")
    def _one(self) -> "View":
        if sum(x is not None for x in (self.window, self.open, self.latest, self.sequence)) != 1:
            raise ValueError("give exactly one of window, open, latest, sequence")
        return self

    @property
    def shape(self) -> Window | Open | Latest | Sequence:
        found = self.window or self.open or self.latest or self.sequence
        assert found is not None
        return found


class Calendar(Model):
    """Parts of a timestamp in local time."""

    column: str = Field(description="timestamp column of the rows source")
    timezone: Zone = Field(description="IANA zone, such as America/New_York")
    parts: tuple[Literal["minute_of_day", "hour", "weekday", "day", "month", "day_of_year"], ...] = Field(
        ("minute_of_day", "weekday", "month"), description="what becomes a feature"
    )


class Function(Model):
    """One pure function over arrays: module:function(columns) → columns."""

    call: str = Field(description="module:function, taking and returning dict[str, numpy array]")
    inputs: tuple[str, ...] = Field(description="row columns or features that it reads")
    outputs: tuple[str, ...] = Field(description="float64 features that it returns")


class Derived(Model):
    """A number made of two others: exactly one of the shapes."""

    minutes: tuple[str, str] | None = Field(None, description="[from, to]: two timestamp columns of the row")
    ratio: tuple[str, str] | None = Field(
        None, description="[a, b]: a / b of number columns of the row or minutes; missing where b is 0"
    )

    @model_validator(mode="after")
    def _one(self) -> "Derived":
        if (self.minutes is None) == (self.ratio is None):
            raise ValueError("give exactly one of minutes, ratio")
        return self


class Auto(Model):
    """Features are proposed from the types and keys of the sources, and chosen on the training part alone."""

    last: tuple[Duration, ...] = Field(
        tuple(hours * 3_600_000_000 for hours in (1, 3, 8, 24, 7 * 24, 30 * 24)), min_length=1,
        description="window lengths proposed, shortest first; of these a group gets those in which facts can be expected",
    )  # fmt: skip
    timezone: Zone = Field("UTC", description="IANA zone of the calendar features")
    rows: int = Field(60_000, ge=100, description="newest training rows by which features are chosen")
    keep: int = Field(150, ge=1, description="features kept at most, strongest first")
    alike: float = Field(0.99, gt=0, le=1, description="rank correlation from which one of two features is dropped")
    too_good: float = Field(0.98, gt=0.5, le=1, description="AUC of one feature alone from which it is taken for a leak")

    @field_validator("last")
    @classmethod
    def _rising(cls, last: tuple[int, ...]) -> tuple[int, ...]:
        if last[0] <= 0 or any(a >= b for a, b in pairwise(last)):
            raise ValueError("window lengths are positive and rise: last: [1h, 3h, 1d]")
        return last


class Text(Model):
    """Columns of text, read as tokens. `text: [review]` means {columns: [review]}."""

    columns: tuple[str, ...] = Field(min_length=1, description="string columns of the row; several are read one after another")
    max_tokens: int = Field(128, ge=4, description="tokens of a row that are read; what comes after them is cut off")
    vocabulary: int = Field(8_000, ge=100, description="different tokens at most, learned from the training part")
    lowercase: bool = Field(True, description="capital letters are read as small ones")
    pretrained: str = Field(
        "", description="folder of a Hugging Face encoder with whose tokens, settings and weights training begins; empty: none"
    )


class Features(Model):
    """Everything that the model sees, defined once for training and serving. `features: auto` means {auto: {}}."""

    auto: Auto | None = Field(None, description="propose and choose features; what else is written here stays")
    row: tuple[str, ...] = Field((), description="columns of the row itself")
    text: Text | None = Field(None, description="columns of the row that are texts")
    calendar: Calendar | None = None
    views: dict[str, View] = Field({}, description="name → group of features")
    derived: dict[str, Derived] = Field({}, description="name → a number made of two others")
    functions: tuple[Function, ...] = ()
    only: tuple[str, ...] = Field((), description="of all these the features that the model sees; empty: all")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("text"), str | list):
            return {**data, "text": {"columns": [data["text"]] if isinstance(data["text"], str) else data["text"]}}
        return {"auto": {}} if data == "auto" else data

    @model_validator(mode="after")
    def _alone(self) -> "Features":
        if self.auto and self.only:
            raise ValueError("auto chooses itself: give either auto or only")
        if self.auto and self.text:
            raise ValueError("auto proposes numbers and categories: where there is text, write the features beside it yourself")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the row that are texts."""
        return self.text.columns if self.text else ()

    @model_serializer(mode="wrap")
    def _only_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not used stands in no digest."""
        return {k: v for k, v in dump(self).items() if k != "text" or v is not None}


class TimeSplit(Model):
    """Parts by time, durations back from as_of − label_delay: train · valid_fit · valid_select · test."""

    by: Literal["time"] = "time"
    train: Duration = Field(description="length of the training part")
    valid_fit: Duration = Field(description="length of the part for early stopping and tuning")
    valid_select: Duration = Field(description="length of the part for calibration and choice")
    test: Duration = Field(description="length of the part that only the gate reads")
    purge: Duration = Field(description="gap between parts, at least label_delay")


class HashSplit(Model):
    """Parts by a seeded hash of the row key, as shares that add up to 1 (time: none)."""

    by: Literal["hash"]
    train: float = Field(gt=0, lt=1)
    valid_fit: float = Field(gt=0, lt=1)
    valid_select: float = Field(gt=0, lt=1)
    test: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> "HashSplit":
        total = self.train + self.valid_fit + self.valid_select + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"shares must add up to 1, they add up to {total:g}")
        return self


class ClockSpec(Model):
    """How now is told. SEMANTICS: wall, or data time from the anchor of the last feed."""

    kind: Literal["wall", "data"] = Field("wall", description="wall clock, or data time")
    speed: float = Field(0.0, ge=0, description="data seconds per wall second (data clock)")
    offset: Duration = Field(0, description="added to the anchor's data time (data clock), never negative")

    @model_validator(mode="after")
    def _forward(self) -> "ClockSpec":
        if self.offset < 0:
            raise ValueError("offset must not be negative: the served store has forgotten what was before its last feed")
        return self


class Range(Model):
    """What a hyper-parameter may be: numbers from low to high, or one of the choices."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="drawn on a logarithmic scale")
    integer: bool = Field(False, description="whole numbers only")
    choices: tuple[float | int | str, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Range":
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either low and high, or choices")
        return self


class Network(Model):
    """The network: embeddings of categories and periodic embeddings of numbers into an MLP."""

    width: int = Field(128, ge=1, description="units per hidden layer")
    depth: int = Field(2, ge=1, description="hidden layers")
    dropout: float = Field(0.1, ge=0, lt=1)
    embedding: int = Field(8, ge=1, description="numbers per category")
    frequencies: int = Field(2, ge=0, description="periodic frequencies per number; 0: numbers go in as they are")
    sigma: float = Field(0.2, gt=0, description="scale of the initial frequencies")


class Power(Model):
    """What training may use of power, energy and carbon, and how these are reckoned. It changes no weight."""

    cap_watts: float | None = Field(
        None, gt=0, description="mean power that the ranks together stay below, by resting between steps"
    )
    window: Duration = Field(
        5 * 1_000_000, ge=500_000, validate_default=True, description="time over which cap_watts is a mean"
    )
    gpu_limit: bool = Field(False, description="let the GPU's driver hold cap_watts too, where this user may set its limit")
    fewer_ranks: bool = Field(
        False, description="go on with half of the ranks where they rest for most of the time below cap_watts; as with every "
        "other number of ranks, weights are then equal within rounding"
    )
    joules: float | None = Field(
        None, gt=0, description="energy after which training stops with a checkpoint; it resumes where more is allowed"
    )
    grams: float | None = Field(None, gt=0, description="the same in g CO2")
    grams_per_kwh: float = Field(475.0, ge=0, description="g CO2 of a kWh of electricity here; default: about the world's mean")
    cheap_hours: tuple[str, ...] = Field((), description="hours of the day such as 22-6 in which training goes on; else it waits")
    zone: Zone = Field("UTC", description="time zone of cheap_hours")
    busy_watts: float = Field(3.5, gt=0, description="power of a busy core, for the estimate where no meter can be read")
    idle_watts: float = Field(0.74, ge=0, description="power of an idle core, for the estimate")

    @field_validator("cheap_hours")
    @classmethod
    def _hours(cls, spans: tuple[str, ...]) -> tuple[str, ...]:
        for span in spans:
            found = re.fullmatch(r"(\d{1,2})-(\d{1,2})", span)
            if found is None or int(found[1]) > 23 or int(found[2]) > 24 or int(found[1]) == int(found[2]) % 24:
                raise ValueError(f"{span!r} are no hours of a day: write two whole ones such as 22-6")
        return spans

    @model_validator(mode="after")
    def _fits(self) -> "Power":
        if self.idle_watts >= self.busy_watts:
            raise ValueError(f"idle_watts {self.idle_watts:g} is not below busy_watts {self.busy_watts:g}")
        if self.gpu_limit and self.cap_watts is None:
            raise ValueError("gpu_limit needs to know the limit: give cap_watts too")
        if self.fewer_ranks and self.cap_watts is None:
            raise ValueError("fewer_ranks is for a cap: give cap_watts too")
        return self

    def wanted(self) -> bool:
        """Whether training is to do anything about its power."""
        return bool(self.cap_watts or self.joules or self.grams or self.cheap_hours)

    def share(self, count: int) -> "Power":
        """What one of so many trainings at a time may use. Budgets are for the one that is shipped."""
        cap = self.cap_watts / count if self.cap_watts else None
        return self.model_copy(update={"cap_watts": cap, "joules": None, "grams": None})

    def cheap(self, us: int) -> bool:
        """Whether training may go on at this time (µs UTC)."""
        hour = datetime.fromtimestamp(us / 1e6, ZoneInfo(self.zone)).hour
        spans = [tuple(int(h) for h in span.split("-")) for span in self.cheap_hours]
        return not spans or any(a <= hour < b if a < b else hour >= a or hour < b for a, b in spans)

    def grams_of(self, joules: float) -> float:
        """g CO2 of so much electricity."""
        return joules / 3.6e6 * self.grams_per_kwh


class Train(Model):
    """Training of the network, by PyTorch Lightning."""

    network: Network = Network()
    encoder: dict[str, bool | int | float | str] = Field(
        {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
        description="what reads features.text: model_type and settings of a Hugging Face encoder, under their own names; a "
        "pretrained one brings its own",
    )
    module: str | None = Field(
        None, description="package.module:Class of your own network or LightningModule, in place of Millrace's network"
    )
    ranks: int | Literal["auto"] = Field("auto", description="processes; auto: one per GPU, else 1")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="how several ranks share the work: each has all weights (ddp, auto), or a part of them (fsdp)"
    )
    max_epochs: int = Field(4, ge=1)
    batch_size: int = Field(512, ge=2, description="rows of a batch over all ranks")
    learning_rate: Rate = Field(3e-3, description="auto: found by a range test of 100 steps when the job begins")
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant", "onecycle"] = Field(
        "cosine", description="learning rate after the warm-up: falls to 0 by a cosine or a line, stays, or PyTorch's OneCycleLR"
    )
    accumulate_grad_batches: int = Field(1, ge=1, description="batches whose gradients are added up to one optimiser step")
    gradient_clip_val: float | None = Field(None, gt=0, description="largest gradient; default: it is not clipped")
    gradient_clip_algorithm: Literal["norm", "value"] = Field(
        "norm", description="what gradient_clip_val limits: the norm of the whole gradient, or each of its numbers"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="weights judged and shipped are a moving average that keeps this share at each step"
    )
    swa: float | None = Field(
        None, gt=0, le=1, description="weights judged and shipped are the mean over this last share of the steps"
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "fp8"] = Field(
        "32-true", description="numbers that are multiplied; weights and judgement are float32 in any case"
    )
    feed: Literal["auto", "memory", "stream"] = Field(
        "auto", description="training rows held by each rank, or streamed from Parquet; auto: streamed above feed_memory_mb"
    )
    feed_memory_mb: int = Field(4_096, ge=1, description="MiB of training rows that a rank holds where feed is auto")
    trainer: dict[str, bool | int | float | str] = Field(
        {}, description="options of Lightning's Trainer under their own names, of those that Millrace does not own"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activation of a hidden layer for the backward pass but compute it again: less memory"
    )
    compile: bool = Field(False, description="run the network through torch.compile; where that fails a note says why")
    profile: bool = Field(False, description="leave a trace of 20 steps and a table of what they spend in the run's folder")
    power: Power = Field(Power(), description="caps and budgets of power, energy and carbon")
    patience: int = Field(2, ge=1, description="epochs without gain on valid_fit before stopping")
    checkpoint_every: Duration = Field(
        20 * 1_000_000, gt=0, description="wall time between checkpoints", validate_default=True
    )
    max_restarts: int = Field(5, ge=0, description="how often dead ranks are restarted")
    hang_after: Duration = Field(
        10 * 1_000_000, gt=0, validate_default=True,
        description="silence after which a rank counts as hung; grows to ten times the time of a step",
    )  # fmt: skip
    skip_bad_batches: int = Field(
        0, ge=0, description="batches with a loss or gradient that is not finite to leave out before training stops"
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _known(cls, strategy: Any) -> Any:
        if str(strategy).startswith("deepspeed"):
            raise ValueError("deepspeed is not built in; fsdp spreads weights, gradients and optimiser as its stage 3 does")
        return strategy

    @field_validator("module")
    @classmethod
    def _named(cls, module: str | None) -> str | None:
        if module is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", module):
            raise ValueError(f"{module!r} names no class: write package.module:Class")
        return module

    @field_validator("trainer")
    @classmethod
    def _not_owned(cls, options: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        if wrong := refused(options):
            raise ValueError("; ".join(wrong))
        return options

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("strategy fsdp has no scaler for precision 16-mixed: choose bf16-mixed or 32-true")
        if self.strategy == "fsdp" and self.precision == "fp8":
            raise ValueError("strategy fsdp does not gather weights for precision fp8: choose ddp, or bf16-mixed")
        if self.module is not None and self.precision == "fp8":
            raise ValueError("precision fp8 is for Millrace's networks: convert your own module's layers yourself")
        if self.module is not None and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is for Millrace's network: call torch.utils.checkpoint in your own module")
        if self.ema is not None and self.swa is not None:
            raise ValueError("ema and swa both average the weights: give one of them")
        if self.gradient_clip_val is None and self.gradient_clip_algorithm != "norm":
            raise ValueError("gradient_clip_algorithm clips nothing by itself: give gradient_clip_val too")
        return self

    @model_serializer(mode="wrap")
    def _only_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Options that are not used stand in no digest: jobs and releases from before they existed keep their names."""
        used = {k for k, field in type(self).model_fields.items() if getattr(self, k) != field.default}
        return {k: v for k, v in dump(self).items() if k not in _OPTIONS or k in used}


_OPTIONS = frozenset({
    "schedule", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "ema", "swa", "precision", "compile",
    "strategy", "trainer", "module", "encoder", "gradient_checkpointing", "feed", "feed_memory_mb",
    "profile", "power",
})  # fmt: skip


class Tune(Model):
    """Search by Optuna, in generations that do not depend on the number of workers."""

    generations: int = Field(2, ge=1)
    size: int = Field(4, ge=1, description="trials per generation")
    workers: int = Field(1, ge=1, description="trials that run at the same time")
    max_epochs: int = Field(2, ge=1, description="epochs per trial")
    rows: int = Field(60_000, ge=1, description="newest training rows that a trial sees")
    pruner: Literal["median", "none"] = "median"
    space: dict[str, Range] = Field({}, description="field of train or train.network → range")
    gbdt_space: dict[str, Range] = Field({}, description="LightGBM parameter → range; empty: not tuned")


class Gbdt(Model):
    """LightGBM at fixed defaults: the baseline that every run trains."""

    learning_rate: float = Field(0.05, gt=0)
    num_leaves: int = Field(63, ge=2)
    feature_fraction: float = Field(0.3, gt=0, le=1)
    min_data_in_leaf: int = Field(100, ge=1)
    max_rounds: int = Field(600, ge=1, description="trees at most; early stopping on valid_fit ends sooner")
    patience: int = Field(30, ge=1, description="rounds without gain before stopping")


class Gate(Model):
    """When a challenger may replace the champion."""

    metric: Literal["log_loss", "auc", "brier", "pr_auc"] = Field("log_loss", description="metric that decides")
    min_gain: float = Field(0.0, description="gain over the champion that the interval's lower end must exceed")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="two-sided level of the bootstrap interval")
    resamples: int = Field(300, ge=20, description="bootstrap resamples")
    min_rows: int = Field(500, ge=1, description="fewest test rows; fewer are refused")
    max_calibration_error: float = Field(0.1, gt=0, description="largest expected calibration error accepted")
    max_slice_loss: float = Field(
        0.05, ge=0, description="largest loss of the metric in any slice against the champion, interval included"
    )
    slice_min_rows: int = Field(200, ge=1, description="smaller slices are shown, not judged")
    slices: tuple[str, ...] = Field((), description="row columns or calendar parts by which quality is shown")


class Guard(Model):
    """When a challenger that takes traffic is taken back; sequential tests, so that every look counts."""

    max_error_share: float = Field(0.01, gt=0, lt=1, description="share of answers that may fail, or what the champion's do")
    max_latency_ratio: float = Field(3, gt=1, description="of the p99 to the champion's (at least the latency budget)")
    max_psi: float = Field(0.25, gt=0, description="population stability index of its scores against the champion's")
    max_log_loss_rise: float = Field(0.02, gt=0, description="log loss above the champion's on rows whose label is known")
    max_rss_growth_mb: float = Field(200, gt=0, description="memory above what it took at first, MB")
    min_requests: int = Field(20, ge=1, description="answers without which no step ends, and no latency is judged")
    min_rows: int = Field(50, ge=1, description="fewest scores of either whose drift is judged")
    alpha: float = Field(0.001, gt=0, lt=1, description="chance that a test takes a good challenger back, in a whole step")


class Rollout(Model):
    """How a challenger becomes champion: behind a proxy, little by little."""

    shadow: Duration = Field(30_000_000, ge=0, description="time in which it answers a copy (0s: none)", validate_default=True)
    canary: tuple[Annotated[int, Field(ge=1, le=99)], ...] = Field((5, 25, 50), description="rising shares of traffic, percent")
    step: Length = Field(60_000_000, description="time at each share", validate_default=True)
    sticky: str | None = Field(None, description="column of the request by whose value a share is drawn; null: each request")
    guard: Guard = Guard()

    @field_validator("canary")
    @classmethod
    def _rising(cls, shares: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(shares)):
            raise ValueError(f"{list(shares)} does not rise: write it as [5, 25, 50]")
        return shares


class Serve(Model):
    """The endpoint and its budget."""

    port: int = Field(3000, ge=0, le=65535, description="port of the endpoint")
    admin_port: int = Field(0, ge=0, le=65535, description="port on loopback that takes pushed events; 0: a free one")
    workers: int = Field(1, ge=1, description="worker processes")
    store: str = Field(
        "", pattern=r"^$|^(rediss?|postgresql)://[^#]+$",
        description="where the served rows lie: redis://… or postgresql://… ($NAME: from the environment); empty: in the home",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="probability from which the decision is yes")
    request: tuple[str, ...] = Field((), description="row columns that may be given for an unknown row")
    stale_after: Duration | None = Field(None, description="age of a latest value that is flagged as stale")
    latency_budget: Duration = Field(50_000, description="p95 of one request in preflight", validate_default=True)
    size_budget_mb: float = Field(200, gt=0, description="largest bento, MB")
    inference: EngineNames = Field(
        ("auto",), description="what computes answers: what is fastest and exact (auto), as it was trained (native), or by name"
    )
    max_gap: float = Field(1e-6, gt=0, le=0.1, description="largest difference of a probability that a compiled model may make")
    log_flush: Duration = Field(1_000_000, description="age at which predictions are written", validate_default=True)
    log_keep: Duration | None = Field(None, gt=0, description="age at which logged predictions are removed; default: never")
    log_drop: tuple[str, ...] = Field((), description="features and fields of a request that are not logged")
    log_hash: tuple[str, ...] = Field(
        (), description="the same of which a keyed hash is logged: text; the key lies in the home"
    )
    access_log: Literal["off", "slow", "all"] = Field(
        "slow", description="requests that are logged as JSON lines; slow: those beyond the latency budget, and failures"
    )
    api_keys: bool = Field(False, description="answer only who brings a key made by `millrace key`")
    rate_limit: float = Field(0.0, ge=0, description="requests a second of one key or address, over all workers; 0: any")
    rollout: Rollout | None = Field(None, description="releases by steps, behind HAProxy; null: at once, by restart")

    def shown(self, name: str) -> bool:
        """Whether a feature is in the prediction log as it was served."""
        return name not in self.log_drop and name not in self.log_hash

    @model_serializer(mode="wrap")
    def _only_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if k != "rollout" or v}


class Monitor(Model):
    """When what the endpoint answers gives an alarm, by which retraining starts."""

    min_rows: int = Field(200, ge=1, description="fewest answers that are judged")
    max_log_loss_rise: float = Field(0.05, gt=0, description="largest rise of the log loss over the test part's")
    max_psi: float = Field(0.25, gt=0, description="largest population stability index of the score")


class Versions(Model):
    """Where the data of every run is kept, for others to check out."""

    remote: str = Field(
        "", description="DVC remote, such as s3://bucket/path or a folder ($NAME: from the environment); empty: in the home"
    )


class Spec(Model):
    """A pipeline, whole."""

    format_version: Literal[1] = 1
    pipeline: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="name, from the file's name")
    title: str = Field(description="the question, in one sentence")
    seed: int = Field(7, ge=0)
    time: Literal["facts", "none"] = Field("facts", description="none: the table has no time")
    clock: ClockSpec | None = None
    sample: Sample | None = None
    sources: dict[str, Source] = Field(min_length=1)
    rows: Rows
    predict_at: PredictAt | None = None
    closed_by: tuple[str, ...] = Field((), description="sources whose fact known at t means: too late to ask")
    label: Label
    label_delay: Delay | None = Field(None, description="time after which an outcome is known")
    split: TimeSplit | HashSplit = Field(discriminator="by")
    features: Features = Features()
    gbdt: Gbdt = Gbdt()
    train: Train = Train()
    tune: Tune = Tune()
    gate: Gate = Gate()
    serve: Serve = Serve()
    monitor: Monitor = Monitor()
    versions: Versions = Versions()
    tracking: Trackers = Field((), description="who is told of each run: mlflow, tensorboard, wandb, or a list of them")

    @model_serializer(mode="wrap")
    def _only_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not used stands in no digest."""
        return {k: v for k, v in dump(self).items() if k != "tracking" or v}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict):
            split = data.get("split")
            if isinstance(split, dict) and "by" not in split:
                data = {**data, "split": {**split, "by": "time"}}
            if data.get("time", "facts") == "facts" and "clock" not in data:
                data = {**data, "clock": {}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Spec":
        _Check(self).run()
        return self

    @property
    def timed(self) -> bool:
        return self.time == "facts"

    @property
    def row_source(self) -> Source:
        return self.sources[self.rows.source]

    @property
    def training(self) -> Train:
        """How the network is trained; the pretrained encoder in place of its own, where the texts have one."""
        folder = self.features.text.pretrained if self.features.text else ""
        return self.train.model_copy(update={"encoder": {"pretrained": folder}}) if folder else self.train

    @property
    def row_key(self) -> tuple[str, ...]:
        return ("row_digest",) if isinstance(self.rows.key, str) else self.rows.key


class _Check:
    """What a type cannot say: names that must exist and fit together."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def source(self, name: str, where: str) -> Source:
        known = list(self.spec.sources)
        if name not in known:
            raise ValueError(f"{where} {name!r} is not a source (sources: {', '.join(known)}{nearest(name, known)})")
        return self.spec.sources[name]

    def column(self, source: str, name: str, where: str, *types: str) -> Column:
        columns = self.source(source, where).columns
        if name not in columns:
            known = list(columns)
            raise ValueError(
                f"{where} {name!r} not in source {source!r} (columns: {', '.join(known)}{nearest(name, known)})"
            )
        if types and columns[name].type not in types:
            raise ValueError(
                f"{where} {name!r} of source {source!r} is {columns[name].type}, expected {' or '.join(types)}"
            )
        return columns[name]

    def compared(self, source: str, condition: Condition, where: str) -> None:
        """That the column of a condition can be compared with its bound."""
        kind = self.column(source, condition.column, f"{where}.column").type
        ((operator, bound),) = condition.comparison().items()
        fits = {"string": isinstance(bound, str), "timestamp": False}.get(kind, isinstance(bound, int | float))
        if not fits or (isinstance(bound, bool) and kind != "bool"):
            raise ValueError(f"{where}: {condition.column!r} is {kind}, it cannot be compared by {operator}: {bound!r}")

    def once(self, columns: tuple[str, ...], where: str) -> None:
        if len(set(columns)) < len(columns):
            raise ValueError(f"{where} names a column twice: {', '.join(columns)}")

    def run(self) -> None:
        spec = self.spec
        for name, source in spec.sources.items():
            self.check_source(name, source)
        self.source(spec.rows.source, "rows.from")
        if not isinstance(spec.rows.key, str):
            self.once(spec.rows.key, "rows.key")
            for column in spec.rows.key:
                self.column(spec.rows.source, column, "rows.key")
        self.compared(spec.label.source, spec.label, "label")
        for column in spec.features.row:
            self.not_label(column, "features.row")
        if spec.timed:
            self.check_timed()
        else:
            self.check_untimed()
        for column in spec.features.row:
            self.column(spec.rows.source, column, "features.row", "string", "int64", "float64", "bool")
        self.check_text()
        for name, view in spec.features.views.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name:
                raise ValueError(f"features.views {name!r}: use lower-case letters, digits and single underscores")
            self.check_view(f"features.views.{name}", view)
        names = Counter(["rows", *(table for name, view in spec.features.views.items() for table in _tables(name, view))])
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"features.views: {twice[0]!r} would name two tables: rename a view, or give each length once")
        if spec.features.calendar:
            self.column(spec.rows.source, spec.features.calendar.column, "features.calendar.column", "timestamp")
        self.check_derived()
        for column in spec.serve.request:
            self.column(spec.rows.source, column, "serve.request")
        sticky = spec.serve.rollout.sticky if spec.serve.rollout else None
        if sticky is not None and sticky not in (known := [*spec.row_key, *spec.serve.request]):
            raise ValueError(f"serve.rollout.sticky: {sticky!r} is not in a request (it has {', '.join(known)})")

    def check_source(self, name: str, source: Source) -> None:
        where = f"sources.{name}"
        for column in source.columns:
            if column.startswith("_"):
                raise ValueError(f"{where}.columns {column!r}: names that begin with _ are Millrace's own; rename it")
        self.once(source.key, f"{where}.key")
        if not (not self.spec.timed and source.key == ("row_digest",)):
            for column in source.key:
                if self.column(name, column, f"{where}.key").type == "float64":
                    raise ValueError(f"{where}.key {column!r} is float64; a key is string, int64, bool or timestamp")
        if source.drift and not self.spec.timed:
            raise ValueError(f"{where}: time: none takes no drift: it is told by days")
        for column in (source.drift.columns or ()) if source.drift else ():
            self.column(name, column, f"{where}.drift.columns")
        for pair in source.order:
            for column in pair:
                self.column(name, column, f"{where}.order")
        for reference in source.references:
            for column in reference.columns:
                self.column(name, column, f"{where}.references.columns")
                self.column(reference.to, column, f"{where}.references.to")
        if not self.spec.timed:
            if source.known_at or source.event_time:
                raise ValueError(f"{where}: time: none takes neither known_at nor event_time")
            return
        if source.known_at is None:
            raise ValueError(f"{where}.known_at is missing: give {{column: c}}, {{lag: 1h}} or {{arrival: true}}")
        if source.event_time is None:
            raise ValueError(f"{where}.event_time is missing: name the timestamp column of the event")
        self.column(name, source.event_time, f"{where}.event_time", "timestamp")
        if source.known_at.column:
            self.column(name, source.known_at.column, f"{where}.known_at.column", "timestamp")
        if source.kind == "plan" and source.known_at.lag is not None and source.known_at.lag >= 0:
            raise ValueError(f"{where}: a plan is known before its event; give known_at.column or a negative lag")
        if source.kind == "observation" and source.known_at.lag is not None and source.known_at.lag < 0:
            raise ValueError(f"{where}: an observation is never known before its event; lag must be ≥ 0s")

    def check_timed(self) -> None:
        spec = self.spec
        if spec.predict_at is None or spec.label_delay is None:
            raise ValueError("predict_at and label_delay are missing (or say time: none)")
        if spec.split.by != "time":
            raise ValueError("split.by: hash is for time: none")
        if isinstance(spec.rows.key, str):
            raise ValueError("rows.key: row_digest is for time: none")
        self.column(spec.rows.source, spec.predict_at.column, "predict_at.column", "timestamp")
        for name in (*spec.closed_by, spec.label.source):
            source = self.source(name, "closed_by" if name in spec.closed_by else "label.from")
            missing = set(spec.rows.key) - set(source.columns)
            if missing:
                raise ValueError(f"source {name!r} lacks the row key column(s) {', '.join(sorted(missing))}")
        if isinstance(spec.split, TimeSplit):
            if spec.split.purge < spec.label_delay:
                raise ValueError("split.purge must be at least label_delay, or labels leak over the border")
            for part in ("train", "valid_fit", "valid_select", "test"):
                if getattr(spec.split, part) <= 0:
                    raise ValueError(f"split.{part} is empty: give a duration above 0s")

    def check_untimed(self) -> None:
        spec = self.spec
        refused = {"predict_at": spec.predict_at, "label_delay": spec.label_delay, "clock": spec.clock,
                   "closed_by": spec.closed_by, "features.calendar": spec.features.calendar}
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name} needs a time, and this pipeline says time: none")
        for name, view in spec.features.views.items():
            if view.latest is None or view.latest.ttl or view.latest.change:
                raise ValueError(f"features.views.{name} needs a time, and this pipeline says time: none")
        if spec.split.by != "hash":
            raise ValueError("time: none splits by a hash of the key: give split.by: hash and four shares")

    def check_text(self) -> None:
        features = self.spec.features
        self.once(features.texts, "features.text.columns")
        for column in features.texts:
            self.not_label(column, "features.text.columns")
            self.column(self.spec.rows.source, column, "features.text.columns", "string")
            if column in features.row:
                raise ValueError(f"features.row {column!r} is a text: leave it out there")
        if features.text and self.spec.train.feed == "stream":
            raise ValueError("train.feed: stream is for tables without features.text, whose tokens are read from disk already")

    def check_derived(self) -> None:
        derived = self.spec.features.derived
        for name, made in derived.items():
            where = f"features.derived.{name}"
            if "__" in name or name in self.spec.row_source.columns:
                raise ValueError(f"{where}: name it otherwise: not like a column of the row, and without __")
            for column in made.minutes or ():
                self.column(self.spec.rows.source, column, f"{where}.minutes", "timestamp")
            for column in made.ratio or ():
                if column not in derived or derived[column].minutes is None:
                    self.column(self.spec.rows.source, column, f"{where}.ratio", "int64", "float64", "bool")
                self.not_label(column, f"{where}.ratio")

    def not_label(self, column: str, where: str) -> None:
        label = self.spec.label
        if (self.spec.rows.source, column) == (label.source, label.column):
            raise ValueError(f"{where} holds the label {column!r}: the model would be told the answer")

    def check_view(self, where: str, view: View) -> None:
        shape = view.shape
        if "event_timestamp" in (*shape.key, getattr(shape, "order", None)):
            raise ValueError(f"{where}: Feast calls the time of a row event_timestamp; rename that column")
        self.once(shape.key, f"{where}.key")
        for column in shape.key:
            theirs = self.column(shape.source, column, f"{where}.key").type
            own = self.column(self.spec.rows.source, column, f"{where}.key").type
            if theirs != own or own == "float64":
                raise ValueError(
                    f"{where}.key {column!r} is {theirs} in source {shape.source!r} and {own} in the rows; "
                    "a key has one type: string, int64, bool or timestamp"
                )
        if isinstance(shape, Window):
            if shape.over:
                self.column(shape.source, shape.over, f"{where}.over", "timestamp")
            for column in shape.numbers:
                found = self.column(shape.source, column, where, "int64", "float64", "bool")
                if found.type == "float64" and found.resolution is None:
                    raise ValueError(f"{where}: {column!r} is float64: declare its resolution in the source")
            for column in shape.nunique:
                self.column(shape.source, column, f"{where}.nunique")
            for name, condition in shape.share.items():
                self.compared(shape.source, condition, f"{where}.share.{name}")
            if shape.next and self.spec.sources[shape.source].kind != "plan":
                raise ValueError(f"{where}.next looks ahead: it needs a source of kind plan")
        elif isinstance(shape, Open):
            self.column(shape.source, shape.over, f"{where}.over", "timestamp")
            for name in shape.closed_by:
                for column in self.spec.sources[shape.source].key:
                    self.column(name, column, f"{where}.closed_by")
        elif isinstance(shape, Latest):
            for column in shape.columns:
                self.column(shape.source, column, f"{where}.columns", "string", "int64", "float64", "bool")
            for column in shape.change.columns if shape.change else ():
                self.column(shape.source, column, f"{where}.change.columns", "int64", "float64")
        else:
            self.column(shape.source, shape.order, f"{where}.order", "timestamp")
            self.column(self.spec.rows.source, shape.order, f"{where}.order", "timestamp")
            for column in shape.columns:
                self.column(shape.source, column, f"{where}.columns", "string", "int64", "float64", "bool",
                            "timestamp")
            for name, columns in shape.facts.items():
                for column in columns:
                    self.column(name, column, f"{where}.facts", "int64", "float64", "bool")


def _tables(name: str, view: View) -> list[str]:
    """The tables that a view is stored as, as `features.views.stored_of` names them."""
    shape = view.shape
    if isinstance(shape, Sequence):
        return [name]
    if isinstance(shape, Latest):
        return [name, *(f"{name}_ago_{duration_text(ago)}" for ago in (shape.change.over if shape.change else ()))]
    ahead = shape.next if isinstance(shape, Window) else ()
    return [f"{name}_{duration_text(w)}" for w in shape.last] + [f"{name}_next_{duration_text(w)}" for w in ahead]


def pipeline_names() -> list[str]:
    """Names of the pipelines in this folder."""
    return sorted(p.stem for p in HERE.glob("*.yaml"))


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file over that in the one that it extends; `above`: the files that extend this one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path.name}: expected a mapping of fields, found {type(data).__name__}")
    base = data.pop("extends", None)
    if base is None:
        return data
    other = path.parent / str(base)
    if not other.is_file():
        known = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise UsageError(f"{path.name}: extends: {base!r} is not beside it{nearest(str(base), known)}")
    if other in (*above, path):
        raise UsageError(f"{path.name}: extends: {base!r} extends this file in turn; one of them must stand alone")
    return _merge(_read_yaml(other, (*above, path)), data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(data: dict[str, Any], item: str) -> dict[str, Any]:
    path, eq, text = item.partition("=")
    if not eq or not path:
        raise UsageError(f"--set {item!r}: write key=value, such as train.max_epochs=2")
    try:
        over: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {item!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    for name in reversed(path.strip().split(".")):
        over = {name: over}
    return _merge(data, over)


def find_pipeline(name: str) -> Path:
    """The YAML file of a pipeline: a name in this folder, or a path that ends in .yaml."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / f"{name}.yaml"
    if not path.is_file():
        known = pipeline_names()
        raise UsageError(
            f"unknown pipeline {name!r} (known: {', '.join(known)}{nearest(name, known)}); "
            "give one of these or the path of a .yaml file"
        )
    return path


def load_spec(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Spec:
    """The validated spec of a pipeline, `key=value` overrides applied. Raises UsageError with every mistake."""
    path = find_pipeline(name)
    data = _read_yaml(path)
    for item in overrides:
        data = _override(data, item)
    data = {"pipeline": path.stem, **data}
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(_sentence(path.name, e) for e in error.errors())) from None


def _sentence(file: str, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("time", "hash") or len(error["loc"]) < 3)
    if error["type"] == "extra_forbidden":
        fields = sorted({name for model in _models(Spec) for name in model.model_fields})
        return f"{file}: {where}: unknown field{nearest(str(error['loc'][-1]), fields)}"
    if error["type"] == "missing":
        return f"{file}: {where}: missing"
    found = "" if isinstance(error["input"], dict | Spec) else f", found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{file}: {where + ': ' if where else ''}{message}{found if error['type'] != 'value_error' else ''}"


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    return {cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, BaseModel)}


def json_schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors."""
    schema = Spec.model_json_schema(by_alias=True)
    needed = [name for name in schema.pop("required") if name != "pipeline"]  # the file's name
    schema["anyOf"] = [{"required": ["extends"]}, {"required": needed}]
    schema["properties"]["features"] = {"anyOf": [{"const": "auto"}, {"$ref": "#/$defs/Features"}]}
    schema["properties"]["extends"] = {"type": "string", "description": "YAML file that this one changes"}
    columns = schema["$defs"]["Source"]["properties"]["columns"]
    columns["additionalProperties"] = {"anyOf": [{"enum": [*get_args(ColumnType)]}, columns["additionalProperties"]]}
    return schema
