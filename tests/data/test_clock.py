"""The clock: what durations and times may be, and what now is."""

import subprocess

import pytest

from pipelines import clock as module
from pipelines.clock import DAY_US, US, Anchor, Clock, duration_text, duration_us, iso, parse_time
from pipelines.manifest import ROOT

WALL = ("pipelines/clock.py", "flows/guard.py")


@pytest.mark.parametrize(
    ("text", "us"),
    [("90s", 90 * US), ("60m", 3600 * US), ("1h", 3600 * US), ("30d", 30 * DAY_US), ("-1h", -3600 * US), ("5ms", 5_000),
     ("7us", 7), ("0s", 0), (" 2 d ", 2 * DAY_US), (17, 17)],
)  # fmt: skip
def test_durations(text: str | int, us: int) -> None:
    assert duration_us(text) == us
    assert duration_us(duration_text(us)) == us


@pytest.mark.parametrize("text", ["", "1", "1.5h", "1w", "1H", "h", "1h30m", "one day", "1 y", True, None])
def test_what_is_no_duration_says_the_units(text: object) -> None:
    with pytest.raises(ValueError, match="us, ms, s, m, h, d, such as '60m'"):
        duration_us(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("us", "text"), [(90 * US, "90s"), (120 * US, "2m"), (DAY_US, "1d"), (1, "1us"), (0, "0s")])
def test_the_shortest_text_of_a_duration(us: int, text: str) -> None:
    assert duration_text(us) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("2013-12-30T12:00Z", "2013-12-30T12:00:00Z"), ("2013-12-30T07:00:00-05:00", "2013-12-30T12:00:00Z"),
     ("2013-12-30", "2013-12-30T00:00:00Z"), ("2013-12-30T12:00:00.000001Z", "2013-12-30T12:00:00.000001Z"),
     ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59Z")],
)  # fmt: skip
def test_times(text: str, shown: str) -> None:
    assert iso(parse_time(text)) == shown
    assert parse_time(shown) == parse_time(text)


@pytest.mark.parametrize("text", ["2013-12-30T12:00", "2013-12-30T00:00", "2013-12-30 12:00:00"])
def test_a_time_without_a_zone_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no time zone: write"):
        parse_time(text)


@pytest.mark.parametrize("text", ["", "noon", "30.12.2013", "2013-13-01", "2013-12-30T25:00Z"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time: write ISO 8601"):
        parse_time(text)


def test_a_data_clock_stands_still_or_runs_at_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wall_us", lambda: 1_000 * US)
    anchor = Anchor(data_us=50 * US, wall_us=990 * US)
    assert Clock("data", 0.0, 0, anchor).now_us() == 50 * US
    assert Clock("data", 2.0, 0, anchor).now_us() == 70 * US
    assert Clock("data", 1.0, 3600 * US, anchor).now_us() == 3660 * US
    assert Clock("data", 1.0, -5 * US, anchor).now_us() == 55 * US


def test_a_data_clock_never_goes_back_behind_its_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wall clock was set back, data time stands."""
    monkeypatch.setattr(module, "wall_us", lambda: 1 * US)
    assert Clock("data", 1.0, 0, Anchor(50 * US, 990 * US)).now_us() == 50 * US


def test_a_data_clock_without_an_anchor_says_where_it_comes_from() -> None:
    with pytest.raises(ValueError, match="needs an anchor: it is written when the served store is fed"):
        Clock("data").now_us()


def test_a_wall_clock_is_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wall_us", lambda: 42)
    assert Clock("wall", 5.0, 99, Anchor(1, 1)).now_us() == Clock("wall").now_us() == 42
    assert Clock("wall", 5.0, 99, Anchor(50, 1)).now_us() == 50  # of what was before its feed the store knows nothing


def test_only_the_clock_reads_the_wall_clock() -> None:
    """`datetime.now`, `time.time` and the like are in no other module, but where Prefect is told when to start."""
    folders = ["pipelines", "features", "models", "deploy", "tasks", "flows"]
    pattern = r"\btime\.time(_ns)?\(|datetime\.(now|utcnow|today)\(|date\.today\(|Timestamp\.(now|utcnow)\("
    grep = ["grep", "-rnE", pattern, "--include=*.py", *folders]
    found = subprocess.run(grep, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if line.partition(":")[0] not in WALL]
    assert not lines, "\n".join(lines)
