"""The offline store on views of any Parquet file, against a row-by-row Python written from the text.

The text: of the facts known at t (event and created time both ≤ t) with the row's key, the newest by event time; ties
to the later created, then to the later row; none older than t − ttl; null equals nothing. Times are int µs (or ns).
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.quick_feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType, types
from pipelines.errors import MillraceError
from pipelines.manifest import ROOT
from tests.random_tables import seeds

from features import asof, known  # isort: skip — after quick_feast
from feast.errors import SavedDatasetLocationAlreadyExists  # isort: skip
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage  # isort: skip
from feast.on_demand_feature_view import on_demand_feature_view  # isort: skip
from feast.data_source import RequestSource  # isort: skip

START, US = datetime(2024, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
Row = dict[str, Any]


def at(us: int | None) -> datetime | None:
    return None if us is None else START + us * US


def newest_known(facts: Sequence[Row], key: Row, t: int | None, ttl: int | None) -> Row | None:
    """The fact that a row of this key sees at t."""
    best = None
    for fact in facts:
        if t is None or any(value is None or fact[column] is None or fact[column] != value for column, value in key.items()):
            continue
        if fact["event"] is None or fact["created"] is None or fact["event"] > t or fact["created"] > t:
            continue
        if best is None or (fact["event"], fact["created"]) >= (best["event"], best["created"]):
            best = fact
    return None if best is None or (ttl and best["event"] < t - ttl) else best


def write(path: Path, facts: Sequence[Row], *, kinds: dict[str, pa.DataType], unit: str = "us") -> Path:
    """Facts as Parquet; `event` and `created` are µs after START, in another unit where told."""
    base = int(START.timestamp()) * 10**6
    columns = {name: pa.array([f[name] for f in facts], kind) for name, kind in kinds.items()}
    for name in ("event", "created"):
        scale = {"ns": 1000, "us": 1}[unit]
        stamps = [None if f[name] is None else (base + f[name]) * scale for f in facts]
        columns[name] = pa.array(stamps, pa.timestamp(unit, "UTC"))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: {path: registry.pb, cache_ttl_seconds: 0}\n"
        "offline_store: {type: features.asof.AsofOfflineStore}\nonline_store: {type: sqlite, path: online.db}\n"
        "materialization: {pull_latest_features: true}\nentity_key_serialization_version: 3\n"
    )
    return tmp_path


def view(name: str, path: str | Path, *, keys: dict[str, ValueType] | None = None, ttl: int = 0, created: str | None = "created",
         event: str = "event", mapping: dict[str, str] | None = None, endpoint: str | None = None,
         **fields: Any) -> FeatureView:  # fmt: skip
    """A view of `path` (relative paths lie in the repository); features x and label unless told."""
    keys = {"k": ValueType.INT64} if keys is None else keys
    kinds = {ValueType.INT64: types.Int64, ValueType.STRING: types.String}
    schema = [Field(name=k, dtype=kinds[v]) for k, v in keys.items()]
    schema += [Field(name=n, dtype=d) for n, d in (fields or {"x": types.Float64}).items()]
    return FeatureView(
        name=name, entities=[Entity(name=k, join_keys=[k], value_type=v) for k, v in keys.items()], ttl=ttl * US, schema=schema,
        source=FileSource(name=f"{name}_source", path=str(path), timestamp_field=event, created_timestamp_column=created or "",
                          field_mapping=mapping, s3_endpoint_override=endpoint),
    )  # fmt: skip


def applied(repo: Path, *views: Any) -> FeatureStore:
    store = FeatureStore(repo_path=str(repo))
    entities = {e.name: e for v in views if isinstance(v, FeatureView) for e in
                (Entity(name=c.name, join_keys=[c.name], value_type=c.dtype.to_value_type()) for c in v.entity_columns)
                if e.name != "__dummy"}  # fmt: skip
    store.apply([*(e for e in entities.values() if not e.name.startswith("__")), *views])
    return store


def entities(rows: Sequence[Row]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).astype(object).where(lambda f: f.notna(), None)
    frame["event_timestamp"] = pd.to_datetime([at(r["t"]) for r in rows], utc=True)
    return frame.drop(columns="t")


K_X = {"k": pa.int64(), "x": pa.float64()}


def simple(k: int | None, event: int | None, created: int | None, x: float | None) -> Row:
    return {"k": k, "event": event, "created": created, "x": x}


# Random worlds


def random_world(seed: int) -> tuple[list[list[Row]], list[int], list[Row]]:
    """Facts of three views (key k; keys k, s; no key), their ttl, and rows to ask for. Many ties, edges and nulls."""
    r = random.Random(seed)
    span = r.choice([4, 30, 1000])
    views = []
    for n in (r.choice([0, 1, 40]), 40, r.choice([0, 12])):
        facts = []
        for i in range(n):
            event = None if r.random() < 0.03 else r.randrange(span)
            late = r.choice([0, 0, 1, r.randrange(span), -r.randrange(span)])
            created = None if event is None or r.random() < 0.03 else event + late
            facts.append({"k": None if r.random() < 0.1 else r.randrange(3), "s": r.choice([None, "a", "b", "a\x1fb", ""]),
                          "event": event, "created": created, "x": None if r.random() < 0.1 else float(i),
                          "label": r.choice([None, f"text {i}"]), "n": r.choice([None, i])})  # fmt: skip
        views.append(facts)
    ttl = [r.choice([0, 0, 1, 3, span // 2]) for _ in range(3)]
    rows = [{"k": None if r.random() < 0.1 else r.randrange(4), "s": r.choice([None, "a", "b", "a\x1fb", "", "c"]),
             "t": None if r.random() < 0.03 else r.randrange(-1, span + 2)} for _ in range(r.choice([0, 1, 60]))]  # fmt: skip
    return views, ttl, rows + rows[: len(rows) // 4]


def wrong_cells(seed: int, repo: Path) -> list[str]:
    """Cells of a random world that are not what the row-by-row Python says."""
    views, ttl, rows = random_world(seed)
    keys: list[dict[str, ValueType]] = [{"k": ValueType.INT64}, {"k": ValueType.INT64, "s": ValueType.STRING}, {}]
    kinds = {"k": pa.int64(), "s": pa.string(), "x": pa.float64(), "label": pa.string(), "n": pa.int64()}
    fields = {"x": types.Float64, "label": types.String, "n": types.Int64}
    made = []
    for i, facts in enumerate(views):
        write(repo / f"v{i}.parquet", facts, kinds=kinds, unit=("us", "ns")[(seed + i) % 2])
        made.append(view(f"v{i}", f"v{i}.parquet", keys=keys[i], ttl=ttl[i], **fields))
    store = applied(repo, *made)
    asked = [f"v{i}:{f}" for i in range(3) for f in fields]
    frame = entities(rows) if rows else pd.DataFrame({"k": [], "s": [], "event_timestamp": pd.to_datetime([], utc=True)})
    job = store.get_historical_features(entity_df=frame, features=asked, full_feature_names=True)
    found = job.to_arrow()
    assert pa.concat_tables(job.to_arrow_batches(7)).equals(found)
    wrong = []
    for i, facts in enumerate(views):
        for row, values in zip(rows, found.to_pylist(), strict=True):
            fact = newest_known(facts, {c: row[c] for c in keys[i]}, row["t"], ttl[i])
            wrong += [f"{f} of {row} in view {i}: {values[f'v{i}__{f}']}, not {fact}" for f in fields
                      if values[f"v{i}__{f}"] != (fact and fact[f])]  # fmt: skip
    return wrong


@pytest.mark.parametrize("seed", range(60))
def test_random_facts_as_known(seed: int, repo: Path) -> None:
    assert wrong_cells(seed, repo) == []


@pytest.fixture
def small_repo(repo: Path) -> Path:
    """A repository whose store may hold a few facts and one row at a time."""
    yaml = repo / "feature_store.yaml"
    yaml.write_text(yaml.read_text().replace("AsofOfflineStore}", "AsofOfflineStore, memory_limit: 3KiB}"))
    return repo


@pytest.mark.parametrize("seed", seeds(15, 6))
def test_random_facts_in_parts_and_in_files(seed: int, small_repo: Path) -> None:
    assert wrong_cells(seed, small_repo) == []


def test_the_order_of_parts_counts(small_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = known.rows_seen
    monkeypatch.setattr(asof, "rows_seen", lambda parts, keys, at: honest(parts[::-1], keys, at))
    assert any(wrong_cells(seed, small_repo) for seed in range(30))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["batches", "table"])
def test_a_result_larger_than_the_limit_goes_through_files(how: str, tmp_path: Path) -> None:
    """3,000,000 rows × 24 features, every row twice: 650 MB under a limit of 192 MiB, the rows in their order."""
    command = [sys.executable, "-m", "tests.data.big_join", str(tmp_path), "192MiB", how]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 3_000_000 and found["in_place"] and found["same"]
    assert found["peak_mb"] < 192 * 1.048576 < found["result_mb"] / 3


def test_a_source_that_changes_while_it_is_read_is_refused(small_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(small_repo / "f.parquet", [simple(1, 10, 10, 1.0)], kinds=K_X)
    store, honest = applied(small_repo, view("v", "f.parquet")), asof._columns

    def meanwhile(*told: Any) -> pa.Table:
        write(small_repo / "new.parquet", [simple(2, 10, 10, 2.0), simple(1, 10, 10, 1.0)], kinds=K_X).replace(path)
        return honest(*told)

    monkeypatch.setattr(asof, "_columns", meanwhile)
    with pytest.raises(MillraceError, match="written to while it was read"):
        seen(store, [(1, 10)])


MUTANTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "event-time join": ("sort_facts", lambda honest: lambda code, known, event, created: honest(code, event, event, created)),
    "created-time join": ("sort_facts", lambda honest: lambda code, known, event, created: honest(code, created, event, created)),
    "newest known, not newest": ("is_newest", lambda honest: lambda start, event: np.ones(len(event), bool)),
    "known 1 µs early": ("seen_at", lambda honest: lambda start, known, codes, t: honest(start, known, codes, t + 1)),
    "known 1 µs late": (
        "seen_at", lambda honest: lambda start, known, codes, t: honest(start, known, codes, np.maximum(t, 0) - 1),
    ),
    "TTL ignored": ("instants", lambda honest: lambda column, unit: (honest(column, unit)[0], -(2**50))),
    "TTL exclusive": ("instants", lambda honest: lambda column, unit: (honest(column, unit)[0], 1)),
    "correction ignored": (
        "is_newest", lambda honest: lambda start, event: honest(start, event) & (np.diff(event, prepend=-1) != 0),
    ),
    "null key matched": (
        "_as_stored", lambda honest: lambda rows, name, kind: honest(rows, name, kind).fill_null("a" if name == "s" else 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = MUTANTS[mutant]
    module = asof if name == "_as_stored" else known
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    assert any(wrong_cells(seed, repo) for seed in range(60))


# One thing at a time


@pytest.fixture
def one(repo: Path) -> FeatureStore:
    """Key 1: event 10 known at 10; event 20 known late, at 50; the first corrected at 30. Key 2: event 15. ttl 25."""
    facts = [simple(1, 10, 10, 1.0), simple(1, 20, 50, 2.0), simple(1, 10, 30, 3.0), simple(2, 15, 15, 4.0)]
    write(repo / "facts.parquet", facts, kinds=K_X)
    return applied(repo, view("v", "facts.parquet", ttl=25))


def seen(store: FeatureStore, rows: Sequence[tuple[Any, int | None]], **more: Any) -> list[Any]:
    frame = entities([{"k": k, "t": t} for k, t in rows])
    return store.get_historical_features(entity_df=frame, features=["v:x"], **more).to_arrow()["x"].to_pylist()


def test_late_corrected_and_expired_facts(one: FeatureStore) -> None:
    rows = [(1, 9), (1, 10), (1, 29), (1, 30), (1, 35), (1, 36), (1, 49), (1, 50), (2, 40), (2, 41), (None, 20), (3, 20)]
    expected = [None, 1.0, 1.0, 3.0, 3.0, None, None, None, 4.0, None, None, None]
    assert seen(one, rows) == expected
    assert seen(one, rows, filter_by_created_timestamp=True) == expected


def test_a_late_fact_counts_while_it_lives(repo: Path) -> None:
    write(repo / "f.parquet", [simple(1, 10, 10, 1.0), simple(1, 20, 40, 2.0)], kinds=K_X)
    assert seen(applied(repo, view("v", "f.parquet", ttl=25)), [(1, 35), (1, 39), (1, 40), (1, 45), (1, 46)]) == \
        [1.0, None, 2.0, 2.0, None]  # fmt: skip


def test_rows_keep_their_order_and_duplicates(one: FeatureStore) -> None:
    rows = [(2, 20), (1, 30), (2, 20), (1, 12), (1, 30)]
    assert seen(one, rows) == [4.0, 3.0, 4.0, 1.0, 3.0]


def test_times_finer_than_a_microsecond(repo: Path) -> None:
    base = pd.Timestamp(START)
    ns = pd.Timedelta(1, "ns")
    table = pa.table({"k": [1, 1], "x": [1.0, 2.0], "event": pa.array([base, base + 2 * ns], pa.timestamp("ns", "UTC"))})
    pq.write_table(table, repo / "fine.parquet")
    pq.write_table(pa.table({"k": [1], "y": [5.0], "event": pa.array([START], pa.timestamp("us", "UTC"))}), repo / "us.parquet")
    store = applied(repo, view("v", "fine.parquet", created=None, ttl=1),
                    view("w", "us.parquet", created=None, ttl=1, y=types.Float64))  # fmt: skip
    times = [base - ns, base, base + ns, base + 2 * ns, base + 1000 * ns, base + 1001 * ns, base + 1003 * ns]
    found = store.get_historical_features(entity_df=pd.DataFrame({"k": [1] * 7, "event_timestamp": times}),
                                          features=["v:x", "w:y"]).to_arrow()  # fmt: skip
    assert found["x"].to_pylist() == [None, 1.0, 1.0, 2.0, 2.0, 2.0, None]
    assert found["y"].to_pylist() == [None, 5.0, 5.0, 5.0, 5.0, None, None]


def test_times_without_a_zone_are_utc(repo: Path) -> None:
    event = pa.array([datetime(2024, 1, 1)], pa.timestamp("ms"))
    pq.write_table(pa.table({"k": [1], "x": [1.0], "event": event}), repo / "f.parquet")
    assert seen(applied(repo, view("v", "f.parquet", created=None)), [(1, -1), (1, 0)]) == [None, 1.0]


def test_many_keys(repo: Path) -> None:
    n = 200_000  # more than 16 bits
    keys = np.random.default_rng(5).permutation(n)
    stamp = pa.array(keys % 1000 + int(START.timestamp()) * 10**6).cast(pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"k": keys, "x": keys.astype(float), "event": stamp, "created": stamp}), repo / "f.parquet")
    store, some = applied(repo, view("v", "f.parquet")), range(0, n, 1000)
    assert seen(store, [(k, 999) for k in some]) == [float(k) for k in some]
    assert seen(store, [(999, 998), (n - 1, 998), (n, 999)]) == [None] * 3


def test_keys_of_any_type(repo: Path) -> None:
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "bool": (pa.bool_(), [True, False]), "time": (pa.timestamp("us", "UTC"), [at(5), at(6)]),
        "text": (pa.dictionary(pa.int32(), pa.string()), ["a", "b"]), "int": (pa.int32(), [1, 2]),
        "long": (pa.large_string(), ["a", "b"]), "date": (pa.date32(), [date(2024, 1, 1), date(2024, 1, 2)]),
        "decimal": (pa.decimal128(5, 2), [Decimal("1.50"), Decimal("2.50")]),
    }  # fmt: skip
    for name, (kind, values) in columns.items():
        table = pa.table({"k": pa.array(values, kind), "x": [1.0, 2.0], "event": pa.array([START] * 2)})
        pq.write_table(table, repo / f"{name}.parquet")
        store = applied(repo, FeatureView(
            name=name, entities=[Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)],
            schema=[Field(name="k", dtype=types.String), Field(name="x", dtype=types.Float64)], ttl=timedelta(0),
            source=FileSource(name=name, path=f"{name}.parquet", timestamp_field="event"),
        ))  # fmt: skip
        frame = pd.DataFrame({"k": [values[1], values[0], None], "event_timestamp": [pd.Timestamp(START)] * 3})
        found = store.get_historical_features(entity_df=frame, features=[f"{name}:x"]).to_arrow()
        assert found["x"].to_pylist() == [2.0, 1.0, None], name


def test_names_of_columns_are_mapped(repo: Path) -> None:
    facts = [simple(1, 10, 20, 1.0), simple(2, 10, 10, 2.0)]
    path = write(repo / "f.parquet", facts, kinds=K_X)
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["raw_k", "raw_x", "raw_event", "raw_created"]), path)
    mapping = {f"raw_{name}": name for name in ("k", "x", "event", "created")}
    store = applied(repo, view("v", "f.parquet", mapping=mapping))
    assert seen(store, [(1, 19), (1, 20), (2, 10)]) == [None, 1.0, 2.0]
    store.materialize(START, START + 100 * US)
    answer = store.get_online_features(features=["v:x"], entity_rows=[{"k": 1}, {"k": 2}]).to_dict()
    assert answer["x"] == [1.0, 2.0]


def test_one_view_under_two_names(one: FeatureStore, repo: Path) -> None:
    own = one.get_feature_view("v")
    home = own.with_name("home").with_join_key_map({"k": "home_k"})
    away = own.with_name("away").with_join_key_map({"k": "away_k"})
    one.apply([both := FeatureService(name="both", features=[home, away])])
    frame = entities([{"home_k": 1, "away_k": 2, "t": 30}, {"home_k": 2, "away_k": 1, "t": 20}])
    found = one.get_historical_features(entity_df=frame, features=both, full_feature_names=True).to_arrow()
    assert found["home__x"].to_pylist() == [3.0, 4.0]
    assert found["away__x"].to_pylist() == [4.0, 1.0]


def test_a_view_without_rows(repo: Path) -> None:
    write(repo / "f.parquet", [], kinds=K_X)
    assert seen(applied(repo, view("v", "f.parquet")), [(1, 10)]) == [None]


def test_on_demand_features(one: FeatureStore) -> None:
    v = one.get_feature_view("v")
    request = RequestSource(name="request", schema=[Field(name="factor", dtype=types.Float64)])

    @on_demand_feature_view(sources=[v, request], schema=[Field(name="scaled", dtype=types.Float64)])
    def times(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"scaled": inputs["x"] * inputs["factor"]})

    @on_demand_feature_view(sources=[request], schema=[Field(name="other", dtype=types.Float64)])
    def not_asked_for(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"other": inputs["factor"]})

    one.apply([times, not_asked_for])
    frame = entities([{"k": 1, "factor": 2.0, "t": 12}, {"k": 3, "factor": 2.0, "t": 12}])
    job = one.get_historical_features(entity_df=frame, features=["times:scaled"])
    found = job.to_arrow()
    assert found["scaled"].to_pylist()[0] == 2.0
    assert pd.isna(found["scaled"].to_pylist()[1])
    assert "other" not in found.column_names
    assert pa.concat_tables(job.to_arrow_batches(1)).to_pandas().equals(found.to_pandas())
    assert seen(one, [(1, 12)]) == [1.0]  # whatever else is registered


def test_a_query_as_entity_frame(one: FeatureStore, repo: Path) -> None:
    entities([{"k": 1, "t": 30}, {"k": None, "t": 30}, {"k": 2, "t": 20}]).to_parquet(repo / "rows.parquet")
    job = one.get_historical_features(entity_df="SELECT k, event_timestamp FROM 'rows.parquet'", features=["v:x"])
    assert job.to_arrow()["x"].to_pylist() == [3.0, None, 4.0]
    assert job.metadata is not None and job.metadata.keys == ["k"]
    assert (job.metadata.min_event_timestamp, job.metadata.max_event_timestamp) == (at(20), at(30))
    assert [t.num_rows for t in job.to_arrow_batches(2)] == [2, 1]
    query = "SELECT k, event_timestamp AS ts FROM 'rows.parquet' WHERE k = 9"
    none = one.get_historical_features(entity_df=query, features=["v:x"])
    assert none.to_arrow().column_names == ["k", "ts", "x"]


def test_a_time_column_of_another_name(one: FeatureStore) -> None:
    frame = entities([{"k": 1, "t": 30}]).rename(columns={"event_timestamp": "when"})
    assert one.get_historical_features(entity_df=frame, features=["v:x"]).to_df()["x"].tolist() == [3.0]


# Materialising, reading all, writing


def test_the_newest_of_each_key_is_materialised(repo: Path) -> None:
    facts = [simple(1, 10, 12, 1.0), simple(1, 10, 11, 2.0), simple(2, 5, 5, 3.0), simple(2, 30, 30, 4.0), simple(3, 31, 31, 6.0),
             simple(None, 6, 6, 5.0), simple(4, 4, 4, 7.0), simple(5, 9, None, 8.0), simple(5, 9, 9, 9.0)]  # fmt: skip
    write(repo / "f.parquet", facts, kinds=K_X)
    store = applied(repo, view("v", "f.parquet"))
    store.materialize(START + 5 * US, START + 30 * US)
    answer = store.get_online_features(features=["v:x"], entity_rows=[{"k": k} for k in range(1, 6)]).to_dict()
    assert answer["x"] == [1.0, 4.0, None, None, 9.0]


@pytest.mark.parametrize("latest", ["true", "false"])
def test_a_view_without_keys_is_materialised(repo: Path, latest: str) -> None:
    settings = repo / "feature_store.yaml"
    settings.write_text(settings.read_text().replace("pull_latest_features: true", f"pull_latest_features: {latest}"))
    write(repo / "f.parquet", [simple(1, 10, 10, 1.0), simple(2, 20, 20, 2.0)], kinds=K_X)
    store = applied(repo, view("v", "f.parquet", keys={}))
    store.materialize(START, START + 30 * US)
    assert store.get_online_features(features=["v:x"], entity_rows=[{"__dummy_id": ""}]).to_dict()["x"] == [2.0]


def pulled(store: FeatureStore, start: int | None, end: int | None) -> list[float]:
    job = store._get_provider().offline_store.pull_all_from_table_or_query(
        config=store.config, data_source=store.get_feature_view("v").batch_source, join_key_columns=["k"],
        feature_name_columns=["x"], timestamp_field="event", created_timestamp_column="created",
        start_date=at(start), end_date=at(end),
    )  # fmt: skip
    table = job.to_arrow()
    assert job.metadata is None
    assert table.column_names == ["k", "x", "event", "created"]
    return table["x"].to_pylist()


@pytest.mark.parametrize("limit", ["", "3KiB"])
def test_rows_that_are_pulled_come_in_batches(repo: Path, limit: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("small_repo" if limit else "repo")
    write(repo / "f.parquet", [simple(k, t, t, float(t)) for t in range(10) for k in (1, 2)], kinds=K_X)
    store = applied(repo, view("v", "f.parquet"))
    told = {"config": store.config, "data_source": store.get_feature_view("v").batch_source, "join_key_columns": ["k"],
            "feature_name_columns": ["x"], "timestamp_field": "event", "created_timestamp_column": "created",
            "start_date": at(0), "end_date": at(9)}  # fmt: skip
    offline = store._get_provider().offline_store
    everything, latest = offline.pull_all_from_table_or_query(**told), offline.pull_latest_from_table_or_query(**told)
    assert max(t.num_rows for t in everything.to_arrow_batches(3)) == 3
    assert pa.concat_tables(everything.to_arrow_batches(3)).equals(everything.to_arrow())
    assert pa.concat_tables(latest.to_arrow_batches(3))["x"].to_pylist() == [9.0, 9.0]


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_everything_between_two_instants(repo: Path, unit: str) -> None:
    facts = [simple(1, t, t, float(t)) for t in range(20)] + [simple(1, None, 3, 99.0)]
    write(repo / "f.parquet", facts, kinds=K_X, unit=unit)
    store = applied(repo, view("v", "f.parquet"))
    assert pulled(store, 3, 5) == [3.0, 4.0, 5.0]
    assert pulled(store, None, 1) == [0.0, 1.0]
    assert pulled(store, 18, None) == [18.0, 19.0]


def test_rows_are_appended_to_a_file(one: FeatureStore, repo: Path) -> None:
    new = pd.DataFrame({"created": [at(31)], "k": [2], "event": [at(31)], "x": [9.0]})
    one.write_to_offline_store("v", new, reorder_columns=True)
    assert seen(one, [(1, 30), (2, 30), (2, 31)]) == [3.0, 4.0, 9.0]
    assert [p.name for p in repo.glob("*.par*")] == ["facts.parquet"]


def test_rows_are_appended_to_a_folder(repo: Path) -> None:
    write(repo / "f" / "0.parquet", [simple(1, 10, 10, 1.0)], kinds=K_X)
    store = applied(repo, view("v", "f"))
    store.write_to_offline_store("v", pd.DataFrame({"k": [1], "x": [2.0], "event": [at(20)], "created": [at(20)]}))
    assert len(list((repo / "f").iterdir())) == 2
    (repo / "f" / ".2.parquet.partial").write_text("what a killed writer left")
    assert seen(store, [(1, 19), (1, 20)]) == [1.0, 2.0]


def test_a_failed_append_leaves_the_file_as_it_was(one: FeatureStore, repo: Path) -> None:
    store = one._get_provider().offline_store
    table = pq.read_table(repo / "facts.parquet")
    with pytest.raises(MillraceError, match="give exactly"):
        store.offline_write_batch(one.config, one.get_feature_view("v"), table.drop_columns("x"), None)
    with pytest.raises(pa.ArrowInvalid):
        store.offline_write_batch(one.config, one.get_feature_view("v"), table.set_column(0, "k", pa.array(["a"] * 4)), None)
    assert pq.read_table(repo / "facts.parquet").equals(table)
    assert {p.name for p in repo.glob("*.par*")} == {"facts.parquet"}


WRITER = """
import sys
import pyarrow as pa
from features.quick_feast import FeatureStore
store, first = FeatureStore(repo_path=sys.argv[1]), int(sys.argv[2])
view = store.get_feature_view("v")
at = pa.array([first], pa.timestamp("us", "UTC"))
print("ready", flush=True)
sys.stdin.readline()
for i in range(first, first + int(sys.argv[3])):
    row = pa.table({"k": pa.array([i]), "x": pa.array([float(i)]), "event": at, "created": at})
    store._get_provider().offline_store.offline_write_batch(store.config, view, row, None)
    print(i, flush=True)
"""


def writers(repo: Path, *told: tuple[int, int]) -> list[subprocess.Popen[str]]:
    """Processes that append rows one by one, (first, how many) each; they begin together."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", WRITER, str(repo), *map(str, some)], env=env, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for some in told]  # fmt: skip
    for one in started:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    return started


@pytest.mark.slow
@pytest.mark.parametrize("place", ["facts.parquet", "facts"])
def test_of_two_writers_no_row_is_lost_also_when_one_is_killed(repo: Path, place: str) -> None:
    """The file holds 300,000 rows, so that a writer is killed while it writes them; every state of it can be read."""
    facts = pa.table({"k": np.arange(300_000), "x": np.random.default_rng(1).random(300_000),
                      "event": pa.repeat(pa.scalar(START, pa.timestamp("us", "UTC")), 300_000)})  # fmt: skip
    facts = facts.append_column("created", facts["event"])
    (repo / "facts").mkdir()
    path = repo / (place if place.endswith(".parquet") else f"{place}/0.parquet")
    pq.write_table(facts, path)
    applied(repo, view("v", place))
    steady, killed = writers(repo, (10**6, 15), (2 * 10**6, 10**6))
    assert killed.stdout is not None
    said = []
    while steady.poll() is None:
        found = pq.read_table(repo / place, columns=["k"])
        assert found.num_rows >= 300_000
        if killed.poll() is None and len(said) >= 5:
            killed.kill()
        elif len(said) < 5:
            said.append(killed.stdout.readline())
    written = [10**6 + i for i in range(15)] + [int(i) for i in (*said, *killed.stdout.read().split())]
    keys = pq.read_table(repo / place, columns=["k"])["k"].to_pylist()
    assert keys[:300_000] == list(range(300_000)) or place == "facts"
    assert sorted(keys)[300_000:] in (sorted(written), sorted([*written, max(written) + 1]))  # the last may not have been said
    steady, = writers(repo, (3 * 10**6, 1))
    assert steady.wait() == 0
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".partial")] == [] or place == "facts"


def test_a_writer_waits_for_another(one: FeatureStore, repo: Path) -> None:
    place = asof.Place(asof.fs.LocalFileSystem(), str(repo / "facts.parquet"))
    with place.alone():
        waiting, = writers(repo, (10**6, 1))
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.5)
        assert pq.read_metadata(repo / "facts.parquet").num_rows == 4
    assert waiting.wait(timeout=60) == 0
    assert pq.read_metadata(repo / "facts.parquet").num_rows == 5


@pytest.mark.parametrize("name", ["saved.parquet", "saved"])
def test_a_result_is_persisted_and_read_back(one: FeatureStore, repo: Path, name: str) -> None:
    frame = entities([{"k": 1, "t": 30}, {"k": 2, "t": 20}])
    job = one.get_historical_features(entity_df=frame, features=["v:x"], full_feature_names=True)
    storage = SavedDatasetFileStorage(path=name)
    one.create_saved_dataset(from_=job, name="set", storage=storage)
    assert one.get_saved_dataset("set").to_df()["v__x"].tolist() == [3.0, 4.0]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)
    assert pq.read_table(repo / name)["v__x"].to_pylist() == [3.0, 4.0]


def test_a_path_as_url(repo: Path) -> None:
    path = write(repo / "f.parquet", [simple(1, 10, 10, 1.0)], kinds=K_X)
    store = applied(repo, view("v", path.as_uri()))
    assert seen(store, [(1, 9), (1, 10)]) == [None, 1.0]
    job = store.get_historical_features(entity_df=entities([{"k": 1, "t": 10}]), features=["v:x"])
    job.persist(SavedDatasetFileStorage(path=(repo / "out.parquet").as_uri()))
    assert pq.read_table(repo / "out.parquet")["x"].to_pylist() == [1.0]


# What is wrong is said


def refused(store: FeatureStore, frame: Any, features: Sequence[str] = ("v:x",)) -> None:
    store.get_historical_features(entity_df=frame, features=list(features)).to_arrow()


def test_errors_say_what_is_wrong(one: FeatureStore, repo: Path) -> None:
    good = entities([{"k": 1, "t": 30}])
    with pytest.raises(MillraceError, match="columns named as features"):
        refused(one, good.assign(x=1.0))
    with pytest.raises(MillraceError, match="entity column 'k' is string"):
        refused(one, good.assign(k="a"))
    with pytest.raises(MillraceError, match=r"entity column 'k' is date32.*source has int64"):
        refused(one, good.assign(k=date(2024, 1, 1)))
    with pytest.raises(MillraceError, match="entity column 'event_timestamp' is string, expected times"):
        refused(one, good.assign(event_timestamp="2024-01-01 10:00:00"))
    with pytest.raises(Exception, match="k"):
        refused(one, good.drop(columns="k"))
    with pytest.raises(Exception, match="event_timestamp"):
        refused(one, good.drop(columns="event_timestamp"))
    with pytest.raises(MillraceError, match="SQL query"):
        one.get_historical_features(features=["v:x"], end_date=START)
    pq.write_table(pq.read_table(repo / "facts.parquet").rename_columns(["k", "xx", "event", "created"]), repo / "facts.parquet")
    with pytest.raises(MillraceError, match="no column 'x'; nearest: 'xx'"):
        refused(one, good)
