"""The feature store: Feast objects made from the spec, over the stored views of one snapshot.

A feature folder is `features/PIPELINE/DEFS/SNAPSHOT/`: `views/NAME/*.parquet`, `online_rows.parquet` for the served
store, and a Feast repository that anyone can open. It is immutable.
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.facts import Columns, Facts
from features.frame import as_array, assemble, feature_list, own_columns
from features.ingest import Snapshot, facts_since, grew_from, newest, read_snapshot, read_table
from features.keys import filled, one_chunk
from features.online import served_store
from features.packed import KEY_TAG, LAYOUT_TAG, layouts
from features.parts import Base, write_parts
from features.rows import online_rows
from features.steps import TIME
from features.views import absent, stored_views
from pipelines.clock import DAY_US, MISSING
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import code_digest, digest_of, file_digest, read_json, write_json, write_page
from pipelines.spec import Sequence, Spec, TimeSplit

if TYPE_CHECKING:
    from features.quick_feast import FeatureStore

REGISTRY = "registry.pb"


@dataclass(frozen=True)
class FeatureSet:
    """The stored features of one snapshot: folder (home-relative), digest of its views, what it was made of."""

    path: str
    digest: str
    defs_digest: str
    snapshot: str
    since_us: int
    rows: int
    newest_us: dict[str, int] = field(default_factory=dict)  # known-at of the newest fact by source
    line: str = ""

    @property
    def page(self) -> str:
        """Where the page about the views lies (home-relative)."""
        return f"{self.path}/page.md"


def defs_digest(spec: Spec) -> str:
    """Digest of everything in a spec that says what a feature is."""
    return digest_of(
        spec.model_dump(
            mode="json", include={"pipeline", "time", "sources", "rows", "predict_at", "closed_by", "features"}
        )
    )


def first_needed(spec: Spec, as_of: int) -> int:
    """Earliest time at which features are asked for, µs."""
    if not isinstance(spec.split, TimeSplit) or spec.label_delay is None:
        return MISSING
    parts = spec.split.train + spec.split.valid_fit + spec.split.valid_select + spec.split.test
    return as_of - spec.label_delay - parts - 3 * spec.split.purge


def build_features(spec: Spec, home: Home, snapshot: Snapshot, *, since: int = MISSING) -> FeatureSet:
    """The feature folder of a snapshot, found whole or built: values are right for every t ≥ since (µs)."""
    defs = defs_digest(spec)
    folder = home.features(spec.pipeline, defs, digest_of([snapshot.digest, since]))
    code = code_digest("features")
    if (folder / "done.json").exists():
        done = read_json(folder / "done.json")
        held = {**done["files"], REGISTRY: done.get("registry")}
        if done["code"] == code and all((folder / f).is_file() and file_digest(folder / f) == d for f, d in held.items()):
            return _feature_set(home, folder, done)
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
        base = _base(spec, home, snapshot, folder.parent, tables)
        rows = write_views(spec, tables, scratch, since, base)
        pq.write_table(online_rows(spec, tables, snapshot.watermark_us), scratch / "online_rows.parquet", compression="zstd")
        files = {p.relative_to(scratch).as_posix(): file_digest(p) for p in sorted(scratch.rglob("*.parquet"))}
        place = served_store(spec.serve.store, spec.pipeline, home.online(spec.pipeline, defs))
        apply_feast(spec, scratch, place if isinstance(place, str) else os.path.relpath(place, scratch), base)
        done = {
            "files": files, "registry": file_digest(scratch / REGISTRY), "code": code, "defs_digest": defs,
            "snapshot": snapshot.digest, "since_us": since,
            "watermark_us": snapshot.watermark_us, "rows": sum(rows.values()),
            "newest_us": {name: us for name, table in tables.items() if (us := newest(table)) is not None},
        }  # fmt: skip
        _summary(spec, scratch, rows)
        write_json(scratch / "done.json", done)
        scratch.replace(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return _feature_set(home, folder, done)


def features_from(spec: Spec, home: Home, snapshot: Snapshot, t: int) -> FeatureSet:
    """Features of a snapshot that are right from t (µs) on: a folder that is there, or one that begins with t's day."""
    folders = home.features(spec.pipeline, defs_digest(spec), snapshot.digest).parent
    done = [read_json(path) for path in folders.glob("*/done.json")]
    made = [body["since_us"] for body in done if body["snapshot"] == snapshot.digest and body["since_us"] <= t]
    return build_features(spec, home, snapshot, since=max(made, default=t - t % DAY_US))


def write_views(
    spec: Spec, tables: Mapping[str, pa.Table], folder: Path, since: int = MISSING, base: Base | None = None
) -> dict[str, int]:  # fmt: skip
    """Writes `views/`, right for every t ≥ since (µs); their rows by name. Parts that `base` has are taken over."""
    facts = Facts(spec, tables)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda view: write_parts(facts, view, folder, since, base), spec.features.views)
        return {name: rows for view in made for name, rows in view.items()}


def _base(spec: Spec, home: Home, snapshot: Snapshot, folders: Path, tables: Mapping[str, pa.Table]) -> Base | None:
    """The feature folder of the newest snapshot that this one grew from."""
    code, found = code_digest("features"), []
    for path in folders.glob("*/done.json"):
        body, registry = read_json(path), path.with_name(REGISTRY)
        if not registry.is_file() or file_digest(registry) != body.get("registry"):  # `feast apply` has emptied it
            continue
        if body["code"] == code and (home.snapshots(spec.pipeline) / f"{body['snapshot']}.json").exists():
            found.append((read_snapshot(home, spec.pipeline, body["snapshot"]), path.parent, body["files"]))
    older = [item for item in found if grew_from(home, snapshot, item[0])]
    if not older:
        return None
    since, folder, files = max(older, key=lambda item: (item[0].watermark_us, item[1].name))
    new = {name: facts_since(spec, home, snapshot, since, name, table) for name, table in tables.items()}
    return Base(folder, frozenset(files), new)


def _summary(spec: Spec, folder: Path, rows: Mapping[str, int]) -> None:
    features = feature_list(spec)
    groups: dict[str, list[str]] = {}
    for feature in features:
        groups.setdefault(feature.group, []).append(feature.name)
    stored = [("view", "kind", "key", "rows")]
    stored += [(v.name, v.kind, ", ".join(v.key) or "all", f"{rows[v.name]:,}") for v in stored_views(spec)]
    write_page(folder / "page.md", f"{spec.pipeline}: {len(features)} features", [
        ("Features", [(name, str(len(names)) + ": " + ", ".join(names[:6])) for name, names in groups.items()]),
        ("Stored views", stored),
    ])  # fmt: skip


def _feature_set(home: Home, folder: Path, done: Mapping[str, Any]) -> FeatureSet:
    return FeatureSet(home.relative(folder), digest_of(done["files"]), done["defs_digest"], done["snapshot"],
                      done["since_us"], done["rows"], done["newest_us"],
                      f"{done['rows']:,} steps in {len({Path(f).parent for f in done['files']}) - 1} views")  # fmt: skip


def apply_feast(spec: Spec, folder: Path, store_place: str, base: Base | None = None) -> None:
    """Writes the Feast repository of the views in `folder`: entities, feature views and one feature service.

    `store_place`: where their served store lies, relative to the folder or as a URL. `base` has the same registry.
    """
    _feast_yaml(spec, folder, store_place)
    if base:
        shutil.copyfile(base.folder / REGISTRY, folder / REGISTRY)
        return
    from features.quick_feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
    from features.quick_feast import types as feast

    types = {"string": feast.String, "int64": feast.Int64, "float64": feast.Float64, "bool": feast.Bool,
             "timestamp": feast.UnixTimestamp}  # fmt: skip
    values = {"string": ValueType.STRING, "int64": ValueType.INT64, "bool": ValueType.BOOL,
              "timestamp": ValueType.UNIX_TIMESTAMP}  # fmt: skip
    entities: dict[str, Entity] = {}
    packing = layouts(spec)
    views: list[Any] = []
    for stored in stored_views(spec):
        shape = spec.features.views[stored.view].shape
        source = spec.sources[shape.source]
        for column in stored.key:
            kind = source.columns[column].type
            entities.setdefault(column, Entity(name=column, join_keys=[column], value_type=values[kind]))
        tags = {"millrace.kind": stored.kind, "millrace.view": stored.view, KEY_TAG: json.dumps(stored.key),
                LAYOUT_TAG: json.dumps(asdict(packing[stored.name]))}  # fmt: skip
        if isinstance(shape, Sequence):
            tags |= {"millrace.order": shape.order, "millrace.within": str(shape.within)}
        fields = [Field(name=c, dtype=types[source.columns[c].type]) for c in stored.key]
        fields += [Field(name=c, dtype=feast.Int64) for c in stored.integers]
        fields += [Field(name=c, dtype=types[kind]) for c, kind in stored.values]
        views.append(
            FeatureView(
                name=stored.name, entities=[entities[c] for c in stored.key], ttl=timedelta(0), schema=fields,
                source=FileSource(name=stored.name, path=f"views/{stored.name}",
                                  timestamp_field=TIME),
                online=True, tags=tags,
            )
        )  # fmt: skip
    store = FeatureStore(repo_path=str(folder))
    store.apply([*entities.values(), *views, FeatureService(name=spec.pipeline, features=views)])


def _feast_yaml(spec: Spec, folder: Path, store_place: str) -> None:
    clock = spec.clock
    online: dict[str, Any] = {"type": "features.served.ServedOnlineStore", "store": store_place}
    if clock is not None:
        online |= {"clock": clock.kind, "speed": clock.speed, "offset": clock.offset}
    (folder / "feature_store.yaml").write_text(
        f"project: {spec.pipeline}\nprovider: local\nregistry: {{path: {REGISTRY}, cache_ttl_seconds: 0}}\n"
        "offline_store: {type: features.asof.AsofOfflineStore}\n"
        f"online_store: {json.dumps(online)}\nentity_key_serialization_version: 3\n"
        "materialization: {pull_latest_features: true}\n"
    )


def open_feast(home: Home, features: FeatureSet) -> "FeatureStore":
    """The Feast store of a feature set."""
    from features.quick_feast import FeatureStore

    return FeatureStore(repo_path=str(home.root / features.path))


def historical_features(spec: Spec, home: Home, features: FeatureSet, rows: pa.Table, t: np.ndarray) -> Columns:
    """The frame of N rows at their times `t` (µs): Feast's point-in-time join, then `frame.assemble`.

    `rows` holds the declared columns of the rows source. Raises MillraceError for a t before `since_us`.
    """
    if len(t) and t.min() < features.since_us:
        raise MillraceError("features were asked for a time before the feature set begins; build it from earlier on")
    raw = _raw_through_feast(spec, home, features, rows, t)
    return assemble(spec, own_columns(spec, rows), raw, t)


def _raw_through_feast(
    spec: Spec, home: Home, features: FeatureSet, rows: pa.Table, t: np.ndarray
) -> dict[str, dict[str, Columns]]:
    raw: dict[str, dict[str, Columns]] = {name: {} for name in spec.features.views}
    if not raw:
        return raw
    needed = {c for s in stored_views(spec) for c in s.key}
    needed |= {v.shape.order for v in spec.features.views.values() if isinstance(v.shape, Sequence)}
    entity = rows.select(sorted(needed)).append_column("event_timestamp", pa.array(t).cast(pa.timestamp("us", "UTC")))
    store = open_feast(home, features)
    job = store.get_historical_features(
        entity_df=entity.to_pandas(integer_object_nulls=True, strings_to_categorical=True), full_feature_names=True,
        features=store.get_feature_service(spec.pipeline),
    )
    joined = job.to_arrow()
    if joined.num_rows != len(t):
        raise MillraceError(f"the point-in-time join gave {joined.num_rows} rows for {len(t)}")
    found = dict(zip(joined.column_names, joined.columns, strict=True))
    del joined, entity  # each column is freed as it is read
    for stored in stored_views(spec):
        columns = {}
        for name in stored.integers:
            columns[name] = filled(one_chunk(found.pop(f"{stored.name}__{name}")).cast(pa.int64()), absent(name))
        for name, kind in stored.values:
            columns[name] = as_array(found.pop(f"{stored.name}__{name}"), kind)
        raw[stored.view][stored.name] = columns
    return raw

