"""The prediction log: its schema and reader. Parquet parts by hour of the clock and by worker."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.clock import MISSING, NEVER, US, iso, parse_time
from pipelines.errors import MillraceError

FORMAT = "1"
STAMP = pa.timestamp("us", "UTC")
HOUR_US = 3_600 * US
FEATURE = "feature."  # prefix of the columns that hold features as served
BASE = pa.schema(
    [
        ("request_id", pa.string()),
        ("row", pa.int32()),
        ("clock", STAMP),  # what the clock showed: features are as of this instant
        ("wall", STAMP),
        ("release", pa.string()),
        ("snapshot", pa.string()),  # which the served store held; null where features were given, and in older logs
        ("pushed", pa.int64()),  # number of the last pushed event that it held; null in older logs
        ("route", pa.string()),
        ("key", pa.string()),  # JSON of the row key
        ("request", pa.string()),  # JSON of the fields given beside the key
        ("event_times", pa.string()),  # JSON: view → event time of its newest fact
        ("unknown_entity", pa.bool_()),
        ("outside_horizon", pa.bool_()),
        ("missing", pa.int32()),
        ("unseen", pa.int32()),  # categories that training did not know; null in older logs
        ("stale", pa.string()),  # JSON list of views
        ("score", pa.float64()),
        ("latency_us", pa.int64()),
    ],
    metadata={"format_version": FORMAT},
)


def schema(numbers: Sequence[str], categories: Sequence[str]) -> pa.Schema:
    """The schema of a log part that holds these features."""
    fields = list(BASE)
    fields += [pa.field(FEATURE + name, pa.float64()) for name in numbers]
    fields += [pa.field(FEATURE + name, pa.string()) for name in categories]
    return pa.schema(fields, metadata=BASE.metadata)


def part_path(root: Path, clock_us: int, worker: str, sequence: int) -> Path:
    """Where a part of one hour of the clock goes."""
    return root / f"hour={iso(clock_us)[:13]}" / f"{worker}-{sequence:06d}.parquet"


def newest_hour(root: Path) -> int | None:
    """Begin of the newest logged hour of the clock (µs), None where nothing is logged."""
    return max(map(_hour, _parts(root)), default=None)


def read_log(root: Path, *, since: int = MISSING, until: int = NEVER) -> pa.Table:
    """What was logged for since ≤ clock ≤ until (µs), columns united; without rows where there is nothing.

    Raises MillraceError naming the part that is broken, or was written in another format.
    """
    parts = [BASE.empty_table()]
    parts += [_read_part(path) for path in _parts(root) if since - HOUR_US < _hour(path) <= until]
    try:
        log = pa.concat_tables(parts, promote_options="default")
    except pa.ArrowException as error:
        raise MillraceError(
            f"the parts of the prediction log {root} hold features of other types ({str(error)[:120]}): "
            "look at a time in which one release answered (--since, --until)"
        ) from None
    clock = log["clock"].cast(pa.int64())
    return log.filter(pc.and_(pc.greater_equal(clock, since), pc.less_equal(clock, until)))


def _parts(root: Path) -> list[Path]:
    """Complete parts: one that is being written has a name with a dot."""
    return sorted(path for path in root.glob("hour=*/*.parquet") if not path.name.startswith("."))


def _hour(part: Path) -> int:
    """Begin of the hour of the clock that a part belongs to, µs."""
    return parse_time(f"{part.parent.name.removeprefix('hour=')}:00Z")


def _read_part(path: Path) -> pa.Table:
    try:
        part = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise MillraceError(f"part {path} of the prediction log is broken ({str(error)[:120]}): delete it") from None
    found = (part.schema.metadata or {}).get(b"format_version", b"none").decode()
    if found != FORMAT or not {"clock", "release", "key"} <= set(part.column_names):
        raise MillraceError(
            f"part {path} of the prediction log has format_version {found}, this Millrace writes and reads {FORMAT}; "
            "run `pip install -U millrace` if the log is newer, or move the part away"
        )
    return part
