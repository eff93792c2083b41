"""A Feast online store over the served store: what `get_online_features` reads are the rows that the endpoint reads.

Views of ours are answered at the clock's now from the steps that a release has fed. Any other view is written by Feast
(`materialize`, `push`) as one packed row per key: an older event never replaces a newer one, a ttl counts when reading,
and a stored null is not an unknown key. A `sequence` view needs fields of the request, so Feast cannot ask for it.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel
from feast.types import Bool, Float64, Int64, String

from features.cells import FEAST, Meta, open_cells, writable_cells
from features.keys import text_key
from features.online import anchor_of, read_cells
from features.packed import KEY_TAG, LAYOUT_TAG, Layout
from features.steps import TIME, as_of
from pipelines.clock import MISSING, Anchor, Clock, wall_us

Read = tuple[datetime | None, dict[str, Value] | None]


class ServedOnlineStoreConfig(FeastConfigBaseModel):
    """`store`: a folder (relative to the repository) or URL#NAME, as `features.cells` takes it. The clock is the spec's."""

    type: Literal["features.served.ServedOnlineStore"] = "features.served.ServedOnlineStore"
    store: str
    clock: Literal["wall", "data"] = "wall"
    speed: float = 0.0
    offset: int = 0


class ServedOnlineStore(OnlineStore):
    """See the module."""

    def online_read(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], requested_features: list[str] | None = None
    ) -> list[Read]:  # fmt: skip
        """Event time and values of each key; (None, None) where it is unknown, or too old for the view's ttl."""
        names = requested_features or [field.name for field in table.features]
        if LAYOUT_TAG in table.tags:
            return _steps(config, table, entity_keys, names)
        view, keys = _view(config, table), [_text(key) for key in entity_keys]
        found = open_cells(_place(config)).get([(view, sorted(set(keys)))])[0]
        oldest = wall_us() - int(table.ttl.total_seconds() * 1e6) if table.ttl else MISSING
        return [_row(found[key], names, oldest) if key in found else (None, None) for key in keys]

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:  # fmt: skip
        """Writes rows, of equal keys the newest. Raises ValueError for a view of ours, which only a release feeds."""
        if LAYOUT_TAG in table.tags:
            raise ValueError(f"view {table.name} is fed by releases (`millrace run`), not through Feast")
        newest: dict[str, bytes] = {}
        for key, values, event, created in data:
            text, packed = _text(key), _packed(values, event, created)
            if text not in newest or _newer(packed, newest[text]):
                newest[text] = packed
        writable_cells(_place(config)).put(_view(config, table), newest, _newer)
        if progress:
            progress(len(data))

    def update(
        self, config: RepoConfig, tables_to_delete: Sequence[FeatureView], tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity], entities_to_keep: Sequence[Entity], partial: bool,
    ) -> None:  # fmt: skip
        """Removes what Feast wrote of deleted views."""
        for table in tables_to_delete:
            if LAYOUT_TAG not in table.tags:
                writable_cells(_place(config)).drop(_view(config, table))

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Removes what Feast wrote; what releases have fed stays."""
        self.update(config, tables, [], entities, [], False)


def _place(config: RepoConfig) -> Path | str:
    store: str = config.online_store.store
    return store if "://" in store else (Path(config.repo_path or ".") / store).resolve()


def _view(config: RepoConfig, table: FeatureView) -> str:
    return f"{FEAST}{config.project}.{table.name}"


def _plain(value: Value) -> Any:
    """A Feast value as our keys name it: times in µs."""
    kind = value.WhichOneof("val")
    found: Any = getattr(value, kind) if kind else None
    return found * 1_000_000 if kind == "unix_timestamp_val" else found


def _text(key: EntityKey, order: Sequence[str] = ()) -> str:
    """The text of a key, its columns in order; a null in it names no row of ours."""
    values = dict(zip(key.join_keys, key.entity_values, strict=True))
    text = text_key([_plain(values[name]) for name in (order or sorted(values))])
    return "\x00" if text is None else text


# Rows that Feast wrote: event and created time (µs), then names and values


def _packed(values: dict[str, Value], event: datetime, created: datetime | None) -> bytes:
    times = [_us(event), _us(created) if created else MISSING]
    head = json.dumps({name: len(value.SerializeToString()) for name, value in sorted(values.items())}).encode()
    body = b"".join(values[name].SerializeToString() for name in sorted(values))
    return np.array([*times, len(head)], "<i8").tobytes() + head + body


def _newer(packed: bytes, held: bytes) -> bool:
    one, other = (np.frombuffer(rows[:16], "<i8").tolist() for rows in (packed, held))
    return bool(one >= other)


def _row(packed: bytes, names: Sequence[str], oldest: int) -> Read:
    event, _, length = np.frombuffer(packed[:24], "<i8").tolist()
    if event < oldest:
        return None, None
    found, at = {}, 24 + length
    for name, size in json.loads(packed[24:at]).items():
        found[name] = Value.FromString(packed[at : at + size])
        at += size
    return datetime.fromtimestamp(event / 1e6, UTC), {name: found.get(name, Value()) for name in names}


def _us(time: datetime) -> int:
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1e6)


# Steps that a release fed


def _steps(config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], names: Sequence[str]) -> list[Read]:
    if table.tags["millrace.kind"] == "sequence":
        return [(None, None)] * len(entity_keys)
    cells = open_cells(_place(config))
    with cells.reading():
        order = json.loads(table.tags[KEY_TAG])
        keys = [_text(key, order) if order else "" for key in entity_keys]
        layout = Layout(**json.loads(table.tags[LAYOUT_TAG]))
        start, columns, at = read_cells(cells, {table.name: (layout, keys)})[table.name]
        now = _now(config, cells.meta())
    found = as_of(start, columns[TIME], at, np.full(len(keys), now))
    types = {field.name: field.dtype for field in table.schema}
    return [
        (None, None) if i < 0
        else (datetime.fromtimestamp(int(columns[TIME][i]) / 1e6, UTC), {n: _value(columns[n][i], types[n]) for n in names})
        for i in found.tolist()
    ]  # fmt: skip


def _now(config: RepoConfig, meta: Meta) -> int:
    told = config.online_store
    anchor = anchor_of(meta) if meta else Anchor(0, 0)
    return Clock(told.clock, told.speed, told.offset, anchor).now_us()


def _value(value: Any, kind: Any) -> Value:
    """A cell as a Feast value; null where it is missing."""
    if value is None or value != value or (isinstance(value, np.integer) and value == MISSING):
        return Value()
    if kind == Int64:
        return Value(int64_val=int(value))
    if kind == Float64:
        return Value(double_val=float(value))
    if kind == Bool:
        return Value(bool_val=bool(value))
    return Value(string_val=value) if kind == String else Value(unix_timestamp_val=int(value) // 1_000_000)
