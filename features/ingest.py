"""Landing files → immutable objects, one per file → a snapshot: what the pipeline knows, named by its values.

Landing is append-only: only new files are read. One that a run built on may be neither changed nor deleted; one that
only refused snapshots held may, which is the way out of a bad delivery.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.erased import drop_rows, erased_rows
from features.keys import KNOWN, filled, one_chunk
from features.landed import ARROW, read_landed
from features.quarantine import BadRows, bad_rows
from pipelines.clock import NEVER, iso, wall_us
from pipelines.errors import Refused
from pipelines.home import Home
from pipelines.lineage import dataset
from pipelines.manifest import digest_of, file_digest, read_json, write_json, write_page
from pipelines.run import accepted, unfinished
from pipelines.spec import Source, Spec


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
    set_aside: dict[str, int] = field(default_factory=dict)  # rows that are in quarantine, and not among `rows`
    new_files: int = 0


def ingest(spec: Spec, home: Home) -> Snapshot:
    """The snapshot of everything landed, but for rows set aside.

    Raises Refused, naming the file, for what cannot be read or believed.
    """
    index = landing_index(home, spec.pipeline)
    found = _landed(spec, home)
    taken = cache(lambda: _taken_in(spec, home))  # only a changed or deleted file asks for it
    for name in [n for n in index if n not in found and n.split("/")[0] in spec.sources]:
        if index[name]["object"] in taken():
            raise Refused(f"landing file {name} was deleted; landing is append-only: put it back")
        del index[name]
    new = len(found.keys() - index.keys())
    try:
        for name, path in found.items():
            read, index[name] = _entry(spec, home, name, path, index.get(name), taken)
            index[read] = index.pop(name)
        _check_columns(spec, index)
    except Refused:
        write_landing_index(home, spec.pipeline, index)  # arrival is the first sight, whatever becomes of the snapshot
        raise
    write_landing_index(home, spec.pipeline, index)
    return replace(_set_aside(spec, home, _publish(spec, home, index)), new_files=new)


def _taken_in(spec: Spec, home: Home) -> set[str]:
    """Objects that a run built on: of the newest one that no contract stopped, and of one that is still to be ended."""
    done, going = accepted(home, spec.pipeline), unfinished(home, spec.pipeline)
    snapshots = {done["inputs"]["snapshot"]} if done else set()
    snapshots |= {going.snapshot} if going else set()
    bodies = [read_json(home.snapshots(spec.pipeline) / f"{digest}.json") for digest in snapshots]
    return {sha for body in bodies for listed in body.get("landed", body["objects"]).values() for sha, _ in listed}


def _entry(
    spec: Spec, home: Home, name: str, path: Path, entry: dict[str, Any] | None, taken: Callable[[], set[str]]
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """A landing file, and what the index says of it. Only a new or changed one is read; one that runs built on may not change.

    A file that tells of who was erased goes on without these rows: as Parquet, under another name where it was none.
    """
    stat, source = path.stat(), spec.sources[name.split("/")[0]]
    columns = _columns_digest(source, spec.timed)
    same_spec = entry is not None and entry["columns"] == columns
    if entry and same_spec and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return name, entry
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
        return name, {**entry, "mtime_ns": stat.st_mtime_ns}
    table, absent = read_landed(name, data, source, timed=spec.timed)
    del data
    gone = erased_rows(home, spec.pipeline, table)
    if gone.any():
        path, table = drop_rows(path, table, gone), table.filter(pa.array(~gone))
        stat, sha = path.stat(), file_digest(path)
    return path.relative_to(home.landing(spec.pipeline)).as_posix(), {
        "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha, "rows": table.num_rows, "absent": absent,
        "arrival_us": entry["arrival_us"] if entry else wall_us(), "object": store_object(table, home), "columns": columns,
    }  # fmt: skip


def _check_columns(spec: Spec, index: dict[str, dict[str, Any]]) -> None:
    """A column may begin with some file, and is null before. Raises Refused for a file that lacks what came before it."""
    before: dict[str, set[str]] = {name: set() for name in spec.sources}
    for name, entry in sorted(index.items(), key=lambda item: (item[1]["arrival_us"], item[0])):
        source = name.split("/")[0]
        if source not in before:
            continue
        absent = set(entry.get("absent", ()))
        if lost := sorted(before[source] & absent):
            raise Refused(
                f"landing file {name}: column {lost[0]!r} is missing, which files before it have; its {entry['rows']:,} rows "
                "would be null there: land it with the column, or take the column out of the spec"
            )
        before[source] |= spec.sources[source].columns.keys() - absent


def write_arrivals(snapshot: Snapshot, previous: Snapshot | None, path: Path) -> None:
    """A page of what arrived: rows per table, against the snapshot before."""
    rows = [("table", "rows", "more than before", "identical rows dropped", "rows set aside")]
    for name, count in snapshot.rows.items():
        more = f"{count - previous.rows.get(name, 0):+,}" if previous else "–"
        twice, aside = (f"{counts.get(name, 0):,}" for counts in (snapshot.duplicates, snapshot.set_aside))
        rows.append((name, f"{count:,}", more, twice, aside))
    write_page(path, f"{snapshot.pipeline}: snapshot {snapshot.digest[:12]}", [
        (f"Known up to {iso(snapshot.watermark_us)}, {snapshot.new_files} new files", rows),
    ])  # fmt: skip


def read_snapshot(home: Home, pipeline: str, digest: str) -> Snapshot:
    """The snapshot of that digest. Raises MillraceError when the home does not have it."""
    path = home.snapshots(pipeline) / f"{digest}.json"
    value = read_json(path)
    return Snapshot(
        pipeline, digest, home.relative(path), value["watermark_us"], value["until_us"], value["rows"],
        value["duplicates"], {name: aside["rows"] for name, aside in value.get("set_aside", {}).items()},
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
    body["objects"] = body.pop("landed", body["objects"])  # what is set aside is seen from then
    body.pop("set_aside", None)
    digest = digest_of({"snapshot": snapshot.digest, "until": as_of})
    path = home.snapshots(spec.pipeline) / f"{digest}.json"
    body["until_us"] = body["watermark_us"] = as_of
    write_json(path, body)
    tables = {name: read_table(spec, home, read_snapshot(home, spec.pipeline, digest), name) for name in spec.sources}
    body["rows"] = {name: table.num_rows for name, table in tables.items()}
    body["watermark_us"] = max((us for t in tables.values() if (us := newest(t)) is not None), default=as_of)
    write_json(path, body)
    return _set_aside(spec, home, read_snapshot(home, spec.pipeline, digest))


def extended(home: Home, snapshot: Snapshot, more: dict[str, pa.Table]) -> Snapshot:
    """A snapshot with more facts (source → declared columns), known whenever their own times say."""
    body = read_json(home.root / snapshot.path)
    del body["format_version"]
    for name, table in more.items():
        body["objects"][name] = sorted([*body["objects"][name], [store_object(table, home), 0]])
        body["rows"][name] += table.num_rows
    digest = digest_of({"snapshot": snapshot.digest, "objects": body["objects"]})
    write_json(home.snapshots(snapshot.pipeline) / f"{digest}.json", body)
    return read_snapshot(home, snapshot.pipeline, digest)


def read_table(spec: Spec, home: Home, snapshot: Snapshot, name: str) -> pa.Table:
    """All versions of a source's facts, sorted by key and known-at, once each, with their `_known_at`."""
    body = read_json(home.root / snapshot.path)
    table = _merge(spec, name, home, body["objects"][name]).table
    return table if body["until_us"] is None else table.filter(_within(table, body["until_us"]))


def _within(table: pa.Table, until_us: int | None) -> pa.Array:
    """Which facts are known by then; one without known-at stays, for the contract to refuse."""
    if until_us is None:
        return pa.repeat(pa.scalar(True), table.num_rows)
    return pc.fill_null(pc.less_equal(table[KNOWN].combine_chunks().cast(pa.int64()), until_us), True)


def landed_files(folder: Path) -> list[Path]:
    """The files of a source, in the order of their names; those that are being written do not count."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))


def grew_from(home: Home, snapshot: Snapshot, since: Snapshot) -> bool:
    """Whether a snapshot knows every fact that an earlier one knows."""
    now, then = (read_json(home.root / s.path)["objects"] for s in (snapshot, since))
    lost = any(listed not in now[name] for name in then for listed in then[name])
    return not lost and (since.until_us or 0) <= (snapshot.until_us or NEVER)


def facts_since(spec: Spec, home: Home, snapshot: Snapshot, since: Snapshot, name: str, table: pa.Table) -> pa.Table:
    """The facts of a source that a snapshot knows and the one that it grew from may not; `table`: all that it knows."""
    now, then = (read_json(home.root / s.path)["objects"][name] for s in (snapshot, since))
    new = [listed for listed in now if listed not in then]
    parts = [_merge(spec, name, home, new).table] if new else [table.slice(0, 0)]
    if since.until_us is not None:
        parts.append(table.filter(pc.greater(table[KNOWN].cast(pa.int64()), since.until_us)))
    found = pa.concat_tables(parts)
    return found if snapshot.until_us is None else found.filter(pc.less_equal(found[KNOWN].cast(pa.int64()), snapshot.until_us))


def landing_index(home: Home, pipeline: str) -> dict[str, dict[str, Any]]:
    """What was taken in: landing file → its object, when it arrived, and how it looked then."""
    path = _index_path(home, pipeline)
    return dict(read_json(path)["files"]) if path.exists() else {}


def write_landing_index(home: Home, pipeline: str, files: dict[str, dict[str, Any]]) -> None:
    """See `landing_index`."""
    write_json(_index_path(home, pipeline), {"files": files})


def _index_path(home: Home, pipeline: str) -> Path:
    return home.snapshots(pipeline) / "landing.json"


def snapshot_files(home: Home, pipeline: str) -> list[Path]:
    """The file of every snapshot, named by its digest."""
    return [p for p in sorted(home.snapshots(pipeline).glob("*.json")) if p != _index_path(home, pipeline)]


def _landed(spec: Spec, home: Home) -> dict[str, Path]:
    root = home.landing(spec.pipeline)
    found = {}
    for source in spec.sources:
        files = landed_files(root / source)
        if not files:
            hint = f"`millrace sample {spec.pipeline}`" if spec.sample else "your files there"
            forms = "Parquet, CSV, JSON lines or TFRecord"
            raise Refused(f"no files landed for source {source!r}: expected {forms} in {root / source}; put {hint}")
        found.update({p.relative_to(root).as_posix(): p for p in files})
    return found


def store_object(table: pa.Table, home: Home) -> str:
    """Writes the table as an object named by its values; one that is there stays as it is."""
    sha = values_digest(table)
    path = home.objects / f"{sha}.parquet"
    if not path.exists():
        write_facts(table, path)
    return sha


def write_facts(table: pa.Table, path: Path) -> None:
    """Writes facts as Parquet: the file is whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}")
    try:
        pq.write_table(table.replace_schema_metadata({"format_version": "1"}), scratch, compression="zstd")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def values_digest(table: pa.Table) -> str:
    """SHA-256 over names, types and values of a table, in the order of its rows."""
    sha = hashlib.sha256()
    for name in sorted(table.column_names):
        column = one_chunk(table[name])
        sha.update(f"{name}:{column.type}:{len(column)}".encode())
        sha.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).data)
        if pa.types.is_string(column.type):
            sha.update(filled(pc.binary_length(column), 0).data)
            sha.update(_text(column.fill_null("")))
        elif pa.types.is_timestamp(column.type):
            sha.update(filled(column.cast(pa.int64()), 0).data)
        elif pa.types.is_floating(column.type):
            sha.update((filled(column, 0.0) + 0.0).data)  # −0.0 is 0.0
        else:
            sha.update(filled(column, False if pa.types.is_boolean(column.type) else 0).data)
    return sha.hexdigest()


def _text(texts: pa.Array) -> memoryview:
    """The UTF-8 of all texts, none of them null, one after the other; not copied."""
    _, offsets, data = texts.buffers()
    at = np.frombuffer(offsets, np.int32)[texts.offset :] if len(texts) else np.zeros(1, np.int32)
    return memoryview(data or b"")[at[0] : at[len(texts)]]


@dataclass(frozen=True)
class _Merged:
    """Every version of a source once, sorted by key and known-at; and where each of L landed rows is in it."""

    table: pa.Table
    order: np.ndarray  # which row it was, counted through all objects (L)
    equal: np.ndarray  # whether the row before says the same (bool, L)
    begins: np.ndarray  # the first row of each object

    @cached_property
    def origin(self) -> np.ndarray:
        """Number of its object (L)."""
        return np.searchsorted(self.begins, self.order, side="right") - 1

    @cached_property
    def row(self) -> np.ndarray:
        """Row of that object (L)."""
        return self.order - self.begins[self.origin]

    @cached_property
    def place(self) -> np.ndarray:
        """Row of the table (L)."""
        return np.cumsum(~self.equal) - 1


def _merge(spec: Spec, name: str, home: Home, objects: list[list]) -> _Merged:
    """Raises Refused where facts clash, unless the source may set rows aside."""
    source, begins = spec.sources[name], [0]

    def landed() -> Iterator[pa.Table]:
        for sha, arrival_us in objects:
            part = pq.read_table(home.objects / f"{sha}.parquet")
            begins.append(begins[-1] + part.num_rows)
            yield part.append_column(KNOWN, known_at(part, source, arrival_us))

    table, order, equal, clash = in_order(pa.concat_tables(landed()), source)
    merged = _Merged(table, order, equal, np.array(begins[:-1]))
    if not source.quarantine and clash.any():
        at = int(np.flatnonzero(clash)[0])
        fact = {k: str(table[k][at]) for k in source.key}
        shas, files = {objects[number][0] for number in merged.origin[at - 1 : at + 1]}, _files_of(spec, home)
        places = sorted(f"{files.get(sha, 'no landing file')} (object {sha[:12]})" for sha in shas)
        raise Refused(
            f"source {name!r}: {int(clash.sum())} fact(s) with the same key and known-at but other values, "
            f"such as {fact} known at {table[KNOWN][at]} in {' and '.join(places)}; "
            "a correction needs a later known-at"
        )
    return replace(merged, table=table.filter(pa.array(~equal)).combine_chunks()) if equal.any() else merged


def in_order(table: pa.Table, source: Source) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    """Facts (N) by key and known-at; which row each was; which say what the one before says (bool), and which contradict it."""
    by, columns = [*source.key, KNOWN], dict(zip(table.column_names, table.columns, strict=True))
    if source.quarantine:  # clashing facts stay for now: in an order that their values give
        by += [c for c in columns if c not in by]
    place = pc.sort_indices(table.select(by).combine_chunks(), [(k, "ascending") for k in by])
    del table  # each column is freed as it is put in order
    table = pa.table({name: one_chunk(columns.pop(name).take(place)) for name in [*columns]})
    order, none = place.to_numpy().view(np.int64), np.zeros(table.num_rows, bool)
    if table.num_rows < 2:
        return table, order, none, none
    known = table[KNOWN].chunk(0).cast(pa.int64()).fill_null(0)
    again = reduce(pc.and_, [_same(known), *(_same(table[k].chunk(0)) for k in source.key)])
    if not pc.any(again, min_count=0).as_py():
        return table, order, none, none
    twice = again.fill_null(False).to_numpy(zero_copy_only=False)
    equal = twice.copy()
    for column in set(table.column_names) - {*source.key, KNOWN}:
        equal &= _unchanged(table[column].chunk(0)).to_numpy(zero_copy_only=False)
    return table, order, np.append(False, equal), np.append(False, twice & ~equal)


def _set_aside(spec: Spec, home: Home, snapshot: Snapshot) -> Snapshot:
    """The snapshot without its bad rows, which then lie in `quarantine/PIPELINE/SNAPSHOT16/SOURCE.parquet`.

    The same snapshot where none are bad, or more of a source than may be: then the contract refuses them.
    """
    if not any(source.quarantine for source in spec.sources.values()):
        return snapshot
    memo = home.snapshots(spec.pipeline) / "by_objects" / f"{digest_of([snapshot.digest, _source_digest(spec)])}.json"
    if memo.exists():
        return read_snapshot(home, spec.pipeline, read_json(memo)["snapshot"])
    body = read_json(home.root / snapshot.path)
    del body["format_version"]
    merged = {name: _merge(spec, name, home, body["objects"][name]) for name in spec.sources}
    known = {name: np.asarray(_within(m.table, body["until_us"])) for name, m in merged.items()}
    tables = {name: m.table.filter(pa.array(known[name])) for name, m in merged.items()}
    found = bad_rows(spec, tables)
    if not any(bad.mask.any() for bad in found.values()) or any(bad.too_many for bad in found.values()):
        write_json(memo, {"snapshot": snapshot.digest})
        return snapshot
    body["landed"], body["objects"], body["set_aside"], aside = body["objects"], dict(body["objects"]), {}, {}
    for name, bad in found.items():
        if not bad.mask.any():
            continue
        gone = np.zeros(merged[name].table.num_rows, bool)
        gone[known[name]] = bad.mask
        body["objects"][name] = _without(home, body["landed"][name], merged[name], gone)
        aside[name] = _reasoned(tables[name], bad)
        body["set_aside"][name] = {"rows": int(bad.mask.sum()), "reasons": [[*why, count] for why, count in bad.counts.items()]}
        body["rows"][name] -= int(bad.mask.sum())
        tables[name] = tables[name].filter(pa.array(~bad.mask))
    digest = digest_of({"snapshot": snapshot.digest, "set_aside": {name: values_digest(t) for name, t in aside.items()}})
    files = _files_of(spec, home)
    for name, table in aside.items():
        places = np.flatnonzero(known[name])[found[name].mask]
        located = _located(table, merged[name], body["landed"][name], places, files)
        write_facts(located, quarantined(home, spec.pipeline, digest, name))
    body["watermark_us"] = max((us for t in tables.values() if (us := newest(t)) is not None), default=0)
    body["watermark"] = iso(body["watermark_us"])
    write_json(home.snapshots(spec.pipeline) / f"{digest}.json", body)
    write_json(memo, {"snapshot": digest})
    return read_snapshot(home, spec.pipeline, digest)


def quarantined(home: Home, pipeline: str, digest: str, source: str) -> Path:
    """Where the rows lie that a snapshot set aside, with `_rule`, `_column`, `_reasons`, `_file` and `_row` (from 0)."""
    return home.root / "quarantine" / pipeline / digest[:16] / f"{source}.parquet"


def _without(home: Home, objects: list[list], merged: _Merged, gone: np.ndarray) -> list[list]:
    """The objects, those with rows that are gone replaced by ones without."""
    lost = gone[merged.place]
    kept = []
    for number, (sha, arrival_us) in enumerate(objects):
        rows = merged.row[lost & (merged.origin == number)]
        if len(rows):
            part = pq.read_table(home.objects / f"{sha}.parquet").replace_schema_metadata(None)
            stays = np.ones(part.num_rows, bool)
            stays[rows] = False
            sha = store_object(part.filter(pa.array(stays)), home)
        kept.append([sha, arrival_us])
    return sorted(kept)


def _reasoned(table: pa.Table, bad: BadRows) -> pa.Table:
    """The bad rows, with the first reason and all of them."""
    rows = np.flatnonzero(bad.mask)
    why = [[reason for reason, mask in bad.reasons.items() if mask[row]] for row in rows]
    table = table.take(pa.array(rows))
    texts = {"_rule": [w[0][0] for w in why], "_column": [w[0][1] for w in why],
             "_reasons": ["; ".join(f"{rule}: {column}" for rule, column in w) for w in why]}  # fmt: skip
    for name, values in texts.items():
        table = table.append_column(name, pa.array(values, pa.string()))
    return table


def _located(
    table: pa.Table, merged: _Merged, objects: list[list], places: np.ndarray, files: dict[str, str]
) -> pa.Table:  # fmt: skip
    """Rows at these places of a merged table, with the file and its row that each was first found in."""
    order = np.lexsort([merged.row, merged.origin, merged.place])
    first = order[np.searchsorted(merged.place[order], places)]
    table = table.append_column("_file", pa.array([files.get(objects[o][0], "") for o in merged.origin[first]], pa.string()))
    return table.append_column("_row", pa.array(merged.row[first], pa.int64()))


def _files_of(spec: Spec, home: Home) -> dict[str, str]:
    """Object → the first landing file that holds it."""
    return {entry["object"]: name for name, entry in sorted(landing_index(home, spec.pipeline).items(), reverse=True)}


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


def known_at(table: pa.Table, source: Source, arrival_us: int) -> pa.Array:
    """When each fact became known, by the rule of its source."""
    rule, stamp = source.known_at, ARROW["timestamp"]
    if rule is None:
        return pa.repeat(pa.scalar(0, pa.int64()), table.num_rows).cast(stamp)
    if rule.arrival:
        return pa.repeat(pa.scalar(arrival_us, pa.int64()), table.num_rows).cast(stamp)
    if rule.column:
        return table[rule.column].combine_chunks().cast(stamp)
    assert source.event_time is not None
    return pc.add(table[source.event_time].combine_chunks().cast(pa.int64()), rule.lag).cast(stamp)


def newest(table: pa.Table) -> int | None:
    """The largest known-at, µs; None without facts."""
    found: int | None = pc.max(table[KNOWN]).cast(pa.int64()).as_py()
    return found


def _publish(spec: Spec, home: Home, index: dict[str, dict]) -> Snapshot:
    """Writes the snapshot of an index, unless these objects already have one."""
    objects: dict[str, list[list]] = {name: [] for name in spec.sources}
    for name, entry in sorted(index.items()):
        source = name.split("/")[0]
        if source in objects:
            rule = spec.sources[source].known_at
            arrival = entry["arrival_us"] if rule and rule.arrival else 0
            objects[source].append([entry["object"], arrival])
    for listed in objects.values():
        listed.sort()
    memo = home.snapshots(spec.pipeline) / "by_objects" / f"{digest_of([objects, _source_digest(spec)])}.json"
    if memo.exists():
        return read_snapshot(home, spec.pipeline, read_json(memo)["snapshot"])
    rows, duplicates, latest, sha = {}, {}, [], hashlib.sha256()
    for name in sorted(objects):
        merged = _merge(spec, name, home, objects[name])
        table, duplicates[name] = merged.table, int(merged.equal.sum())
        del merged
        rows[name] = table.num_rows
        latest += [us for us in [newest(table)] if us is not None]
        arrives = (known := spec.sources[name].known_at) is not None and known.arrival
        values = table if arrives else table.drop_columns([KNOWN])
        sha.update(f"{name}={values_digest(values)};".encode())
        del table, values
    digest, watermark = sha.hexdigest(), max(latest, default=0)
    body = {"pipeline": spec.pipeline, "objects": objects, "rows": rows, "duplicates": duplicates,
            "watermark_us": watermark, "watermark": iso(watermark), "until_us": None,
            "schema": {name: json.loads(spec.sources[name].model_dump_json())["columns"] for name in rows}}  # fmt: skip
    path = home.snapshots(spec.pipeline) / f"{digest}.json"
    write_json(path, body)
    write_json(memo, {"snapshot": digest})
    return Snapshot(spec.pipeline, digest, home.relative(path), watermark, None, rows, duplicates)


def _columns_digest(source: Source, timed: bool) -> str:
    """Names what is read from a file of this source, and how."""
    digested = source.key == ("row_digest",) and not timed
    return digest_of([{c: column.type for c, column in source.columns.items()}, digested])


def _source_digest(spec: Spec) -> str:
    return digest_of({name: json.loads(s.model_dump_json()) for name, s in spec.sources.items()})
