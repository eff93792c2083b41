"""A Feast offline store that joins on known-at: of the facts known at the row's time, the newest.

A fact is known from the later of its event and created time on; `ttl` is inclusive; equal event times go to the later
created, then to the later row (of files in the order of their names). Facts without an event or created time are never
known, and a null key matches nothing. Rows keep their order and number. Views of ours say in their tags how they are
stored: as steps, read by `steps.as_of`. Any other view of Parquet files, local or on S3, is read by `known`.
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
from features.keys import codes_of, key_runs, text_keys
from features.known import Codes, instants, newest_known, seen_at, sort_facts, times, unit_of
from features.steps import KEY, TIME, previous
from pipelines.clock import MISSING, NEVER, wall_us
from pipelines.errors import MillraceError, nearest

BATCH = 1_000_000  # entity rows that are joined at a time where the result is streamed


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    type: Literal["features.asof.AsofOfflineStore"] = "features.asof.AsofOfflineStore"


@dataclass(frozen=True)
class Place:
    """Where the Parquet of a source lies: one file, or a folder of files."""

    system: fs.FileSystem
    path: str

    def dataset(self) -> ds.FileSystemDataset:
        """The files as they are."""
        return ds.dataset(self.path, filesystem=self.system, format="parquet")

    def parts(self, text: Sequence[str], columns: list[str]) -> list[tuple[int, pa.Table]]:
        """The files of a view of ours, each with the time from which on it is right."""
        files = sorted(self.dataset().files)
        tables = (pq.read_table(f, filesystem=self.system, columns=columns, read_dictionary=text) for f in files)
        return [(int(Path(f).stem) or MISSING, table) for f, table in zip(files, tables, strict=True)]

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
            unit = unit_of([table[c] for c in stamps])
            code = Codes([table[c] for c in join_key_columns], table.num_rows).stored
            there = np.flatnonzero(code >= 0)
            order, code, _ = sort_facts(code[there], *(times(table[c], unit)[there] for c in stamps))
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

    def keys_of(rows: pa.Table) -> list[pa.ChunkedArray]:
        return [_as_stored(rows, c, t) for c, t in zip(asked, types, strict=True)]

    if kind is None:
        stamps = [stored[source.timestamp_field], created] if created else [stored[source.timestamp_field]]
        table = place.dataset().to_table(columns=list(dict.fromkeys([*(stored[c] for c in key), *stamps, *columns])))
        event, *rest = (table[c] for c in stamps)
        facts = newest_known([table[stored[c]] for c in key], event, rest[0] if rest else None, view.ttl)
        return Ready([table[c] for c in columns], lambda rows: facts.find(keys_of(rows), rows[_time_column(rows)]))
    held = (KEY, TIME, "_order", "_live_to", *columns) if kind == "sequence" else (KEY, TIME, *columns)
    parts = place.parts([KEY], list(dict.fromkeys(held)))
    begins, finds = [begin for begin, _ in parts], [_of_part(view, table) for _, table in parts]
    offsets = np.cumsum([0, *(table.num_rows for _, table in parts)])

    def find(rows: pa.Table) -> np.ndarray:
        """Each row in the part that is right for its time."""
        names, (t, _) = text_keys(keys_of(rows), rows.num_rows), instants(rows[_time_column(rows)], "us")
        own = int_times(rows[view.tags["millrace.order"]]) if kind == "sequence" else t
        found, which = np.full(rows.num_rows, -1), np.searchsorted(begins, t, side="right") - 1
        for i, of_part in enumerate(finds):
            asked = np.flatnonzero(which == i)
            if len(asked):
                at = of_part(names.take(pa.array(asked)), t[asked], own[asked])
                found[asked] = np.where(at >= 0, at + offsets[i], -1)
        return found

    whole = pa.concat_tables([table for _, table in parts])
    return Ready([whole[c] for c in columns], find)


def _of_part(view: FeatureView, table: pa.Table) -> Callable[[pa.Array, np.ndarray, np.ndarray], np.ndarray]:
    """From Q keys, times and own orders of rows to the row of a part of a view of ours that each sees, −1 where none."""
    keys, start = key_runs(table[KEY])
    begin = int_times(table[TIME])
    if view.tags["millrace.kind"] != "sequence":
        return lambda names, t, own: seen_at(start, begin, codes_of(names, keys), t)
    order, live_to = (table[c].to_numpy() for c in ("_order", "_live_to"))
    within, recent = int(view.tags["millrace.within"]), int(view.tags.get("millrace.recent", NEVER))

    def find(names: pa.Array, t: np.ndarray, own: np.ndarray) -> np.ndarray:
        found = previous(start, order, begin, live_to, codes_of(names, keys), t, own, within)
        return np.where(t - own <= recent, found, -1)  # what came before an older row is not kept

    return find


def _as_stored(rows: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A key column of the entity rows in the type of the source: pandas makes floats of integers that may be missing."""
    if name not in rows.column_names:
        raise FeastEntityDFMissingColumnsError({name}, {name})
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        return rows[name].cast(kind)
    except pa.ArrowInvalid as error:
        raise MillraceError(f"entity column {name!r} is {rows[name].type}, the source has {kind}: {error}") from None
