"""Random cases of the point-in-time join against the oracle: fact tables for every store, pipelines for ours.

All fact tables of one ttl lie in one file, told apart by the key column `case`, so that a store is called a few times
and not a thousand.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.pit_peers import Facts, feast_join, write_views
from features import feed, online, rows
from features.store import build_features, historical_features
from pipelines.clock import duration_text
from tests.agreement import arrow, frame_differences, make_world
from tests.data import test_oracle as planted
from tests.oracle import Oracle

STAMP = pa.timestamp("us", "UTC")
TTL = (0, 1, 7, 60)  # µs; instants lie 1 µs apart, so that every edge is hit
COLUMNS = {"n": "int64", "event": "timestamp", "created": "timestamp", "g": "string", "x": "int64"}
Row = dict[str, Any]


def random_facts(case: int) -> tuple[list[Row], list[Row]]:
    """Facts (late, corrected, some without a key) and rows to ask for (again and again the same, some without a key)."""
    draw = random.Random(case)
    span = draw.choice([6, 30, 200])
    facts: dict[tuple[int, int, int], Row] = {}
    for n in range(draw.choice([0, 3, 12])):
        group, event = draw.choice([None, "a", "b", "c"]), draw.randrange(span)
        for _ in range(draw.choice([1, 1, 2, 3])):  # the first version, and corrections
            created = event + draw.choice([0, 0, 1, draw.randrange(span)])
            facts[n, event, created] = {"n": n, "event": event, "created": created, "g": group, "x": case * 1000 + len(facts)}
    rows = [{"g": draw.choice([None, "a", "b", "c", "d"]), "t": draw.randrange(-1, span + 3)} for _ in range(20)]
    return list(facts.values()), rows + rows[:3]


def expected(facts: list[Row], rows: list[Row], ttl: int) -> list[int | None]:
    """What the oracle says that each row sees."""
    latest = {"from": "facts", "key": ["g"], "columns": ["x"]} | ({"ttl": duration_text(ttl)} if ttl else {})
    source = {"key": ["n", "event"], "event_time": "event", "known_at": {"column": "created"}, "columns": COLUMNS}
    oracle = Oracle({"sources": {"facts": source}, "features": {"views": {"v": {"latest": latest}}}}, {"facts": facts})
    return [oracle.features(row, row["t"])["v__x"] for row in rows]


def fact_cases(folder: Path, cases: int) -> Row:
    """Cells of our store that the oracle denies; values of Feast's that were not known yet, and rows that they lost.

    `wrong_cells` of Feast's include ties: of two facts that happened and became known together they take either.
    """
    total: Row = {"what": "random fact tables, every store", "cases": cases, "cells": 0, "mismatches": 0}
    stock = {peer: {"leaked_cells": 0, "dropped_rows": 0, "wrong_cells": 0} for peer in ("feast_dask", "feast_duckdb")}
    for ttl in TTL:
        data = folder / str(ttl)
        data.mkdir(parents=True)
        made = {case: random_facts(case) for case in range(cases) if TTL[case % len(TTL)] == ttl}
        facts = [{**fact, "case": case} for case, (some, _) in made.items() for fact in some]
        rows = [{**row, "case": case} for case, (_, some) in made.items() for row in some]
        wanted = [x for some, asked in made.values() for x in expected(some, asked, ttl)]
        known = {fact["x"]: fact["created"] for fact in facts}
        kinds = {"case": pa.int64(), "g": pa.string(), "x": pa.int64()}
        columns = {c: pa.array([f[c] for f in facts], kind) for c, kind in kinds.items()}
        columns |= {c: pa.array([f[c] for f in facts], pa.int64()).cast(STAMP) for c in ("event", "created")}
        pq.write_table(pa.table(columns), data / "v.parquet")
        write_views(data, [Facts("v", {"case": "int64", "g": "string"}, {"x": "int64"}, ttl)])
        asked = pa.table({"row_id": np.arange(len(rows)), "case": pa.array([r["case"] for r in rows]),
                          "g": pa.array([r["g"] for r in rows], pa.string()),
                          "event_timestamp": pa.array([r["t"] for r in rows]).cast(STAMP)})  # fmt: skip
        total["cells"] += len(rows)
        ours = _values(data, asked, "features.asof.AsofOfflineStore", known_at=True)
        total["mismatches"] += sum(ours.get(i, "lost") != x for i, x in enumerate(wanted))
        for peer, counts in stock.items():
            kind = peer.removeprefix("feast_")
            plain, told = (_values(data, asked, kind, known_at=flag) for flag in (False, True))
            counts["leaked_cells"] += sum(x is not None and known[x] > rows[i]["t"] for i, x in plain.items())
            counts["dropped_rows"] += len(rows) - len(told)
            counts["wrong_cells"] += sum(x != wanted[i] for i, x in told.items())
    return total | stock


def _values(data: Path, asked: pa.Table, offline: str, *, known_at: bool) -> dict[int, int | None]:
    """What a store of Feast gives each row that it does not lose."""
    join = feast_join(data, offline, known_at=known_at)
    join.prepare(asked)  # type: ignore[attr-defined]
    found = join(asked)
    values = [None if x is None or x != x else int(x) for x in found["v__x"].to_pylist()]
    return dict(zip(found["row_id"].to_pylist(), values, strict=True))


def pipeline_cases(folder: Path, cases: int) -> Row:
    """Cells of whole random pipelines, joined through Feast by our store, that the oracle denies."""
    total: Row = {"what": "random pipelines through Feast", "cases": cases, "cells": 0, "mismatches": 0}
    for seed in range(10_000, 10_000 + cases):
        world = make_world(seed, folder / str(seed))
        asked = world.asked()
        built = build_features(world.spec, world.home, world.snapshot)
        rows = arrow(world.spec.row_source, [version for version, _ in asked])
        found = historical_features(world.spec, world.home, built, rows, np.array([t for _, t in asked]))
        total["cells"] += len(found) * len(asked)
        total["mismatches"] += len(frame_differences(world.spec, found, world.expected(asked), "row"))
        shutil.rmtree(folder / str(seed))
    return total


def mutants_caught(folder: Path) -> list[str]:
    """The mutants of the oracle's tests that the comparison finds."""
    mutants = {
        "event-time join": [planted.join_on_event_time], "own row included": [planted.own_row_included],
        "edge off by 1 µs": [planted.window_begins_late, planted.window_ends_late], "TTL ignored": [planted.ttl_ignored],
        "correction ignored": [planted.correction_ignored], "null key matched": [planted.null_key_matched],
    }  # fmt: skip

    def caught(plant: planted.Plant) -> bool:
        for seed in planted.MUTATED:
            world = make_world(seed, folder / plant.__name__ / str(seed))
            served = folder / plant.__name__ / f"{seed}served"
            if next(planted.differences_of_rows(plant, world, served, patch), None):
                return True
        return False

    with pytest.MonkeyPatch.context() as patch:
        for module in (rows, feed, online):  # the served store forgets rows by age; the random tables span months
            patch.setattr(module, "RECENT", 2**60)
        return [name for name, plants in mutants.items() if all(caught(plant) for plant in plants)]
