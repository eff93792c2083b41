"""A Feast offline store that joins on known-at: the newest step, or the newest fact, known at the row's time.

Views of ours say in their tags how they are stored and are read by the merge function, `steps.as_of`. Any other view
of a Parquet file works too: known at the later of event and created time, its ttl inclusive, ties to the later
created. Rows keep their order and number; a null key matches nothing.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureView, RepoConfig
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _get_requested_feature_views_to_features_dict

from features.facts import Versions, int_times
from features.keys import codes_of, key_runs, text_keys
from features.steps import KEY, TIME, as_of, previous
from features.windows import latest_steps
from pipelines.clock import MISSING, NEVER
from pipelines.errors import MillraceError
from pipelines.spec import Latest, Source

DUMMY = "__dummy_id"  # Feast's join key of a view without entities


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    type: Literal["features.asof.AsofOfflineStore"] = "features.asof.AsofOfflineStore"


class AsofRetrievalJob(RetrievalJob):
    """A join that runs when its result is asked for."""

    def __init__(self, run: Callable[[], pa.Table], full_feature_names: bool,
                 on_demand: list[OnDemandFeatureView]) -> None:  # fmt: skip
        self._run, self._full, self._on_demand = run, full_feature_names, on_demand

    @property
    def full_feature_names(self) -> bool:
        return self._full

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return None

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._run().to_pandas()

    def persist(self, storage: Any, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        path = Path(storage.file_options.uri)
        if path.exists() and not allow_overwrite:
            raise MillraceError(f"{path} exists: pass allow_overwrite=True to replace it")
        pq.write_table(self._run(), path)


class AsofOfflineStore(OfflineStore):
    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig, feature_views: list[FeatureView], feature_refs: list[str],
        entity_df: pd.DataFrame | str | None, registry: BaseRegistry, project: str,
        full_feature_names: bool = False, filter_by_created_timestamp: bool = False, **kwargs: Any,
    ) -> RetrievalJob:  # fmt: skip
        """Features of each entity row, known at its time. The known-at rule holds with either flag."""
        if not isinstance(entity_df, pd.DataFrame):
            raise MillraceError("entity_df must be a data frame with an event_timestamp column")
        on_demand = registry.list_on_demand_feature_views(project)
        wanted, _ = _get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)

        def run() -> pa.Table:
            rows = pa.Table.from_pandas(entity_df, preserve_index=False)
            t = int_times(rows[DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL])
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                joined = pool.map(lambda item: _join(config, item[0], item[1], rows, t), wanted.items())
            columns = dict(zip(rows.column_names, rows.columns, strict=True))
            for (view, features), found in zip(wanted.items(), joined, strict=True):
                prefix = f"{view.projection.name_to_use()}__" if full_feature_names else ""
                columns |= {prefix + feature: column for feature, column in zip(features, found, strict=True)}
            return pa.table(columns)

        return AsofRetrievalJob(run, full_feature_names, on_demand)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None, start_date: datetime, end_date: datetime,
    ) -> RetrievalJob:  # fmt: skip
        """The newest row of each key in [start_date, end_date], ties to the later created."""
        columns = [*join_key_columns, *feature_name_columns]

        def run() -> pa.Table:
            table = _between(config, data_source, timestamp_field, start_date, end_date)
            stamps = [timestamp_field] + [created_timestamp_column] * bool(created_timestamp_column)
            keys = [(c, "ascending") for c in join_key_columns] + [(c, "ascending") for c in stamps]
            table = table.take(pc.sort_indices(table, keys)).combine_chunks()
            names = text_keys([table[c] for c in join_key_columns], table.num_rows)
            last = np.append(pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False), True)
            return table.filter(pa.array(last[: table.num_rows].astype(bool))).select([*columns, *stamps])

        return AsofRetrievalJob(run, False, [])

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], feature_name_columns: list[str],
        timestamp_field: str, created_timestamp_column: str | None = None, start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:  # fmt: skip
        """Every row with its event in [start_date, end_date]."""
        columns = [*join_key_columns, *feature_name_columns, timestamp_field]
        columns += [created_timestamp_column] if created_timestamp_column else []

        def run() -> pa.Table:
            return _between(config, data_source, timestamp_field, start_date, end_date).select(columns)

        return AsofRetrievalJob(run, False, [])

    @staticmethod
    def write_logged_features(config: RepoConfig, data: pa.Table | Path, source: LoggingSource,
                              logging_config: LoggingConfig, registry: BaseRegistry) -> None:  # fmt: skip
        raise MillraceError("predictions are logged by the endpoint, not by Feast")


def _path(config: RepoConfig, source: DataSource) -> Path:
    if not isinstance(source, FileSource):
        raise MillraceError(f"data source {source.name!r} is not a Parquet file")
    path = Path(source.file_options.uri)
    return path if path.is_absolute() else Path(config.repo_path or ".") / path


def _between(
    config: RepoConfig, source: DataSource, field: str, start: datetime | None, end: datetime | None
) -> pa.Table:
    table = pq.read_table(_path(config, source))
    t = int_times(table[field])
    lowest = MISSING if start is None else int(pd.Timestamp(start).timestamp() * 1e6)
    highest = NEVER if end is None else int(pd.Timestamp(end).timestamp() * 1e6)
    return table.filter(pa.array((t >= lowest) & (t <= highest)))


def _join(
    config: RepoConfig, view: FeatureView, features: Sequence[str], rows: pa.Table, t: np.ndarray
) -> list[pa.ChunkedArray]:
    """One column per feature, aligned with the rows."""
    source = view.batch_source
    assert source is not None
    key = [c for c in view.join_keys if c != DUMMY]
    renamed = view.projection.join_key_map
    mapping = source.field_mapping or {}
    back = {new: old for old, new in mapping.items()}
    path, kind = _path(config, source), view.tags.get("millrace.kind")
    stored = pq.read_schema(path)  # pandas makes floats of integers that may be missing
    asked = text_keys([rows[renamed.get(c, c)].cast(stored.field(back.get(c, c)).type) for c in key], rows.num_rows)
    if kind == "sequence":
        table = pq.read_table(path, read_dictionary=[KEY])
        own = int_times(rows[view.tags["millrace.order"]])
        found = _previous(table, asked, t, own, int(view.tags["millrace.within"]))
        columns = table
    elif kind in ("steps", "ago"):
        names = [KEY, source.timestamp_field, *(back.get(f, f) for f in features)]
        columns = pq.read_table(path, columns=names, read_dictionary=[KEY])
        step_t = int_times(columns[source.timestamp_field])
        keys, start = key_runs(columns[KEY])
        found = as_of(start, step_t, codes_of(asked, keys), t)
    else:
        columns = pq.read_table(path)
        found = _newest_known(columns, view, source, key, asked, t)
    none = found < 0
    take = pa.array(np.maximum(found, 0), mask=none) if none.any() else pa.array(found)
    if not columns.num_rows:
        return [pa.chunked_array([pa.nulls(rows.num_rows, columns[back.get(f, f)].type)]) for f in features]
    return [columns[back.get(f, f)].take(take) for f in features]


def _previous(table: pa.Table, asked: pa.Array, t: np.ndarray, own: np.ndarray, within: int) -> np.ndarray:
    keys, start = key_runs(table[KEY])
    order, live_to = (table[c].to_numpy() for c in ("_order", "_live_to"))
    return previous(start, order, int_times(table[TIME]), live_to, codes_of(asked, keys), t, own, within)


def _newest_known(
    table: pa.Table, view: FeatureView, source: DataSource, key: list[str], asked: pa.Array, t: np.ndarray
) -> np.ndarray:
    event = int_times(table[source.timestamp_field])
    known = event
    if source.created_timestamp_column:
        known = np.maximum(event, int_times(table[source.created_timestamp_column]))
    order = np.argsort(known, kind="stable")
    facts = Versions(table.take(pa.array(order)), np.arange(len(order)), known[order], np.full(len(order), NEVER))
    ttl = int(view.ttl.total_seconds() * 1e6) if view.ttl else None
    shape = Latest.model_construct(source="", key=tuple(key), columns=(), ttl=ttl or None, change=None)
    described = Source.model_construct(event_time=source.timestamp_field, key=tuple(key), columns={})
    steps = latest_steps(described, shape, facts)
    at = as_of(steps.start, steps.t, codes_of(asked, steps.keys), t)
    row = np.where(at >= 0, steps.columns["row"][np.maximum(at, 0)], -1) if len(steps.t) else at
    return np.where(row >= 0, order[np.maximum(row, 0)], -1)

