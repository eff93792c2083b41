"""Backfill: every prediction row in a range of time, with its features and label as they were known at one time.

A row is asked about at its own t and sees the facts known at min(t, as_of): those of the snapshot cut at `as_of`, read
at t. What became known after `as_of` does not exist, whatever has landed since.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.frame import arrow_columns
from features.ingest import ARROW, Snapshot, cut, ingest, read_snapshot, read_table
from features.rows import find_rows
from features.store import FeatureSet, historical_features
from pipelines.clock import DAY_US, MISSING, NEVER, iso, wall_us
from pipelines.errors import UsageError
from pipelines.home import Home
from pipelines.manifest import Note, code_digest, digest_of, read_json, write_json
from pipelines.run import Run, accepted, result_spec
from pipelines.spec import Spec

AT_ONCE = 50_000  # rows that are joined at once, unless one day holds more


@dataclass(frozen=True, kw_only=True)
class Backfill(Run):
    """Pinned inputs of a backfill: rows asked about at begin_us ≤ t < end_us (µs UTC).

    `snapshot` is the newest one, `landed`, as it was known at `as_of_us`. The same inputs have the same run_id.
    """

    landed: str
    begin_us: int
    end_us: int

    def folder(self, home: Home) -> Path:
        return home.backfills(self.pipeline) / self.run_id


def check_range(spec: Spec, begin: int, end: int) -> None:
    """Raises UsageError where there is nothing between begin and end (µs)."""
    if not spec.timed:
        raise UsageError(f"{spec.pipeline} says time: none: its rows have no time, so there is no range to backfill")
    if begin >= end:
        raise UsageError(f"--from {iso(begin)} is not before --to {iso(end)}: rows asked about at --from count, at --to not")


def pin_backfill(spec: Spec, home: Home, begin: int, end: int, as_of: int | None) -> Backfill:
    """Takes in what landed and pins it. `as_of` (µs) is the newest known-at where it is not given.

    Raises UsageError for an empty range, and for an `as_of` that is still to come.
    """
    check_range(spec, begin, end)
    landed = ingest(spec, home)
    newest = max(landed.watermark_us, wall_us() if spec.clock and spec.clock.kind == "wall" else MISSING)
    at = landed.watermark_us if as_of is None else as_of
    if at > newest:
        raise UsageError(f"--as-of {iso(at)} is later than now, {iso(newest)}: what will be known then is not known yet")
    snapshot, spec_digest, code = cut(spec, home, landed, at), digest_of(result_spec(spec)), code_digest("features")
    run = Backfill(
        spec.pipeline, digest_of([spec_digest, code, snapshot.digest, at, begin, end])[:16], at, snapshot.digest,
        _before(home, landed), "", wall_us(), spec_digest, code, landed=landed.digest, begin_us=begin, end_us=end,
        line=f"rows asked about from {iso(begin)} to {iso(end)}, as known at {iso(at)}",
    )  # fmt: skip
    write_json(run.folder(home) / "spec.json", spec.model_dump(mode="json", by_alias=True))
    pins = {"snapshot": snapshot.digest, "landed": landed.digest, "spec_digest": spec_digest, "code": code}
    write_json(run.folder(home) / "inputs.json", pins | {"from": iso(begin), "to": iso(end), "as_of": iso(at)})
    return run


def _before(home: Home, landed: Snapshot) -> str:
    """The snapshot that the contract compares with what landed: as the run that had the same did."""
    last = accepted(home, landed.pipeline)
    same = last is not None and last["inputs"]["snapshot"] == landed.digest
    return str(last["inputs"]["previous_snapshot" if same else "snapshot"]) if last else ""


def write_rows(spec: Spec, home: Home, run: Backfill, out: Path) -> Note:
    """Writes `rows.parquet`, in order of t, and `parts.json`: between which rows each part lies.

    Raises UsageError, naming the times that there are, where the range holds no row.
    """
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    needed = {spec.rows.source, spec.label.source, *spec.closed_by}
    rows = find_rows(spec, {name: read_table(spec, home, snapshot, name) for name in needed}, run.as_of_us)
    inside = (rows.t >= run.begin_us) & (rows.t < run.end_us)
    if not inside.any():
        there = f"they are asked about from {iso(int(rows.t[0]))} to {iso(int(rows.t[-1]))}" if len(rows.t) else "there are none"
        raise UsageError(
            f"no prediction row of {spec.pipeline} lies between --from {iso(run.begin_us)} and --to {iso(run.end_us)} "
            f"as known at {iso(run.as_of_us)}: {there}"
        )
    t, label, known = rows.t[inside], rows.label[inside], rows.label_known[inside]
    table = rows.table.select([*spec.row_source.columns]).filter(pa.array(inside))
    table = table.append_column("_key", rows.key.filter(pa.array(inside)))
    table = table.append_column("_t", pa.array(t).cast(ARROW["timestamp"]))
    table = table.append_column("_label", pa.array(label, mask=label < 0))
    table = table.append_column("_label_known", pa.array(known, mask=known == NEVER).cast(ARROW["timestamp"]))
    pq.write_table(table, out / "rows.parquet", compression="zstd", compression_level=1)
    parts = parts_of(t)
    write_json(out / "parts.json", {"parts": parts})
    later = int((t > run.as_of_us).sum())
    asked_later = f", {later:,} of them asked about after that" if later else ""
    return Note(f"{len(t):,} rows{asked_later}, {int((label < 0).sum()):,} without a label; {len(parts)} part(s)")


def parts_of(t: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each part of rows at sorted times t (µs): whole days (UTC), together up to AT_ONCE rows."""
    first = np.flatnonzero(np.diff(t // DAY_US, prepend=MISSING)).tolist()
    parts, begin = [], 0
    for day, end in zip(first, [*first[1:], len(t)], strict=True):
        if end - begin > AT_ONCE and day > begin:
            parts.append((begin, day))
            begin = day
    return [*parts, (begin, len(t))]


def write_part(spec: Spec, home: Home, features: FeatureSet, rows: Path, part: int, out: Path) -> Note:
    """Writes one part, named by its first day: the features, `_key_…`, `_key`, `_t`, `_label` and `_label_known`."""
    begin, end = read_json(rows / "parts.json")["parts"][part]
    table = pq.read_table(rows / "rows.parquet").slice(begin, end - begin).combine_chunks()
    t = table["_t"].cast(pa.int64()).to_numpy()
    columns: dict[str, pa.Array | pa.ChunkedArray] = {**arrow_columns(historical_features(spec, home, features, table, t))}
    columns |= {f"_key_{name}": table[name] for name in spec.row_key}
    columns |= {name: table[name] for name in ("_key", "_t", "_label", "_label_known")}
    first, last = (iso(int(us))[:10] for us in (t[0], t[-1]))
    pq.write_table(pa.table(columns), out / f"{first}.parquet", compression="zstd", compression_level=1)
    return Note(f"{first} to {last}: {len(t):,} rows, {pc.sum(table['_label'].is_valid()).as_py() or 0:,} with a label")
