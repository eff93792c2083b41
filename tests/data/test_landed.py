"""Landing files of every form: the same rows give the same snapshot, and what is wrong is named by file and place."""

import gzip
import json
import struct
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.ingest import ingest, read_table
from features.landed import ARROW
from pipelines.arrow import owned
from pipelines.errors import Refused
from pipelines.home import Home, open_home
from pipelines.spec import Spec
from tests.data.lines import lines_spec

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
COLUMNS: dict[str, Any] = {
    "id": "int64", "name": {"type": "string", "nulls": 1}, "late": {"type": "float64", "nulls": 1},
    "full": {"type": "bool", "nulls": 1}, "count": {"type": "int64", "nulls": 1}, "at": "timestamp", "seen": "timestamp",
}  # fmt: skip
Row = dict[str, Any]


def spec_of(**columns: Any) -> Spec:
    return lines_spec({**COLUMNS, **columns})


SPEC = spec_of()


def rows_of(seed: int, rows: int = 25) -> list[Row]:
    """Random rows whose floats are exact in 32 bits, as TFRecord keeps them; texts that need quoting among them."""
    random = np.random.default_rng(seed)
    texts = ["plain", "", " spaces ", 'a "quoted", one', "two\nlines", "null", "é ∑ 漢", "1", "a\\n", "true", "\r\n", "#"]

    def some(value: Any) -> Any:
        return None if random.random() < 0.2 else value

    def row(i: int) -> Row:
        at = NOON + timedelta(microseconds=int(random.integers(-(10**15), 10**15)))
        return {
            "id": i, "name": some(texts[random.integers(len(texts))]), "late": some(float(np.float32(random.normal(0, 1e3)))),
            "full": some(bool(random.integers(2))), "count": some(int(random.integers(-(2**62), 2**62))), "at": at,
            "seen": at + timedelta(microseconds=int(random.integers(0, 10**9))),
        }  # fmt: skip

    return [row(i) for i in range(rows)]


def zoned(value: datetime, hours: int) -> str:
    return value.astimezone(timezone(timedelta(hours=hours))).isoformat()


def as_parquet(rows: Sequence[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    fields = {n: ARROW[c["type"] if isinstance(c, dict) else c] for n, c in COLUMNS.items()}
    pq.write_table(pa.table({n: pa.array([r[n] for r in rows], kind) for n, kind in fields.items()}), sink)
    return sink.getvalue().to_pybytes()


def as_csv(rows: Sequence[Row], header: Sequence[str] = tuple(COLUMNS)) -> bytes:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        text = zoned(value, 2) if isinstance(value, datetime) else str(value).lower() if isinstance(value, bool) else str(value)
        return '"' + text.replace('"', '""') + '"' if isinstance(value, str) else text

    lines = [",".join(cell(row[n]) for n in header) for row in rows]
    return "\n".join([",".join(header), *lines, ""]).encode()


def as_jsonl(rows: Sequence[Row]) -> bytes:
    def line(row: Row) -> str:
        return json.dumps(
            {n: zoned(v, -5) if isinstance(v, datetime) else v for n, v in row.items() if v is not None or row["id"] % 2}
        )

    return "\n".join(map(line, rows)).encode()


# TFRecord by hand: protocol buffers, and CRC-32C by its table, so that nothing is shared with what is tested


def varint(value: int) -> bytes:
    value, out = value % 2**64, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(value: Any) -> bytes:
    """A tf.train.Feature of one value, or of a list of them."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not values:
        return b""
    if isinstance(values[0], bool | int):
        return field(3, field(1, b"".join(varint(int(v)) for v in values)))
    if isinstance(values[0], float):
        return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    texts = [zoned(v, 9) if isinstance(v, datetime) else v for v in values]
    return field(1, b"".join(field(1, t.encode() if isinstance(t, str) else t) for t in texts))


def example(row: Row) -> bytes:
    entries = [field(1, field(1, n.encode()) + field(2, feature(v))) for n, v in row.items() if v is not None or row["id"] % 2]
    return field(1, b"".join(entries))


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def as_tfrecord(rows: Sequence[Row]) -> bytes:
    return b"".join(frame(example(row)) for row in rows)


FORMS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "parquet": as_parquet, "csv": as_csv, "jsonl": as_jsonl, "tfrecord": as_tfrecord
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def put(home: Home, data: bytes, name: str) -> Path:
    path = home.landing("lines") / "trips" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(home: Home, data: bytes, name: str, spec: Spec = SPEC) -> str:
    path = put(home, data, name)
    with pytest.raises(Refused) as caught:
        ingest(spec, home)
    path.unlink()
    assert str(caught.value).startswith(f"landing file trips/{name}"), str(caught.value)
    assert not (home.snapshots("lines") / "by_objects").exists()
    return str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_rows_in_every_form_are_the_same_snapshot(seed: int, tmp_path: Path) -> None:
    rows, digests = rows_of(seed), {}
    for form, write in FORMS.items():
        for name, data in ((f"a.{form}", write(rows)), (f"a.{form}.gz", gzip.compress(write(rows)))):
            home = open_home(tmp_path / name)
            put(home, data, name)
            snapshot = ingest(SPEC, home)
            digests[name] = snapshot.digest
            found = read_table(SPEC, home, snapshot, "trips").drop_columns(["_known_at"]).to_pylist()
            assert found == [{n: r[n] for n in sorted(r)} for r in rows], name
    assert len(set(digests.values())) == 1, digests


def test_forms_lie_side_by_side(tmp_path: Path) -> None:
    rows, mixed, whole = rows_of(9, 40), open_home(tmp_path / "mixed"), open_home(tmp_path / "whole")
    for i, (form, write) in enumerate(FORMS.items()):
        put(mixed, write(rows[10 * i : 10 * i + 10]), f"{i}.{form}")
    put(whole, as_parquet(rows), "all.parquet")
    assert ingest(SPEC, mixed).digest == ingest(SPEC, whole).digest


def changed(rows: list[Row], number: int, /, **cells: Any) -> list[Row]:
    return [{**row, **cells} if i == number else row for i, row in enumerate(rows)]


def test_a_bad_cell_is_named_by_line_and_column(home: Home) -> None:
    rows = changed(rows_of(1), 3, name="two\nlines")  # a quoted line break: rows are not lines
    lines = as_csv(changed(rows, 5, late="soon")).decode()
    at = next(n for n, line in enumerate(lines.split("\n"), 1) if "soon" in line)
    message = refusal(home, lines.encode(), "a.csv")
    assert f"line {at}, column 'late': 'soon' is not float64" in message
    for bad, column, expected in [
        ("1.5", "id", "int64"),
        ("2024-05-01T12:00:00", "at", "a time with a zone"),
        ("maybe", "full", "bool"),
    ]:
        assert f"column '{column}': '{bad}' is not {expected}" in refusal(
            home, as_csv(changed(rows, 5, **{column: bad})), "a.csv"
        )
    several = changed(changed(rows, 5, late="soon"), 7, late="later")
    assert "'soon' is not float64 (and 1 more such cells)" in refusal(home, as_csv(several), "a.csv")


def test_a_bad_json_value_is_named_by_line_and_field(home: Home) -> None:
    rows = rows_of(2)
    for column, bad, shown in [("late", "soon", '"soon"'), ("id", 1.5, "1.5"), ("name", 3, "3"), ("full", 1, "1"),
        ("count", True, "true"),
                               ("count", 2**63, str(2**63)), ("late", [1.0], "[1.0]")]:  # fmt: skip
        message = refusal(home, as_jsonl(changed(rows, 4, **{column: bad})), "a.jsonl")
        assert f"line 5, column '{column}': {shown} is not " in message, message
    assert "line 5, column 'at': '2024-05-01 12:00' is not a time with a zone" in refusal(
        home, as_jsonl(changed(rows, 4, at="2024-05-01 12:00")), "a.jsonl"
    )
    lines = as_jsonl(rows).split(b"\n")
    assert "line 3 is not JSON" in refusal(home, b"\n".join([*lines[:2], lines[2][:-4], *lines[3:]]), "a.jsonl")
    assert "line 3 is not a JSON object" in refusal(home, b"\n".join([*lines[:2], b"[1]", *lines[3:]]), "a.jsonl")
    for column in ("name", "at"):
        bad = as_jsonl(changed(rows, 4, **{column: "ab"})).replace(b'"ab"', b'"a\xff"')
        assert "line 5 is not JSON: 'utf-8' codec can't decode byte 0xff" in refusal(home, bad, "a.jsonl")


def test_a_corrupt_record_is_named_by_its_byte(home: Home) -> None:
    frames = [frame(example(row)) for row in rows_of(3, 6)]
    begins = [sum(map(len, frames[:i])) for i in range(6)]
    whole = b"".join(frames)
    random = np.random.default_rng(0)
    for _ in range(60):  # any bit, anywhere
        at, bit = int(random.integers(len(whole))), int(random.integers(8))
        data = bytearray(whole)
        data[at] ^= 1 << bit
        record = max(b for b in begins if b <= at)
        message = refusal(home, bytes(data), "a.tfrecord")
        assert f"record at byte {record:,}: " in message, message
        assert "does not match its checksum" in message if at - record < 12 else "do not match their checksum" in message


def test_a_record_that_is_cut_short_is_named_by_its_byte(home: Home) -> None:
    frames = [frame(example(row)) for row in rows_of(4, 3)]
    whole = b"".join(frames)
    for length in range(1, len(whole), 7):
        if length in (len(frames[0]), len(frames[0]) + len(frames[1])):
            continue
        begin = max(b for b in (0, len(frames[0]), len(frames[0]) + len(frames[1])) if b <= length)
        assert f"record at byte {begin:,}: cut short, it needs " in refusal(home, whole[:length], "a.tfrecord")


def test_a_feature_that_does_not_fit_is_named(home: Home) -> None:
    rows = rows_of(5, 4)
    second = len(frame(example(rows[0])))
    bad = [({"late": [1.0, 2.0]}, "feature 'late' has 2 values, expected one"),
        ({"id": "x"}, "feature 'id' is a bytes_list, the spec says int64"),
           ({"name": 3}, "feature 'name' is a int64_list, the spec says string")]  # fmt: skip
    for cells, why in bad:
        assert f"record at byte {second}: {why}" in refusal(home, as_tfrecord(changed(rows, 1, **cells)), "a.tfrecord")
    assert "feature 'full' holds 2, expected 0 or 1" in refusal(home, as_tfrecord(changed(rows, 1, full=2)), "a.tfrecord")
    assert "feature 'name' does not fit string: " in refusal(home, as_tfrecord(changed(rows, 1, name=b"\xff")), "a.tfrecord")
    assert "record at byte 0: not a tf.train.Example" in refusal(home, frame(b"\xff\xff\xff"), "a.tfrecord")
    assert "column 'at': '2024' is not a time with a zone" in refusal(
        home, as_tfrecord(changed(rows, 1, at="2024")), "a.tfrecord"
    )


def test_times_of_a_record_may_be_whole_microseconds(home: Home) -> None:
    rows = rows_of(6)
    put(
        home,
        as_tfrecord([{**r, "at": round(r["at"].timestamp() * 1e6), "seen": round(r["seen"].timestamp() * 1e6)} for r in rows]),
        "a.tfrecord",
    )
    other = open_home(home.root / "other")
    put(other, as_parquet(rows), "a.parquet")
    assert ingest(SPEC, home).digest == ingest(SPEC, other).digest


@pytest.mark.parametrize("form", ["csv", "jsonl", "tfrecord", "parquet"])
def test_garbage_is_refused_by_name(form: str, home: Home) -> None:
    random = np.random.default_rng(7)
    good = FORMS[form](rows_of(7))
    for _ in range(40):
        data = bytearray(random.bytes(int(random.integers(1, 200))))
        refusal(home, bytes(data), f"a.{form}")
        refusal(home, bytes(data), f"a.{form}.gz")
    cut = gzip.compress(good)
    assert "cannot be unzipped" in refusal(home, cut[:-9], f"a.{form}.gz")


def test_a_torn_line_of_csv_is_refused(home: Home) -> None:
    lines = as_csv(rows_of(8, 5)).split(b"\n")
    assert "is not CSV with a line of column names" in refusal(home, b"\n".join([*lines[:2], b"1,2", *lines[2:]]), "a.csv")
    assert "two columns named 'id'" in refusal(home, b"id," + lines[0] + b"\n", "a.csv")
    assert "is not CSV with a line of column names: Empty" in refusal(home, b"", "a.csv")
    assert "column 'id' is missing" in refusal(home, b"at,late\n", "a.csv")


def test_empty_cells_are_null_and_quoted_ones_are_text(home: Home) -> None:
    put(
        home,
        b'id,name,late,full,count,at,seen\n1,"",,,,2024-05-01T12:00Z,2024-05-01T12:00Z\n2,,,,,2024-05-01T12:00Z,2024-05-01T12:00Z\n',
        "a.csv",
    )
    assert read_table(SPEC, home, ingest(SPEC, home), "trips")["name"].to_pylist() == ["", None]


# --- columns that come, widen and go ---


@pytest.mark.parametrize("form", list(FORMS))
def test_a_column_that_the_spec_does_not_name_is_left_out(form: str, tmp_path: Path) -> None:
    more, plain = open_home(tmp_path / "more"), open_home(tmp_path / "plain")
    fewer = Spec.model_validate({**SPEC.model_dump(by_alias=True), "sources": {"trips": {
        **SPEC.sources["trips"].model_dump(by_alias=True), "columns":
            {n: c for n, c in COLUMNS.items() if n != "name"}}}})  # fmt: skip
    put(more, FORMS[form](rows_of(1)), f"a.{form}")
    put(plain, as_parquet([{**r, "name": None} for r in rows_of(1)]), "a.parquet")
    assert ingest(fewer, more).digest == ingest(fewer, plain).digest


@pytest.mark.parametrize("form", list(FORMS))
def test_a_new_column_is_null_where_files_before_it_lack_it(form: str, home: Home) -> None:
    rows = rows_of(2, 20)
    old = pq.read_table(pa.BufferReader(as_parquet(rows[:10]))).drop_columns(["name"])
    pq.write_table(old, put(home, b"", "a.parquet"))
    put(home, FORMS[form](changed(rows, 12, name="new")[10:]), f"b.{form}")
    found = read_table(SPEC, home, ingest(SPEC, home), "trips")["name"].to_pylist()
    assert found[:10] == [None] * 10 and found[12] == "new"
    pq.write_table(old, put(home, b"", "c.parquet"))
    with pytest.raises(
        Refused, match=r"trips/c.parquet: column 'name' is missing, which files before it have; its 10 rows would be null"
    ):
        ingest(SPEC, home)


def test_a_new_column_that_may_not_be_null_is_missed(home: Home) -> None:
    message = refusal(home, as_parquet(rows_of(1)), "a.parquet", spec_of(gate="string"))
    assert "column 'gate' is missing (columns: id, name," in message


WIDER = {
    "int8": ("count", pa.int8(), [1, -7, None]), "uint32": ("count", pa.uint32(), [1, 2**32 - 1, None]),
    "float32": ("late", pa.float32(), [1.5, -0.25, None]), "float16": ("late", pa.float16(), [1.5, -0.25, None]),
    "int16 as float": ("late", pa.int16(), [1, -7, None]), "large_string": ("name", pa.large_string(), ["a", "", None]),
    "dictionary": ("name", pa.dictionary(pa.int8(), pa.string()), ["a", "", None]),
    "date": ("at", pa.date32(), [NOON.date()] * 3), "seconds": ("at", pa.timestamp("s", "UTC"), [NOON] * 3),
    "nanoseconds": ("at", pa.timestamp("ns", "UTC"), [NOON] * 3), "another zone": ("at",
        pa.timestamp("us", "Asia/Tokyo"), [NOON] * 3),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDER)
def test_a_type_that_widens_is_the_same_value(case: str, tmp_path: Path) -> None:
    column, kind, values = WIDER[case]
    table = pq.read_table(pa.BufferReader(as_parquet(rows_of(3, 3))))
    at = table.column_names.index(column)
    wide = ARROW[COLUMNS[column]["type"] if isinstance(COLUMNS[column], dict) else COLUMNS[column]]
    midnight = [datetime(2024, 5, 1, tzinfo=UTC)] * 3 if case == "date" else values
    digests = []
    for name, array in (("narrow", pa.array(values, kind)), ("wide", pa.array(midnight, wide))):
        home = open_home(tmp_path / name)
        pq.write_table(table.set_column(at, column, array), put(home, b"", "a.parquet"))
        digests.append(ingest(SPEC, home).digest)
    assert digests[0] == digests[1]


AS_INT64, LOST = "is double, the spec says int64: write it as int64; ", "values would be lost: "
NARROWER = {
    "fractions": ("count", pa.array([1.5, 2.0, None, 2.25, 1e300]), f"{AS_INT64}3 of 4 {LOST}1.5, 2.25, 1e+300"),
    "whole numbers as double": ("count", pa.array([1.0, 2.0, None, 3.0, 4.0]), f"{AS_INT64}none of its values would be lost"),
    "texts": ("late", pa.array(["1", "late", None, "2.5", "x"]),
        f"is string, the spec says float64: write it as double; 2 of 4 {LOST}late, x"),
    "large whole numbers": ("late", pa.array([1, 2**53 + 1, 2**60 + 1, 2**54, None]), f"2 of 4 {LOST}{2**53 + 1}, {2**60 + 1}"),
    "beyond int64": ("count", pa.array([1, 2**64 - 1, 2**63, 5, None], pa.uint64()), f"2 of 4 {LOST}{2**64 - 1}, {2**63}"),
    "nanoseconds": ("at", pa.array([10**18, 10**18 + 1, 10**18 + 999, 10**18, 10**18],
        pa.timestamp("ns", "UTC")), f"2 of 5 {LOST}"),
}  # fmt: skip


@pytest.mark.parametrize("case", NARROWER)
def test_a_type_that_would_lose_values_is_refused_with_them(case: str, home: Home) -> None:
    column, values, why = NARROWER[case]
    table = pq.read_table(pa.BufferReader(as_parquet(rows_of(3, 5))))
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(table.column_names.index(column), column, values), sink)
    message = refusal(home, sink.getvalue().to_pybytes(), "a.parquet")
    assert f"column '{column}' " in message and why in message, message


def test_what_arrow_reads_is_its_own() -> None:
    """A thread of Arrow that lets go of Python's bytes as Python ends aborts the process: 7 in 100 checks of a busy machine."""
    data = b"x" * 1_000_000
    before = sys.getrefcount(data)
    held = owned(data)
    assert sys.getrefcount(data) == before and held.read() == data
