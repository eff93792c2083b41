"""`millrace erase`: one entity leaves the home: landing, objects, snapshots and their versions, logs, pages and what serves.

It first leaves a mark (`features.erased`), which names the runs and releases that had seen it and keeps a copy that lands
again out. Every later step looks for what is left, so a repeat finishes what a kill left half-done. Snapshots keep their
names, though they hold less; models that learned from the entity stay, and are named. What a running endpoint has not
written yet is waited for.
"""

import hashlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.contents import sign_again
from deploy.process import running
from deploy.redact import Redactor
from deploy.rollout import released, served_stores
from deploy.skew import requests
from features.cells import cleared, writable_cells
from features.erased import Entity, drop_rows, mark_of, write_mark
from features.feed import feed
from features.ingest import (
    landed_files,
    landing_index,
    read_snapshot,
    read_table,
    snapshot_files,
    store_object,
    write_landing_index,
)  # fmt: skip
from features.keys import key_arrays, one_chunk, request_key, text_keys, true
from features.landed import read_landed
from features.online import anchor_of
from features.push import Delivery, event_tables
from features.store import build_features
from features.tokens import Tokens
from features.trainset import TOKENS
from features.versions import drop, drop_half_made, files_of, forget, objects_of, remote_of, track, version_of
from pipelines.arrow import owned
from pipelines.errors import Refused, UsageError
from pipelines.home import Home
from pipelines.manifest import file_digest, read_json, write_atomic, write_json
from pipelines.run import run_lock
from pipelines.spec import Spec

OURS = ("runs", "releases", "predictions", "scores", "quarantine", "events", "backfills", "studies", "lineage")
SHARED = ("artifacts", "bentoml", "prefect", "errors", "mlflow", "wandb")
FLUSHED = 2  # times the promised age of a logged answer
TEXT = (".json", ".jsonl", ".md", ".html", ".txt", ".csv", ".yaml", ".log", "")


@dataclass(frozen=True)
class Erased:
    """Rows that left landing files and objects, files that were changed beside these, and who had seen the entity."""

    pipeline: str
    landed_rows: int
    object_rows: int
    files: int
    runs: tuple[str, ...]
    releases: tuple[str, ...]
    snapshots: tuple[str, ...]
    line: str


def erase(home: Home, spec: Spec, entity: Entity) -> Erased:
    """Erases an entity. Raises UsageError where nothing tells of it, and it never was erased."""
    with run_lock(home, spec.pipeline):
        seen = _seen(home, spec.pipeline, entity)
        otherwise = _landed_otherwise(home, spec, entity)
        landed = [p for p in _landing(home, spec) if entity.names(pq.read_table(p)).any()]
        if not (landed or otherwise or seen["snapshots"] or mark_of(home, spec.pipeline, entity)):
            raise UsageError(f"no row of {spec.pipeline} has {' and '.join(f'{n} = {t}' for n, t in entity.texts)}")
        redactor, (rows, md5s) = Redactor(entity), _pending(home, spec, entity)
        mark = write_mark(home, spec.pipeline, entity, seen)
        landed_rows = sum(_drop_rows(path, entity.names) for path in landed) + otherwise
        object_rows = _objects(home, spec, entity)
        _versions(home, spec, mark["snapshots"], md5s)
        for folder in (home.root / "features" / spec.pipeline, home.root / "copies"):
            shutil.rmtree(folder, ignore_errors=True)
        _serve(home, spec, entity)
        if running(home, spec.pipeline):  # it answers without the entity now, and has logged by then what it answered before
            time.sleep(FLUSHED * max([own.serve.log_flush for _, own, _ in served_stores(home, spec.pipeline, "")]) / 1e6)
        files = sum(_scrub(spec, path, entity, redactor, rows) for path in _files(home, spec.pipeline))
        _pending_file(home, spec.pipeline).unlink()
    line = f"{landed_rows:,} landed rows, {object_rows:,} rows of objects and what {files:,} other files told of it are gone"
    return Erased(spec.pipeline, landed_rows, object_rows, files, tuple(mark["runs"]), tuple(mark["releases"]),
                  tuple(mark["snapshots"]), line)  # fmt: skip


def _seen(home: Home, pipeline: str, entity: Entity) -> dict[str, list[str]]:
    """Snapshots that hold rows of it, the runs on them, and the releases that came of these."""
    bodies = {path.stem: read_json(path) for path in snapshot_files(home, pipeline)}
    bad = {sha for sha in {s for body in bodies.values() for s in objects_of(body)} if _holds(home, sha, entity)}
    snapshots = [digest for digest, body in bodies.items() if bad & objects_of(body)]
    inputs = {path.parent.name: read_json(path) for path in home.runs(pipeline).glob("*/inputs.json")}
    runs = [name for name, body in inputs.items() if body["snapshot"] in snapshots]
    releases = [r.release for r in released(home, pipeline) if r.run_id in runs or r.snapshot in snapshots]
    return {"snapshots": snapshots, "runs": runs, "releases": releases}


def _pending_file(home: Home, pipeline: str) -> Path:
    return home.erased / f"{pipeline}.pending.json"


def _pending(home: Home, spec: Spec, entity: Entity) -> tuple[pa.Array, set[str]]:
    """Text keys of the prediction rows that belong to it, and the md5s of objects that hold it; in a file until all is done."""
    path = _pending_file(home, spec.pipeline)
    held = read_json(path) if path.exists() else {"rows": [], "md5s": []}
    keys, md5s = set(held["rows"]), set(held["md5s"])
    bodies = [read_json(p) for p in snapshot_files(home, spec.pipeline)]
    asked = {sha for body in bodies for sha, _ in body["objects"].get(spec.rows.source, ())}
    for sha in {sha for body in bodies for sha in objects_of(body)}:
        if _holds(home, sha, entity):
            data = (home.objects / f"{sha}.parquet").read_bytes()
            md5s.add(hashlib.md5(data, usedforsecurity=False).hexdigest())
            if sha in asked:
                table = pq.ParquetFile(owned(data)).read()
                keys |= {*row_keys(spec, table.filter(pa.array(entity.names(table)))).drop_null().to_pylist()}
    write_json(path, {"rows": sorted(keys), "md5s": sorted(md5s)})
    return pa.array(sorted(keys), pa.string()), md5s


def row_keys(spec: Spec, table: pa.Table) -> pa.Array:
    """Text key of the prediction row that each row of any table of ours is about, null where it is about none (N)."""
    if "_key" in table.column_names and pa.types.is_string(table["_key"].type):
        return one_chunk(table["_key"])
    if set(spec.row_key) <= set(table.column_names):
        return text_keys(key_arrays(table, spec.row_key), table.num_rows)
    if {"request_id", "key"} <= set(table.column_names):
        asked = requests(spec, table) if "request" in table.column_names else []
        return pa.array([request_key(row, spec.row_key) for row in asked], pa.string())
    return pa.nulls(table.num_rows, pa.string())


def _landing(home: Home, spec: Spec) -> Iterator[Path]:
    for source in spec.sources:
        yield from sorted((home.landing(spec.pipeline) / source).rglob("*.parquet"))


def _holds(home: Home, sha: str, entity: Entity) -> bool:
    path = home.objects / f"{sha}.parquet"
    return path.exists() and bool(entity.names(pq.ParquetFile(path).read()).any())


def _objects(home: Home, spec: Spec, entity: Entity) -> int:
    """Writes objects without its rows, names these in index and snapshots, then removes those that no one names."""
    pipeline = spec.pipeline
    index = landing_index(home, pipeline)
    bodies = {path: read_json(path) for path in snapshot_files(home, pipeline)}
    named = {entry["object"] for entry in index.values()} | {sha for body in bodies.values() for sha in objects_of(body)}
    new, rows = {}, 0
    for sha in sorted(named):
        if _holds(home, sha, entity):
            table = pq.ParquetFile(home.objects / f"{sha}.parquet").read()
            gone = entity.names(table)
            rows += int(gone.sum())
            new[sha] = store_object(table.filter(pa.array(~gone)).replace_schema_metadata(None), home)
    for path, body in bodies.items():
        if new.keys() & objects_of(body):
            for part in {"objects", "landed"} & body.keys():
                body[part] = {n: sorted([new.get(sha, sha), at] for sha, at in listed) for n, listed in body[part].items()}
            del body["format_version"]
            write_json(path, {**body, "erased": True})
    for name, entry in list(index.items()):
        path = home.landing(pipeline) / name
        if not path.exists() and path.with_name(f"{path.name}.parquet").exists():
            path = path.with_name(f"{path.name}.parquet")
            index[f"{name}.parquet"] = index.pop(name)
        if path.exists():
            stat = path.stat()
            entry |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_digest(path)}
        entry["object"] = new.get(entry["object"], entry["object"])
    write_landing_index(home, pipeline, index)
    shutil.rmtree(home.snapshots(pipeline) / "by_objects", ignore_errors=True)
    for path in bodies:  # the next contract compares with what is left
        snapshot = read_snapshot(home, pipeline, path.stem)
        rows_of = {name: read_table(spec, home, snapshot, name).num_rows for name in snapshot.rows if name in spec.sources}
        if rows_of != snapshot.rows:
            del (body := read_json(path))["format_version"]
            write_json(path, {**body, "rows": rows_of})
    kept = {sha for path in home.root.glob("snapshots/*/*.json") for sha in _names(read_json(path))}
    for path in home.objects.glob("*.parquet"):
        if path.stem not in kept and _holds(home, path.stem, entity):
            path.unlink()
    return rows


def _names(body: dict[str, Any]) -> set[str]:
    """Objects that a snapshot or an index of landing files names."""
    return objects_of(body) if "objects" in body else {entry["object"] for entry in body["files"].values()}


def _versions(home: Home, spec: Spec, snapshots: list[str], md5s: set[str]) -> None:
    """Removes old bytes, those of `md5s` among them, from DVC's cache and remotes, and tracks what the snapshots are now."""
    if home.dvc.exists():
        drop_half_made(home, spec.pipeline)
        drop(home, md5s, remote_of(home, spec.versions.remote))
    current = {f"objects/{sha}.parquet" for path in snapshot_files(home, spec.pipeline) for sha in objects_of(read_json(path))}
    manifests = {path: read_json(path) for path in home.runs(spec.pipeline).glob("*/manifest.json")}
    for snapshot in snapshots:
        runs = {p: body for p, body in manifests.items() if body["inputs"]["snapshot"] == snapshot and "data_version" in body}
        version, files = version_of(home, spec.pipeline, snapshot), files_of(home, spec.pipeline, snapshot)
        old = {md5 for name, md5 in files.items() if name.startswith("objects/") and name not in current}
        if version is not None and (old or not files):
            remote = version.remote or remote_of(home, spec.versions.remote)
            drop(home, old, remote)
            drop(home, {version.md5}, remote)  # the list of the others, last
            forget(home, spec.pipeline, {snapshot})
        if version is not None or runs:
            now = vars(track(home, spec.pipeline, snapshot, spec.versions.remote))
            for path, body in runs.items():
                if body["data_version"] != now:
                    del body["format_version"]
                    write_json(path, {**body, "data_version": now, "erased": True})


def _files(home: Home, pipeline: str) -> Iterator[Path]:
    """Everything else that may tell of it."""
    for top in (*(home.root / name / pipeline for name in OURS), *(home.root / name for name in SHARED)):
        yield from (p for p in sorted(top.rglob("*")) if p.is_file() and not p.is_symlink())


def _scrub(spec: Spec, path: Path, entity: Entity, redactor: Redactor, rows: pa.Array) -> bool:
    """Removes its rows from Parquet, and its values from text and databases; whether there was something."""
    if path.suffix == ".parquet":
        changed = _drop_rows(path, lambda table: entity.is_in(table) | true(pc.is_in(row_keys(spec, table), value_set=rows))) > 0
    elif path.suffix in (".db", ".sqlite"):
        return _scrub_database(path, redactor)
    else:
        changed = path.suffix in TEXT and _scrub_text(path, redactor)
    if changed:
        _sign(path)
    return changed


def _drop_rows(path: Path, gone_of: Callable[[pa.Table], np.ndarray]) -> int:
    table = pq.ParquetFile(path).read()
    gone = gone_of(table)
    if gone.any():
        if path.name == "frame.parquet" and (tokens := path.with_name(TOKENS)).is_file():
            scratch = tokens.with_name(f".{TOKENS}")
            Tokens.load(tokens).take(~gone).save(scratch)
            scratch.replace(tokens)
            _sign(tokens)
        drop_rows(path, table, gone)
    return int(gone.sum())


def _scrub_text(path: Path, redactor: Redactor) -> bool:
    text = path.read_bytes().decode(errors="surrogateescape")
    clean = redactor.clean(text)
    if clean != text:
        write_atomic(path, clean.encode(errors="surrogateescape"))
    return clean != text


def _scrub_database(path: Path, redactor: Redactor) -> bool:
    """Cleans every text of a SQLite file, and leaves no free page with the old ones. It is not searched as bytes: a text may
    be cut where a page ends."""
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as db, cleared(db, path):
        db.create_function("clean", 1, redactor.clean)
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'").fetchall():
            for column in [row[1] for row in db.execute(f'PRAGMA table_info("{table}")')]:
                db.execute(f'UPDATE "{table}" SET "{column}" = clean("{column}") '
                           f'WHERE typeof("{column}") = \'text\' AND clean("{column}") != "{column}"')  # fmt: skip
        return db.total_changes > 0


def _sign(path: Path) -> None:
    """Writes the digest of a changed file into the `done.json` or the list of a bento above it, which so counts as whole."""
    sign_again(path)
    for folder in path.parents[:3]:
        done = folder / "done.json"
        name = path.relative_to(folder).as_posix()
        if done != path and done.is_file() and name in read_json(done).get("files", {}):
            body = read_json(done)
            body["files"][name] = file_digest(path)
            del body["format_version"]
            write_json(done, body)


def _serve(home: Home, spec: Spec, entity: Entity) -> None:
    """Writes every served store anew, as of when it was fed, from what is left, and forgets pushed events that name it."""
    stores = served_stores(home, spec.pipeline, spec.serve.store)
    for _, own, store in stores:
        cells = writable_cells(store)
        meta = cells.meta()
        if not meta:
            continue
        events = [event for event in cells.events() if event.source in own.sources]
        cells.purge([event.id for event in events if entity.names(event_tables(own, [event])[event.source]).any()])
        anchor, snapshot = anchor_of(meta), read_snapshot(home, spec.pipeline, meta["snapshot"])
        built = build_features(own, home, snapshot, since=anchor.data_us)
        left = Delivery(own, home, snapshot, anchor.data_us, [other for _, _, other in stores])
        feed(own, home.root / built.path, store, anchor, meta["snapshot"], again=True, newest=built.newest_us, fresh=left.pushed)
        cells.purge([])


def _landed_otherwise(home: Home, spec: Spec, entity: Entity) -> int:
    """Writes landing files of other forms that name it as Parquet without its rows; how many rows these were."""
    gone = 0
    for name, source in spec.sources.items():
        folder = home.landing(spec.pipeline) / name
        for path in (p for p in landed_files(folder) if p.suffix != ".parquet"):
            try:
                table = read_landed(path.name, path.read_bytes(), source, timed=spec.timed)[0]
            except Refused:  # such a file is in no snapshot; its bytes are asked instead
                if any(text.encode() in path.read_bytes() for _, text in entity.texts):
                    raise
                continue
            if (rows := entity.names(table)).any():
                drop_rows(path, table, rows)
                gone += int(rows.sum())
    return gone
