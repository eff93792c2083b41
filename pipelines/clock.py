"""The clock: the only module that reads the wall clock. Times are int64 microseconds, UTC."""

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

US = 1_000_000
DAY_US = 86_400 * US
NEVER = 2**62  # later than every time a fact can have
MISSING = -(2**63)  # how an int64 time says "none" (numpy's NaT)
_UNITS = {"us": 1, "ms": 1_000, "s": US, "m": 60 * US, "h": 3_600 * US, "d": 86_400 * US}
_EPOCH, _EPOCH_UTC = datetime(1970, 1, 1), datetime(1970, 1, 1, tzinfo=UTC)


def wall_us() -> int:
    """Wall time now, µs UTC."""
    return time.time_ns() // 1_000


def begin_s(pid: int) -> float:
    """When a process began, seconds after the machine did. psutil's `create_time` moves with the wall clock when that is set.

    Raises psutil.NoSuchProcess. Where there is no /proc it is psutil's.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        import psutil

        return psutil.Process(pid).create_time()


def duration_us(text: str | int) -> int:
    """Microseconds of a duration such as `90s`, `60m`, `1h`, `30d` or `-1h`; an integer is taken as µs.

    Raises ValueError with the units that exist.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*(-?\d+)\s*([a-z]+)\s*", str(text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"{text!r} is not a duration: write a whole number and one of {', '.join(_UNITS)}, such as '60m'"
        )
    return int(match[1]) * _UNITS[match[2]]


def duration_text(us: int) -> str:
    """The shortest exact text of a duration, the inverse of `duration_us`."""
    for unit in ("d", "h", "m", "s", "ms"):
        if us and us % _UNITS[unit] == 0:
            return f"{us // _UNITS[unit]}{unit}"
    return f"{us}us" if us else "0s"


def parse_time(text: str | int) -> int:
    """µs UTC of an ISO 8601 text with a zone (`2013-12-30T12:00Z`), of a date, or of an integer taken as µs."""
    if isinstance(text, int):
        return text
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time: write ISO 8601 such as '2013-12-30T12:00Z'") from None
    if moment.tzinfo is None:
        if moment != moment.replace(hour=0, minute=0, second=0, microsecond=0) or "T" in text:
            raise ValueError(f"{text!r} has no time zone: write '{text}Z' if it is UTC")
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH_UTC) // timedelta(microseconds=1)


def iso(us: int) -> str:
    """ISO 8601 text in UTC, with as many decimals as it needs."""
    return (_EPOCH + timedelta(microseconds=us)).isoformat() + "Z"  # strftime gives years before 1000 fewer digits


@dataclass(frozen=True)
class Anchor:
    """A pair of times that fixes a data clock: at wall time `wall_us` it showed `data_us`."""

    data_us: int
    wall_us: int


@dataclass(frozen=True)
class Clock:
    """Tells now (µs UTC). `wall`: the wall clock. `data`: anchor + offset + elapsed wall time × speed.

    Where the wall clock was set back behind the last feed, now is that feed's: the store knows nothing of earlier times.
    """

    kind: str
    speed: float = 0.0
    offset_us: int = 0
    anchor: Anchor | None = None

    def now_us(self) -> int:
        if self.kind == "wall":
            return max(wall_us(), self.anchor.data_us if self.anchor else MISSING)
        if self.anchor is None:
            raise ValueError("a data clock needs an anchor: it is written when the served store is fed")
        elapsed = max(0, wall_us() - self.anchor.wall_us)
        return self.anchor.data_us + self.offset_us + int(elapsed * self.speed)
