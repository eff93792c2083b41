"""A Feast offline store that joins on known-at: of the facts known at the row's time, the newest.

A fact is known from the later of its event and created time on; `ttl` is inclusive; equal event times go to the later
created, then to the later row (of files in the order of their names). Facts without an event or created time are never
known, and a null key matches nothing. Rows keep their order and number. Views of ours say in their tags how they are
stored: as steps, read by `steps.as_of`. Any other view of Parquet files, local or on S3, is read by `known`.

Under a `memory_limit` facts are made ready in parts, and they and the result lie in files that are mapped into memory;
entity rows are joined in batches that fit. What is held beside a batch is one part, or one column of a source.
"""

import fcntl
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import chain
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
from pydantic import ByteSize

from features.facts import int_times
from features.keys import codes_of, filled, key_runs, one_chunk, text_keys
from features.known import Codes, NewestKnown, instants, newest_known, rows_seen, seen_at, sort_facts, times, unit_of
from features.steps import KEY, TIME, previous
from pipelines.clock import MISSING, wall_us
from pipelines.errors import MillraceError, nearest

BATCH = 1_000_000  # entity rows that are joined at a time where the result is streamed
ROW = 1024  # bytes that joining one entity row takes beside its features
FACT = 160  # bytes that making one fact ready takes


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    """`memory_limit` of a join, such as 512MiB; what lies in files lies in the folder for temporary files (TMPDIR)."""

    type: Literal["features.asof.AsofOfflineStore"] = "features.asof.AsofOfflineStore"
    memory_limit: ByteSize | None = None


def spilled(tables: Iterable[pa.Table]) -> pa.Table:
    """The tables as one, mapped from a file that has lost its name: it goes with the table. All get the first's schema."""
    tables = iter(tables)
    first = next(tables)
    with tempfile.NamedTemporaryFile(prefix="millrace-") as file:
        with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table.cast(first.schema))
        with pa.memory_map(file.name) as mapped:
            return pa.ipc.open_stream(mapped).read_all()


@dataclass(frozen=True)
class Place:
    """Where the Parquet of a source lies: one file, or a folder of files."""

    system: fs.FileSystem
    path: str

    def dataset(self, text: Sequence[str] = ()) -> ds.FileSystemDataset:
        """The files as they are; the columns named are read as codes of a dictionary."""
        options = ds.ParquetReadOptions(dictionary_columns=text)
        return ds.dataset(self.path, filesystem=self.system, format=ds.ParquetFileFormat(read_options=options))

    def parts(self) -> list[tuple[int, "Place"]]:
        """The files of a view of ours, each with the time from which on it is right."""
        return [(int(Path(file).stem) or MISSING, Place(self.system, file)) for file in sorted(self.dataset().files)]

    @contextmanager
    def unchanged(self, stored: ds.FileSystemDataset) -> Iterator[None]:
        """Files that are read more than once. Raises MillraceError where they were written to meanwhile."""

        def marks() -> list[tuple[int, int]]:
            return [(info.size, info.mtime_ns) for info in self.system.get_file_info(stored.files)]

        before = marks()
        try:
            yield
        except OSError:
            if marks() == before:
                raise
        if marks() != before:
            raise MillraceError(f"{self.path} was written to while it was read: ask again")

    def exists(self) -> bool:
        return bool(self.system.get_file_info(self.path).type != fs.FileType.NotFound)

    def is_folder(self) -> bool:
        return bool(self.system.get_file_info(self.path).type == fs.FileType.Directory)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One writer at a time in the folder of this local file; what one left that was killed is removed."""
        path = Path(self.path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # the folder: the file itself is replaced
            for left in path.parent.glob(f".{path.name}.*.partial"):
                left.unlink()
            yield
        finally:
            os.close(folder)

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
    """A join that runs when its result is asked for: `rows(n)` gives the rows in tables of at most n, a `Join` widens one."""

    def __init__(
        self, rows: Callable[[int], Iterator[pa.Table]], join: Callable[[], "Join"], config: RepoConfig,
        *, full_feature_names: bool = False, on_demand: Sequence[OnDemandFeatureView] = (), features: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._rows, self._join, self._config, self._limit = rows, join, config, _memory_limit(config)
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

    def to_arrow(self, validation_reference: Any = None, timeout: int | None = None) -> pa.Table:
        """The whole result, on-demand features included; under a memory limit mapped from a file."""
        if self._limit is None or validation_reference is not None:
            return super().to_arrow(validation_reference, timeout)
        return spilled(self.to_arrow_batches())

    def to_arrow_batches(self, rows: int | None = None) -> Iterator[pa.Table]:
        """The result in tables of at most `rows` rows, each made when it is asked for; unless told, of as many as fit."""
        join = self._join()
        if rows is None:
            rows = BATCH if self._limit is None else min(BATCH, max(self._limit // 4 // (ROW + join.row_bytes), 1))
        for part in self._rows(rows):
            yield super(AsofRetrievalJob, self._of(part, join)).to_arrow()

    def _of(self, rows: pa.Table, join: "Join") -> "AsofRetrievalJob":
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

        def ready() -> Join:
            with ThreadPoolExecutor(os.cpu_count() if _memory_limit(config) is None else 1) as pool:
                views = list(pool.map(lambda item: _ready(config, item[0], item[1]), wanted.items()))
            prefixes = [f"{view.projection.name_to_use()}__" if full_feature_names else "" for view in wanted]
            names = [prefix + f for prefix, features in zip(prefixes, wanted.values(), strict=True) for f in features]
            return Join(views, names)

        return AsofRetrievalJob(lambda n: _entity_rows(config, entity_df, n), ready, config,
                                full_feature_names=full_feature_names, on_demand=on_demand, features=feature_refs)  # fmt: skip

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None, start_date: datetime, end_date: datetime,
    ) -> RetrievalJob:  # fmt: skip
        """The newest row of each key in [start_date, end_date], ties to the later created; none of a null key."""
        stamps = [timestamp_field, created_timestamp_column] if created_timestamp_column else [timestamp_field]

        def latest(table: pa.Table) -> np.ndarray:
            unit = unit_of([table[c] for c in stamps])
            _, code = Codes.made([table[c] for c in join_key_columns], table.num_rows)
            there = np.flatnonzero(code >= 0)
            order, code, _ = sort_facts(code[there], *(times(table[c], unit)[there] for c in stamps))
            newest = np.zeros(table.num_rows, bool)
            newest[there[order[np.append(code[1:] != code[:-1], True)[: len(order)]]]] = True
            return newest

        columns, keyed = [*join_key_columns, *feature_name_columns, *stamps], [*join_key_columns, *stamps]
        pulled = _pulled(config, data_source, columns, timestamp_field, start_date, end_date, keyed, latest)
        return _as_job(config, pulled, keyless=not join_key_columns)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None = None, start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:  # fmt: skip
        """Every row with its event in [start_date, end_date]."""
        columns = [*join_key_columns, *feature_name_columns, timestamp_field]
        columns += [created_timestamp_column] if created_timestamp_column else []
        pulled = _pulled(config, data_source, columns, timestamp_field, start_date, end_date)
        return _as_job(config, pulled, keyless=not join_key_columns)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Appends rows to the source of a view: a file is replaced at once by a longer one, a folder gets one more file.

        Raises MillraceError for other columns than those of the source, for a view whose steps are computed, and for one
        object on S3, where no two writers could be kept apart.
        """
        source = feature_view.batch_source
        if "millrace.kind" in feature_view.tags:
            raise MillraceError(f"view {feature_view.name!r} is computed from landed facts: land new files instead")
        assert source is not None
        place = _place(config, source)
        back = {new: old for old, new in (source.field_mapping or {}).items()}
        table = table.rename_columns([back.get(c, c) for c in table.column_names])

        def fitting(stored: ds.Dataset) -> pa.Table:
            if sorted(table.column_names) != sorted(stored.schema.names):
                raise MillraceError(f"columns {table.column_names} do not fit {place.path}: give exactly {stored.schema.names}")
            return table.select(stored.schema.names).cast(stored.schema)

        if place.is_folder():
            name = f"appended-{wall_us()}-{uuid.uuid4().hex[:8]}.parquet"
            Place(place.system, f"{place.path}/{name}").write([fitting(place.dataset())])
        elif not isinstance(place.system, fs.LocalFileSystem):
            raise MillraceError(f"{place.path} is one object, which two could append to at once: make it a folder of files")
        else:
            with place.alone():
                stored = place.dataset()
                before = (pa.Table.from_batches([batch]) for batch in stored.to_batches())
                place.write(chain([stored.schema.empty_table()], before, [fitting(stored)]))
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


def _memory_limit(config: RepoConfig) -> int | None:
    limit: int | None = config.offline_store.memory_limit
    return limit


def _pulled(
    config: RepoConfig, source: DataSource, columns: Sequence[str], field: str, start: datetime | None, end: datetime | None,
    keyed: Sequence[str] = (), choose: Callable[[pa.Table], np.ndarray] | None = None,
) -> Callable[[int], Iterator[pa.Table]]:  # fmt: skip
    """The columns of the rows whose `field` is in [start, end]; those alone that `choose` (bool, N) takes by `keyed` columns."""

    def run(most: int) -> Iterator[pa.Table]:
        place = _place(config, source)
        stored = place.dataset()
        zone = getattr(stored.schema.field(field).type, "tz", None)
        keep = pc.is_valid(pc.field(field))
        for bound, compare in ((start, pc.greater_equal), (end, pc.less_equal)):
            if bound is not None:
                moment = (bound if bound.tzinfo else bound.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
                keep &= compare(pc.field(field), pa.scalar(moment // timedelta(microseconds=1), pa.timestamp("us", zone)))
        found = stored.scanner(columns=list(dict.fromkeys(columns)), filter=keep, batch_size=min(most, 2**17))
        parts = chain([found.projected_schema.empty_table()], (pa.Table.from_batches([b]) for b in found.to_batches()))
        if choose is None:
            yield from parts
        elif _memory_limit(config) is None:
            table = found.to_table()
            yield table.filter(pa.array(choose(table)))
        else:
            with place.unchanged(stored):
                chosen = pa.array(choose(stored.to_table(columns=[*keyed], filter=keep)))
                for part in parts:
                    yield part.filter(chosen[: part.num_rows])
                    chosen = chosen[part.num_rows :]

    return run


def _as_job(config: RepoConfig, rows: Callable[[int], Iterator[pa.Table]], *, keyless: bool) -> AsofRetrievalJob:
    return AsofRetrievalJob((lambda most: map(_with_dummy, rows(most))) if keyless else rows, lambda: Join((), ()), config)


def _with_dummy(table: pa.Table) -> pa.Table:
    return table.append_column(DUMMY_ENTITY_ID, pa.repeat(pa.scalar(DUMMY_ENTITY_VAL), table.num_rows))


def _entity_rows(config: RepoConfig, entity_df: pd.DataFrame | str, rows: int) -> Iterator[pa.Table]:
    """The entity rows in tables of at most `rows`, at least one."""
    if isinstance(entity_df, pd.DataFrame):
        schema = pa.Schema.from_pandas(entity_df, preserve_index=False)
        for i in range(0, max(len(entity_df), 1), rows):
            yield pa.Table.from_pandas(entity_df.iloc[i : i + rows], schema, preserve_index=False)
        return
    limit = _memory_limit(config)
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        settings: dict[str, Any] = {"file_search_path": str(Path(config.repo_path or ".").absolute()), "temp_directory": folder}
        with duckdb.connect(config=settings | ({"memory_limit": f"{limit // 4}B"} if limit else {})) as connection:
            connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
            reader = connection.sql(entity_df).to_arrow_reader(min(rows, 2**20))
            empty = True
            for batch in reader:
                empty = False
                yield pa.Table.from_batches([batch])
            if empty:
                yield reader.schema.empty_table()


def _time_column(rows: pa.Table) -> str:
    """`event_timestamp`, or else the only column of times.

    Raises EntityTimestampInferenceException where there is none, MillraceError where it holds something else.
    """
    stamps = [f.name for f in rows.schema if pa.types.is_timestamp(f.type)]
    if DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL in rows.column_names or len(stamps) != 1:
        stamps = [DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL]
    if stamps[0] not in rows.column_names:
        raise EntityTimestampInferenceException(DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL)
    kind = rows[stamps[0]].type
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind)):
        raise MillraceError(f"entity column {stamps[0]!r} is {kind}, expected times: convert it (pandas.to_datetime, CAST)")
    return stamps[0]


# Joining


@dataclass(frozen=True)
class Ready:
    """A view made ready: its features, and which of their rows (int64, −1 where none) rows of entities see."""

    columns: list[pa.ChunkedArray]
    find: Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True)
class Join:
    """Views made ready, and the names of their features one after the other."""

    views: Sequence[Ready]
    names: Sequence[str]

    @property
    def row_bytes(self) -> int:
        """Bytes that the features of a row take, about."""
        return sum(c.nbytes // max(len(c), 1) + 1 for view in self.views for c in view.columns)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with one column more per feature."""
        if twice := sorted(set(self.names) & set(rows.column_names)):
            raise MillraceError(f"the entity rows have columns named as features, {twice}: rename them, or ask for full names")

        def features(view: Ready) -> list[pa.ChunkedArray]:
            found = view.find(rows)
            none = found < 0
            at = pa.array(np.maximum(found, 0), mask=none) if none.any() else pa.array(found)
            return [c.take(at) if len(c) else pa.chunked_array([pa.nulls(rows.num_rows, c.type)]) for c in view.columns]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [column for columns in pool.map(features, self.views) for column in columns]
        return pa.table([*rows.columns, *found], names=[*rows.column_names, *self.names])


def _read(
    config: RepoConfig, place: Place, held: Sequence[str], columns: Sequence[str], text: Sequence[str] = ()
) -> tuple[pa.Table, pa.Table]:
    """Two tables of a source: columns that are held (`text` as codes of a dictionary), and those that may lie in files."""
    stored = place.dataset(text)
    if _memory_limit(config) is None:
        table = stored.to_table(columns=list(dict.fromkeys([*held, *columns])))
        return table, table
    with place.unchanged(stored):
        return stored.to_table(columns=list(dict.fromkeys(held))), _columns(stored, columns)


def _facts(
    config: RepoConfig, place: Place, key: Sequence[str], stamps: Sequence[str], columns: Sequence[str], ttl: timedelta | None
) -> tuple[pa.Table, list[NewestKnown]]:
    """Columns of a source, and its facts made ready: at once, or under a memory limit in parts."""
    stored, limit = place.dataset(), _memory_limit(config)
    read = list(dict.fromkeys([*key, *stamps]))

    def ready(table: pa.Table, first: int = 0, unit: str = "") -> NewestKnown:
        event, created = table[stamps[0]], table[stamps[1]] if len(stamps) > 1 else None
        return newest_known([table[c] for c in key], event, created, ttl, first=first, unit=unit)

    if limit is None:
        table = stored.to_table(columns=list(dict.fromkeys([*read, *columns])))
        return table, [ready(table)]
    unit = "ns" if any(getattr(stored.schema.field(c).type, "unit", "") == "ns" for c in stamps) else "us"
    parts, first = [], 0
    with place.unchanged(stored):
        for table in _in_parts(stored, read, max(limit // 4 // FACT, 1)):
            parts.append(_away(ready(table, first, unit)))
            first += table.num_rows
        return _columns(stored, columns), parts


def _in_parts(stored: ds.Dataset, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
    """Columns of a source in tables of `rows` rows or a few more, at least one."""
    found = stored.scanner(columns=columns, batch_size=min(rows, 2**17), batch_readahead=1, fragment_readahead=1)
    held: list[pa.RecordBatch] = []
    for batch in found.to_batches():
        held.append(batch)
        if sum(b.num_rows for b in held) >= rows:
            yield pa.Table.from_batches(held)
            held = []
    yield pa.Table.from_batches(held, found.projected_schema)


def _columns(stored: ds.Dataset, names: Sequence[str]) -> pa.Table:
    """Columns of a source in files."""
    return pa.table({c: spilled(iter([stored.to_table(columns=[c]).combine_chunks()]))[c] for c in dict.fromkeys(names)})


def _away(facts: NewestKnown) -> NewestKnown:
    """The same facts in files."""

    def away(array: pa.Array) -> pa.Array:
        return one_chunk(spilled(iter([pa.table({"": array})]))[""])

    codes = Codes([away(a) for a in facts.codes.levels], [away(a) for a in facts.codes.pairs], facts.codes.count)
    numbers = ("start", "known", "event", "created", "row")
    return replace(facts, codes=codes, **{f: away(pa.array(getattr(facts, f))).to_numpy() for f in numbers})


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
        try:
            table, parts = _facts(config, place, [stored[c] for c in key], stamps, columns, view.ttl)
        except pa.ArrowInvalid as error:
            said = f"view {view.name!r}: {place.path} cannot be read with the types of its first file: {error}"
            raise MillraceError(said) from None
        return Ready([table[c] for c in columns], lambda rows: rows_seen(parts, keys_of(rows), rows[_time_column(rows)]))
    held = (KEY, TIME, "_order", "_live_to") if kind == "sequence" else (KEY, TIME)
    begins, places = zip(*place.parts(), strict=True)
    read = [_read(config, part, held, columns, [KEY]) for part in places]
    finds, first = [_of_part(view, table) for table, _ in read], np.cumsum([0, *(table.num_rows for table, _ in read)])

    def find(rows: pa.Table) -> np.ndarray:
        """Each row in the part that is right for its time, or for the order of its plan."""
        names, (t, _) = text_keys(keys_of(rows), rows.num_rows).dictionary_encode(), instants(rows[_time_column(rows)], "us")
        code = filled(names.indices, len(names.dictionary))
        own = int_times(rows[view.tags["millrace.order"]]) if kind == "sequence" else t
        found, part = np.full(rows.num_rows, -1), np.searchsorted(begins, own, side="right") - 1
        for i in np.unique(part[part >= 0]):
            here = np.flatnonzero(part == i)
            at = finds[i](names.dictionary, code[here], t[here], own[here])
            found[here] = np.where(at >= 0, at + first[i], -1)
        return found

    whole = pa.concat_tables([values for _, values in read])
    whole = whole.combine_chunks() if _memory_limit(config) is None else whole  # rows are taken from one chunk faster
    return Ready([whole[c] for c in columns], find)


def _of_part(view: FeatureView, table: pa.Table) -> Callable[..., np.ndarray]:
    """From names, and Q rows' codes of them, times and own orders, to the row of a part of a view of ours, −1 where none."""
    keys, start = key_runs(table[KEY])
    begin = int_times(table[TIME])
    if view.tags["millrace.kind"] != "sequence":
        return lambda names, code, t, own: seen_at(start, begin, np.append(codes_of(names, keys), -1)[code], t)
    order, live_to = (table[c].to_numpy() for c in ("_order", "_live_to"))
    within = int(view.tags["millrace.within"])

    def find(names: pa.Array, code: np.ndarray, t: np.ndarray, own: np.ndarray) -> np.ndarray:
        return previous(start, order, begin, live_to, np.append(codes_of(names, keys), -1)[code], t, own, within)

    return find


def _as_stored(rows: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A key column of the entity rows in the type of the source: pandas makes floats of integers that may be missing."""
    if name not in rows.column_names:
        raise FeastEntityDFMissingColumnsError({name}, {name})
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        return rows[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise MillraceError(f"entity column {name!r} is {rows[name].type}, the source has {kind}: {error}") from None
