"""The offline store and data versions on a server that speaks S3."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from features.quick_feast import FeatureStore, ValueType, types
from features.versions import check_out, drop, files_of, track
from pipelines.errors import MillraceError
from pipelines.home import Home
from tests.data.test_asof import (
    K_X,
    START,
    US,
    applied,
    at,
    entities,
    newest_known,
    pulled,
    random_world,
    repo,
    seen,
    simple,
    small_repo,
    view,
    write,
    writers,
)
from tests.data.test_versions import home
from tests.e2e.buses import Buses

from feast.infra.offline_stores.file_source import SavedDatasetFileStorage  # isort: skip — after quick_feast

pytestmark = pytest.mark.s3
__all__ = ["home", "repo", "small_repo"]


@pytest.fixture
def bucket(s3: str) -> fs.SubTreeFileSystem:
    """The bucket, empty."""
    system = fs.S3FileSystem(endpoint_override=s3)
    system.delete_dir_contents("bucket")
    return fs.SubTreeFileSystem("bucket", system)


def names(bucket: fs.FileSystem) -> list[str]:
    return sorted(i.path for i in bucket.get_file_info(fs.FileSelector("", recursive=True)) if i.type == fs.FileType.File)


def put(bucket: fs.FileSystem, name: str, folder: Path, facts: Sequence[dict[str, Any]], kinds: Any = None) -> None:
    path = write(folder / "scratch.parquet", facts, kinds=kinds or K_X)
    with bucket.open_output_stream(name) as out:
        out.write(path.read_bytes())


@pytest.fixture
def one(bucket: fs.FileSystem, s3: str, repo: Path) -> FeatureStore:
    """A view of two objects below one prefix. Key 1: known at 10, corrected at 30; key 2 at 15."""
    put(bucket, "facts/0.parquet", repo, [simple(1, 10, 10, 1.0), simple(2, 15, 15, 4.0)])
    put(bucket, "facts/1.parquet", repo, [simple(1, 10, 30, 3.0)])
    return applied(repo, view("v", "s3://bucket/facts", endpoint=s3))


@pytest.mark.parametrize("limit", ["repo", "small_repo"])
@pytest.mark.parametrize("seed", range(4))
def test_random_facts_as_known(bucket: fs.FileSystem, s3: str, seed: int, limit: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(limit)
    views, ttl, rows = random_world(seed + 100)
    kinds = {"k": pa.int64(), "s": pa.string(), "x": pa.float64(), "label": pa.string(), "n": pa.int64()}
    put(bucket, "v.parquet", folder, views[1], kinds)
    keys = {"k": ValueType.INT64, "s": ValueType.STRING}
    store = applied(folder, view("v", "s3://bucket/v.parquet", keys=keys, ttl=ttl[1], endpoint=s3, label=types.String))
    rows = rows or [{"k": 1, "s": "a", "t": 3}]
    found = store.get_historical_features(entity_df=entities(rows), features=["v:label"]).to_arrow()["label"].to_pylist()
    facts = [newest_known(views[1], {"k": row["k"], "s": row["s"]}, row["t"], ttl[1]) for row in rows]
    assert found == [fact and fact["label"] for fact in facts]


def test_facts_are_pulled_and_materialised(one: FeatureStore) -> None:
    assert pulled(one, 10, 12) == [1.0, 3.0]
    one.materialize(START, START + 30 * US)
    answer = one.get_online_features(features=["v:x"], entity_rows=[{"k": k} for k in (1, 2, 3)]).to_dict()
    assert answer["x"] == [3.0, 4.0, None]


@pytest.mark.parametrize("name", ["saved.parquet", "saved"])
def test_a_result_is_persisted_and_read_back(one: FeatureStore, bucket: fs.FileSystem, s3: str, name: str) -> None:
    storage = SavedDatasetFileStorage(path=f"s3://bucket/{name}", s3_endpoint_override=s3)
    for times, values in (((10, 20), [1.0, 4.0]), ((30, 40), [3.0, 4.0])):
        frame = entities([{"k": 1, "t": times[0]}, {"k": 2, "t": times[1]}])
        one.get_historical_features(entity_df=frame, features=["v:x"]).persist(storage, allow_overwrite=True)
        (saved,) = [n for n in names(bucket) if n.startswith("saved")]
        assert pq.read_table(saved, filesystem=bucket)["x"].to_pylist() == values
    one.create_saved_dataset(
        from_=one.get_historical_features(entity_df=frame, features=["v:x"]), name="set", storage=storage, allow_overwrite=True
    )
    assert one.get_saved_dataset("set").to_df()["x"].tolist() == [3.0, 4.0]


def test_a_result_that_breaks_off_leaves_nothing(one: FeatureStore, bucket: fs.FileSystem, s3: str, repo: Path) -> None:
    before = names(bucket)
    query = "SELECT 1 AS k, make_timestamptz(n) AS event_timestamp, error('broken') FROM range(5) t(n)"
    with pytest.raises(Exception, match="broken"):
        one.get_historical_features(entity_df=query, features=["v:x"]).persist(
            SavedDatasetFileStorage(path="s3://bucket/saved.parquet", s3_endpoint_override=s3)
        )
    assert names(bucket) == before


@pytest.mark.slow
def test_two_writers_append_at_once(one: FeatureStore, repo: Path) -> None:
    for writer in writers(repo, (100, 8), (200, 8)):
        assert writer.wait(timeout=60) == 0
    assert seen(one, [(k, 10**6) for k in (1, 100, 107, 108, 200, 207)]) == [3.0, 100.0, 107.0, None, 200.0, 207.0]


def test_one_object_is_not_appended_to(bucket: fs.FileSystem, s3: str, repo: Path) -> None:
    put(bucket, "f.parquet", repo, [simple(1, 10, 10, 1.0)])
    store = applied(repo, view("v", "s3://bucket/f.parquet", endpoint=s3))
    with pytest.raises(MillraceError, match="make it a folder"):
        store.write_to_offline_store("v", pd.DataFrame({"k": [1], "x": [2.0], "event": [at(20)], "created": [at(20)]}))
    assert seen(store, [(1, 20)]) == [1.0]


def test_versions_of_data_lie_in_the_bucket(bucket: fs.FileSystem, buses: Buses, home: Home, tmp_path: Path) -> None:
    digest = buses.snapshot.digest
    version = track(home, "buses", digest, "s3://bucket/dvc")
    assert version.remote == "s3://bucket/dvc" and len(names(bucket)) == version.files + 1
    second = Home(tmp_path / "second")
    brought = check_out(second, "buses", digest, version)
    assert (brought.objects, brought.landed) == (3, 3)
    shutil.rmtree(tmp_path / "second")
    drop(home, {*files_of(home, "buses", digest).values()}, "s3://bucket/dvc")
    assert names(bucket) == []
    with pytest.raises(MillraceError, match="cannot be had from s3://bucket/dvc"):
        check_out(second, "buses", digest, version)
