"""Landing files → immutable objects, one per file → a snapshot: what the pipeline knows, named by its values.

Landing is append-only: only new files are read. One that a run built on may be neither changed nor deleted; one that
only refused snapshots held may, which is the way out of a bad delivery.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.erased import without_erased
from features.keys import KNOWN, SEPARATOR, text_keys
from pipelines.clock import iso, parse_time, wall_us
from pipelines.errors import Refused, nearest
from pipelines.home import Home
from pipelines.lineage import dataset
from pipelines.manifest import digest_of, read_json, write_json, write_page
from pipelines.run import accepted, unfinished
from pipelines.spec import Source, Spec

ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}
YEARS_US = (parse_time("0001-01-01"), parse_time("9999-12-31"))  # the times that have a text


@dataclass(frozen=True)
class Snapshot:
    """What is known: `digest` covers schema and values alone. Times are µs UTC."""

    pipeline: str
    digest: str
    path: str
    watermark_us: int
    until_us: int | None  # facts known later do not exist for it
    rows: dict[str, int]
    duplicates: dict[str, int] = field(default_factory=dict)
    new_files: int = 0


def ingest(spec: Spec, home: Home) -> Snapshot:
    """The snapshot of everything landed. Raises Refused, naming the file, for what cannot be read or believed."""
    index_path = home.snapshots(spec.pipeline) / "landing.json"
    index = read_json(index_path)["files"] if index_path.exists() else {}
    found = _landed(spec, home)
    taken = cache(lambda: _taken_in(spec, home))  # only a changed or deleted file asks for it
    for name in [n for n in index if n not in found and n.split("/")[0] in spec.sources]:
        if index[name]["object"] in taken():
            raise Refused(f"landing file {name} was deleted; landing is append-only: put it back")
        del index[name]
    new = len(found.keys() - index.keys())
    try:
        for name, path in found.items():
            index[name] = _entry(spec, home, name, path, index.get(name), taken)
    except Refused:
        write_json(index_path, {"files": index})  # arrival is the first sight, whatever becomes of the snapshot
        raise
    write_json(index_path, {"files": index})
    return _publish(spec, home, index, new)


def _taken_in(spec: Spec, home: Home) -> set[str]:
    """Objects that a run built on: of the newest one that no contract stopped, and of one that is still to be ended."""
    done, going = accepted(home, spec.pipeline), unfinished(home, spec.pipeline)
    snapshots = {done["inputs"]["snapshot"]} if done else set()
    snapshots |= {going.snapshot} if going else set()
    bodies = [read_json(home.snapshots(spec.pipeline) / f"{digest}.json") for digest in snapshots]
    return {sha for body in bodies for listed in body["objects"].values() for sha, _ in listed}


def _entry(
    spec: Spec, home: Home, name: str, path: Path, entry: dict[str, Any] | None, taken: Callable[[], set[str]]
) -> dict[str, Any]:  # fmt: skip
    """What the index says of a landing file. Only a new or changed one is read; one that runs built on may not change."""
    stat, source = path.stat(), spec.sources[name.split("/")[0]]
    columns = _columns_digest(source, spec.timed)
    same_spec = entry is not None and entry["columns"] == columns
    if entry and same_spec and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return entry
    data = path.read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    if entry and entry["sha256"] != sha:
        if entry["object"] in taken():
            raise Refused(
                f"landing file {name} was changed after it was read; landing is append-only: "
                "put the old file back and land the correction as a new file"
            )
        entry = None
    if entry and same_spec:
        return {**entry, "mtime_ns": stat.st_mtime_ns}
    table = without_erased(home, spec.pipeline, _read_file(name, data, source, spec.timed))
    arrival = entry["arrival_us"] if entry else wall_us()
    return {
        "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha, "rows": table.num_rows,
        "arrival_us": arrival, "object": store_object(table, home), "columns": columns,
    }  # fmt: skip


def write_arrivals(snapshot: Snapshot, previous: Snapshot | None, path: Path) -> None:
    """A page of what arrived: rows per table, against the snapshot before."""
    rows = [("table", "rows", "more than before", "identical rows dropped")]
    for name, count in snapshot.rows.items():
        more = f"{count - previous.rows.get(name, 0):+,}" if previous else "–"
        rows.append((name, f"{count:,}", more, f"{snapshot.duplicates.get(name, 0):,}"))
    write_page(path, f"{snapshot.pipeline}: snapshot {snapshot.digest[:12]}", [
        (f"Known up to {iso(snapshot.watermark_us)}, {snapshot.new_files} new files", rows),
    ])  # fmt: skip


def read_snapshot(home: Home, pipeline: str, digest: str) -> Snapshot:
    """The snapshot of that digest. Raises MillraceError when the home does not have it."""
    path = home.snapshots(pipeline) / f"{digest}.json"
    value = read_json(path)
    return Snapshot(
        pipeline, digest, home.relative(path), value["watermark_us"], value["until_us"], value["rows"],
        value["duplicates"],
    )  # fmt: skip


def inputs_of(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The tables of a snapshot as lineage names them."""
    return [dataset(f"{snapshot.pipeline}.{name}", snapshot.digest, rows) for name, rows in snapshot.rows.items()]


def cut(spec: Spec, home: Home, snapshot: Snapshot, as_of: int) -> Snapshot:
    """The snapshot as it was known at `as_of`: the same one when nothing in it was known later."""
    if not spec.timed or as_of >= snapshot.watermark_us:
        return snapshot
    body = read_json(home.root / snapshot.path)
    del body["format_version"]
    digest = digest_of({"snapshot": snapshot.digest, "until": as_of})
    path = home.snapshots(spec.pipeline) / f"{digest}.json"
    body["until_us"] = body["watermark_us"] = as_of
    write_json(path, body)
    tables = {name: read_table(spec, home, read_snapshot(home, spec.pipeline, digest), name) for name in spec.sources}
    body["rows"] = {name: table.num_rows for name, table in tables.items()}
    body["watermark_us"] = max((us for t in tables.values() if (us := _newest(t)) is not None), default=as_of)
    write_json(path, body)
    return read_snapshot(home, spec.pipeline, digest)


def read_table(spec: Spec, home: Home, snapshot: Snapshot, name: str) -> pa.Table:
    """All versions of a source's facts, sorted by key and known-at, once each, with their `_known_at`."""
    body = read_json(home.root / snapshot.path)
    table = _merge(spec, name, home, body["objects"][name])[0]
    if body["until_us"] is not None:
        known = pc.less_equal(table[KNOWN].cast(pa.int64()), body["until_us"])
        table = table.filter(pc.fill_null(known, True))  # a fact without known-at stays, for the contract to refuse
    return table


def _landed(spec: Spec, home: Home) -> dict[str, Path]:
    root = home.landing(spec.pipeline)
    found = {}
    for source in spec.sources:
        files = sorted(p for p in (root / source).rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
        if not files:
            hint = f"`millrace sample {spec.pipeline}`" if spec.sample else "your Parquet files there"
            raise Refused(f"no files landed for source {source!r}: expected Parquet in {root / source}; put {hint}")
        found.update({p.relative_to(root).as_posix(): p for p in files})
    return found


def _read_file(name: str, data: bytes, source: Source, timed: bool) -> pa.Table:
    """The declared columns of one landing file, in canonical order and types."""
    if data[:4] != b"PAR1":
        raise Refused(f"landing file {name} is not Parquet (it begins with {data[:4]!r}): write it as Parquet")
    try:
        table = pq.read_table(pa.BufferReader(data))
        known = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refused(f"landing file {name} cannot be read, it may be cut short: {str(error)[:200]}") from None
    columns = {}
    for column, declared in sorted(source.columns.items()):
        if column not in known:
            raise Refused(
                f"landing file {name}: column {column!r} is missing "
                f"(columns: {', '.join(known)}{nearest(column, known)})"
            )
        columns[column] = _typed(f"landing file {name}: column {column!r}", table[column], declared.type)
    result = pa.table(columns)
    if source.key == ("row_digest",) and not timed:
        result = result.append_column("row_digest", _row_digests(result))
    return result


def _typed(where: str, column: pa.ChunkedArray, declared: str) -> pa.Array:
    """The column in its declared type, widened where nothing is lost. Raises Refused otherwise."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    ok = {
        "string": pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
        "int64": pa.types.is_integer(kind),
        "float64": pa.types.is_floating(kind) or pa.types.is_integer(kind),
        "bool": pa.types.is_boolean(kind),
        "timestamp": pa.types.is_timestamp(kind),
    }[declared] or pa.types.is_null(kind)
    if not ok:
        raise Refused(f"{where} is {kind}, the spec says {declared}: write it as {ARROW[declared]}")
    if pa.types.is_timestamp(kind) and kind.tz is None:
        raise Refused(f"{where} holds times without a zone: write them as timestamp[us, tz=UTC]")
    try:
        array = column.cast(ARROW[declared]).combine_chunks()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        array.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise Refused(f"{where} does not fit {declared}: {str(error)[:200]}") from None
    if declared == "timestamp":
        us = pc.min_max(array.cast(pa.int64())).as_py()
        if us["min"] is not None and not YEARS_US[0] <= us["min"] <= us["max"] < YEARS_US[1]:
            raise Refused(f"{where} holds times outside the years 1 to 9999: were they written in another unit?")
    return array


def _row_digests(table: pa.Table) -> pa.Array:
    texts = [pc.fill_null(column.cast(pa.string()), "\x00") for column in table.columns]
    joined = pc.binary_join_element_wise(*texts, SEPARATOR) if len(texts) > 1 else texts[0]
    return pa.array([hashlib.sha256(text.encode()).hexdigest()[:32] for text in joined.to_pylist()], pa.string())


def store_object(table: pa.Table, home: Home) -> str:
    """Writes the table as an object named by its values; one that is there stays as it is."""
    sha = values_digest(table)
    path = home.objects / f"{sha}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{sha}.{os.getpid()}")
        try:
            pq.write_table(table.replace_schema_metadata({"format_version": "1"}), scratch, compression="zstd")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    return sha


def values_digest(table: pa.Table) -> str:
    """SHA-256 over names, types and values of a table, in the order of its rows."""
    sha = hashlib.sha256()
    for name in sorted(table.column_names):
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        sha.update(f"{name}:{column.type}:{len(column)}".encode())
        sha.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        if pa.types.is_string(column.type):
            filled = column.fill_null("")
            sha.update(pc.binary_length(filled).to_numpy().tobytes())
            sha.update("".join(filled.to_pylist()).encode())
        elif pa.types.is_timestamp(column.type):
            sha.update(column.cast(pa.int64()).fill_null(0).to_numpy().tobytes())
        elif pa.types.is_boolean(column.type):
            sha.update(column.fill_null(False).to_numpy(zero_copy_only=False).tobytes())
        elif pa.types.is_floating(column.type):
            sha.update((column.fill_null(0.0).to_numpy() + 0.0).tobytes())  # −0.0 is 0.0
        else:
            sha.update(column.fill_null(0).to_numpy().tobytes())
    return sha.hexdigest()


def _merge(spec: Spec, name: str, home: Home, objects: list[list]) -> tuple[pa.Table, int]:
    """Every version of a source once, sorted by key and known-at; and how many identical rows were dropped."""
    source = spec.sources[name]
    parts, origin = [], []
    for number, (sha, arrival_us) in enumerate(objects):
        part = pq.read_table(home.objects / f"{sha}.parquet")
        parts.append(part.append_column(KNOWN, _known_at(part, source, arrival_us)))
        origin.append(np.full(part.num_rows, number))
    table = pa.concat_tables(parts).replace_schema_metadata(None).combine_chunks()
    order = pc.sort_indices(table, [(k, "ascending") for k in (*source.key, KNOWN)])
    table, came_from = table.take(order).combine_chunks(), np.concatenate(origin)[order.to_numpy()]
    if table.num_rows < 2:
        return table, 0
    names = text_keys([table[k] for k in source.key], table.num_rows)
    known = table[KNOWN].combine_chunks().cast(pa.int64()).fill_null(0)
    again = pc.and_(_same(names), _same(known))
    if not pc.any(again, min_count=0).as_py():
        return table, 0
    twice = again.fill_null(False).to_numpy(zero_copy_only=False)
    equal = twice.copy()
    for column in set(table.column_names) - {*source.key, KNOWN}:
        equal &= _unchanged(table[column].combine_chunks()).to_numpy(zero_copy_only=False)
    if (clash := twice & ~equal).any():
        at = int(np.flatnonzero(clash)[0])
        row = {k: str(table[k][at]) for k in source.key}
        shas = sorted({objects[came_from[at]][0][:12], objects[came_from[at + 1]][0][:12]})
        raise Refused(
            f"source {name!r}: {int(clash.sum())} fact(s) with the same key and known-at but other values, "
            f"such as {row} known at {table[KNOWN][at]} in object(s) {' and '.join(shas)}; "
            "a correction needs a later known-at"
        )
    keep = np.concatenate([[True], ~equal])
    return table.filter(pa.array(keep)).combine_chunks(), int(equal.sum())


def _same(array: pa.Array) -> pa.Array:
    return pc.equal(array[1:], array[:-1])


def _unchanged(array: pa.Array) -> pa.Array:
    """Whether each value is the one before: null is null here, and NaN is NaN."""
    same = pc.fill_null(_same(array), False)
    missing = [array.is_null()]
    if pa.types.is_floating(array.type):
        missing.append(pc.fill_null(pc.is_nan(array), False))
    for mask in missing:
        same = pc.or_(same, pc.and_(mask[1:], mask[:-1]))
    return same


def _known_at(table: pa.Table, source: Source, arrival_us: int) -> pa.Array:
    rule, stamp = source.known_at, ARROW["timestamp"]
    if rule is None:
        return pa.repeat(pa.scalar(0, pa.int64()), table.num_rows).cast(stamp)
    if rule.arrival:
        return pa.repeat(pa.scalar(arrival_us, pa.int64()), table.num_rows).cast(stamp)
    if rule.column:
        return table[rule.column].combine_chunks().cast(stamp)
    assert source.event_time is not None
    return pc.add(table[source.event_time].combine_chunks().cast(pa.int64()), rule.lag).cast(stamp)


def _newest(table: pa.Table) -> int | None:
    """The largest known-at, µs."""
    found: int | None = pc.max(table[KNOWN]).cast(pa.int64()).as_py()
    return found


def _publish(spec: Spec, home: Home, index: dict[str, dict], new: int) -> Snapshot:
    """Writes the snapshot of an index, unless these objects already have one."""
    objects: dict[str, list[list]] = {name: [] for name in spec.sources}
    for name, entry in sorted(index.items()):
        source = name.split("/")[0]
        if source in objects:
            known_at = spec.sources[source].known_at
            arrival = entry["arrival_us"] if known_at and known_at.arrival else 0
            objects[source].append([entry["object"], arrival])
    for listed in objects.values():
        listed.sort()
    memo = home.snapshots(spec.pipeline) / "by_objects" / f"{digest_of([objects, _source_digest(spec)])}.json"
    if memo.exists():
        return read_snapshot(home, spec.pipeline, read_json(memo)["snapshot"])
    rows, duplicates, newest, sha = {}, {}, [], hashlib.sha256()
    for name in sorted(objects):
        table, duplicates[name] = _merge(spec, name, home, objects[name])
        rows[name] = table.num_rows
        newest += [us for us in [_newest(table)] if us is not None]
        arrives = (known := spec.sources[name].known_at) is not None and known.arrival
        values = table if arrives else table.drop_columns([KNOWN])
        sha.update(f"{name}={values_digest(values)};".encode())
    digest, watermark = sha.hexdigest(), max(newest, default=0)
    body = {"pipeline": spec.pipeline, "objects": objects, "rows": rows, "duplicates": duplicates,
            "watermark_us": watermark, "watermark": iso(watermark), "until_us": None,
            "schema": {name: json.loads(spec.sources[name].model_dump_json())["columns"] for name in rows}}  # fmt: skip
    path = home.snapshots(spec.pipeline) / f"{digest}.json"
    write_json(path, body)
    write_json(memo, {"snapshot": digest})
    return Snapshot(
        spec.pipeline, digest, home.relative(path), watermark, None, rows, duplicates, new
    )


def _columns_digest(source: Source, timed: bool) -> str:
    """Names what is read from a file of this source, and how."""
    digested = source.key == ("row_digest",) and not timed
    return digest_of([{c: column.type for c, column in source.columns.items()}, digested])


def _source_digest(spec: Spec) -> str:
    return digest_of({name: json.loads(s.model_dump_json()) for name, s in spec.sources.items()})
