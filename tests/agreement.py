"""A random pipeline as the code sees it, beside the oracle, and the comparison of the two: exact, types included."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.facts import Columns
from features.feed import feed
from features.frame import compose, feature_list, own_columns
from features.ingest import ARROW, Snapshot, cut, ingest, read_table
from features.online import OnlineStore, serve_features
from features.rows import PARTS, find_rows, online_rows
from features.store import write_views
from pipelines.clock import MISSING, NEVER, Anchor
from pipelines.home import Home, open_home
from pipelines.spec import Source, Spec
from tests.oracle import Key, Oracle, Version
from tests.random_tables import Case, known_at, random_case

Asked = tuple[Version, int]  # columns of a row, and the instant they are asked for


@dataclass(frozen=True)
class World:
    """A random case after ingest, cut at its `as_of`. `oracle` knows all facts, `then` those known at `as_of`."""

    case: Case
    spec: Spec
    home: Home
    snapshot: Snapshot
    tables: dict[str, pa.Table]
    oracle: Oracle
    then: Oracle

    def asked(self) -> list[Asked]:
        """Every prediction row, and every request."""
        rows = [(row.version, row.t) for row in self.oracle.rows(self.case.as_of).rows]
        return rows + [(request.version, request.t) for request in self.case.requests]

    def expected(self, asked: Iterable[Asked]) -> list[Version]:
        return [self.then.features(version, t) for version, t in asked]


def make_world(seed: int, folder: Path) -> World:
    """The case of a seed, landed as Parquet files and taken in."""
    case = random_case(seed)
    spec, home = Spec.model_validate(case.spec), open_home(folder)
    with patch("features.ingest.wall_us", side_effect=land(case, spec, home)):
        snapshot = cut(spec, home, ingest(spec, home), case.as_of)
    known = {name: [row for row in rows if known_at(case.spec["sources"][name], row) <= case.as_of]
             for name, rows in case.tables.items()}  # fmt: skip
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    return World(case, spec, home, snapshot, tables, Oracle(case.spec, case.tables), Oracle(case.spec, known))


def land(case: Case, spec: Spec, home: Home) -> list[int]:
    """Writes the tables in up to three files each, or one per arrival; the arrivals in the order of the files."""
    arrivals = []
    for name, source in spec.sources.items():
        files: dict[int, list[Version]] = {}
        for i, row in enumerate(case.tables[name]):
            files.setdefault(row.get("_arrival", i % (1 + case.seed % 3)), []).append(row)
        folder = home.landing(spec.pipeline) / name
        folder.mkdir(parents=True)
        for i, arrival in enumerate(sorted(files)):
            pq.write_table(arrow(source, files[arrival]), folder / f"{i:04d}.parquet")
            arrivals.append(arrival)
    return arrivals


def arrow(source: Source, rows: Sequence[Version]) -> pa.Table:
    """Rows as a table of the declared columns; timestamps are given as int µs."""
    columns = {}
    for name, column in source.columns.items():
        values = [row.get(name) for row in rows]
        stamp = column.type == "timestamp"
        columns[name] = pa.array(values, pa.int64() if stamp else ARROW[column.type]).cast(ARROW[column.type])
    return pa.table(columns)


def plain(source: Source, table: pa.Table) -> list[Version]:
    """The declared columns of a table as rows; timestamps become int µs."""
    columns = {name: table[name].cast(pa.int64()) if column.type == "timestamp" else table[name]
               for name, column in source.columns.items()}  # fmt: skip
    return pa.table(columns).to_pylist()


# Rows


def row_differences(world: World) -> list[str]:
    """Prediction rows: key, version, t, label, when that was known, and part; and the keys that are none."""
    found = find_rows(world.spec, world.tables, world.case.as_of)
    wanted = world.oracle.rows(world.case.as_of)
    differences = []
    counts = (found.counts["without_version_in_time"], found.counts.get("closed_before_asked", 0))
    if counts != (wanted.unknown_in_time, wanted.closed):
        differences.append(f"keys that are no rows {counts}, not {wanted.unknown_in_time, wanted.closed}")
    if (np.diff(found.t) < 0).any():
        differences.append("rows are not in the order of t")
    versions = plain(world.spec.row_source, found.table)
    columns = (found.t, found.label, found.label_known, found.part)
    got = dict(zip(
        (tuple(version[column] for column in world.spec.row_key) for version in versions),
        zip(versions, *(column.tolist() for column in columns), strict=True), strict=True,
    ))  # fmt: skip
    for row in wanted.rows:
        expected = (row.version, row.t, *outcome(world.oracle, row.key, row.t, world.case.as_of))
        if got.get(row.key) != expected:
            differences.append(f"row {row.key}: {got.get(row.key)}, not {expected}")
    if len(found.t) != len(wanted.rows):
        differences.append(f"{len(found.t)} rows, not {len(wanted.rows)}")
    return differences


def outcome(oracle: Oracle, key: Key, t: int, as_of: int) -> tuple[int, int, int]:
    """Label, its known-at and part of a row, as `features.rows` writes them."""
    label, known = oracle.label(key, as_of)
    part = oracle.part(t, known, as_of)
    return (
        -1 if label is None else int(label),
        NEVER if known is None else known,
        -1 if part is None else PARTS.index(part),
    )


# Features


def frame_differences(spec: Spec, found: Columns, expected: Sequence[Version], what: str) -> list[str]:
    """Where a frame is not what the oracle says: numbers are float64 with NaN, texts are objects with None."""
    features = feature_list(spec)
    names = {name for row in expected for name in row}
    if expected and names != {f.name for f in features if f.group not in _computed(spec)}:
        return [f"{what}: other features: {sorted(names ^ {f.name for f in features})}"]
    differences = []
    for feature in features:
        if feature.group in _computed(spec):
            continue
        values, wanted = found[feature.name], [row[feature.name] for row in expected]
        if values.dtype != (object if feature.kind == "category" else np.float64):
            differences.append(f"{what}: {feature.name} is {values.dtype}")
        same = [a == b or (a != a and b != b) for a, b in zip(values.tolist(), map(_number, wanted), strict=True)] \
            if feature.kind == "number" else [a == b for a, b in zip(values.tolist(), wanted, strict=True)]  # fmt: skip
        differences += [f"{what}: {feature.name} of row {i} is {values[i]!r}, not {wanted[i]!r}"
                        for i, ok in enumerate(same) if not ok]  # fmt: skip
    return differences


def _computed(spec: Spec) -> set[str]:
    """Groups of features that Python functions of the spec make: the oracle does not know them."""
    return {function.call.partition(":")[2] for function in spec.features.functions}


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def same_frames(one: Columns, other: Columns) -> list[str]:
    """Features that are not equal, bit for bit where they are numbers, of the same types."""
    differences = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.dtype != b.dtype or not (
            a.tolist() == b.tolist() if a.dtype == object else np.array_equal(a, b, equal_nan=True)
        ):
            differences.append(name)
    return differences


# The served store


def serve_world(world: World, folder: Path, *, since: int = MISSING, anchor: int = -(2**60)) -> OnlineStore:
    """A served store fed at `anchor` from views that are right from `since` on."""
    features = folder / f"features{since}"
    if not features.exists():
        write_views(world.spec, world.tables, features, since)
        pq.write_table(online_rows(world.spec, world.tables, world.snapshot.watermark_us), features / "online_rows.parquet")
    feed(world.spec, features, folder / f"store{anchor}", Anchor(anchor, 0), world.snapshot.digest)
    return OnlineStore(world.spec, folder / f"store{anchor}")


def features_at(store: OnlineStore, asked: Sequence[Asked]) -> Columns:
    """The frame of given rows, each at its own time, from what the store holds."""
    spec, t = store.spec, np.array([t for _, t in asked], np.int64)
    own = own_columns(spec, arrow(spec.row_source, [version for version, _ in asked]))
    return compose(spec, own, store.features_at(own, t)[0])


def served_differences(world: World, store: OnlineStore) -> list[str]:
    """Requests by row key, from the anchor on: the version that is live then counts, else the fields given."""
    differences = []
    rows, key_columns = world.case.spec["rows"]["from"], world.spec.row_key
    for i, request in enumerate(world.case.requests):
        if request.t < store.anchor().data_us:
            continue
        served = serve_features(store, [request.version], request.t)
        key = tuple(request.version.get(column) for column in key_columns)
        live = world.then.live_with(rows, key_columns, key, request.t)
        version, what = live[0].row if live else request.version, f"request {i}"
        differences += frame_differences(world.spec, served.frame, world.expected([(version, request.t)]), what)
        if served.looked.unknown.tolist() != [not live]:
            differences.append(f"{what}: unknown entity is {served.looked.unknown.tolist()}")
        if live and bool(served.looked.closed_at[0] <= request.t) != world.then.is_closed(key, request.t):
            differences.append(f"{what}: closed at {served.looked.closed_at[0]}")
    return differences
