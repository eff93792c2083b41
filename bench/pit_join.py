"""`python -m bench.pit_join`: the point-in-time join of our offline store, against Feast's own and queries by hand.

Workloads: `flights`, every flight of the year × 5 views of raw facts; `synthetic`, a million rows × 3 views of five
million facts, a tenth of them known late; `flights` cut to as many rows as a stock store of Feast survives: the largest of
a doubling series that ends in time and memory (both stated). Every join runs in a process of its own, peers in turn.

Figures: `speedup_vs_feast_dask`, `speedup_vs_feast_duckdb` (seconds, both told to join on known-at),
`ratio_to_handwritten` (synthetic, against the faster of one DuckDB and one Polars query), `peak_rss_ratio_vs_dask`
(resident memory above what it was with everything imported and the rows read), `oracle_mismatches` of
`oracle_cases` random cases, `mutants_caught`, and what Feast's stores do on the random fact tables: `stock_leaked_cells`
(dask, default flags: values that were not known yet), `stock_dropped_rows` (dask, told to join on known-at).
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.pit_cases import fact_cases, mutants_caught, pipeline_cases
from bench.pit_peers import MEMORY, Facts, write_views
from bench.record import options, report
from pipelines.clock import duration_us, parse_time
from pipelines.flights import write_sample
from pipelines.manifest import ROOT

STAMP = pa.timestamp("us", "UTC")
Rows = list[dict[str, Any]]


def flights_data(folder: Path, until: int | None) -> Path:
    """Five views of the real sample, as raw facts; rows: each flight an hour before its departure is due.

    Of facts of one key that happened and became known together one is kept: no store could say which is the newer.
    """
    write_sample(folder / "landing", until_us=until)
    data = folder / "flights"
    data.mkdir()
    views = {
        "weather": ("weather", "observed_at", ["origin"], ["temp", "wind_speed", "pressure", "visib"], "6h"),
        "tail": ("departures", "departed_at", ["tailnum"], ["dep_delay", "origin"], "2d"),
        "carrier": ("departures", "departed_at", ["origin", "carrier"], ["dep_delay"], "3h"),
        "destination": ("arrivals", "arrived_at", ["dest"], ["arr_delay", "air_time"], "3h"),
        "plane": ("planes", "registered_at", ["tailnum"], ["year", "seats", "model"], "0s"),
    }
    found = []
    for name, (source, event, keys, features, ttl) in views.items():
        table = pq.read_table(folder / "landing" / source)
        facts = pa.table({**{c: table[c] for c in (*keys, *features)}, "event": table[event], "created": table["known_at"]})
        once = facts.group_by([*keys, "event", "created"], use_threads=False).aggregate([(f, "last") for f in features])
        pq.write_table(once.rename_columns([c.removesuffix("_last") for c in once.column_names]), data / f"{name}.parquet")
        types = {f.name: "float64" if f.type == pa.float64() else "string" for f in table.schema}
        found.append(Facts(name, {k: types[k] for k in keys}, {f: types[f] for f in features}, duration_us(ttl)))
    write_views(data, found)
    due = pq.read_table(folder / "landing" / "schedule")
    t = pc.subtract(due["scheduled_departure"].cast(pa.int64()), duration_us("60m")).cast(STAMP)
    columns = {"row_id": pa.array(np.arange(due.num_rows)), **{c: due[c] for c in ("origin", "carrier", "dest", "tailnum")}}
    pq.write_table(pa.table({**columns, "event_timestamp": t}), data / "rows.parquet")
    return data


def synthetic_data(folder: Path, facts: int, rows: int) -> Path:
    """Three views of `facts` facts each over thirty days, a tenth known late by up to a day."""
    data = folder / "synthetic"
    data.mkdir()
    draw = np.random.default_rng(3)
    begin, length = 1_704_067_200_000_000, duration_us("30d")
    keys = {"a": {"user": facts // 25}, "b": {"shop": 1000}, "c": {"user": facts // 25, "kind": 20}}
    for name, sizes in keys.items():
        event = np.sort(draw.integers(begin, begin + length, facts))
        created = event + np.where(draw.random(facts) < 0.1, draw.integers(0, duration_us("1d"), facts), duration_us("1m"))
        columns = {k: draw.integers(0, n, facts) for k, n in sizes.items()}
        columns |= {"x": draw.random(facts), "n": draw.integers(0, 1000, facts)}
        stamps = {"event": pa.array(event).cast(STAMP), "created": pa.array(created).cast(STAMP)}
        pq.write_table(pa.table({**columns, **stamps}), data / f"{name}.parquet")
    write_views(data, [Facts(name, dict.fromkeys(sizes, "int64"), {"x": "float64", "n": "int64"}, duration_us("10d"))
                       for name, sizes in keys.items()])  # fmt: skip
    t = pa.array(draw.integers(begin, begin + length, rows)).cast(STAMP)
    asked = {k: draw.integers(0, n, rows) for sizes in keys.values() for k, n in sizes.items()}
    pq.write_table(pa.table({"row_id": np.arange(rows), **asked, "event_timestamp": t}), data / "rows.parquet")
    return data


def join(peer: str, data: Path, rows: int, limit: float) -> dict[str, Any] | None:
    """Seconds and memory of one join in its own process; None where it did not end in time (s) and memory."""
    command = [sys.executable, "-m", "bench.pit_peers", peer, str(data), str(rows), str(data / peer)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and not any(word in done.stderr for word in ("Memory", "memory", "alloc")) and done.returncode > 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if done.returncode:
        return None
    return {"peer": peer, "data": data.name, "asked": rows, **json.loads((data / f"{peer}.json").read_text())}


def compared(data: Path, peer: str, other: str) -> dict[str, int]:
    """Cells of a peer that are not those of the other, row by row, and rows that it lost."""
    one, two = (pa.ipc.open_file(pa.memory_map(str(data / f"{p}.arrow"))).read_all() for p in (peer, other))
    there = pc.index_in(two["row_id"], one["row_id"].combine_chunks())
    mine = one.take(there.combine_chunks())
    names = [c for c in two.column_names if "__" in c]
    differ = 0
    for name in names:
        a, b = mine[name].cast(two[name].type), two[name]
        if pa.types.is_floating(a.type):  # pandas turns null into NaN
            a, b = (pc.if_else(pc.is_nan(c), pa.scalar(None, c.type), c) for c in (a, b))
        same = pc.or_(pc.equal(a, b).fill_null(False), pc.and_(pc.is_null(a), pc.is_null(b)))
        differ += pc.sum(pc.and_(pc.invert(same), pc.is_valid(there))).as_py() or 0
    return {"differing_cells": differ, "cells": len(names) * (two.num_rows - there.null_count), "lost_rows": there.null_count}


def in_turn(data: Path, rows: int, peers: list[str], rounds: int, limit: float) -> dict[str, dict[str, Any]]:
    """Medians of seconds and memory of peers that run in turn, and how their cells compare with the first's."""
    runs: dict[str, Rows] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            done = join(peer, data, rows, limit)
            runs[peer] += [done] if done else []
    found = {}
    for peer, done in runs.items():
        if done:
            middle = {k: round(statistics.median(run[k] for run in done), 3) for k in ("seconds", "peak_mb", "before_mb")}
            found[peer] = {**done[0], **middle, "runs": len(done), **compared(data, peer, peers[0])}
    return found


def survived(data: Path, peer: str, start: int, limit: float) -> int:
    """The largest of start, 2 × start, … rows that a peer joins within `limit` seconds and MEMORY; 0 where none."""
    most, rows, last = 0, start, pq.read_metadata(data / "rows.parquet").num_rows
    while rows <= last and join(peer, data, rows, limit):
        most, rows = rows, 2 * rows
    return most


def main() -> None:
    """Makes the data, runs the peers in turn and reports."""
    told = options("pit_join")
    folder = Path(tempfile.mkdtemp(prefix="millrace-pit-"))
    limit, start, rounds, cases = (20.0, 50, 1, 10) if told.quick else (100.0, 250, 3, 500)
    rows: Rows = []
    figures: dict[str, Any] = {}
    try:
        flights = flights_data(folder, parse_time("2013-01-15") if told.quick else None)
        for peer in ("feast_dask", "feast_duckdb"):
            most = start if told.quick else survived(flights, peer, start, limit)
            found = in_turn(flights, most, ["millrace", peer], rounds, 2 * limit)
            what = f"most rows that {peer} survives in {limit:g} s and {MEMORY >> 30} GiB"
            rows += [{**row, "what": what} for row in found.values()]
            figures[f"speedup_vs_{peer}"] = round(found[peer]["seconds"] / found["millrace"]["seconds"], 1)
            if peer == "feast_dask":
                figures["peak_rss_ratio_vs_dask"] = round(found["millrace"]["peak_mb"] / found[peer]["peak_mb"], 3)
        synthetic = synthetic_data(folder, *((100_000, 20_000) if told.quick else (5_000_000, 1_000_000)))
        for data in (flights, synthetic):
            number = pq.read_metadata(data / "rows.parquet").num_rows
            found = in_turn(data, number, ["millrace", "duckdb", "polars"], rounds, 600)
            rows += [{**row, "what": "all rows, beside queries by hand"} for row in found.values()]
            ratio = found["millrace"]["seconds"] / min(found["duckdb"]["seconds"], found["polars"]["seconds"])
            figures["ratio_to_handwritten" if data is synthetic else "flights_ratio_to_handwritten"] = round(ratio, 2)
        facts, pipelines = fact_cases(folder / "cases", cases), pipeline_cases(folder / "pipelines", cases)
        rows += [facts, pipelines]
        figures |= {
            "oracle_mismatches": facts["mismatches"] + pipelines["mismatches"],
            "oracle_cases": facts["cases"] + pipelines["cases"],
            "mutants_caught": mutants_caught(folder / "mutants"),
            "stock_leaked_cells": facts["feast_dask"]["leaked_cells"],
            "stock_dropped_rows": facts["feast_dask"]["dropped_rows"],
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    report("pit_join", figures, rows, told.json, "numpy", "pyarrow", "feast", "dask", "duckdb", "ibis-framework", "polars")


if __name__ == "__main__":
    main()
