"""The prediction log: its schema, its reader, and its tidying. Parquet parts by hour of the clock and by worker.

A part that was made of others names them (`REPLACES`): they do not count from the moment it is there, and are removed next.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.clock import MISSING, NEVER, US, iso, parse_time
from pipelines.errors import MillraceError
from pipelines.manifest import sync

FORMAT, REPLACES, WHOLE = "1", b"replaces", "whole-"  # WHOLE: how a part begins that was made of others
GROUP = 50_000  # rows
LISTED = 5  # attempts to read parts of which some are replaced meanwhile
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
    for _ in range(LISTED):
        try:
            found = [_read_part(path) for path in _parts(root) if since - HOUR_US < _hour(path) <= until]
            break
        except FileNotFoundError:  # it was replaced since it was listed
            continue
    else:
        raise MillraceError(f"the parts of the prediction log {root} are replaced again and again: try again later")
    parts = [BASE.empty_table(), *found]
    try:
        log = pa.concat_tables(parts, promote_options="default")
    except pa.ArrowException as error:
        raise MillraceError(
            f"the parts of the prediction log {root} hold features of other types ({str(error)[:120]}): "
            "look at a time in which one release answered (--since, --until)"
        ) from None
    clock = log["clock"].cast(pa.int64())
    return log.filter(pc.and_(pc.greater_equal(clock, since), pc.less_equal(clock, until)))


def complete(hour: Path) -> list[Path]:
    """Parts in the folder of an hour that are not being written: those have names with a dot."""
    return sorted(path for path in hour.glob("*.parquet") if not path.name.startswith("."))


def _parts(root: Path) -> list[Path]:
    """Complete parts that count, in order."""
    found = [path for hour in sorted(root.glob("hour=*")) for path in complete(hour)]
    gone = {path.with_name(name) for path in found if path.name.startswith(WHOLE) for name in _replaced(path)}
    return [path for path in found if path not in gone]


def _replaced(whole: Path) -> list[str]:
    """The parts that one was made of. Raises FileNotFoundError where it is gone itself."""
    with _reading(whole):
        return list(json.loads((pq.read_schema(whole).metadata or {}).get(REPLACES, b"[]")))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises MillraceError for a part that is broken, FileNotFoundError for one that is gone."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise MillraceError(f"part {path} of the prediction log is broken ({str(error)[:120]}): delete it") from None


def _hour(part: Path) -> int:
    """Begin of the hour of the clock that a part belongs to, µs."""
    return parse_time(f"{part.parent.name.removeprefix('hour=')}:00Z")


def _read_part(path: Path) -> pa.Table:
    with _reading(path):
        part = pq.ParquetFile(path).read()
    part = part.replace_schema_metadata({k: v for k, v in (part.schema.metadata or {}).items() if k != REPLACES})
    found = (part.schema.metadata or {}).get(b"format_version", b"none").decode()
    if found != FORMAT or not {"clock", "release", "key"} <= set(part.column_names):
        raise MillraceError(
            f"part {path} of the prediction log has format_version {found}, this Millrace writes and reads {FORMAT}; "
            "run `pip install -U millrace` if the log is newer, or move the part away"
        )
    return part


@dataclass(frozen=True)
class Tidied:
    """Hours whose parts became one, parts that they were, and hours that were too old to keep."""

    hours: int
    parts: int
    expired: int


def tidy(root: Path, now: int, keep: int | None = None) -> Tidied:
    """Makes one part of the parts of each hour of the clock that is over at `now` (µs), and removes hours that ended before
    now − keep (µs). Each answer is read once by whoever reads meanwhile, and after a kill at any moment.

    Raises MillraceError for a part that is broken.
    """
    hours = parts = expired = 0
    for folder in sorted(root.glob("hour=*")):
        end = _hour(folder / "part") + HOUR_US
        if keep is not None and end <= now - keep:
            shutil.rmtree(folder)
            expired += 1
        elif end <= now and (count := _whole(folder)) > 1:
            hours, parts = hours + 1, parts + count
    return Tidied(hours, parts, expired)


def _whole(folder: Path) -> int:
    """Makes one part of those in the folder of an hour; how many there were. Those whose features have other types stay."""
    every = complete(folder)
    live = [path for path in _parts(folder.parent) if path.parent == folder]
    names = json.dumps([path.name for path in every])
    if len(live) > 1:
        try:
            plain = pa.unify_schemas([pq.read_schema(path).remove_metadata() for path in live])
        except pa.ArrowException:
            return 0
        path = folder / f"{WHOLE}{hashlib.sha256(names.encode()).hexdigest()[:16]}.parquet"
        scratch = path.with_name(f".{path.name}")
        metadata = {b"format_version": FORMAT.encode(), REPLACES: names.encode()}
        with pq.ParquetWriter(scratch, plain.with_metadata(metadata), compression="zstd") as writer:
            for some in _some(live):
                writer.write_table(pa.concat_tables([plain.empty_table(), *some], promote_options="default").cast(plain))
        sync(scratch)
        scratch.replace(path)
        sync(folder)
    for path in set(every) - set(live if len(live) < 2 else ()):
        path.unlink(missing_ok=True)
    return len(live)


def _some(parts: Sequence[Path]) -> Iterator[list[pa.Table]]:
    """The tables of parts, as many at a time as make a row group."""
    held: list[pa.Table] = []
    for path in parts:
        held.append(_read_part(path).replace_schema_metadata(None))
        if sum(table.num_rows for table in held) >= GROUP:
            yield held
            held = []
    if held:
        yield held
