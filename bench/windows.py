"""`python -m bench.windows`: window features of the whole year against pandas, and a day of them against the year.

Figures: `speedup_vs_pandas` (count, mean and share in five windows for every flight at its prediction time; pandas by its
rolling windows over facts and rows together), `differing_cells` of `cells` (beyond 1e-9, pandas adds floats),
`incremental_day_ratio` (steps from a day before the end on, over those of the year), `bit_equal` (the day's steps give
what the year's give, at every prediction time of that day).
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from bench.record import options, report
from features.facts import Columns, Facts, int_times
from features.ingest import ingest, read_table
from features.keys import codes_of, key_arrays, key_runs, text_keys
from features.steps import KEY, TIME, as_of
from features.views import absent, derive
from features.windows import build_views
from pipelines.clock import DAY_US
from pipelines.flights import write_sample
from pipelines.home import open_home
from pipelines.spec import Spec, View, load_spec

LATE = {"late": {"column": "dep_delay", "gt": 15}}
WINDOWS = {("origin",): ["1h", "8h"], ("carrier",): ["3h"], ("carrier", "origin"): ["3h"], ("dest",): ["1d"]}


def spec_of(base: Spec) -> Spec:
    """The flights with five windows over departures alone."""
    views = {
        "_".join(key): View.model_validate(
            {"window": {"from": "departures", "key": list(key), "last": last, "mean": ["dep_delay"], "share": LATE}}
        )
        for key, last in WINDOWS.items()
    }
    return base.model_copy(update={"features": base.features.model_copy(update={"views": views, "functions": ()})})


def ours(spec: Spec, tables: dict[str, pa.Table], rows: pa.Table, t: np.ndarray, since: int) -> Columns:
    """The features of rows at their times, from steps that are right for every t ≥ since."""
    facts, found = Facts(spec, tables, since), {}
    for name, view in spec.features.views.items():
        names = text_keys(key_arrays(rows, view.shape.key), rows.num_rows)
        raw = {}
        for stored, table in build_views(facts, name):
            keys, start = key_runs(table[KEY])
            at = as_of(start, int_times(table[TIME]), codes_of(names, keys), t)
            raw[stored.name] = {
                c: np.append(table[c].to_numpy(), absent(c))[at] for c in stored.integers
            }  # fmt: skip
        found |= derive(spec, name, raw, t, {}, np.zeros(len(t), bool))
    return found


def theirs(departures: pd.DataFrame, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """The same by pandas: rows and facts in one table, rolled over by group, a fact before a row of the same instant."""
    found: dict[str, np.ndarray] = {}
    for key, lengths in WINDOWS.items():
        delay = departures["dep_delay"]
        facts = departures.assign(
            row=-1, one=1.0, known=delay.notna().astype(float), late=(delay > 15).astype(float), delay=delay.fillna(0.0)
        )
        both = pd.concat([facts, rows.assign(row=np.arange(len(rows)), one=0.0, known=0.0, late=0.0, delay=0.0)])
        both = both.sort_values([*key, "t", "row"], kind="stable")
        for length in lengths:
            rolled = both.groupby([*key], sort=True).rolling(length, on="t")[["one", "known", "late", "delay"]].sum()
            here = both["row"].to_numpy() >= 0
            order = both["row"].to_numpy()[here]
            one, known, late, delay = (rolled[c].to_numpy()[here] for c in ("one", "known", "late", "delay"))
            prefix = f"{'_'.join(key)}_{length}"
            with np.errstate(divide="ignore", invalid="ignore"):
                columns = {"count": one, "dep_delay_mean": np.where(known > 0.5, delay / known, np.nan),
                           "late_share": np.where(known > 0.5, late / known, np.nan)}  # fmt: skip
            for name, values in columns.items():
                placed = np.empty(len(rows))
                placed[order] = values
                found[f"{prefix}__{name}"] = placed
    return found


def best(function: Any, turns: int) -> tuple[float, Any]:
    """Least seconds of some turns, and the last result."""
    times, result = [], None
    for _ in range(turns):
        began = time.monotonic()
        result = function()
        times.append(time.monotonic() - began)
    return min(times), result


def main() -> None:
    """Measures and reports."""
    told = options("windows")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        home, spec = open_home(folder), spec_of(load_spec("flights"))
        write_sample(home.landing("flights"))
        snapshot = ingest(spec, home)
        tables = {name: read_table(spec, home, snapshot, name) for name in ("schedule", "departures")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if told.quick:
        tables = {name: table.slice(0, 40_000) for name, table in tables.items()}
    rows = tables["schedule"]
    t = int_times(rows["scheduled_departure"]) - 3_600_000_000
    plan = pd.DataFrame({c: rows[c].to_pandas() for c in ("origin", "carrier", "dest")}).assign(t=pd.to_datetime(t, unit="us"))
    departures = tables["departures"]
    frame = pd.DataFrame({c: departures[c].to_pandas() for c in ("origin", "carrier", "dest", "dep_delay")})
    frame["t"] = pd.to_datetime(int_times(departures[str(spec.sources["departures"].event_time)]), unit="us")
    ours_s, found = best(lambda: ours(spec, tables, rows, t, -(2**62)), 3)
    theirs_s, expected = best(lambda: theirs(frame, plan), 1)
    differing = sum(int((~np.isclose(found[n], v, rtol=1e-9, atol=1e-9, equal_nan=True)).sum()) for n, v in expected.items())
    since = int(t.max()) - DAY_US
    day = t >= since
    last = rows.filter(pa.array(day))
    year_s, _ = best(lambda: [list(build_views(f, v)) for f in [Facts(spec, tables)] for v in spec.features.views], 3)
    day_s, _ = best(lambda: [list(build_views(f, v)) for f in [Facts(spec, tables, since)] for v in spec.features.views], 3)
    again = ours(spec, tables, last, t[day], since)
    equal = all(np.array_equal(again[n], v[day], equal_nan=True) for n, v in found.items())
    figures = {
        "speedup_vs_pandas": round(theirs_s / ours_s, 1), "differing_cells": differing, "cells": len(t) * len(expected),
        "incremental_day_ratio": round(day_s / year_s, 3), "bit_equal": equal,
    }  # fmt: skip
    seconds = {"ours": ours_s, "pandas": theirs_s, "steps of the year": year_s, "steps of a day": day_s}
    report("windows", figures, [{"what": n, "seconds": round(s, 3)} for n, s in seconds.items()], told.json)


if __name__ == "__main__":
    main()
