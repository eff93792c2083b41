"""One point-in-time join by one peer in a process of its own: `python -m bench.pit_peers PEER DATA ROWS OUT`.

DATA holds `views.json`, the facts of each view and `rows.parquet`; the first ROWS of a seeded sample are joined. Writes
the result as an Arrow file to OUT.arrow and to OUT.json the seconds from entity rows in memory (a pandas frame for
Feast, Arrow for the others) to an Arrow table, and how far the resident memory rose above what it was before, with
everything imported and the rows read.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MEMORY = 12 << 30  # address space of a process, bytes: what does not fit fails instead of pushing out its neighbours


@dataclass(frozen=True)
class Facts:
    """A view of facts: `NAME.parquet` with key columns, `event`, `created` and features. Column types by name."""

    name: str
    keys: dict[str, str]
    features: dict[str, str]
    ttl: int  # µs, 0: for ever


def write_views(folder: Path, views: list[Facts]) -> None:
    """What `read_views` reads."""
    (folder / "views.json").write_text(json.dumps([asdict(view) for view in views]))


def read_views(folder: Path) -> list[Facts]:
    return [Facts(**view) for view in json.loads((folder / "views.json").read_text())]


# Feast: its own stores and ours


def feast_join(folder: Path, offline: str, *, known_at: bool = True) -> Callable[[pa.Table], pa.Table]:
    """Feast's join by an offline store; `known_at` False: with Feast's default flags."""
    from features.quick_feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType, types

    from feast.repo_config import RepoConfig  # isort: skip — after quick_feast

    kinds = {"string": types.String, "int64": types.Int64, "float64": types.Float64}
    values = {"string": ValueType.STRING, "int64": ValueType.INT64}
    views = read_views(folder)
    entities = {k: Entity(name=k, join_keys=[k], value_type=values[t]) for view in views for k, t in view.keys.items()}
    made = [
        FeatureView(
            name=view.name, entities=[entities[k] for k in view.keys], ttl=timedelta(microseconds=view.ttl),
            schema=[Field(name=n, dtype=kinds[t]) for n, t in (view.keys | view.features).items()],
            source=FileSource(name=f"{view.name}_facts", path=str(folder / f"{view.name}.parquet"),
                              timestamp_field="event", created_timestamp_column="created"),
        )
        for view in views
    ]  # fmt: skip
    scratch = folder / offline
    scratch.mkdir(exist_ok=True)
    store = FeatureStore(config=RepoConfig(
        project="pit", provider="local", registry=str(scratch / "registry.pb"), offline_store={"type": offline},
        online_store={"type": "sqlite", "path": str(scratch / "online.db")}, entity_key_serialization_version=3,
    ))  # fmt: skip
    store.apply([*entities.values(), *made])
    asked = [f"{view.name}:{feature}" for view in views for feature in view.features]

    def join(rows: pa.Table) -> pa.Table:
        frame = frames[id(rows)]
        return store.get_historical_features(
            entity_df=frame, features=asked, full_feature_names=True, filter_by_created_timestamp=known_at
        ).to_arrow()

    frames: dict[int, object] = {}
    join.prepare = lambda rows: frames.update({id(rows): rows.to_pandas()})  # type: ignore[attr-defined]
    return join


# One query by hand


def duckdb_join(folder: Path) -> Callable[[pa.Table], pa.Table]:
    """Per view the facts that are newest when they become known, then ASOF on known-at."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    views = read_views(folder)
    parts, columns, joins = [], ["e.*"], []
    for view in views:
        keys, kept = ", ".join(view.keys), ", ".join([*view.keys, *view.features])
        by = f"PARTITION BY {keys} ORDER BY greatest(event, created), event, created"
        parts.append(
            f"{view.name} AS (SELECT {kept}, event, known FROM (SELECT {kept}, event, greatest(event, created) AS known, "
            f"max(event) OVER ({by} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS best, "
            f"lead(greatest(event, created)) OVER ({by}) AS later FROM read_parquet('{folder / view.name}.parquet')) "
            "WHERE (best IS NULL OR event >= best) AND later IS DISTINCT FROM known)"
        )
        alive = f"epoch_us(e.event_timestamp) - epoch_us({view.name}.event) <= {view.ttl}" if view.ttl else "true"
        columns += [f"CASE WHEN {alive} THEN {view.name}.{f} END AS {view.name}__{f}" for f in view.features]
        same = " AND ".join(f"e.{k} = {view.name}.{k}" for k in view.keys)
        joins.append(f"ASOF LEFT JOIN {view.name} ON {same} AND e.event_timestamp >= {view.name}.known")
    query = f"WITH {', '.join(parts)} SELECT {', '.join(columns)} FROM e {' '.join(joins)} ORDER BY e.row_id"

    def join(rows: pa.Table) -> pa.Table:
        connection.register("e", rows)
        return connection.sql(query).to_arrow_table()

    return join


def polars_join(folder: Path) -> Callable[[pa.Table], pa.Table]:
    """The same by Polars' join_asof."""
    import polars as pl

    views = read_views(folder)

    def join(rows: pa.Table) -> pa.Table:
        found = pl.from_arrow(rows).lazy().sort("event_timestamp")  # type: ignore[union-attr]
        for view in views:
            keys = list(view.keys)
            facts = (
                pl.scan_parquet(folder / f"{view.name}.parquet").drop_nulls(keys)
                .with_columns(known=pl.max_horizontal("event", "created"))
                .sort([*keys, "known", "event", "created"])
                .filter(pl.col("event") >= pl.col("event").cum_max().over(keys))
                .select(*keys, "known", event_of=pl.col("event"), **{f"{view.name}__{f}": pl.col(f) for f in view.features})
                .sort("known", maintain_order=True)
            )  # fmt: skip
            found = found.join_asof(facts, left_on="event_timestamp", right_on="known", by=keys, check_sortedness=False)
            age = pl.col("event_timestamp") - pl.col("event_of")
            alive = age <= timedelta(microseconds=view.ttl) if view.ttl else pl.lit(True)
            names = [f"{view.name}__{f}" for f in view.features]
            found = found.with_columns(pl.when(alive).then(pl.col(names))).drop("known", "event_of")
        return found.sort("row_id").collect().to_arrow()

    return join


PEERS: dict[str, Callable[[Path], Callable[[pa.Table], pa.Table]]] = {
    "millrace": lambda folder: feast_join(folder, "features.asof.AsofOfflineStore"),
    "feast_dask": lambda folder: feast_join(folder, "dask"),
    "feast_duckdb": lambda folder: feast_join(folder, "duckdb"),
    "duckdb": duckdb_join,
    "polars": polars_join,
}


def sample(folder: Path, rows: int) -> pa.Table:
    """The first rows of a seeded sample of the entity rows, in the order of the file."""
    import numpy as np

    table = pq.read_table(folder / "rows.parquet")
    if rows < table.num_rows:
        table = table.take(pa.array(np.sort(np.random.default_rng(11).permutation(table.num_rows)[:rows])))
    return table.combine_chunks()


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise LookupError(field)


def main() -> None:
    peer, data, rows, out = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    join = PEERS[peer](data)
    table = sample(data, rows)
    getattr(join, "prepare", lambda rows: None)(table)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.perf_counter()
    found = join(table)
    seconds = time.perf_counter() - began
    peak = memory_mb("VmHWM") - before
    with pa.OSFile(f"{out}.arrow", "wb") as file, pa.ipc.new_file(file, found.schema) as writer:
        writer.write_table(found)
    figures = {"seconds": seconds, "peak_mb": peak, "before_mb": before, "rows": found.num_rows}
    Path(f"{out}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
