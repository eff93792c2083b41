"""`python -m tests.data.big_join FOLDER LIMIT HOW`: millions of rows × four views under a limit, and what memory it took.

Prints as JSON the MB of the result, how far the resident memory rose above what it was before, and whether every row is in
its place and holds what a join without a limit says.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.pit_peers import memory_mb
from features.quick_feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType, types

from features.asof import AsofRetrievalJob  # isort: skip — after quick_feast
from feast.repo_config import RepoConfig  # isort: skip

ROWS, FACTS, KEYS = 3_000_000, 100_000, 5_000
STAMP = pa.timestamp("us", "UTC")
FEATURES = {f"v{i}": [f"x{i}_{j}" for j in range(6)] for i in range(4)}
# Each key is asked for again and again, twice at the same time.
QUERY = f"""SELECT (n // 2 * 7919) % {KEYS} AS k, make_timestamptz((n // 2 * 104729) % 1000000000) AS event_timestamp, n
            FROM range({ROWS}) t(n)"""


def store(folder: Path, **offline: str) -> FeatureStore:
    draw = np.random.default_rng(1)
    key = Entity(name="k", join_keys=["k"], value_type=ValueType.INT64)
    views = []
    for name, features in FEATURES.items():
        event = draw.integers(0, 10**9, FACTS)
        stamps = {"event": event, "created": event + draw.integers(0, 10**7, FACTS)}
        columns = {"k": draw.integers(0, KEYS, FACTS), **{f: draw.random(FACTS) for f in features}}
        table = pa.table({**columns, **{c: pa.array(t).cast(STAMP) for c, t in stamps.items()}})
        pq.write_table(table, folder / f"{name}.parquet")
        source = FileSource(name=f"{name}_source", path=str(folder / f"{name}.parquet"), timestamp_field="event",
                            created_timestamp_column="created")  # fmt: skip
        schema = [Field(name="k", dtype=types.Int64), *(Field(name=f, dtype=types.Float64) for f in features)]
        views.append(FeatureView(name=name, entities=[key], schema=schema, source=source))
    made = FeatureStore(config=RepoConfig(
        project="big", provider="local", registry=str(folder / "registry.pb"), entity_key_serialization_version=3,
        offline_store={"type": "features.asof.AsofOfflineStore", **offline},
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
    ))  # fmt: skip
    made.apply([key, *views])
    return made


def join(of: FeatureStore, query: str) -> AsofRetrievalJob:
    asked = [f"{view}:{f}" for view, features in FEATURES.items() for f in features]
    job = of.get_historical_features(entity_df=query, features=asked)
    assert isinstance(job, AsofRetrievalJob)
    return job


def main() -> None:
    folder, limit, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    limited = store(folder, memory_limit=limit)
    join(limited, f"SELECT * FROM ({QUERY}) LIMIT 10").to_arrow()  # imports
    job = join(limited, QUERY)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if how == "batches":
        parts = job.to_arrow_batches()
    else:  # looked at piece by piece: what is not looked at takes no memory
        parts = (pa.Table.from_batches([batch]) for batch in job.to_arrow().to_batches())
    at, size, heads, in_place = 0, 0, [], True
    for part in parts:
        in_place &= bool((part["n"].to_numpy() == np.arange(at, at + part.num_rows)).all())
        heads += [part.take(list(range(10)))] if len(heads) < 20 else []
        at, size = at + part.num_rows, size + part.nbytes
    peak = memory_mb("VmHWM") - before
    some = pa.concat_tables(heads)
    query = f"SELECT * FROM ({QUERY}) WHERE n IN ({', '.join(map(str, some['n'].to_pylist()))}) ORDER BY n"
    same = join(store(folder), query).to_arrow().equals(some)
    print(json.dumps({"rows": at, "result_mb": size / 1e6, "peak_mb": peak, "in_place": in_place, "same": same}))


if __name__ == "__main__":
    main()
