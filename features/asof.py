"""A Feast offline store that joins on known-at: of the facts known at the row's time, the newest.

A fact is known from the later of its event and created time on; `ttl` is inclusive; equal event times go to the later
created, then to the later row (of files in the order of their names). Facts without an event or created time are never
known, and a null key matches nothing. Rows keep their order and number. Views of ours say in their tags how they are
stored: as steps, read by `steps.as_of`. Any other view of Parquet files, local or on S3, becomes steps when it is read:
its facts that are the newest of their key when they become known.

Shapes: N facts, Q rows asked for, K keys. Times are int64 µs, or ns where a source has finer ones.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from feast import FeatureView, RepoConfig
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.errors import EntityTimestampInferenceException, FeastEntityDFMissingColumnsError, SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _get_requested_feature_views_to_features_dict
from pyarrow import fs

from features.facts import int_times
from features.keys import codes_of, filled, key_runs, one_chunk, text_keys
from features.steps import KEY, LIMIT, TIME, as_of, order_of, previous
from pipelines.clock import MISSING, wall_us
from pipelines.errors import MillraceError, nearest

BATCH = 1_000_000  # entity rows that are joined at a time where the result is streamed


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    type: Literal["features.asof.AsofOfflineStore"] = "features.asof.AsofOfflineStore"


@dataclass(frozen=True)
class Place:
    """Where the Parquet of a source lies: one file, or a folder of files."""

    system: fs.FileSystem
    path: str

    def dataset(self, text: Sequence[str] = ()) -> ds.FileSystemDataset:
        """The files as they are; the columns named are read as codes of a dictionary."""
        options = ds.ParquetReadOptions(dictionary_columns=text)
        return ds.dataset(self.path, filesystem=self.system, format=ds.ParquetFileFormat(read_options=options))

    def exists(self) -> bool:
        return bool(self.system.get_file_info(self.path).type != fs.FileType.NotFound)

    def is_folder(self) -> bool:
        return bool(self.system.get_file_info(self.path).type == fs.FileType.Directory)

    def write(self, tables: Iterable[pa.Table]) -> None:
        """Writes one file, whole or not at all; all tables get the schema of the first."""
        folder, _, name = self.path.rpartition("/")
        scratch = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"  # with a dot before it, no reader of the folder takes it
        tables = iter(tables)
        first = next(tables)
        try:
            with pq.ParquetWriter(scratch, first.schema, filesystem=self.system) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table.cast(first.schema))
            self.system.move(scratch, self.path)
        except BaseException:
            if self.system.get_file_info(scratch).type != fs.FileType.NotFound:
                self.system.delete_file(scratch)
            raise


class AsofRetrievalJob(RetrievalJob):
    """A join that runs when its result is asked for: `rows(n)` gives the rows in tables of at most n, `join` widens one."""

    def __init__(
        self, rows: Callable[[int], Iterator[pa.Table]], join: Callable[[], Callable[[pa.Table], pa.Table]], config: RepoConfig,
        *, full_feature_names: bool = False, on_demand: Sequence[OnDemandFeatureView] = (), features: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._rows, self._join, self._config = rows, join, config
        self._full, self._on_demand, self._features = full_feature_names, list(on_demand), list(features)

    @property
    def full_feature_names(self) -> bool:
        return self._full

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @cached_property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for; the times are those of the entity rows, which are read for it. None of rows that are pulled."""
        if not self._features:
            return None
        keys: list[str] = []
        ends: list[datetime] = []
        for rows in self._rows(BATCH):
            stamp = _time_column(rows)
            keys = [c for c in rows.column_names if c != stamp]
            ends += [v for v in pc.min_max(rows[stamp].cast(pa.timestamp("us", "UTC"))).as_py().values() if v is not None]
        return RetrievalMetadata(self._features, keys, min(ends, default=None), max(ends, default=None))

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        join = self._join()
        return pa.concat_tables([join(rows) for rows in self._rows(2**40)])

    def to_arrow_batches(self, rows: int = BATCH) -> Iterator[pa.Table]:
        """The result in tables of at most `rows` rows, on-demand features included, each made when it is asked for."""
        join = self._join()
        for part in self._rows(rows):
            yield self._of(part, join).to_arrow()

    def _of(self, rows: pa.Table, join: Callable[[pa.Table], pa.Table]) -> "AsofRetrievalJob":
        """The same job for some of its rows."""
        return AsofRetrievalJob(lambda n: iter([rows]), lambda: join, self._config, full_feature_names=self._full,
                                on_demand=self._on_demand, features=self._features)  # fmt: skip

    def persist(self, storage: Any, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the result as Parquet, in batches: one file, or the only file of a folder if its name says no .parquet."""
        place = _place(self._config, storage.to_data_source())
        if place.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=storage.file_options.uri)
        if not place.path.endswith(".parquet"):
            if place.exists():
                for old in place.system.get_file_info(fs.FileSelector(place.path)):
                    if old.path.endswith(".parquet"):
                        place.system.delete_file(old.path)
            place.system.create_dir(place.path)
            place = Place(place.system, f"{place.path}/part-0.parquet")
        place.write(self.to_arrow_batches())


class AsofOfflineStore(OfflineStore):
    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig, feature_views: list[FeatureView], feature_refs: list[str],
        entity_df: pd.DataFrame | str | None, registry: BaseRegistry, project: str,
        full_feature_names: bool = False, filter_by_created_timestamp: bool = False, **kwargs: Any,
    ) -> RetrievalJob:  # fmt: skip
        """Features of each entity row, known at its time. The known-at rule holds with either flag.

        `entity_df` is a data frame, or a query for DuckDB, whose relative paths lie in the repository. Raises
        MillraceError where a column is missing, twice there, or not of the type of the source.
        """
        if entity_df is None:
            raise MillraceError("entity_df must be a data frame or a SQL query: every row is joined at its own time")
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        wanted, _ = _get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)

        def ready() -> Callable[[pa.Table], pa.Table]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                views = list(pool.map(lambda item: _ready(config, item[0], item[1]), wanted.items()))
            prefixes = [f"{view.projection.name_to_use()}__" if full_feature_names else "" for view in wanted]
            names = [prefix + f for prefix, features in zip(prefixes, wanted.values(), strict=True) for f in features]
            return lambda rows: _joined(rows, views, names)

        return AsofRetrievalJob(lambda n: _entity_rows(config, entity_df, n), ready, config,
                                full_feature_names=full_feature_names, on_demand=on_demand, features=feature_refs)  # fmt: skip

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None, start_date: datetime, end_date: datetime,
    ) -> RetrievalJob:  # fmt: skip
        """The newest row of each key in [start_date, end_date], ties to the later created; none of a null key."""
        stamps = [timestamp_field, created_timestamp_column] if created_timestamp_column else [timestamp_field]

        def latest(table: pa.Table) -> pa.Table:
            unit = _unit([table[c] for c in stamps])
            code = Codes([table[c] for c in join_key_columns], table.num_rows).stored
            there = np.flatnonzero(code >= 0)
            order, code, _ = _order(code[there], *(_times(table[c], unit)[there] for c in stamps))
            last = np.append(code[1:] != code[:-1], True)[: len(order)]
            found = table.take(pa.array(there[order[last]]))
            if join_key_columns:
                return found
            return found.append_column(DUMMY_ENTITY_ID, pa.repeat(pa.scalar(DUMMY_ENTITY_VAL), found.num_rows))

        columns = [*join_key_columns, *feature_name_columns, *stamps]
        return _pulled(config, data_source, columns, timestamp_field, start_date, end_date, latest)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None = None, start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:  # fmt: skip
        """Every row with its event in [start_date, end_date]."""
        columns = [*join_key_columns, *feature_name_columns, timestamp_field]
        columns += [created_timestamp_column] if created_timestamp_column else []
        return _pulled(config, data_source, columns, timestamp_field, start_date, end_date, lambda table: table)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Appends rows to the source of a view: a file is replaced at once by a longer one, a folder gets one more file.

        Raises MillraceError for other columns than those of the source, and for a view whose steps are computed.
        """
        source = feature_view.batch_source
        if "millrace.kind" in feature_view.tags:
            raise MillraceError(f"view {feature_view.name!r} is computed from landed facts: land new files instead")
        assert source is not None
        place = _place(config, source)
        stored = place.dataset()
        back = {new: old for old, new in (source.field_mapping or {}).items()}
        table = table.rename_columns([back.get(c, c) for c in table.column_names])
        if sorted(table.column_names) != sorted(stored.schema.names):
            raise MillraceError(f"columns {table.column_names} do not fit {place.path}: give exactly {stored.schema.names}")
        table = table.select(stored.schema.names).cast(stored.schema)
        if place.is_folder():
            Place(place.system, f"{place.path}/appended-{wall_us()}-{uuid.uuid4().hex[:8]}.parquet").write([table])
        else:
            before = (pa.Table.from_batches([batch]) for batch in stored.to_batches())
            place.write(part for parts in ([stored.schema.empty_table()], before, [table]) for part in parts)
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(config: RepoConfig, data: pa.Table | Path, source: LoggingSource,
                              logging_config: LoggingConfig, registry: BaseRegistry) -> None:  # fmt: skip
        raise MillraceError("predictions are logged by the endpoint, not by Feast")


# Reading


def _place(config: RepoConfig, source: DataSource) -> Place:
    if not isinstance(source, FileSource) or not isinstance(source.file_format or ParquetFormat(), ParquetFormat):
        raise MillraceError(f"data source {source.name!r} is not a Parquet file")
    uri, endpoint = source.path, source.s3_endpoint_override or ""
    if uri.startswith("s3://"):
        return Place(*FileSource.create_filesystem_and_path(uri, endpoint, source.resolve_credentials()))
    if "://" in uri:
        return Place(*fs.FileSystem.from_uri(uri))
    return Place(fs.LocalFileSystem(), str(Path(config.repo_path or ".").absolute() / uri))


def _pulled(
    config: RepoConfig, source: DataSource, columns: Sequence[str], field: str, start: datetime | None, end: datetime | None,
    change: Callable[[pa.Table], pa.Table],
) -> RetrievalJob:  # fmt: skip
    """The columns of the rows whose `field` is in [start, end], then changed."""

    def run(_: int) -> Iterator[pa.Table]:
        stored = _place(config, source).dataset()
        zone = getattr(stored.schema.field(field).type, "tz", None)
        keep = pc.is_valid(pc.field(field))
        for bound, compare in ((start, pc.greater_equal), (end, pc.less_equal)):
            if bound is not None:
                moment = (bound if bound.tzinfo else bound.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
                keep &= compare(pc.field(field), pa.scalar(moment // timedelta(microseconds=1), pa.timestamp("us", zone)))
        yield change(stored.to_table(columns=list(dict.fromkeys(columns)), filter=keep))

    return AsofRetrievalJob(run, lambda: lambda table: table, config)


def _entity_rows(config: RepoConfig, entity_df: pd.DataFrame | str, rows: int) -> Iterator[pa.Table]:
    """The entity rows in tables of at most `rows`, at least one."""
    if isinstance(entity_df, pd.DataFrame):
        table = pa.Table.from_pandas(entity_df, preserve_index=False)
        yield from (table.slice(i, rows) for i in range(0, max(table.num_rows, 1), rows))
        return
    with duckdb.connect(config={"file_search_path": str(Path(config.repo_path or ".").absolute())}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        reader = connection.sql(entity_df).to_arrow_reader(min(rows, 2**20))
        empty = True
        for batch in reader:
            empty = False
            yield pa.Table.from_batches([batch])
        if empty:
            yield reader.schema.empty_table()


def _time_column(rows: pa.Table) -> str:
    """`event_timestamp`, or else the only column of times. Raises EntityTimestampInferenceException."""
    stamps = [f.name for f in rows.schema if pa.types.is_timestamp(f.type)]
    if DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL in rows.column_names or len(stamps) != 1:
        stamps = [DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL]
    if stamps[0] not in rows.column_names:
        raise EntityTimestampInferenceException(DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL)
    return stamps[0]


def _unit(columns: Sequence[pa.ChunkedArray]) -> str:
    """`us`, or `ns` where a time is finer than that."""
    fine = [c for c in columns if pa.types.is_timestamp(c.type) and c.type.unit == "ns"]
    return "ns" if any((filled(one_chunk(c).cast(pa.int64()), 0) % 1000).any() for c in fine) else "us"


def _times(column: pa.ChunkedArray, unit: str) -> np.ndarray:
    """Times in a unit, MISSING where null."""
    if unit == "us":
        return int_times(column)
    return filled(one_chunk(column).cast(pa.timestamp("ns", "UTC")).cast(pa.int64()), MISSING)


# Joining


@dataclass(frozen=True)
class Ready:
    """A view made ready: its features, and which of their rows (int64, −1 where none) rows of entities see."""

    columns: list[pa.ChunkedArray]
    find: Callable[[pa.Table], np.ndarray]


def _joined(rows: pa.Table, views: Sequence[Ready], names: Sequence[str]) -> pa.Table:
    """The rows with one column more per feature."""
    if twice := sorted(set(names) & set(rows.column_names)):
        raise MillraceError(f"the entity rows have columns named as features, {twice}: rename them, or ask for full names")

    def features(view: Ready) -> list[pa.ChunkedArray]:
        found = view.find(rows)
        none = found < 0
        at = pa.array(np.maximum(found, 0), mask=none) if none.any() else pa.array(found)
        return [c.take(at) if len(c) else pa.chunked_array([pa.nulls(rows.num_rows, c.type)]) for c in view.columns]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [column for columns in pool.map(features, views) for column in columns]
    return pa.table([*rows.columns, *found], names=[*rows.column_names, *names])


def _ready(config: RepoConfig, view: FeatureView, features: Sequence[str]) -> Ready:
    source, kind = view.batch_source, view.tags.get("millrace.kind")
    assert source is not None
    back = {new: old for old, new in (source.field_mapping or {}).items()}
    place = _place(config, source)
    key = [c for c in view.join_keys if c != DUMMY_ENTITY_ID]
    asked = [view.projection.join_key_map.get(c, c) for c in key]
    stored = {c: back.get(c, c) for c in (*key, *features, source.timestamp_field)}
    created = back.get(source.created_timestamp_column, source.created_timestamp_column)
    schema = place.dataset().schema
    for column in (*stored.values(), *([created] if created else [])):
        if column not in schema.names:
            raise MillraceError(f"view {view.name!r}: {place.path} has no column {column!r}{nearest(column, schema.names)}")
    columns = [stored[f] for f in features]
    types = [schema.field(stored[c]).type for c in key]
    if kind is None:
        return _newest_known(place, view.ttl, columns, [stored[c] for c in key], stored[source.timestamp_field], created, asked)
    held = (KEY, TIME, "_order", "_live_to", *columns) if kind == "sequence" else (KEY, TIME, *columns)
    table = place.dataset([KEY]).to_table(columns=list(dict.fromkeys(held)))
    keys, start = key_runs(table[KEY])
    begin = int_times(table[TIME])

    def find(rows: pa.Table) -> np.ndarray:
        names = [_as_stored(rows, c, t) for c, t in zip(asked, types, strict=True)]
        codes, t = codes_of(text_keys(names, rows.num_rows), keys), int_times(rows[_time_column(rows)])
        if kind == "sequence":
            order, live_to = (table[c].to_numpy() for c in ("_order", "_live_to"))
            own = int_times(rows[view.tags["millrace.order"]])
            return previous(start, order, begin, live_to, codes, t, own, int(view.tags["millrace.within"]))
        return _seen(start, begin, codes, t)

    return Ready([table[c] for c in columns], find)


def _as_stored(rows: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A key column of the entity rows in the type of the source: pandas makes floats of integers that may be missing."""
    if name not in rows.column_names:
        raise FeastEntityDFMissingColumnsError({name}, {name})
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        return rows[name].cast(kind)
    except pa.ArrowInvalid as error:
        raise MillraceError(f"entity column {name!r} is {rows[name].type}, the source has {kind}: {error}") from None


def _newest_known(
    place: Place, ttl: timedelta | None, features: Sequence[str], key: Sequence[str], event_column: str,
    created_column: str | None, asked: Sequence[str],
) -> Ready:  # fmt: skip
    """Any view of Parquet files."""
    stamps = [event_column, created_column] if created_column else [event_column]
    table = place.dataset().to_table(columns=list(dict.fromkeys([*key, *stamps, *features])))
    codes = Codes([table[c] for c in key], table.num_rows)
    unit = _unit([table[c] for c in stamps])
    event, *rest = (_times(table[c], unit) for c in stamps)
    created = rest[0] if rest else event
    types = [table.schema.field(c).type for c in key]
    row = np.flatnonzero((codes.stored >= 0) & (event != MISSING) & (created != MISSING))
    order, code, known = _order(codes.stored[row], np.maximum(event, created)[row], event[row], created[row])
    row = row[order]
    event = event[row]
    newest = _is_newest(_starts(code, codes.count), event)
    row, known, event = row[newest], known[newest], event[newest]
    start = _starts(code[newest], codes.count)
    limit = (ttl or timedelta(0)) // timedelta(microseconds=1) * (1000 if unit == "ns" else 1)

    def find(rows: pa.Table) -> np.ndarray:
        t, late = _instants(rows[_time_column(rows)], unit)
        names = [_as_stored(rows, c, kind) for c, kind in zip(asked, types, strict=True)]
        found = _seen(start, known, codes.of(names, len(t)), t)
        if not len(row):
            return found
        seen = np.maximum(found, 0)
        alive = found >= 0
        if limit:
            alive &= event[seen] >= t + late - limit
        return np.where(alive, row[seen], -1)

    return Ready([table[c] for c in features], find)


def _instants(column: pa.ChunkedArray, unit: str) -> tuple[np.ndarray, np.ndarray | int]:
    """Times of rows in a unit, rounded down, and what rounding them up would add (1 or 0); MISSING where null."""
    if unit == "ns" or _unit([column]) == "us":
        return _times(column, unit), 0
    t = _times(column, "ns")
    none = t == MISSING
    return np.where(none, MISSING, t // 1000), ~none & (t % 1000 > 0)


def _order(code: np.ndarray, *by: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the order of code (≥ 0, < 2^32), then of each of `by`, stable; code and by[0] in that order.

    Fast where by[0] is nearly sorted and rarely equal.
    """
    order = np.arange(len(code)) if (by[0][1:] >= by[0][:-1]).all() else np.argsort(by[0], kind="stable")
    for shift in range(0, int(code.max(initial=0)).bit_length(), 16):  # numpy sorts 16 bits by counting
        digit = (code >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    code, first = code[order], by[0][order]
    same = (code[1:] == code[:-1]) & (first[1:] == first[:-1])
    if len(by) > 1 and same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        order[tied] = order[tied][np.lexsort((*(values[order[tied]] for values in by[::-1]), code[tied]))]
    return order, code, first


def _is_newest(start: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Which facts, in the order of key and known-at, are at least as new as all before of their key (bool, N)."""
    newest = np.ones(len(event), bool)
    low, width = int(event.min(initial=0)), int(event.max(initial=0)) - int(event.min(initial=0)) + 1
    step = max(LIMIT // width, 1)
    for key in range(0, len(start) - 1, step):  # as many keys as fit into one line of integers
        part = slice(start[key], start[min(key + step, len(start) - 1)])
        runs = np.diff(start[key : key + step + 1])
        line = np.repeat(np.arange(len(runs)) * width, runs) + (event[part] - low)
        newest[part] = np.maximum.accumulate(line) == line
    return newest


def _starts(code: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` keys begins among sorted codes (count + 1)."""
    return np.append(0, np.cumsum(np.bincount(code, minlength=count)))


def _seen(start: np.ndarray, step_t: np.ndarray, codes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """`steps.as_of`, asked in order of key and time: a search that moves forward finds its place in the cache."""
    order = order_of(codes, np.maximum(t, 0))  # no MISSING: its distance to a time is no int64
    found = np.empty(len(t), np.int64)
    found[order] = as_of(start, step_t, codes[order], t[order])
    return found


class Codes:
    """Keys as small integers: equal exactly where all columns are equal, −1 where one is null or not stored."""

    def __init__(self, columns: Sequence[pa.ChunkedArray], length: int) -> None:
        self.levels: list[pa.Array] = []
        self.pairs: list[pa.Array] = []  # of a code so far and a level of the next column, as one integer
        self.stored, self.count = np.zeros(length, np.int64), 1
        for i, column in enumerate(columns):
            encoded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            part = one_chunk(encoded)
            self.levels.append(part.dictionary)
            self.stored = self._both(self.stored, filled(part.indices, -1).astype(np.int64), len(part.dictionary))
            if i:
                pair = pa.array(self.stored, mask=self.stored < 0).dictionary_encode()
                self.pairs.append(pair.dictionary)
                self.stored = filled(pair.indices, -1).astype(np.int64)
            self.count = len(self.pairs[-1] if i else part.dictionary)

    def of(self, columns: Sequence[pa.ChunkedArray], length: int) -> np.ndarray:
        """Codes of keys that are asked for (int64, length)."""
        code = np.zeros(length, np.int64)
        for i, (column, level) in enumerate(zip(columns, self.levels, strict=True)):
            code = self._both(code, _positions(column, level), len(level))
            if i:
                code = _positions(pa.array(code, mask=code < 0), self.pairs[i - 1])
        return code

    @staticmethod
    def _both(code: np.ndarray, part: np.ndarray, levels: int) -> np.ndarray:
        return np.where((code < 0) | (part < 0), -1, code * levels + part)


def _positions(column: pa.Array | pa.ChunkedArray, level: pa.Array) -> np.ndarray:
    """`codes_of`, by hashing the shorter of the two: few rows may be asked of many keys."""
    if len(column) >= len(level):
        return codes_of(column, level)
    own = one_chunk(column.dictionary_encode())
    at = codes_of(level, own.dictionary)
    there = np.flatnonzero(at >= 0)
    place = np.full(len(own.dictionary) + 1, -1)
    place[at[there]] = there
    return place[filled(own.indices, len(own.dictionary))]
