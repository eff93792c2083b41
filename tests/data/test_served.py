"""`get_online_features` on the registry of a pipeline, and Feast's own views, in each kind of served store."""

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import features.quick_feast  # noqa: F401  # isort: skip
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_source import PushMode
from feast.types import Float64, Int64, String

from deploy.process import free_port
from features.cells import Update, open_cells, writable_cells
from features.facts import Columns
from features.feed import feed
from features.few import FEW_ROWS
from features.frame import derive_all, own_columns
from features.online import OnlineStore, own_keys
from features.store import build_features, open_feast
from features.views import absent, stored_views
from pipelines.clock import Anchor
from tests.agreement import arrow, make_world, same_frames, serve_world

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


# Views of ours


@pytest.mark.parametrize("seed", range(3010, 3022))
def test_feast_reads_the_cells_that_the_endpoint_reads(seed: int, tmp_path: Path) -> None:
    world = make_world(seed, tmp_path)
    spec, built = world.spec, build_features(world.spec, world.home, world.snapshot)
    now = sorted(request.t for request in world.case.requests)[4]
    feed(spec, world.home.root / built.path, world.home.online(spec.pipeline, built.defs_digest), Anchor(now, 0), built.snapshot)
    settings = world.home.root / built.path / "feature_store.yaml"
    settings.write_text(settings.read_text().replace('"clock": "wall"', '"clock": "data"'))  # it stands at `now`
    lean = OnlineStore(spec, world.home.online(spec.pipeline, built.defs_digest))
    versions = [request.version for request in world.case.requests]
    own = own_columns(spec, arrow(spec.row_source, versions))
    t = np.full(len(versions), now)
    raw = lean.views_at(own, t, own_keys(spec, own, (s.key for s in stored_views(spec)), len(t)))
    through = through_feast(open_feast(world.home, built), spec, own, len(versions))
    for view, tables in raw.items():
        for name, columns in tables.items():
            if next(s for s in stored_views(spec) if s.name == name).kind != "sequence":
                assert same_frames(columns, through[view][name]) == [], (seed, name)


@pytest.mark.parametrize("seed", range(3030, 3042))
def test_few_rows_have_the_features_of_many(seed: int, tmp_path: Path) -> None:
    """What is cut out of the packed values, each formula once over all views, is what their columns give view by view."""
    world = make_world(seed, tmp_path)
    times = sorted(request.t for request in world.case.requests)
    store, spec = serve_world(world, tmp_path, anchor=times[4]), world.spec
    versions = [request.version for request in world.case.requests][:FEW_ROWS]
    own, t = own_columns(spec, arrow(spec.row_source, versions)), np.maximum(times[: len(versions)], times[4])
    keys = own_keys(spec, own, (s.key for s in stored_views(spec)), len(t))
    few, many = store.features_at(own, t)[0], derive_all(spec, store.views_at(own, t, keys), t, own)
    assert few.keys() == many.keys() and same_frames(few, {name: many[name] for name in few}) == []
    for i in range(0, len(t), 5):
        alone, row = store.features_at({n: v[i : i + 1] for n, v in own.items()}, t[i : i + 1])[0], slice(i, i + 1)
        assert same_frames(alone, {name: few[name][row] for name in alone}) == []


def through_feast(store: FeatureStore, spec: Any, own: Columns, rows: int) -> dict[str, dict[str, Columns]]:
    """What `get_online_features` gives for the keys of the rows, as `frame.assemble` takes it; null keys are asked apart."""
    found: dict[str, dict[str, Columns]] = {}
    for stored in stored_views(spec):
        if stored.kind == "sequence":
            continue
        keys = own_keys(spec, own, [stored.key], rows)[stored.key]
        whole = [i for i, key in enumerate(keys) if key is not None]
        names = [*stored.integers, *(n for n, _ in stored.values)]
        kinds = dict(stored.values)
        columns: Columns = {n: np.full(rows, absent(n)) for n in stored.integers}
        columns |= {n: np.full(rows, None, object) if k == "string" else np.full(rows, np.nan) for n, k in kinds.items()}
        if whole:
            kind = {c: {"string": str, "bool": bool}.get(spec.row_source.columns[c].type, int) for c in stored.key}
            asked = [{c: kind[c](own[c][i]) for c in stored.key} or {"__dummy_id": ""} for i in whole]
            refs = [f"{stored.name}:{n}" for n in names]
            answer = store.get_online_features(refs, asked, full_feature_names=True).to_dict()
            for n in names:
                for i, value in zip(whole, answer[f"{stored.name}__{n}"], strict=True):
                    if value is not None:
                        columns[n][i] = value
        found.setdefault(stored.view, {})[stored.name] = columns
    return found


def test_a_registry_that_feast_has_emptied_is_made_again(tmp_path: Path) -> None:
    """`feast apply` in a folder without definitions deletes whatever is registered."""
    world = make_world(3010, tmp_path)
    built = build_features(world.spec, world.home, world.snapshot)
    folder, store = world.home.root / built.path, open_feast(world.home, built)
    keys = [c for v in store.list_feature_views() for c in v.join_keys if c != "__dummy_id"]
    entities = pd.DataFrame({"event_timestamp": [NOON], **{key: [None] for key in keys}})
    if order := next((v.tags["millrace.order"] for v in store.list_feature_views() if "millrace.order" in v.tags), ""):
        entities[order] = NOON
    store.get_historical_features(entities, store.get_feature_service(world.spec.pipeline), full_feature_names=True).to_arrow()
    made = folder.stat().st_ino
    assert build_features(world.spec, world.home, world.snapshot) == built and folder.stat().st_ino == made
    store.apply([], objects_to_delete=[*store.list_feature_views(), *store.list_feature_services()], partial=False)
    assert build_features(world.spec, world.home, world.snapshot) == built
    assert open_feast(world.home, built).get_feature_service(world.spec.pipeline).feature_view_projections


@pytest.mark.slow
def test_the_ui_of_feast_shows_our_views(tmp_path: Path) -> None:
    world = make_world(3010, tmp_path)
    folder = world.home.root / build_features(world.spec, world.home, world.snapshot).path
    url = f"http://127.0.0.1:{(port := free_port())}/api/v1/feature_views?project={world.spec.pipeline}"
    words = [str(Path(sys.executable).with_name("feast")), "-c", str(folder), "ui", "--port", str(port)]
    ui = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            assert ui.poll() is None
            with suppress(OSError):
                shown = json.load(urllib.request.urlopen(url, timeout=10))
                break
            time.sleep(0.5)
    finally:
        ui.kill()
    assert {view["spec"]["name"] for view in shown["featureViews"]} == {stored.name for stored in stored_views(world.spec)}


# Views of Feast's own


def repository(folder: Path, place: str, ttl: timedelta = timedelta(0)) -> FeatureStore:
    """A store with one view of stops, of which Feast knows no more than that it is a Parquet file."""
    folder.mkdir(exist_ok=True)
    (folder / "feature_store.yaml").write_text(
        "project: mine\nprovider: local\nregistry: {path: registry.pb, cache_ttl_seconds: 0}\n"
        "offline_store: {type: features.asof.AsofOfflineStore}\n"
        f"online_store: {{type: features.served.ServedOnlineStore, store: '{place}'}}\nentity_key_serialization_version: 3\n"
    )
    stop = Entity(name="stop", join_keys=["stop"], value_type=ValueType.STRING)
    batch = FileSource(name="stops", path=str(folder / "stops.parquet"), timestamp_field="at", created_timestamp_column="made")
    source = PushSource(name="pushed", batch_source=batch)
    fields = [Field(name="waiting", dtype=Int64), Field(name="wait", dtype=Float64), Field(name="line", dtype=String)]
    store = FeatureStore(repo_path=str(folder))
    store.apply([stop, FeatureView(name="stops", entities=[stop], ttl=ttl, schema=fields, source=source)])
    return store


def stops(rows: list[tuple[str, int | None, float | None, str | None, datetime]]) -> pa.Table:
    stop, waiting, wait, line, at = map(list, zip(*rows, strict=True))
    stamps = pa.array(at, pa.timestamp("us", "UTC"))
    return pa.table({"stop": stop, "waiting": pa.array(waiting, pa.int64()), "wait": pa.array(wait, pa.float64()),
                     "line": pa.array(line, pa.string()), "at": stamps, "made": stamps})  # fmt: skip


def read(store: FeatureStore, *names: str) -> dict[str, list[Any]]:
    return store.get_online_features(
        ["stops:waiting", "stops:wait", "stops:line"], [{"stop": name} for name in names]
    ).to_dict()  # fmt: skip


def test_what_is_materialised_is_read(place: str, tmp_path: Path) -> None:
    rows = [("a", 3, 1.5, "L1", NOON), ("b", None, None, None, NOON), ("a", 4, 2.5, "L2", NOON + timedelta(hours=1))]
    store = repository(tmp_path / "repo", place)
    pq.write_table(stops(rows), tmp_path / "repo" / "stops.parquet")
    store.materialize(NOON - timedelta(days=1), NOON + timedelta(days=1))
    found = read(store, "a", "b", "nobody", "a")
    assert found["waiting"] == [4, None, None, 4] and found["wait"] == [2.5, None, None, 2.5]
    assert found["line"] == ["L2", None, None, "L2"]
    raw = store.get_online_features(["stops:waiting"], [{"stop": "b"}, {"stop": "nobody"}]).proto
    statuses = list(raw.results[-1].statuses)
    assert statuses[0] != statuses[1]  # a stored null is not an unknown key


def test_an_older_event_never_replaces_a_newer_one(place: str, tmp_path: Path) -> None:
    store = repository(tmp_path / "repo", place)
    for waiting, at in ((5, NOON), (4, NOON - timedelta(hours=1)), (6, NOON + timedelta(hours=1)), (7, NOON)):
        store.push("pushed", stops([("a", waiting, 0.5, "L1", at)]).to_pandas(), to=PushMode.ONLINE)
    assert read(store, "a")["waiting"] == [6]


def test_a_ttl_counts_when_reading(place: str, tmp_path: Path) -> None:
    store = repository(tmp_path / "repo", place, ttl=timedelta(hours=2))
    now = datetime.now(UTC)
    rows = [("old", 1, 0.5, "L1", now - timedelta(hours=3)), ("new", 2, 0.5, "L1", now - timedelta(hours=1))]
    store.push("pushed", stops(rows).to_pandas(), to=PushMode.ONLINE)
    assert read(store, "old", "new")["waiting"] == [None, 2]


def test_a_release_leaves_the_views_of_feast_alone(place: str, tmp_path: Path) -> None:
    store = repository(tmp_path / "repo", place)
    store.push("pushed", stops([("a", 5, 0.5, "L1", NOON)]).to_pandas(), to=PushMode.ONLINE)
    cells = writable_cells(place)
    assert cells.feed(lambda held: Update({"data_us": "1"}, [("rows", "k", b"x")]))
    assert read(store, "a")["waiting"] == [5]
    store.teardown()
    assert open_cells(place).get([("rows", ["k"])]) == [{"k": b"x"}]


def test_a_view_of_ours_is_not_written_through_feast(tmp_path: Path) -> None:
    world = make_world(3010, tmp_path)
    built = build_features(world.spec, world.home, world.snapshot)
    store = open_feast(world.home, built)
    view = store.get_feature_view(stored_views(world.spec)[0].name)
    with pytest.raises(ValueError, match="is fed by releases"):
        store._get_provider().online_write_batch(store.config, view, [], None)
