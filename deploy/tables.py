"""Tables that are scored: where their files lie, in which parts, which columns are taken, and as which types. B rows."""

import glob
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from deploy.requests import EARLIEST, LATEST, Field, feature_fields, key_fields, longest_of
from features.frame import feature_list
from pipelines.errors import MillraceError, UsageError, nearest
from pipelines.spec import Spec

Way = Literal["keys", "features"]
MADE: dict[Way, tuple[str, ...]] = {"features": ("probability", "decision", "release")}  # columns that scoring adds
MADE["keys"] = (*MADE["features"], "missing", "unseen", "stale", "unknown_entity", "outside_horizon", "refused")
UTC = pa.timestamp("us", "UTC")
_TYPES = {"string": pa.string(), "text": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
          "timestamp": UTC}  # fmt: skip
_WANTED = {"string": "text", "text": "text", "float64": "numbers", "int64": "whole numbers", "bool": "booleans",
           "timestamp": "times with a zone, or dates"}  # fmt: skip
_NOT_TEXT = "\x1f"  # parts the columns of a key


@dataclass(frozen=True)
class Job:
    """What all parts have in common: where their files lie, how they are asked, at which instant of which store."""

    source: str
    output: str
    way: Way
    batch_rows: int
    now_us: int
    store: str


@dataclass(frozen=True)
class Part:
    """Row groups begin ≤ g < end of a file, whose first row has this number, and the file that their scores go to.

    `made_of`: digest of everything that the scores depend on; kept in what is written.
    """

    name: str
    file: str
    begin: int
    end: int
    first: int
    rows: int
    made_of: str = ""


@dataclass(frozen=True)
class Counts:
    """Rows of a part, and of these those that were not answered, and those whose key the store does not know."""

    rows: int = 0
    refused: int = 0
    unknown: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.rows + other.rows, self.refused + other.refused, self.unknown + other.unknown)


def open_source(source: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI (`s3://bucket/folder`), and the path on it. Raises UsageError."""
    if "://" not in source:
        return fs.LocalFileSystem(), str(Path(source).absolute())
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(source)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"--input {source}: {error}") from None
    return found


def find_files(source: str) -> tuple[str, list[str]]:
    """The folder (or its URI) that paths are told from, and the files below it that a file, folder, glob or URI means, in order.

    Names that begin with `_` or `.` are no data, as in pyarrow.dataset. Raises UsageError where there is none.
    """
    if "://" not in source and re.search(r"[*?[]", source) and not Path(source).exists():
        whole, named = str(Path(source).absolute()), False
        root = base = re.split(r"[*?[]", whole)[0].rpartition("/")[0]
        found = [p for p in glob.glob(whole, recursive=True) if Path(p).is_file()]  # noqa: PTH207 — of absolute patterns
    else:
        system, base = open_source(source)
        uri, info = urlsplit(source), system.get_file_info(base)
        if info.type == fs.FileType.NotFound:
            raise UsageError(f"--input {source}: there is no such file or folder; give Parquet: a file, a folder or a glob")
        named = info.is_file
        if named:
            found, base, uri = [base], base.rpartition("/")[0], uri._replace(path=uri.path.rpartition("/")[0])
        else:
            found = [f.path for f in system.get_file_info(fs.FileSelector(base, recursive=True)) if f.is_file]
        root = uri.geturl() if "://" in source else base
    names = sorted(path.removeprefix(base).lstrip("/") for path in found)
    names = [name for name in names if named or not re.search(r"(^|/)[._]", name)]
    if not names:
        raise UsageError(f"--input {source}: there is no file in it, without those whose names begin with `_` or `.`")
    return root, names


def in_path(name: str) -> dict[str, str | None]:
    """Columns that the folders of a file say, such as `day=2013-12-30/`."""
    pairs = (folder.partition("=") for folder in name.split("/")[:-1] if "=" in folder)
    return {column: None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for column, _, value in pairs}


def fields_of(spec: Spec, way: Way) -> dict[str, Field]:
    """What is read of each row: its key and request fields, or its features."""
    return key_fields(spec) if way == "keys" else feature_fields(feature_list(spec))


def way_of(where: str, columns: Collection[str], spec: Spec) -> Way:
    """Whether rows hold their features (all of them), or else their key. Raises MillraceError where neither is whole."""
    lacking = {way: [n for n in names if n not in columns] for way, names in
               (("features", [*fields_of(spec, "features")]), ("keys", [*spec.row_key]))}  # fmt: skip
    for way in lacking:
        if not lacking[way]:
            return "keys" if way == "keys" else "features"
    raise MillraceError(
        f"{where}: neither the row key ({_shown(lacking['keys'])} missing) nor the features ({_shown(lacking['features'])} "
        f"missing) are columns of it (columns: {_shown([*columns])}{nearest(lacking['keys'][0], [*columns])}); give either whole"
    )


def check_columns(where: str, schema: pa.Schema, said: Collection[str], spec: Spec, way: Way) -> None:
    """Raises MillraceError for columns that are missing, of another type, twice there, or that scoring would write.

    `said`: columns that the path of the file gives, as text.
    """
    fields, names = fields_of(spec, way), schema.names
    for name in names:
        if names.count(name) > 1:
            raise MillraceError(f"{where}: two columns are named {name!r}; rename one")
        if name in MADE[way] and name not in fields:
            raise MillraceError(f"{where}: a column is named {name!r}, which scoring writes; rename it, or leave it out")
    missing = [n for n, f in fields.items() if n not in names and n not in said and (f.required or way == "features")]
    if missing:
        raise MillraceError(
            f"{where}: {_shown(missing)} not among its columns ({_shown(names)}{nearest(missing[0], names)}); scoring by {way} "
            f"needs {'the whole key' if way == 'keys' else 'every feature: add those that are not known as columns of nulls'}"
        )
    for name, field in fields.items():
        if name in names and not _fits(schema.field(name).type, field.type):
            found = schema.field(name).type
            raise MillraceError(f"{where}: column {name!r} is of type {found}, expected {_WANTED[field.type]}; cast it")


def _fits(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(found):
        return _fits(found.value_type, kind)
    if pa.types.is_null(found):
        return True
    if kind in ("string", "text"):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    if kind == "float64":
        return pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_boolean(found)
    if kind == "int64":
        return pa.types.is_integer(found)
    if kind == "bool":
        return pa.types.is_boolean(found)
    return pa.types.is_date(found) or (pa.types.is_timestamp(found) and found.tz is not None)


def values_of(where: str, batch: pa.RecordBatch, said: Mapping[str, str | None], field: Field, first: int) -> pa.Array:
    """The values of a field (B) in its type. `first`: number of the first row, for what is said of a bad one.

    Raises MillraceError for a value that the type cannot hold, and for a key that is null.
    """
    at = batch.schema.get_field_index(field.name)
    column = batch.column(at) if at >= 0 else pa.repeat(pa.scalar(said.get(field.name), pa.string()), len(batch))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if at < 0 and field.type == "timestamp" and "T" not in str(said[field.name]):
            column = column.cast(pa.date32())
        found = column.cast(_TYPES[field.type], safe=field.type != "float64")
    except pa.ArrowInvalid as error:
        raise MillraceError(f"{where}: column {field.name!r}: {error}; expected {_WANTED[field.type]}") from None
    if field.required:
        _refuse(where, field, found.is_null(), first, "null", "give the whole key")
    if field.type == "timestamp":
        at = found.cast(pa.int64())
        bad = pc.or_(pc.less(at, EARLIEST), pc.greater(at, LATEST))
        _refuse(where, field, bad, first, "out of range", "give times in the years 2 to 9998")
    return found


def check_text(where: str, column: pa.Array, field: Field, first: int) -> None:
    """Raises MillraceError for texts that `/predict` would refuse: too long, with what parts keys, or not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise MillraceError(f"{where}: column {field.name!r} from row {first:,} on: {error}; write it as UTF-8") from None
    longest = longest_of(field.type)
    bad = pc.or_(pc.greater(pc.utf8_length(column), longest), pc.match_substring(column, _NOT_TEXT))
    _refuse(where, field, bad, first, f"longer than {longest:,} characters, or holds a control character", "shorten it")


def check_range(where: str, columns: Mapping[str, np.ndarray], first: int) -> None:
    """Raises MillraceError for numbers that are infinite or out of range, as the endpoint refuses them."""
    for name, values in columns.items():
        bad = np.abs(values) >= 2.0**63
        if bad.any():
            at = int(bad.argmax())
            raise MillraceError(f"{where}: row {first + at:,}: {name} is {values[at]:g}; expected a number below 2^63, or null")


def _refuse(where: str, field: Field, bad: pa.Array, first: int, what: str, do: str) -> None:
    at = pc.index(bad, True).as_py()
    if at >= 0:
        raise MillraceError(f"{where}: row {first + at:,}: {field.name} is {what}; expected {_WANTED[field.type]}: {do}")


def _shown(names: Collection[str]) -> str:
    some = [repr(name) for name in names][:6]
    return ", ".join(some) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if some else "none"
