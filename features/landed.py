"""A landing file, Parquet, CSV, JSON lines or TFRecord, → its declared columns in canonical order and types.

The form is told by the file's name; `.gz` may follow it. Text is parsed strictly: a bad cell is named by line and column.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from features.keys import SEPARATOR, filled, one_chunk
from features.tfrecord import columns_at_once, example, records
from pipelines.arrow import owned
from pipelines.clock import parse_time
from pipelines.errors import Refused, nearest
from pipelines.spec import Source

ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}
YEARS_US = (parse_time("0001-01-01"), parse_time("9999-12-31"))  # the times that have a text
SHOWN = 3  # values that a refusal names


@dataclass(frozen=True)
class Found:
    """What a reader found: columns as they are in the file, or as `text` that is still to be parsed; and where a row is."""

    columns: dict[str, pa.Array | pa.ChunkedArray]
    rows: int
    names: list[str]
    text: bool = False
    place: Callable[[int], str] = "row {}".format


def read_landed(name: str, data: bytes, source: Source, *, timed: bool) -> tuple[pa.Table, tuple[str, ...]]:
    """The declared columns of a landing file, in canonical order, and those that it lacks (which are null then).

    Raises Refused, naming the file and the place in it, for what is no such file, lacks a column that may not be null, or
    has values that the declared type cannot hold.
    """
    where = f"landing file {name}"
    found = _reader(name)(where, _unzipped(where, name, data), source)
    columns, absent = {}, []
    for column, declared in sorted(source.columns.items()):
        at = f"{where}: column {column!r}"
        if column not in found.columns:
            if source.nulls(column) == 0:
                raise Refused(f"{at} is missing (columns: {', '.join(found.names)}{nearest(column, found.names)})")
            absent.append(column)
            columns[column] = pa.nulls(found.rows, ARROW[declared.type])
        elif found.text:
            columns[column] = _parsed(where, column, found, declared.type)
        else:
            columns[column] = _typed(at, found.columns[column], declared.type)
        found.columns.pop(column, None)  # freed as it is read
        if declared.type == "string" and pc.any(parting := pc.match_substring(columns[column], SEPARATOR)).as_py():
            place = found.place(int(np.argmax(filled(parting, False))))
            raise Refused(f"{at} holds the character U+001F in {place}; it parts the columns of a key: write the text without it")
    table = pa.table(columns)
    if source.key == ("row_digest",) and not timed:
        table = table.append_column("row_digest", _row_digests(table))
    return table, tuple(absent)


def column_names(name: str, data: bytes, source: Source) -> list[str]:
    """Columns that a landing file has; of JSON lines and TFRecord, those of the declared ones. Raises Refused as reading does."""
    where = f"landing file {name}"
    return _reader(name)(where, _unzipped(where, name, data), source).names


def _reader(name: str) -> Callable[[str, bytes, Source], Found]:
    suffixes = [s.lower() for s in PurePath(name).suffixes if s.lower() != ".gz"]
    return _READERS.get(suffixes[-1] if suffixes else "", _parquet)


def _unzipped(where: str, name: str, data: bytes) -> bytes:
    if not name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{where} cannot be unzipped, it may be cut short: {error}") from None


# Parquet: columns have types


def _parquet(where: str, data: bytes, source: Source) -> Found:
    if data[:4] != b"PAR1":
        raise Refused(
            f"{where} is not Parquet (it begins with {data[:4]!r}): write it as Parquet, or name it by its form: "
            f"{', '.join(_READERS)}"
        )
    try:
        table = pq.read_table(owned(data))
        return Found({n: table[n] for n in source.columns if n in table.column_names}, table.num_rows, table.column_names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refused(f"{where} cannot be read, it may be cut short: {str(error)[:200]}") from None


def _typed(where: str, column: pa.ChunkedArray, declared: str) -> pa.Array:
    """The column in its declared type, widened where nothing is lost. Raises Refused otherwise, with what would be lost."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    ok = {
        "string": pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
        "int64": pa.types.is_integer(kind),
        "float64": pa.types.is_floating(kind) or pa.types.is_integer(kind),
        "bool": pa.types.is_boolean(kind),
        "timestamp": pa.types.is_timestamp(kind) or pa.types.is_date(kind),
    }[declared] or pa.types.is_null(kind)
    if not ok:
        raise Refused(f"{where} is {kind}, the spec says {declared}: write it as {ARROW[declared]}{_lost(column, declared)}")
    if pa.types.is_timestamp(kind) and kind.tz is None:
        raise Refused(f"{where} holds times without a zone: write them as timestamp[us, tz=UTC]")
    try:
        if pa.types.is_date(kind):  # midnight UTC
            column = column.cast(pa.timestamp("us"))
        array = one_chunk(column.cast(ARROW[declared]))
        array.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise Refused(f"{where} does not fit {declared}: {str(error)[:200]}{_lost(column, declared)}") from None
    return _dated(where, array, declared)


def _dated(where: str, array: pa.Array, declared: str) -> pa.Array:
    if declared == "timestamp":
        us = pc.min_max(array.cast(pa.int64())).as_py()
        if us["min"] is not None and not YEARS_US[0] <= us["min"] <= us["max"] < YEARS_US[1]:
            raise Refused(f"{where} holds times outside the years 1 to 9999: were they written in another unit?")
    return array


def _lost(column: pa.ChunkedArray, declared: str) -> str:
    """`; 3 of 40 values would be lost: 1.5, 2.5, …`; empty where nothing can be said."""
    kind, target = column.type, ARROW[declared]
    if declared == "string" or pa.types.is_nested(kind):
        return ""
    try:
        values = one_chunk(column)
        if pa.types.is_string(kind):
            bad = _unparsed(values, declared)
        else:
            back = values.cast(target, safe=False).cast(kind, safe=False)
            bad = pc.and_(values.is_valid(), pc.invert(pc.fill_null(pc.equal(back, values), False)))
            if kind == pa.uint64():
                bad = pc.or_(bad, pc.fill_null(pc.greater(values, pa.scalar(2**63 - 1, kind)), False))
        lost = values.filter(bad)
    except (pa.ArrowException, UnicodeDecodeError):
        return ""
    if not len(lost):
        return "; none of its values would be lost"
    some = ", ".join([str(v) for v in lost[:SHOWN]] + ["…"] * (len(lost) > SHOWN))
    return f"; {len(lost):,} of {len(values) - values.null_count:,} values would be lost: {some}"


# Text: CSV and JSON lines


def _csv(where: str, data: bytes, source: Source) -> Found:
    """An empty cell is null; a quoted empty one is the empty text, in a string column."""
    try:
        head = next(csv.reader(io.StringIO(data.removeprefix(b"\xef\xbb\xbf").decode())), [])
        if twice := {n for n in head if head.count(n) > 1}:
            raise Refused(f"{where} has two columns named {min(twice)!r}")
        wanted = [n for n in head if n in source.columns]
        table = pa_csv.read_csv(
            owned(data),
            pa_csv.ReadOptions(use_threads=False, block_size=_block(data)),
            pa_csv.ParseOptions(newlines_in_values=True),
            pa_csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), null_values=[""],
                strings_can_be_null=True, quoted_strings_can_be_null=False,
            ),
        )  # fmt: skip
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise Refused(f"{where} is not CSV with a line of column names: {' '.join(str(error).split())[:200]}") from None
    return Found({n: table[n] for n in wanted}, table.num_rows, head, text=True, place=lambda row: _csv_line(data, row))


def _csv_line(data: bytes, row: int) -> str:
    """`line 7`: where a row begins; a quoted cell may hold line breaks."""
    reader = csv.reader(io.StringIO(data.decode(), newline=""))
    begins, seen = 1, -1
    try:
        for cells in reader:
            seen += bool(cells)
            if seen == row + 1:
                break
            begins = reader.line_num + 1
    except csv.Error:  # a cell longer than that module reads
        return f"row {row + 1}"
    return f"line {begins}"


def _jsonl(where: str, data: bytes, source: Source) -> Found:
    """A missing field is null. Times are text with a zone."""
    read = {n: pa.string() if c.type == "timestamp" else ARROW[c.type] for n, c in source.columns.items()}
    try:
        table = pa_json.read_json(
            owned(data), pa_json.ReadOptions(use_threads=False, block_size=_block(data)),
            pa_json.ParseOptions(explicit_schema=pa.schema(read), unexpected_field_behavior="ignore"),
        ) if data.strip() else pa.schema(read).empty_table()  # fmt: skip
        table.validate(full=True)  # the reader takes any bytes for text
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Refused(_json_fault(where, data, source) or f"{where} is not JSON lines: {str(error)[:200]}") from None
    names = [n for n in read if table[n].null_count < table.num_rows or json.dumps(n).encode() in data]
    return Found({n: table[n] for n in names}, table.num_rows, names, text=True, place=lambda row: _json_line(data, row))


def _json_line(data: bytes, row: int) -> str:
    lines = (number for number, line in enumerate(data.split(b"\n"), 1) if line.strip())
    return f"line {next(number for at, number in enumerate(lines) if at == row)}"


def _json_fault(where: str, data: bytes, source: Source) -> str:
    """What is wrong with the first line that is wrong; empty when none is."""
    kinds: dict[str, Any] = {"string": str, "timestamp": str, "int64": int, "float64": (int, float), "bool": bool}
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError as error:
            return f"{where}, line {number} is not JSON: {error}"
        if not isinstance(value, dict):
            return f"{where}, line {number} is not a JSON object"
        for column, declared in source.columns.items():
            cell: Any = value.get(column)
            right = isinstance(cell, kinds[declared.type]) and isinstance(cell, bool) == (declared.type == "bool")
            right &= declared.type != "int64" or (right and -(2**63) <= cell < 2**63)
            if cell is not None and not right:
                return _cell(where, f"line {number}", column, json.dumps(cell), declared.type)
    return ""


def _block(data: bytes) -> int:
    """One block: a line may be as long as the file."""
    return min(len(data) + 1, 2**31 - 1)


def _parsed(where: str, column: str, found: Found, declared: str) -> pa.Array:
    """The cells of a text column in its declared type. Raises Refused naming the first that is none."""
    array = one_chunk(found.columns[column])
    if array.type == ARROW[declared]:
        return array
    try:
        parsed = array.cast(ARROW[declared])
    except pa.ArrowInvalid:
        bad = _unparsed(array, declared)
        row = pc.index(bad, True).as_py()
        shown, more = repr(array[row].as_py()), pc.sum(bad).as_py() - 1
        raise Refused(_cell(where, found.place(row), column, shown, declared, more)) from None
    return _dated(f"{where}: column {column!r}", parsed, declared)


def _unparsed(array: pa.Array, declared: str) -> pa.Array:
    """Which texts are no value of the type."""

    def fits(text: pa.Scalar) -> bool:
        try:
            text.cast(ARROW[declared])
        except pa.ArrowInvalid:
            return False
        return True

    distinct = array.unique().drop_null()
    return pc.is_in(array, value_set=distinct.filter(pa.array([not fits(text) for text in distinct], pa.bool_())))


def _cell(where: str, place: str, column: str, value: str, declared: str, more: int = 0) -> str:
    expected = "a time with a zone, such as 2024-05-01T12:00:00Z" if declared == "timestamp" else declared
    shown = value if len(value) <= 60 else value[:59] + "…"
    others = f" (and {more:,} more such cells)" if more else ""
    return f"{where}, {place}, column {column!r}: {shown} is not {expected}{others}"


# TFRecord: tf.train.Example in length-and-CRC frames, read without TensorFlow


def _tfrecord(where: str, data: bytes, source: Source) -> Found:
    """Lists of one value each; none, or no feature, is null. Times are text with a zone, or whole µs since 1970 (UTC)."""
    begins, lengths = records(where, data)
    declared = {name: column.type for name, column in source.columns.items()}
    at_once = columns_at_once(data, begins, lengths, declared)
    if at_once is not None:
        texts = Found(at_once, len(begins), [*at_once], text=True, place="record {}".format)
        return Found({name: _parsed(where, name, texts, declared[name]) for name in at_once}, len(begins), [*at_once])
    return _one_by_one(where, data, begins, lengths, source)


def _one_by_one(where: str, data: bytes, begins: np.ndarray, lengths: np.ndarray, source: Source) -> Found:
    from google.protobuf.message import DecodeError

    parse = example().FromString
    cells: dict[str, list[Any]] = {name: [None] * len(begins) for name in source.columns}
    allowed = {name: (None, *_KINDS[column.type]) for name, column in source.columns.items()}
    seen: set[str] = set()
    for row, (at, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        try:
            entries = parse(data[at + 12 : at + 12 + length]).features.feature
        except DecodeError:
            raise Refused(f"{where}, record at byte {at:,}: not a tf.train.Example") from None
        for entry in entries:
            name, feature = entry.key, entry.value
            if name not in cells:
                continue
            seen.add(name)
            kind = feature.WhichOneof("kind")
            given = getattr(feature, kind).value if kind else ()
            if kind not in allowed[name] and given:
                declared = source.columns[name].type
                raise Refused(f"{where}, record at byte {at:,}: feature {name!r} is a {kind}, the spec says {declared}")
            if len(given) > 1:
                raise Refused(f"{where}, record at byte {at:,}: feature {name!r} has {len(given)} values, expected one")
            if given:
                cells[name][row] = given[0]
    columns = {n: _from_feature(where, n, cells[n], source.columns[n].type) for n in sorted(seen)}
    return Found(columns, len(begins), sorted(seen))


_KINDS = {"string": ("bytes_list",), "timestamp": ("bytes_list", "int64_list"), "int64": ("int64_list",),
          "bool": ("int64_list",), "float64": ("float_list", "int64_list")}  # fmt: skip


def _from_feature(where: str, column: str, values: list[Any], declared: str) -> pa.Array:
    """One feature of every record as an array: of its declared type, or of one that widens to it."""
    try:
        if declared == "string":
            return pa.array([v if v is None else v.decode() for v in values], pa.string())
        if declared == "bool":
            if other := {*values} - {0, 1, None}:
                raise Refused(f"{where}: feature {column!r} holds {max(other)}, expected 0 or 1")
            return pa.array([v if v is None else bool(v) for v in values], pa.bool_())
        if declared == "timestamp" and any(isinstance(v, bytes) for v in values):
            text = [v.decode() if isinstance(v, bytes) else v for v in values]
            found = Found({column: pa.array(text, pa.string())}, len(text), [column], text=True, place="record {}".format)
            return _parsed(where, column, found, declared)
        return pa.array(values, ARROW[declared])
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise Refused(f"{where}: feature {column!r} does not fit {declared}: {error}") from None


def _row_digests(table: pa.Table) -> pa.Array:
    texts = [pc.fill_null(column.cast(pa.string()), "\x00") for column in table.columns]
    joined = pc.binary_join_element_wise(*texts, SEPARATOR) if len(texts) > 1 else texts[0]
    return pa.array([hashlib.sha256(text.encode()).hexdigest()[:32] for text in joined.to_pylist()], pa.string())


_READERS: dict[str, Callable[[str, bytes, Source], Found]] = {
    ".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".tfrecord": _tfrecord, ".tfrecords": _tfrecord,
}  # fmt: skip
