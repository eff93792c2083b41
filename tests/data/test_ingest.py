"""Ingest: what it refuses, that a snapshot is named by its values alone, and that only new files are read."""

import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features import ingest as module
from features.feed import feed
from features.ingest import Snapshot, cut, ingest, read_snapshot, read_table
from features.keys import KNOWN
from features.online import OnlineStore, serve_features
from features.store import build_features, historical_features
from pipelines.clock import Anchor, parse_time
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.run import pin
from pipelines.spec import Spec
from tests.agreement import same_frames

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
UTC_US = pa.timestamp("us", "UTC")
COLUMNS = {"id": "int64", "name": "string", "late": "float64", "full": "bool", "at": "timestamp", "seen": "timestamp"}
N = 40


def spec_of(known_at: Any = None, columns: dict[str, str] = COLUMNS, **more: Any) -> Spec:
    source = {"key": ["id"], "event_time": "at", "known_at": known_at or {"column": "seen"}, "columns": columns}
    timed = {
        "pipeline": "lines", "title": "Late?", "sources": {"trips": source},
        "rows": {"from": "trips", "key": ["id"]}, "predict_at": {"column": "at", "lead": "10m", "tolerance": "1m"},
        "label": {"from": "trips", "column": "late", "gt": 5}, "label_delay": "1h",
        "split": {"train": "1d", "valid_fit": "1d", "valid_select": "1d", "test": "1d", "purge": "1h"},
    }  # fmt: skip
    return Spec.model_validate({**timed, **more})


SPEC = spec_of()


def trips(rows: int = N, **columns: Any) -> pa.Table:
    """Trips five minutes apart, each seen a minute after it happened."""
    at = [NOON + timedelta(minutes=5 * i) for i in range(rows)]
    table = {
        "id": pa.array(range(rows), pa.int64()),
        "name": pa.array([None if i % 9 == 4 else f"trip {i % 7} é" for i in range(rows)], pa.string()),
        "late": pa.array([None if i % 11 == 3 else float(i % 5) for i in range(rows)], pa.float64()),
        "full": pa.array([None if i % 13 == 3 else i % 2 == 0 for i in range(rows)], pa.bool_()),
        "at": pa.array(at, UTC_US),
        "seen": pa.array([t + timedelta(minutes=1) for t in at], UTC_US),
    }
    return pa.table({**table, **columns})


def put(home: Home, table: pa.Table | bytes, name: str = "a.parquet", **settings: Any) -> Path:
    path = home.landing("lines") / "trips" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        pq.write_table(table, path, **settings)
    return path


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def refusal(home: Home, spec: Spec = SPEC) -> str:
    """What a refused ingest says. It publishes nothing: no snapshot, no index, no half-written file."""
    before = published(home)
    with pytest.raises(Refused) as caught:
        ingest(spec, home)
    assert published(home) == before
    return str(caught.value)


def published(home: Home) -> dict[str, bytes]:
    """Everything in the home but landing, and objects, which are named by their values and harm nobody."""
    there = {home.relative(p): p.read_bytes() for p in home.root.rglob("*") if p.is_file()}
    assert not [name for name in there if name.startswith("objects/") and not name.endswith(".parquet")]
    kept = {name: data for name, data in there.items() if not name.startswith(("landing/", "objects/"))}
    kept.pop("snapshots/lines/landing.json", None)  # when each file was first seen: that stays
    return kept


def fresh(home: Home, name: str) -> Home:
    return open_home(home.root / "homes" / name)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


# --- what is refused ---


def test_an_empty_landing(home: Home) -> None:
    message = refusal(home)
    assert "no files landed for source 'trips'" in message
    assert str(home.landing("lines") / "trips") in message and "your files there" in message


def test_files_that_are_being_written_do_not_count(home: Home) -> None:
    put(home, b"half", ".a.parquet.tmp")
    put(home, b"done", "_SUCCESS")
    assert "no files landed" in refusal(home)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file(home: Home, share: float) -> None:
    data = parquet(trips())
    put(home, trips(5), "a.parquet")
    put(home, data[: int(len(data) * share)], "b.parquet")
    message = refusal(home)
    assert message.startswith("landing file trips/b.parquet cannot be read, it may be cut short: ")


@pytest.mark.parametrize("data", [b"", b"PA", b"id,name\n1,a\n", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_not_parquet(home: Home, data: bytes) -> None:
    put(home, data, "table.bin")
    assert "landing file trips/table.bin is not Parquet" in refusal(home)


def test_every_way_to_cut_a_file_is_a_refusal(home: Home) -> None:
    data = parquet(trips(3))
    for length in range(0, len(data), 37):
        put(home, data[:length])
        assert "landing file trips/a.parquet" in refusal(home)


def test_a_missing_column(home: Home) -> None:
    put(home, trips().drop_columns(["full"]))
    message = refusal(home)
    assert "landing file trips/a.parquet: column 'full' is missing (columns: id, name, late, at, seen" in message


def test_a_renamed_column_names_the_nearest(home: Home) -> None:
    put(home, trips().rename_columns(["id", "name", "lateness", "full", "at", "seen"]))
    message = refusal(home)
    assert "column 'late' is missing" in message and "nearest: 'lateness'" in message


@pytest.mark.parametrize(
    ("column", "values", "found", "declared"),
    [("late", pa.array(["1"] * N), "string", "float64"), ("id", pa.array([1.0] * N), "double", "int64"),
     ("name", pa.array([b"x"] * N), "binary", "string"), ("full", pa.array([1] * N), "int64", "bool"),
     ("at", pa.array([1] * N), "int64", "timestamp"), ("at", pa.array(["noon"] * N), "string", "timestamp"),
     ("late", pa.array([[1.0]] * N), "list", "float64")],
)  # fmt: skip
def test_a_column_of_another_type(home: Home, column: str, values: pa.Array, found: str, declared: str) -> None:
    put(home, trips(**{column: values}))
    message = refusal(home)
    assert f"landing file trips/a.parquet: column '{column}' is {found}" in message
    assert f"the spec says {declared}: write it as " in message


def test_two_files_that_disagree_on_types(home: Home) -> None:
    put(home, trips(), "a.parquet")
    put(home, trips(late=pa.array(["late"] * N)), "b.parquet")
    assert "landing file trips/b.parquet: column 'late' is string, the spec says float64" in refusal(home)


def test_times_without_a_zone(home: Home) -> None:
    put(home, trips(at=trips()["at"].cast(pa.timestamp("us"))))
    message = refusal(home)
    assert "column 'at' holds times without a zone: write them as timestamp[us, tz=UTC]" in message


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [("at", pa.array([1_700_000_000_000_000_001] * N, pa.timestamp("ns", "UTC")), "would lose data"),
     ("at", pa.array([1_714_564_800_000_000] * N, pa.timestamp("ms", "UTC")), "outside the years 1 to 9999"),
     ("late", pa.array([2**60 + 1] * N), "not in range"),
     ("id", pa.array([2**64 - 1] * N, pa.uint64()), "not in range")],
)  # fmt: skip
def test_values_that_do_not_fit(home: Home, column: str, values: pa.Array, why: str) -> None:
    put(home, trips(**{column: values}))
    message = refusal(home)
    assert f"landing file trips/a.parquet: column '{column}'" in message and why in message


@pytest.mark.parametrize("form", ["string", "large_string", "dictionary"])
def test_strings_that_are_not_utf8(home: Home, form: str) -> None:
    raw = [b"fine"] * (N - 1) + [b"caf\xe9"]
    values = (
        pa.array(raw, pa.large_binary()).view(pa.large_string()) if form == "large_string"
        else pa.array(raw, pa.binary()).view(pa.string())
    )  # fmt: skip
    put(home, trips(name=values.dictionary_encode() if form == "dictionary" else values))
    message = refusal(home)
    assert "landing file trips/a.parquet: column 'name' does not fit string: Invalid UTF8" in message


def test_texts_that_hold_what_parts_keys(home: Home) -> None:
    put(home, trips(name=pa.array([*["fine"] * (N - 1), "a\x1fb"])))
    expected = f"trips/a.parquet: column 'name' holds the character U+001F in row {N - 1}; it parts the columns of a key"
    assert expected in refusal(home)


def test_the_same_key_and_known_at_with_other_values(home: Home) -> None:
    put(home, trips(10), "a.parquet")
    late = pa.array([99.0, *trips(10)["late"].to_pylist()[1:]])
    put(home, trips(10, late=late).slice(0, 3), "b.parquet")
    message = refusal(home)
    assert "source 'trips': 1 fact(s) with the same key and known-at but other values" in message
    assert "such as {'id': '0'} known at 2024-05-01 12:01:00" in message
    assert re.search(r" in trips/a\.parquet \(object (\w{12})\) and trips/b\.parquet \(object (?!\1)\w{12}\); ", message)
    assert "a correction needs a later known-at" in message


@pytest.mark.parametrize("other", [None, float("nan")])
def test_a_value_and_none_are_other_values(home: Home, other: float | None) -> None:
    put(home, trips(1), "a.parquet")
    put(home, trips(1, late=pa.array([other], pa.float64())), "b.parquet")
    assert "1 fact(s) with the same key and known-at but other values" in refusal(home)


def build_on(home: Home, snapshot: Snapshot) -> None:
    """A run on this snapshot, which no contract has stopped."""
    pin(home, SPEC, as_of_us=snapshot.watermark_us, snapshot=snapshot.digest, previous="", parent="", code="")


def test_a_landed_file_that_was_changed(home: Home) -> None:
    path = put(home, trips(10))
    build_on(home, ingest(SPEC, home))
    put(home, trips(11))
    message = refusal(home)
    assert "landing file trips/a.parquet was changed after it was read; landing is append-only" in message
    assert path.exists()


def test_a_landed_file_that_was_deleted(home: Home) -> None:
    put(home, trips(10), "a.parquet")
    put(home, trips(12).slice(10), "b.parquet")
    build_on(home, ingest(SPEC, home))
    put(home, b"").unlink()
    assert "landing file trips/a.parquet was deleted; landing is append-only: put it back" in refusal(home)


def test_a_bad_delivery_that_no_run_built_on_may_be_replaced_or_taken_away(home: Home, tmp_path: Path) -> None:
    put(home, trips(10), "a.parquet")
    good = ingest(SPEC, home)
    build_on(home, good)
    put(home, trips(12, late=pa.array([-999.0] * 12)).slice(10), "b.parquet")
    assert ingest(SPEC, home).new_files == 1  # such as a contract refuses
    put(home, trips(12).slice(10), "b.parquet")
    replaced = ingest(SPEC, home)
    assert replaced.rows == {"trips": 12}
    clean = fresh(home, "clean")
    put(clean, trips(12))
    assert replaced.digest == ingest(SPEC, clean).digest
    (home.landing("lines") / "trips" / "b.parquet").unlink()
    assert ingest(SPEC, home) == snapshot_without_news(good)


def test_a_clash_can_be_taken_away(home: Home) -> None:
    put(home, trips(10), "a.parquet")
    snapshot = ingest(SPEC, home)
    bad = put(home, trips(3, late=pa.array([99.0] * 3)), "b.parquet")
    refusal(home)
    bad.unlink()
    assert ingest(SPEC, home) == snapshot_without_news(snapshot)


def test_arrival_is_the_first_sight_also_in_a_refused_ingest(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(known_at={"arrival": True})
    monkeypatch.setattr(module, "wall_us", lambda: 1_000)
    put(home, trips(10), "a.parquet")
    put(home, b"PAR1", "b.parquet")
    refusal(home, spec)
    monkeypatch.setattr(module, "wall_us", lambda: 2_000)
    put(home, trips(12).slice(10), "b.parquet")
    known = read_table(spec, home, ingest(spec, home), "trips")[KNOWN].cast(pa.int64()).to_pylist()
    assert known == [1_000] * 10 + [2_000] * 2


def test_whole_numbers_that_a_request_could_not_name_exactly(home: Home) -> None:
    view = {"window": {"from": "trips", "key": ["id"], "last": ["1h"], "mean": []}}
    spec = spec_of(features={"views": {"mine": view}})
    put(home, trips(2, id=pa.array([1, 2**53], pa.int64())))
    with pytest.raises(Refused, match=r"column 'id', a key of features, holds whole numbers of 2\^53 or more"):
        build_features(spec, home, ingest(spec, home))
    assert not [p for p in (home.root / "features").rglob("*") if p.is_file()]


def test_row_keys_of_64_bits_name_their_own_row(home: Home) -> None:
    spec, ids = spec_of(features={"row": ["full", "id"]}), [2**60 + i for i in range(N)]
    put(home, trips(id=pa.array(ids, pa.int64())))
    snapshot = ingest(spec, home)
    built, store = build_features(spec, home, snapshot), home.root / "served"
    feed(spec, home.root / built.path, store, Anchor(snapshot.watermark_us, 0), snapshot.digest)
    served = serve_features(OnlineStore(spec, store), [{"id": i} for i in ids], snapshot.watermark_us).frame
    table = read_table(spec, home, snapshot, "trips")
    offline = historical_features(spec, home, built, table, np.full(N, snapshot.watermark_us))
    assert same_frames(served, offline) == [] and served["full"][1] == 0.0 and served["id"][1] == 2.0**60


def test_windows_do_not_add_up_what_is_not_exact(home: Home) -> None:
    view = {"window": {"from": "trips", "key": ["name"], "last": ["1h"], "sum": ["id"]}}
    spec = spec_of(features={"views": {"mine": view}})
    put(home, trips(2, id=pa.array([1, 2**53], pa.int64())))
    with pytest.raises(MillraceError, match=r"column 'id' holds whole numbers of 2\^53 or more, which windows cannot add"):
        build_features(spec, home, ingest(spec, home))


def test_facts_before_1970(home: Home) -> None:
    early = [t - timedelta(days=365 * 80) for t in trips()["at"].to_pylist()]
    put(home, trips(at=pa.array(early, UTC_US), seen=pa.array(early, UTC_US)))
    assert ingest(SPEC, home).watermark_us == int(early[-1].timestamp() * 1e6) < 0


def test_a_refusal_leaves_the_last_snapshot_usable(home: Home) -> None:
    put(home, trips(10))
    snapshot = ingest(SPEC, home)
    bad = put(home, b"PAR1", "b.parquet")
    refusal(home)
    assert read_table(SPEC, home, read_snapshot(home, "lines", snapshot.digest), "trips").num_rows == 10
    bad.unlink()
    assert ingest(SPEC, home) == snapshot_without_news(snapshot)


# --- what a snapshot is ---


def snapshot_without_news(snapshot: Snapshot) -> Snapshot:
    return Snapshot(**{**vars(snapshot), "new_files": 0})


def test_a_snapshot_says_what_is_known(home: Home) -> None:
    put(home, trips())
    snapshot = ingest(SPEC, home)
    assert snapshot.rows == {"trips": N} and snapshot.duplicates == {"trips": 0} and snapshot.new_files == 1
    assert snapshot.watermark_us == parse_time("2024-05-01T15:16Z") and snapshot.until_us is None
    assert read_snapshot(home, "lines", snapshot.digest) == snapshot_without_news(snapshot)
    table = read_table(SPEC, home, snapshot, "trips")
    assert table.column_names == [*sorted(COLUMNS), KNOWN]
    assert table[KNOWN].to_pylist() == table["seen"].to_pylist()
    expected = trips().select(sorted(COLUMNS))
    assert table.drop_columns([KNOWN]).equals(expected)


def halves(home: Home, table: pa.Table) -> None:
    put(home, table.slice(N // 2), "a.parquet")
    put(home, table.slice(0, N // 2), "z/b.parquet")


def retyped(table: pa.Table, column: str, kind: pa.DataType) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, table[column].cast(kind))


FORMS: dict[str, Callable[[Home, pa.Table], object]] = {
    "another name": lambda home, t: put(home, t, "2024/may.pq"),
    "two files": halves,
    "rows backwards": lambda home, t: put(home, t.take(list(range(N))[::-1])),
    "columns backwards": lambda home, t: put(home, t.select(t.column_names[::-1])),
    "columns that nobody reads": lambda home, t: put(home, t.append_column("more", t["id"])),
    "compression": lambda home, t: put(home, t, compression="zstd", version="1.0"),
    "row groups": lambda home, t: put(home, t, row_group_size=7),
    "no dictionary": lambda home, t: put(home, t, use_dictionary=False, data_page_version="2.0"),
    "categories": lambda home, t: put(home, t.set_column(1, "name", t["name"].dictionary_encode())),
    "int32": lambda home, t: put(home, retyped(t, "id", pa.int32())),
    "float32": lambda home, t: put(home, retyped(t, "late", pa.float32())),
    "large strings": lambda home, t: put(home, retyped(t, "name", pa.large_string())),
    "string views": lambda home, t: put(home, retyped(t, "name", pa.string_view())),
    "milliseconds elsewhere": lambda home, t: put(home, retyped(t, "at", pa.timestamp("ms", "America/New_York"))),
    "metadata": lambda home, t: put(home, t.replace_schema_metadata({"pandas": "{}"})),
    "the same rows twice": lambda home, t: (put(home, t, "a.parquet"), put(home, t.slice(3, 9), "b.parquet")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_depends_on_values_alone(home: Home, form: str) -> None:
    first, second = fresh(home, "first"), fresh(home, "second")
    put(first, trips())
    FORMS[form](second, trips())
    snapshots = ingest(SPEC, first), ingest(SPEC, second)
    assert snapshots[0].digest == snapshots[1].digest
    tables = [read_table(SPEC, h, s, "trips") for h, s in zip((first, second), snapshots, strict=True)]
    assert tables[0].equals(tables[1])


CHANGES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a number": lambda t: t.set_column(2, "late", pa.array([7.0, *t["late"].to_pylist()[1:]])),
    "a null": lambda t: t.set_column(3, "full", pa.array([None, *t["full"].to_pylist()[1:]])),
    "a null for an empty text": lambda t: t.set_column(1, "name", pc.fill_null(t["name"], "")),
    "a null for zero": lambda t: t.set_column(2, "late", pc.fill_null(t["late"], 0.0)),
    "NaN for null": lambda t: t.set_column(2, "late", pc.fill_null(t["late"], float("nan"))),
    "letters moved between rows": lambda t: t.set_column(
        1, "name", pa.array(["trip", " 0 étrip 1 é", *t["name"].to_pylist()[2:]])
    ),
    "a microsecond": lambda t: t.set_column(
        4, "at", pa.array([NOON - timedelta(microseconds=1), *t["at"].to_pylist()[1:]], UTC_US)
    ),
    "a row less": lambda t: t.slice(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_values_have_another_digest(home: Home, change: str) -> None:
    first, second = fresh(home, "first"), fresh(home, "second")
    put(first, trips())
    put(second, CHANGES[change](trips()))
    assert ingest(SPEC, first).digest != ingest(SPEC, second).digest


def test_minus_zero_is_zero(home: Home) -> None:
    first, second = fresh(home, "first"), fresh(home, "second")
    put(first, trips(2, late=pa.array([0.0, 1.0])))
    put(second, trips(2, late=pa.array([-0.0, 1.0])))
    assert ingest(SPEC, first).digest == ingest(SPEC, second).digest


def test_identical_rows_count_once_and_are_reported(home: Home) -> None:
    """Where a value is NaN too: that they are NaN is for the contract to say."""
    table = trips(10, late=pa.array([float("nan"), None, *[1.0] * 8], pa.float64()))
    put(home, table, "a.parquet")
    put(home, table.slice(0, 4), "b.parquet")
    snapshot = ingest(SPEC, home)
    assert snapshot.rows == {"trips": 10} and snapshot.duplicates == {"trips": 4}


def test_corrections_stay_beside_what_they_correct(home: Home) -> None:
    put(home, trips(3), "a.parquet")
    later = [NOON + timedelta(days=1)] * 3
    put(home, trips(3, late=pa.array([50.0] * 3), seen=pa.array(later, UTC_US)), "b.parquet")
    table = read_table(SPEC, home, ingest(SPEC, home), "trips")
    assert table["id"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table["late"].to_pylist() == [0.0, 50.0, 1.0, 50.0, 2.0, 50.0]


def test_a_table_without_rows_is_a_snapshot(home: Home) -> None:
    """Whether none is enough is for the contract to say."""
    put(home, trips(0))
    snapshot = ingest(SPEC, home)
    assert snapshot.rows == {"trips": 0}
    assert read_table(SPEC, home, snapshot, "trips").num_rows == 0


def test_a_column_of_nulls_in_one_file(home: Home) -> None:
    put(home, trips(3, name=pa.nulls(3)), "a.parquet")
    put(home, trips(6).slice(3), "b.parquet")
    assert read_table(SPEC, home, ingest(SPEC, home), "trips")["name"].null_count == 4


# --- only what is new is read ---


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the landing files whose bytes were read, as they are read."""
    found: list[str] = []
    real = Path.read_bytes

    def spy(path: Path) -> bytes:
        if "landing" in path.parts:
            found.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", spy)
    return found


def test_only_new_files_are_read(home: Home, reads: list[str]) -> None:
    put(home, trips(10), "a.parquet")
    first = ingest(SPEC, home)
    assert reads == ["a.parquet"]
    assert ingest(SPEC, home) == snapshot_without_news(first)
    assert reads == ["a.parquet"]
    put(home, trips(20).slice(10), "b.parquet")
    second = ingest(SPEC, home)
    assert reads == ["a.parquet", "b.parquet"]
    assert (second.new_files, second.rows) == (1, {"trips": 20})
    assert second.digest != first.digest


def test_a_touched_file_is_compared_and_not_taken_again(home: Home, reads: list[str]) -> None:
    path = put(home, trips(10))
    first = ingest(SPEC, home)
    os.utime(path, ns=(1, 1))
    again = ingest(SPEC, home)
    assert (again.digest, again.new_files) == (first.digest, 0)
    assert len(reads) == 2
    ingest(SPEC, home)
    assert len(reads) == 2  # its new time is remembered


def test_a_copied_landing_is_the_same_snapshot(home: Home, tmp_path: Path) -> None:
    put(home, trips(10))
    other = open_home(tmp_path / "other")
    shutil.copytree(home.root / "landing", other.root / "landing")
    assert ingest(SPEC, other).digest == ingest(SPEC, home).digest


def test_nothing_is_written_twice(home: Home) -> None:
    put(home, trips(10))
    ingest(SPEC, home)
    objects = {p.name: p.stat().st_mtime_ns for p in home.objects.iterdir()}
    put(home, trips(10), "again.parquet", compression="gzip")
    ingest(SPEC, home)
    assert {p.name: p.stat().st_mtime_ns for p in home.objects.iterdir()} == objects


def test_a_column_that_the_spec_names_later_is_read_from_old_files(home: Home) -> None:
    fewer = spec_of(columns={name: kind for name, kind in COLUMNS.items() if name != "name"})
    put(home, trips(10))
    ingest(fewer, home)
    put(home, trips(20).slice(10), "b.parquet")
    snapshot = ingest(SPEC, home)
    assert read_table(SPEC, home, snapshot, "trips")["name"].to_pylist() == trips(20)["name"].to_pylist()
    assert snapshot.new_files == 1
    other = fresh(home, "other")
    put(other, trips(20))
    assert ingest(SPEC, other).digest == snapshot.digest


def test_a_column_whose_type_changes_in_the_spec_is_read_again(home: Home) -> None:
    put(home, trips(10))
    ingest(SPEC, home)
    other = spec_of(columns={**COLUMNS, "full": "string"})
    assert "column 'full' is bool, the spec says string" in refusal(home, other)
    assert ingest(SPEC, home).rows == {"trips": 10}


# --- what is known when ---


def test_a_cut_is_what_was_known_then(home: Home) -> None:
    put(home, trips(), "a.parquet")
    whole = ingest(SPEC, home)
    as_of = parse_time("2024-05-01T12:31Z")  # the seventh trip is seen in that very microsecond
    then = cut(SPEC, home, whole, as_of)
    assert (then.rows, then.watermark_us, then.until_us) == ({"trips": 7}, as_of, as_of)
    assert then.digest != whole.digest
    assert read_table(SPEC, home, then, "trips")["id"].to_pylist() == list(range(7))
    assert cut(SPEC, home, whole, as_of) == then
    just_before = cut(SPEC, home, whole, as_of - 1)
    assert (just_before.rows, just_before.watermark_us) == ({"trips": 6}, parse_time("2024-05-01T12:26Z"))
    assert read_table(SPEC, home, whole, "trips").num_rows == N


def test_a_cut_at_or_after_the_watermark_is_the_snapshot(home: Home) -> None:
    put(home, trips())
    whole = ingest(SPEC, home)
    assert cut(SPEC, home, whole, whole.watermark_us) is whole
    assert cut(SPEC, home, whole, whole.watermark_us + 1) is whole


def test_a_cut_before_everything_is_empty(home: Home) -> None:
    put(home, trips())
    then = cut(SPEC, home, ingest(SPEC, home), parse_time("2020-01-01"))
    assert then.rows == {"trips": 0}


def test_a_cut_keeps_facts_without_known_at_for_the_contract(home: Home) -> None:
    put(home, trips(3, seen=pa.array([NOON, None, NOON + timedelta(hours=9)], UTC_US)))
    then = cut(SPEC, home, ingest(SPEC, home), parse_time("2024-05-01T12:00Z"))
    assert read_table(SPEC, home, then, "trips")["id"].to_pylist() == [0, 1]


def test_known_at_by_lag(home: Home) -> None:
    put(home, trips(3))
    spec = spec_of({"lag": "1h"})
    table = read_table(spec, home, ingest(spec, home), "trips")
    assert table[KNOWN].to_pylist() == [t + timedelta(hours=1) for t in table["at"].to_pylist()]


def test_known_at_by_arrival(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamped at first sight, kept when the file is touched or the spec changes, and part of the digest."""
    spec, other = spec_of({"arrival": True}), fresh(home, "other")
    for where, t0 in ((home, "2024-05-02"), (other, "2024-06-02")):
        monkeypatch.setattr(module, "wall_us", lambda t0=t0: parse_time(t0))
        put(where, trips(3), "a.parquet")
        first = ingest(spec, where)
        monkeypatch.setattr(module, "wall_us", lambda t0=t0: parse_time(t0) + 5)
        os.utime(put(where, trips(5).slice(3), "b.parquet"))
        os.utime(where.landing("lines") / "trips" / "a.parquet", ns=(1, 1))
        second = ingest(spec, where)
        known = read_table(spec, where, second, "trips")[KNOWN].cast(pa.int64()).to_pylist()
        assert known == [parse_time(t0)] * 3 + [parse_time(t0) + 5] * 2
        assert (first.watermark_us, second.watermark_us) == (parse_time(t0), parse_time(t0) + 5)
        assert cut(spec, where, second, parse_time(t0)).rows == {"trips": 3}
    assert ingest(spec, home).digest != ingest(spec, other).digest
    assert ingest(SPEC, home).digest == ingest(SPEC, other).digest  # elsewhere arrival is no value
    fewer = spec_of({"arrival": True}, {name: kind for name, kind in COLUMNS.items() if name != "name"})
    table = read_table(fewer, home, ingest(fewer, home), "trips")
    assert table[KNOWN].cast(pa.int64()).to_pylist()[0] == parse_time("2024-05-02")


def test_a_table_without_time_or_key(home: Home) -> None:
    spec = spec_of(
        time="none", sources={"trips": {"key": ["row_digest"], "columns": {"late": "float64", "name": "string"}}},
        rows={"from": "trips", "key": "row_digest"}, predict_at=None, label_delay=None,
        label={"from": "trips", "column": "name", "eq": "a"},
        split={"by": "hash", "train": 0.7, "valid_fit": 0.1, "valid_select": 0.1, "test": 0.1},
    )  # fmt: skip
    table = pa.table({"late": [1.0, 2.0, 1.0, None], "name": ["a", "b", "a", None]})
    put(home, table)
    snapshot = ingest(spec, home)
    assert (snapshot.rows, snapshot.duplicates, snapshot.watermark_us) == ({"trips": 3}, {"trips": 1}, 0)
    rows = read_table(spec, home, snapshot, "trips")
    assert len(set(rows["row_digest"].to_pylist())) == 3
    assert cut(spec, home, snapshot, 0) is snapshot
    other = fresh(home, "other")
    put(other, table.take([3, 1, 0]))
    assert ingest(spec, other).digest == snapshot.digest


def test_files_of_the_home_carry_their_format(home: Home) -> None:
    put(home, trips(3))
    snapshot = ingest(SPEC, home)
    for path in (home.root / snapshot.path, home.snapshots("lines") / "landing.json"):
        assert read_json(path)["format_version"] == 1
    (stored,) = home.objects.iterdir()
    assert pq.read_schema(stored).metadata[b"format_version"] == b"1"
    with pytest.raises(MillraceError, match="not found"):
        read_snapshot(home, "lines", "0" * 64)
