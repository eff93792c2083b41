"""`python -m bench.windows`: window features of the whole year against pandas, and a day of them against the year.

Figures: `speedup_vs_pandas` (count, sum, mean, share, std, min, max, distinct, newest, time since, in five windows for every
flight at its prediction time; pandas by its rolling windows over facts and rows together, distinct values by `apply`, the
newest by `ffill`), `speedup_of_sums` (count, mean and share alone), `differing_cells` of `cells` (beyond 1e-9 of the value
or 1e-6, pandas adds floats), `incremental_day_ratio` (CPU seconds of the steps from a day before the end on, over those of
the year), `bit_equal` (the day's steps give what the year's give, at every prediction time of that day),
`folder_day_ratio` (CPU seconds of the whole feature folder of flights, everything in it, of a snapshot that knows a day more
than one before it, over those of a home where there is none before) and `folder_bytes_equal` (both folders hold the same).
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from bench.record import options, report
from features.facts import Columns, Facts, int_times
from features.ingest import Snapshot, cut, ingest, read_table
from features.keys import codes_of, key_arrays, key_runs, text_keys
from features.known import seen_at
from features.steps import KEY, TIME
from features.store import build_features, first_needed
from features.views import absent, derive
from features.windows import build_views
from pipelines.clock import DAY_US
from pipelines.flights import write_sample
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.spec import Spec, View, load_spec

LATE = {"late": {"column": "dep_delay", "gt": 15}}
DELAY = ("dep_delay",)
SUMS = {"mean": DELAY, "share": LATE}
EVERY = {**SUMS, **dict.fromkeys(("sum", "std", "min", "max", "newest"), DELAY), "nunique": ("flight",), "since": True}
WINDOWS = {("origin",): ["1h", "8h"], ("carrier",): ["3h"], ("carrier", "origin"): ["3h"], ("dest",): ["1d"]}


def spec_of(base: Spec, aggregates: dict[str, Any]) -> Spec:
    """The flights with five windows over departures alone."""
    views = {
        "_".join(key): View.model_validate({"window": {"from": "departures", "key": list(key), "last": last, **aggregates}})
        for key, last in WINDOWS.items()
    }
    return base.model_copy(update={"features": base.features.model_copy(update={"views": views, "functions": ()})})


def ours(spec: Spec, tables: dict[str, pa.Table], rows: pa.Table, t: np.ndarray, since: int) -> Columns:
    """The features of rows at their times, from steps that are right for every t ≥ since."""
    facts = Facts(spec, tables)

    def view_of(name: str) -> Columns:
        names = text_keys(key_arrays(rows, spec.features.views[name].shape.key), rows.num_rows)
        raw = {}
        for stored, table in build_views(facts, name, since):
            keys, start = key_runs(table[KEY])
            at = seen_at(start, int_times(table[TIME]), codes_of(names, keys), t)
            raw[stored.name] = {c: np.append(table[c].to_numpy(), absent(c))[at] for c in stored.integers}
        return derive(spec, name, raw, t, {}, np.zeros(len(t), bool))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # as `features.store` builds them
        return {name: values for view in pool.map(view_of, spec.features.views) for name, values in view.items()}


def steps_of(spec: Spec, tables: dict[str, pa.Table], since: int) -> float:
    """CPU seconds of all steps that are right for every t ≥ since."""
    began, facts = time.process_time(), Facts(spec, tables)
    for name in spec.features.views:
        list(build_views(facts, name, since))
    return time.process_time() - began


def theirs(departures: pd.DataFrame, rows: pd.DataFrame, seconds: dict[str, float]) -> dict[str, np.ndarray]:
    """The same by pandas: rows and facts in one table, rolled over by group, a fact before a row of the same instant.

    `seconds`: of each part, added up.
    """
    found: dict[str, np.ndarray] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - began

    for key, lengths in WINDOWS.items():
        with timed("table"):
            delay = departures["dep_delay"]
            late = (delay > 15).astype(float)
            facts = departures.assign(row=-1, one=1.0, known=delay.notna().astype(float), late=late, sum=delay.fillna(0.0))
            both = pd.concat([facts, rows.assign(row=np.arange(len(rows)), one=0.0, known=0.0, late=0.0, sum=0.0)])
            both = both.sort_values([*key, "t", "row"], kind="stable")
        fact, order = both["row"] < 0, both["row"].to_numpy()
        here = order >= 0
        with timed("newest, since"):  # a delay that is null counts as the newest: ∞ stands for it
            newest = both.assign(event=both["t"].where(fact), value=both["dep_delay"].fillna(np.inf).where(fact))
            newest = newest.groupby([*key], sort=True)[["event", "value"]].ffill()
        age, value = (both["t"] - newest["event"]).to_numpy()[here], newest["value"].to_numpy()[here]
        for length in lengths:
            rolled = both.groupby([*key], sort=True).rolling(length, on="t")
            with timed("count, sum, mean, share"):
                sums = rolled[["one", "known", "late", "sum"]].sum()
            one, known, hits, total = (sums[c].to_numpy()[here] for c in ("one", "known", "late", "sum"))
            inside = age < pd.Timedelta(length).to_timedelta64()
            with np.errstate(divide="ignore", invalid="ignore"):
                columns = {"count": one, "dep_delay_sum": total, "dep_delay_mean": np.where(known > 0.5, total / known, np.nan),
                           "late_share": np.where(known > 0.5, hits / known, np.nan),
                           "minutes_since": np.where(inside, age / np.timedelta64(1, "m"), np.nan),
                           "dep_delay_newest": np.where(inside & np.isfinite(value), value, np.nan)}  # fmt: skip
            for kind, how in (("std", {"ddof": 0}), ("min", {}), ("max", {})):
                with timed(kind):
                    columns[f"dep_delay_{kind}"] = getattr(rolled["dep_delay"], kind)(**how).to_numpy()[here]
            with timed("distinct"):
                columns["flight_nunique"] = rolled["flight"].apply(_distinct, raw=True).fillna(0.0).to_numpy()[here]
            for name, values in columns.items():
                placed = np.empty(len(rows))
                placed[order[here]] = values
                found[f"{'_'.join(key)}_{length}__{name}"] = placed
    return found


def _distinct(values: np.ndarray) -> float:
    return float(len(np.unique(values[~np.isnan(values)])))


@dataclass(frozen=True)
class Folders:
    """CPU seconds of a feature folder made whole and after one of a day before; whether the two are equal, file by file."""

    whole_s: float
    day_s: float
    equal: bool


def folder_of_a_day(home: Home, snapshot: Snapshot) -> Folders:
    """Builds the feature folder of a snapshot both ways."""
    spec, digests, seconds = load_spec("flights"), [], []
    for before in (False, True):
        shutil.rmtree(home.root / "features", ignore_errors=True)
        if before:
            old = cut(spec, home, snapshot, snapshot.watermark_us - DAY_US)
            build_features(spec, home, old, since=first_needed(spec, old.watermark_us))
        began = time.process_time()
        built = build_features(spec, home, snapshot, since=first_needed(spec, snapshot.watermark_us))
        seconds.append(time.process_time() - began)
        digests.append(read_json(home.root / built.path / "done.json")["files"])
    return Folders(seconds[0], seconds[1], digests[0] == digests[1])


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
        home = open_home(folder)
        spec, sums = (spec_of(load_spec("flights"), aggregates) for aggregates in (EVERY, SUMS))
        write_sample(home.landing("flights"))
        snapshot = ingest(spec, home)
        tables = {name: read_table(spec, home, snapshot, name) for name in ("schedule", "departures")}
        folders = folder_of_a_day(home, snapshot)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if told.quick:
        tables = {name: table.slice(0, 40_000) for name, table in tables.items()}
    rows = tables["schedule"]
    t = int_times(rows["scheduled_departure"]) - 3_600_000_000
    plan = pd.DataFrame({c: rows[c].to_pandas() for c in ("origin", "carrier", "dest")}).assign(t=pd.to_datetime(t, unit="us"))
    departures = tables["departures"]
    frame = pd.DataFrame({c: departures[c].to_pandas() for c in ("origin", "carrier", "dest", "dep_delay", "flight")})
    frame["t"] = pd.to_datetime(int_times(departures[str(spec.sources["departures"].event_time)]), unit="us")
    sums_s, _ = best(lambda: ours(sums, tables, rows, t, -(2**62)), 3)
    ours_s, found = best(lambda: ours(spec, tables, rows, t, -(2**62)), 3)
    seconds: dict[str, float] = {}
    expected = theirs(frame, plan, seconds)
    differing = sum(int((~np.isclose(found[n], v, rtol=1e-9, atol=1e-6, equal_nan=True)).sum()) for n, v in expected.items())
    since = int(t.max()) - DAY_US
    day = t >= since
    year_s = min(steps_of(spec, tables, -(2**62)) for _ in range(3))
    day_s = min(steps_of(spec, tables, since) for _ in range(3))
    again = ours(spec, tables, rows.filter(pa.array(day)), t[day], since)
    equal = all(np.array_equal(again[n], v[day], equal_nan=True) for n, v in found.items())
    figures = {
        "speedup_vs_pandas": round(sum(seconds.values()) / ours_s, 1),
        "speedup_of_sums": round((seconds["table"] + seconds["count, sum, mean, share"]) / sums_s, 1),
        "differing_cells": differing, "cells": len(t) * len(expected),
        "incremental_day_ratio": round(day_s / year_s, 3), "bit_equal": equal,
        "folder_day_ratio": round(folders.day_s / folders.whole_s, 3), "folder_bytes_equal": folders.equal,
    }  # fmt: skip
    shown = {"ours": ours_s, "ours, sums alone": sums_s, **{f"pandas: {part}": s for part, s in seconds.items()},
             "steps of the year (CPU)": year_s, "steps of a day (CPU)": day_s,
             "feature folder, whole (CPU)": folders.whole_s, "feature folder, a day more (CPU)": folders.day_s}  # fmt: skip
    report("windows", figures, [{"what": n, "seconds": round(s, 3)} for n, s in shown.items()], told.json)


if __name__ == "__main__":
    main()
