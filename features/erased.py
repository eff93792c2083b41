"""Erased entities: what a key names in any table, and the marks by which a copy of it that lands again is left out.

A mark holds no value: only a salted digest of it. Who has the home can still try out values, as with every such digest.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.keys import SEPARATOR, true
from pipelines.clock import iso, parse_time, wall_us
from pipelines.errors import UsageError, nearest
from pipelines.home import Home
from pipelines.manifest import read_json, write_json
from pipelines.spec import Spec


@dataclass(frozen=True)
class Entity:
    """Columns and their values, as a text each (timestamps: µs)."""

    texts: tuple[tuple[str, str], ...]
    words: bool  # one value, of a column of text: it can be told apart in any file

    @staticmethod
    def of(spec: Spec, given: Sequence[str]) -> "Entity":
        """The entity that `column=value` texts name. Raises UsageError for what is no column, or not of its type."""
        types = {name: column.type for source in spec.sources.values() for name, column in source.columns.items()}
        texts = {}
        for item in given:
            name, _, value = item.partition("=")
            if name in texts:
                raise UsageError(f"--key {item!r}: {name} is given twice; erase one entity after the other")
            if name not in types:
                raise UsageError(f"--key {item!r}: no source of {spec.pipeline} has a column {name!r}{nearest(name, [*types])}; "
                                 "write COLUMN=VALUE")  # fmt: skip
            try:
                read: dict[str, Callable[[str], object]] = {"timestamp": parse_time, "int64": int}
                texts[name] = str(read.get(types[name], str)(value))
            except ValueError as error:
                raise UsageError(f"--key {item!r}: {error}") from None
            if not value or types[name] == "float64":
                raise UsageError(f"--key {item!r}: give a value of a column of text, whole numbers, truths or times")
        return Entity(tuple(sorted(texts.items())), len(texts) == 1 and types[next(iter(texts))] == "string")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.texts)

    def names(self, table: pa.Table) -> np.ndarray:
        """Rows of a table of facts that hold the values (bool, N); none where a column is not there."""
        if not set(self.columns) <= set(table.column_names):
            return np.zeros(table.num_rows, bool)
        return np.logical_and.reduce([_equal(table[name], text) for name, text in self.texts])

    def is_in(self, table: pa.Table) -> np.ndarray:
        """Rows of any other table of ours that tell of it, by a column, a text key or JSON (bool, N)."""
        found = np.ones(table.num_rows, bool)
        for name, text in self.texts:
            forms = "|".join(re.escape(form) for t in spellings(text) for form in dict.fromkeys((t, json.dumps(t)[1:-1])))
            pattern = rf'(^|\x1f)({forms})($|\x1f)|"{re.escape(name)}": ?"?({forms})["Z,}}.:]'
            part = np.zeros(table.num_rows, bool)
            for column in table.column_names:
                kind = table[column].type
                if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
                    part |= true(pc.match_substring_regex(table[column].cast(pa.string()), pattern))
                elif column in (name, f"_key_{name}", f"feature.{name}"):
                    part |= _equal(table[column], text)
            found &= part
        return found


def spellings(text: str) -> list[str]:
    """A value as a text key, JSON and Python may hold it: a time in µs is ISO there."""
    if text.lower() in ("true", "false"):
        return [text.lower(), text.capitalize()]
    if not re.fullmatch(r"-?\d{12,17}", text):
        return [text]
    times = [iso(int(text)).rstrip("Z"), iso(int(text)).rstrip("Z").replace("T", " ")]
    return [text, *times, f"{times[0]}Z", f"{times[1]}+00:00"]


def _equal(column: pa.ChunkedArray, text: str) -> np.ndarray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz)).cast(pa.int64())
    elif pa.types.is_floating(kind):
        return true(pc.equal(column, float(text))) if re.fullmatch(r"-?\d+", text) else np.zeros(len(column), bool)
    return true(pc.equal(column.cast(pa.string()), text.lower() if pa.types.is_boolean(kind) else text))


# Marks


def marks(home: Home, pipeline: str) -> list[dict[str, Any]]:
    """What was erased: columns, salt and digest, and what had seen it."""
    path = home.erased / f"{pipeline}.json"
    return list(read_json(path)["erased"]) if path.exists() else []


def mark_of(home: Home, pipeline: str, entity: Entity) -> dict[str, Any] | None:
    """The mark of an entity that was erased, wholly or until a kill."""
    values = [text for _, text in entity.texts]
    alike = [mark for mark in marks(home, pipeline) if tuple(mark["columns"]) == entity.columns]
    return next((mark for mark in alike if _digest(mark["salt"], values) == mark["digest"]), None)


def write_mark(home: Home, pipeline: str, entity: Entity, seen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Marks an entity, with the runs, releases and snapshots that had seen it; a mark that is there learns of more."""
    old = mark_of(home, pipeline, entity)
    salt = old["salt"] if old else os.urandom(16).hex()
    mark = {"columns": list(entity.columns), "salt": salt, "digest": _digest(salt, [text for _, text in entity.texts]),
            "when": old["when"] if old else iso(wall_us())}  # fmt: skip
    mark |= {what: sorted({*(old[what] if old else ()), *names}) for what, names in seen.items()}
    write_json(home.erased / f"{pipeline}.json", {"erased": [*(m for m in marks(home, pipeline) if m != old), mark]})
    return mark


def erased_rows(home: Home, pipeline: str, table: pa.Table) -> np.ndarray:
    """Rows of a table of facts whose entity was erased (bool, N)."""
    gone = np.zeros(table.num_rows, bool)
    for mark in marks(home, pipeline):
        columns = mark["columns"]
        if not set(columns) <= set(table.column_names):
            continue
        texts = [_texts(table[name]) for name in columns]
        keys = pa.table({str(i): text for i, text in enumerate(texts)})
        distinct = keys.group_by(keys.column_names).aggregate([]).to_pylist()
        bad = [row for row in distinct if None not in row.values() and _digest(mark["salt"], [*row.values()]) == mark["digest"]]
        for row in bad:
            gone |= np.logical_and.reduce([true(pc.equal(keys[i], value)) for i, value in row.items()])
    return gone


def without_erased(home: Home, pipeline: str, table: pa.Table) -> pa.Table:
    """Rows of a table of facts whose entity was not erased."""
    gone = erased_rows(home, pipeline, table)
    return table.filter(pa.array(~gone)) if gone.any() else table


def drop_rows(path: Path, table: pa.Table, gone: np.ndarray) -> Path:
    """Writes a file of rows without those that are gone (bool, N); one that is no Parquet as Parquet beside its old name.

    `table`: what is in it. The path on which it is then.
    """
    is_parquet = path.suffix == ".parquet"
    left = path if is_parquet else path.with_name(f"{path.name}.parquet")
    scratch = left.with_name(f".{left.name}.erase")
    pq.write_table((pq.ParquetFile(path).read() if is_parquet else table).filter(pa.array(~gone)), scratch, compression="zstd")
    scratch.replace(left)
    if left != path:
        path.unlink()
    return left


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).cast(pa.string())


def _digest(salt: str, values: Sequence[str]) -> str:
    return hashlib.sha256(SEPARATOR.join([salt, *values]).encode()).hexdigest()
