"""The contract: every rule is seen to refuse, naming column, count and sample rows, and good data passes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import contract
from features.contract import check_contract, type_rule, value_rules
from features.contract_page import ContractResult, as_json, from_json, percent, render
from features.ingest import ARROW, Snapshot, ingest
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home, open_home
from pipelines.spec import Spec, load_spec

N = 20
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
Row = dict[str, Any]
Tables = dict[str, list[Row]]

SOURCES: dict[str, Any] = {
    "plans": {
        "kind": "plan", "key": ["line", "trip"], "event_time": "due", "known_at": {"column": "told"},
        "columns": {"line": "string", "trip": "int64", "stop": {"type": "string", "nulls": 0.1}, "due": "timestamp",
                    "end": {"type": "timestamp", "nulls": 0.1}, "told": "timestamp"},
        "order": [["due", "end"]],
        "references": [{"to": "stops", "columns": ["stop"], "share": 0.75}],
    },
    "trips": {
        "key": ["line", "trip"], "event_time": "at", "known_at": {"column": "seen"},
        "columns": {
            "line": "string", "trip": {"type": "int64", "min": 1, "max": 999},
            "mode": {"type": "string", "values": ["bus", "tram"]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
            "late": {"type": "float64", "min": -60, "max": 600}, "speed": {"type": "float64", "min": 0},
            "note": {"type": "string", "nulls": 0.5}, "unused": {"type": "float64", "nulls": 1},
            "full": {"type": "bool", "nulls": 0.1}, "at": "timestamp", "seen": "timestamp",
        },
        "references": [{"to": "plans", "columns": ["line", "trip"]}],
        "rows_min": 5, "rows_shrink": 0.1,
    },
    "stops": {
        "key": ["stop"], "event_time": "since", "known_at": {"lag": "1h"},
        "columns": {"stop": "string", "first": "string", "last": "string", "since": "timestamp"},
        "order": [["first", "last"]],
    },
}  # fmt: skip


def spec_of(sources: dict[str, Any], **more: Any) -> Spec:
    timed = {
        "rows": {"from": "plans", "key": ["line", "trip"]}, "label_delay": "1h",
        "predict_at": {"column": "due", "lead": "10m", "tolerance": "1m"},
        "label": {"from": "trips", "column": "late", "gt": 5},
        "split": {"train": "1d", "valid_fit": "1d", "valid_select": "1d", "test": "1d", "purge": "1h"},
    }  # fmt: skip
    return Spec.model_validate({"pipeline": "lines", "title": "Late?", "sources": sources, **timed, **more})


def changed(source: str, column: str, **fields: Any) -> Spec:
    """The spec with a column declared in another way."""
    sources = json.loads(json.dumps(SOURCES))
    old = sources[source]["columns"][column]
    sources[source]["columns"][column] = {**(old if isinstance(old, dict) else {"type": old}), **fields}
    return spec_of(sources)


def good() -> Tables:
    """Twenty plans, their trips a minute late, and three stops. What the contract just allows is there too:

    an unknown stop and no stop, a plan that ends as it begins and one without end, a trip seen as it leaves.
    """
    due = [NOON + timedelta(minutes=5 * i) for i in range(N)]
    plans = [{"line": f"L{i % 3}", "trip": i + 1, "stop": "abc"[i % 3], "due": t, "end": t + timedelta(minutes=9),
              "told": t - timedelta(days=1)} for i, t in enumerate(due)]  # fmt: skip
    trips = [{"line": f"L{i % 3}", "trip": i + 1, "mode": ("bus", "tram")[i % 2], "code": f"AB{i % 10}",
              "late": float(i % 7), "speed": 30.5, "note": None if i % 2 else "fine", "unused": None,
              "full": i % 4 == 0, "at": t, "seen": t + timedelta(minutes=1)} for i, t in enumerate(due)]  # fmt: skip
    plans[10] |= {"stop": "z", "end": due[10]}
    plans[11] |= {"stop": None, "end": None}
    trips[10]["seen"] = due[10]
    stops = [{"stop": s, "first": "0500", "last": "2300", "since": NOON - timedelta(days=9)} for s in "abc"]
    return {"plans": plans, "trips": trips, "stops": stops}


def land(spec: Spec, home: Home, tables: Tables, name: str = "part") -> Snapshot:
    """The snapshot after one more file for each table."""
    for source, rows in tables.items():
        fields = [(column, ARROW[declared.type]) for column, declared in spec.sources[source].columns.items()]
        path = home.landing(spec.pipeline) / source / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [pa.array([row[name] for row in rows], kind) for name, kind in fields]  # NaN stays NaN
        pq.write_table(pa.table(columns, schema=pa.schema(fields)), path)
    return ingest(spec, home)


def files(home: Home) -> set[str]:
    return {home.relative(p) for p in home.root.rglob("*") if p.is_file()}


def refused(
    spec: Spec, home: Home, snapshot: Snapshot, previous: Snapshot | None = None, kind: type[MillraceError] = Refused
) -> tuple[str, str]:
    """Message and page of a contract that says no; that page is all that it may have written."""
    before = files(home)
    with pytest.raises(MillraceError) as caught:
        check_contract(spec, home, snapshot, previous, folder=home.root / "out")
    assert type(caught.value) is kind, str(caught.value)
    report = f"quarantine/lines/{snapshot.digest[:16]}.html"
    assert files(home) - before == {report}
    assert report in str(caught.value)
    assert not isinstance(caught.value, Refused) or caught.value.report == report
    return str(caught.value), (home.root / report).read_text()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def put(source: str, column: str, value: Any, *rows: int) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        for row in rows or range(len(tables[source])):
            tables[source][row][column] = value

    return change


def shorter(tables: Tables) -> None:
    del tables["trips"][3:]


def none_left(tables: Tables) -> None:
    tables["trips"].clear()


def two_nulls_of_one_key(tables: Tables) -> None:
    for row in (4, 5):
        tables["trips"][row] |= {"line": None, "trip": 1, "seen": NOON + timedelta(hours=1), "late": 0.0}


INF, NAN = float("inf"), float("nan")
EARLY = NOON - timedelta(hours=1)

# what is done to good data: (change, rule, where, what was found, what a sample row shows)
BAD = {
    "known before it happened": (
        put("trips", "seen", EARLY, 4), "known_at", "trips (at, seen)", "1 of 20 rows (5 %) known too early",
        "at=2024-05-01T12:20:00Z seen=2024-05-01T11:00:00Z"),
    "no rows": (none_left, "rows_min", "trips", "0 rows; expected at least 5", ""),
    "too few rows": (shorter, "rows_min", "trips", "3 rows; expected at least 5", ""),
    "all null": (put("trips", "note", None), "nulls", "trips.note", "all 20 values null; expected at most 50 % null",
                 "line=L0 trip=1 seen=2024-05-01T12:01:00Z note=null"),
    "too many nulls": (put("trips", "full", None, 0, 1, 2), "nulls", "trips.full", "3 of 20 values (15 %) null",
                       "full=null"),
    "null where none may be": (put("trips", "mode", None, 6), "nulls", "trips.mode", "1 of 20 values (5 %) null",
                               "line=L0 trip=7 seen=2024-05-01T12:31:00Z mode=null"),
    "null in the key": (put("trips", "line", None, 2), "nulls", "trips.line", "1 of 20 values (5 %) null",
                        "line=null trip=3"),
    "null event time": (put("stops", "since", None, 1), "nulls", "stops.since", "1 of 3 values (33.3 %) null",
                        "stop=b known-at=null since=null"),
    "null known-at": (put("plans", "told", None, 1), "nulls", "plans.told", "1 of 20 values (5 %) null",
                      "line=L1 trip=2 told=null"),
    "same key twice": (two_nulls_of_one_key, "key", "trips (line, trip, seen)",
                       "2 of 20 rows (10 %) share it with another row", "line=null trip=1 seen=2024-05-01T13:00:00Z"),
    "NaN": (put("trips", "late", NAN, 3, 5), "finite", "trips.late", "2 of 20 values (10 %) not finite: 2 NaN",
            "late=NaN"),
    "NaN where null may be": (put("trips", "unused", NAN, 0), "finite", "trips.unused",
                              "the only value not finite: 1 NaN", "unused=NaN"),
    "infinity where a range ends": (put("trips", "late", INF, 1), "finite", "trips.late",
                                    "1 of 20 values (5 %) not finite: 1 infinite", "late=+infinity"),
    "minus infinity": (put("trips", "speed", -INF, 1), "finite", "trips.speed",
                       "1 of 20 values (5 %) not finite: 1 infinite", "speed=-infinity"),
    "infinity": (put("trips", "speed", INF, 1), "finite", "trips.speed",
                 "1 of 20 values (5 %) not finite: 1 infinite", "speed=+infinity"),
    "below the range": (put("trips", "late", -61.0, 2), "range", "trips.late",
                        "1 of 20 values (5 %) outside, from -61 to 6; expected between -60 and 600", "late=-61"),
    "above the range": (put("trips", "trip", 1000, 2), "range", "trips.trip",
                        "outside, from 1 to 1000; expected between 1 and 999", "trip=1000"),
    "below an open range": (put("trips", "speed", -0.5, 7), "range", "trips.speed",
                            "outside, from -0.5 to 30.5; expected at least 0", "speed=-0.5"),
    "outside the set": (put("trips", "mode", "taxi", 2, 4), "values", "trips.mode",
                        "2 of 20 values (10 %) something else: taxi; expected one of bus, tram", "mode=taxi"),
    "another pattern": (put("trips", "code", "ab1", 2), "pattern", "trips.code",
                        "1 of 20 values (5 %) different: ab1; expected ^[A-Z]{2}[0-9]$", "code=ab1"),
    "times the wrong way round": (put("plans", "end", EARLY, 0, 1), "order", "plans (due, end)",
                                  "2 of 19 rows (10.5 %) the other way round; expected due ≤ end",
                                  "due=2024-05-01T12:00:00Z end=2024-05-01T11:00:00Z"),
    "texts the wrong way round": (put("stops", "last", "0400", 0), "order", "stops (first, last)",
                                  "1 of 3 rows (33.3 %) the other way round", "first=0500 last=0400"),
    "unknown reference": (put("trips", "line", "L9", 8), "references", "trips (line, trip)",
                          "1 of 20 rows (5 %) not found in plans; expected all found in plans", "line=L9 trip=9"),
    "too many unknown references": (put("plans", "stop", "z", *range(6)), "references", "plans.stop",
                                    "7 of 19 values (36.8 %) not found in stops; expected at least 75 % found in stops",
                                    "stop=z"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_by_name(case: str, home: Home) -> None:
    change, rule, where, found, sample = BAD[case]
    spec, tables = spec_of(SOURCES), good()
    change(tables)
    message, page = refused(spec, home, land(spec, home, tables))
    line = next((line for line in message.splitlines() if f"{where} [{rule}]:" in line), "")
    assert line, message
    assert found in line
    assert sample in line
    assert ">Refused</h1>" in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert found.split(";")[0] in text
    for value in re.findall(r"=(\S+)", sample):
        assert f" {value} " in text


ONLY = ["known before it happened", "all null", "NaN", "NaN where null may be", "infinity", "minus infinity",
        "infinity where a range ends", "another pattern", "null known-at", "null event time",
        "too many unknown references"]  # fmt: skip


@pytest.mark.parametrize("case", ONLY)
def test_one_fault_is_one_failure(case: str, home: Home) -> None:
    """NaN is no null and breaks no range; infinity passes no open range; a missing time is said once."""
    spec, tables = spec_of(SOURCES), good()
    BAD[case][0](tables)
    message, _ = refused(spec, home, land(spec, home, tables))
    assert f"lines' is refused by the contract: 1 of {len(expectations(spec))} expectations failed" in message


def expectations(spec: Spec) -> list[contract.Rule]:
    rules = ([type_rule(name), *value_rules(name, s, spec.timed, None)] for name, s in spec.sources.items())
    return list(chain.from_iterable(rules))


def test_good_data_passes_and_says_what_it_saw(home: Home) -> None:
    spec = spec_of(SOURCES)
    snapshot = land(spec, home, good())
    before = files(home)
    result = check_contract(spec, home, snapshot, snapshot)
    assert result.accepted and not result.report
    assert result.expectations == len(expectations(spec)) + 3 == len(result.checks)  # three compare rows with before
    assert result.rows == {"plans": 20, "trips": 20, "stops": 3}
    assert result.seconds > 0
    assert files(home) == before
    nulls = next(c for c in result.checks if (c.table, c.rule, c.columns) == ("trips", "nulls", ("note",)))
    assert (nulls.verdict, nulls.count, nulls.of, nulls.share) == ("passed", 10, 20, 0.5)
    assert ">Accepted</h1>" in render(result)


def test_exactly_the_limit_passes(home: Home) -> None:
    """5 % of nulls where 5 % are accepted, in floating point too; and a column that may be null throughout."""
    tables = good()
    for row in tables["trips"][1:]:
        row["note"] = None
    land(spec := changed("trips", "note", nulls=0.95), home, tables)
    assert check_contract(spec, home, ingest(spec, home)).accepted
    tables["trips"][0]["note"] = None
    snapshot = land(spec := changed("trips", "note", nulls=1), home := open_home(home.root / "second"), tables)
    result = check_contract(spec, home, snapshot)
    assert not [c for c in result.checks if c.rule == "nulls" and c.columns == ("note",)]


def test_fewer_rows_than_before(home: Home) -> None:
    spec, tables = spec_of(SOURCES), good()
    before = land(spec, home, tables)
    for table in ("plans", "trips"):
        del tables[table][17:]
    smaller = land(spec, open_home(home.root / "second"), tables)
    message, page = refused(spec, open_home(home.root / "second"), smaller, before)
    assert "plans [rows_shrink]: 17 rows; expected at least 20 (the previous snapshot had 20)" in message
    assert "trips [rows_shrink]: 17 rows; expected at least 18 (the previous snapshot had 20)" in message
    assert "2 of " in message
    assert before.digest[:16] in page and "−3" in page
    del tables["trips"][16:]
    tables["trips"] += good()["trips"][16:18]
    allowed = land(spec, open_home(home.root / "third"), {**good(), "trips": tables["trips"]})
    assert check_contract(spec, open_home(home.root / "third"), allowed, before).accepted  # 10 % may go


def test_the_same_row_twice_counts_once(home: Home) -> None:
    spec = spec_of(SOURCES)
    first = land(spec, home, good())
    twice = land(spec, home, {"trips": good()["trips"][:4]}, "again")
    assert twice.digest == first.digest
    result = check_contract(spec, home, twice)
    assert {a.table: (a.rows, a.duplicates) for a in result.arrived}["trips"] == (20, 4)


@pytest.mark.parametrize("fault", ["missing", "bool"])
@pytest.mark.parametrize(("source", "column"), [("trips", "late"), ("trips", "line"), ("plans", "line")])
def test_a_column_that_is_not_what_the_spec_says(
    fault: str, source: str, column: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ingest lets none through, so this one is made. What reads the column is not judged then."""
    spec = spec_of(SOURCES)
    snapshot = land(spec, home, good())
    real = contract.read_table

    def damaged(spec: Spec, home: Home, snapshot: Snapshot, name: str) -> pa.Table:
        table = real(spec, home, snapshot, name)
        if name != source:
            return table
        at = table.column_names.index(column)
        left = table.remove_column(at)
        return left if fault == "missing" else left.append_column(column, pa.array([True] * N))

    monkeypatch.setattr(contract, "read_table", damaged)
    message, page = refused(spec, home, snapshot)
    declared = spec.sources[source].columns
    assert f"{source} (declared, found) [type]: 1 of {len(declared)} columns" in message
    assert f"column={column} declared={declared[column].type} found={fault}" in message
    assert ": 1 of " in message.splitlines()[0] and f">{column}<" in page


@pytest.mark.parametrize(("source", "column"), [("trips", "line"), ("trips", "seen"), ("stops", "since")])
def test_keys_and_times_are_there_whatever_the_spec_allows(source: str, column: str, home: Home) -> None:
    spec, tables = changed(source, column, nulls=1), good()
    tables[source][1][column] = None
    message, _ = refused(spec, home, land(spec, home, tables))
    assert f"{source}.{column} [nulls]: 1 of " in message and "expected no nulls" in message


def test_keys_are_unique_whatever_ingest_did(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(SOURCES)
    snapshot = land(spec, home, good())
    real = contract.read_table
    monkeypatch.setattr(contract, "read_table", lambda *a: pa.concat_tables([real(*a), real(*a).slice(0, 1)]))
    message, _ = refused(spec, home, snapshot)
    assert "trips (line, trip, seen) [key]: 2 of 21 rows (9.52 %) share it with another row" in message
    assert "line=L0 trip=1 seen=2024-05-01T12:01:00Z" in message


def past_the_spec(column: str, **fields: Any) -> Spec:
    """A spec with a rule that cannot run, which validation would not let through."""
    spec = spec_of(SOURCES)
    trips = spec.sources["trips"]
    columns = {**trips.columns, column: trips.columns[column].model_copy(update=fields)}
    return spec.model_copy(update={"sources": {**spec.sources, "trips": trips.model_copy(update={"columns": columns})}})


@pytest.mark.parametrize(
    ("column", "fields", "rule", "why"),
    [("mode", {"min": 3}, "range", "same type"), ("code", {"pattern": "["}, "pattern", "unterminated"),
     ("at", {"max": 9}, "range", "datetime")],
)  # fmt: skip
def test_a_broken_check_is_not_bad_data(column: str, fields: Row, rule: str, why: str, home: Home) -> None:
    spec = past_the_spec(column, **fields)
    snapshot = land(spec, home, good())
    message, page = refused(spec, home, snapshot, kind=MillraceError)
    assert f"trips.{column} [{rule}]: the check could not run (" in message
    assert why in message
    assert "1 of " in message and "not of the data" in message
    assert ">Not judged</h1>" in page and "not run" in page


def test_bad_data_and_a_broken_check_are_told_apart(home: Home) -> None:
    spec, tables = past_the_spec("mode", min=3), good()
    put("trips", "late", NAN, 3)(tables)
    message, page = refused(spec, home, land(spec, home, tables))
    assert "1 of 44 expectations failed, and 1 of 44 checks could not run" in message.splitlines()[0]
    assert message.index("trips.late [finite]") < message.index("trips.mode [range]: the check could not run")
    assert "1 more could not be checked" in re.sub(r"\s+", " ", page)


def test_many_bad_rows_are_counted_and_a_few_shown(home: Home) -> None:
    spec, tables = spec_of(SOURCES), good()
    put("trips", "mode", "taxi")(tables)
    message, page = refused(spec, home, land(spec, home, tables))
    assert "all 20 values something else: taxi" in message
    assert message.count("mode=taxi") == 3 and "| and 17 more" in message
    assert page.count('<td class="hit">taxi</td>') == contract.SAMPLES == 8
    assert "and 12 more" in page


def test_values_are_escaped_and_hidden_characters_shown(home: Home) -> None:
    spec, tables = spec_of(SOURCES), good()
    put("trips", "mode", "<script>alert('x')</script>", 0)(tables)
    put("trips", "mode", "bus\x1b[31m", 1)(tables)
    put("trips", "mode", "", 2)(tables)
    message, page = refused(spec, home, land(spec, home, tables))
    assert "<script" not in page and "&lt;script&gt;alert(" in page
    assert "\x1b" not in message + page
    assert r"mode='bus\x1b[31m'" in message and "mode=''" in message


def test_the_page_needs_nothing_else(home: Home) -> None:
    spec, tables = spec_of(SOURCES), good()
    BAD["infinity"][0](tables)
    _, page = refused(spec, home, land(spec, home, tables))
    assert not re.search(r"https?:|src=|@import|<link|url\(", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "2024-05-01 13:36 UTC" in page  # known up to


def test_the_result_as_json(home: Home, tmp_path: Path) -> None:
    spec = spec_of(SOURCES)
    snapshot = land(spec, home, good())
    results = [check_contract(spec, home, snapshot, folder=tmp_path / name) for name in ("a", "b")]
    texts = [(tmp_path / name / "contract.json").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1] and results[0].digest == results[1].digest  # no seconds in it
    value = json.loads(texts[0])
    assert value["format_version"] == 1 and value["accepted"] is True
    again: ContractResult = from_json(value)
    assert as_json(again) == as_json(results[0])
    assert render(again) == render(results[0])


def test_a_table_without_time(home: Home) -> None:
    sources = {"cells": {"key": ["row_digest"], "columns": {"size": {"type": "float64", "min": 0}, "kind": "string"}}}
    spec = spec_of(
        sources, time="none", rows={"from": "cells", "key": "row_digest"}, predict_at=None, label_delay=None,
        label={"from": "cells", "column": "kind", "eq": "a"},
        split={"by": "hash", "train": 0.7, "valid_fit": 0.1, "valid_select": 0.1, "test": 0.1},
    )  # fmt: skip
    rows = [{"size": float(i), "kind": "ab"[i % 2]} for i in range(9)]
    result = check_contract(spec, home, land(spec, home, {"cells": [*rows, rows[0]]}))
    assert result.rows == {"cells": 9} and result.arrived[0].duplicates == 1
    assert "Known up to" not in render(result)
    rows[4]["size"] = -1.0
    message, _ = refused(spec, other := open_home(home.root / "second"), land(spec, other, {"cells": rows}))
    assert "cells.size [range]: 1 of 9 values (11.1 %) outside, from -1 to 8; expected at least 0" in message
    assert re.search(r"row_digest=[0-9a-f]{32} size=-1", message)


def test_arrival_is_a_known_at_too(home: Home) -> None:
    sources = json.loads(json.dumps(SOURCES))
    sources["stops"]["known_at"] = {"arrival": True}
    spec, tables = spec_of(sources), good()
    assert check_contract(spec, home, land(spec, home, tables)).accepted
    tables["stops"][0]["since"] = datetime(2990, 1, 1, tzinfo=UTC)
    message, _ = refused(spec, other := open_home(home.root / "second"), land(spec, other, tables))
    assert "stops (since, known-at) [known_at]: 1 of 3 rows" in message


def test_the_flights_have_a_contract_worth_the_name() -> None:
    rules = expectations(load_spec("flights"))
    assert len(rules) >= 100
    assert {r.name for r in rules} == {"type", "rows_min", "key", "nulls", "finite", "range", "values", "pattern",
                                       "known_at", "order", "references"}  # fmt: skip


def test_great_expectations_is_imported_by_the_check_alone() -> None:
    code = "import sys, features.contract; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.123456, "12.3 %"), (0.0123456, "1.23 %"), (0.0001234, "0.012 %"),
     (1e-6, "< 0.001 %"), (0.1, "10 %")],
)  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
