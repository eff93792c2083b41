"""The prediction log: its schema and reader. Parquet parts by hour of the clock and by worker."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.clock import iso

STAMP = pa.timestamp("us", "UTC")
FEATURE = "feature."  # prefix of the columns that hold features as served
BASE = pa.schema(
    [
        ("request_id", pa.string()),
        ("row", pa.int32()),
        ("clock", STAMP),  # what the clock showed: features are as of this instant
        ("wall", STAMP),
        ("release", pa.string()),
        ("route", pa.string()),
        ("key", pa.string()),  # JSON of the row key
        ("request", pa.string()),  # JSON of the fields given beside the key
        ("event_times", pa.string()),  # JSON: view → event time of its newest fact
        ("unknown_entity", pa.bool_()),
        ("outside_horizon", pa.bool_()),
        ("missing", pa.int32()),
        ("stale", pa.string()),  # JSON list of views
        ("score", pa.float64()),
        ("latency_us", pa.int64()),
    ],
    metadata={"format_version": "1"},
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


def read_log(root: Path) -> pa.Table:
    """Every complete part, columns united; an empty table with the base columns where there is none."""
    parts = [pq.ParquetFile(p).read() for p in sorted(root.glob("hour=*/*.parquet"))]
    return pa.concat_tables([BASE.empty_table(), *parts], promote_options="default") if parts else BASE.empty_table()
