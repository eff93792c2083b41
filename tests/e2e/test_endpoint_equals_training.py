"""On real flights the endpoint sees what training sees: features of one instant, served and made offline.

At the anchor, and one and three hours later while no event arrives; some of the answers against the oracle too.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from features.facts import Columns
from features.feed import feed
from features.frame import feature_list, is_missing
from features.ingest import ingest, read_table
from features.online import OnlineStore, serve_features
from features.store import FeatureSet, build_features, first_needed, historical_features
from pipelines.clock import Anchor
from pipelines.home import Home, open_home
from pipelines.spec import HERE, Spec, load_spec
from tests.agreement import arrow, frame_differences, plain, same_frames
from tests.oracle import Oracle, Version, duration

HOUR, DAY = 3_600_000_000, 86_400_000_000
REQUESTS, UNKNOWN, CHECKED = 600, 40, 25


@dataclass(frozen=True)
class Flights:
    """Real flights after the features stage and a feed; `anchor` is when the last fact became known."""

    spec: Spec
    home: Home
    built: FeatureSet
    tables: dict[str, pa.Table]
    store: OnlineStore
    anchor: int
    oracle: Oracle

    def offline(self, rows: Sequence[Version], t: int) -> Columns:
        table = arrow(self.spec.row_source, rows)
        return historical_features(self.spec, self.home, self.built, table, np.full(len(rows), t))


@pytest.fixture(scope="module")
def flights(flights_landing: Path, tmp_path_factory: pytest.TempPathFactory) -> Flights:
    spec, home = load_spec("flights_demo"), open_home(tmp_path_factory.mktemp("home"))
    shutil.copytree(flights_landing, home.landing(spec.pipeline))
    snapshot = ingest(spec, home)
    anchor = snapshot.watermark_us
    built = build_features(spec, home, snapshot, since=first_needed(spec, anchor))
    feed(spec, home.root / built.path, home.root / "online", Anchor(anchor, 0), snapshot.digest)
    tables = {name: read_table(spec, home, snapshot, name) for name in spec.sources}
    store = OnlineStore(spec, home.root / "online")
    return Flights(spec, home, built, tables, store, anchor, oracle_of(spec, tables, anchor))


def oracle_of(spec: Spec, tables: dict[str, pa.Table], anchor: int) -> Oracle:
    """The oracle over the facts that any view can reach at the anchor or later."""
    settings = yaml.safe_load((HERE / "flights.yaml").read_text())
    kept = {}
    for name, source in spec.sources.items():
        assert source.event_time
        since = anchor - reach(settings, name)
        recent = tables[name].filter(pc.greater(tables[name][source.event_time].cast(pa.int64()), since))
        kept[name] = plain(source, recent)
    return Oracle(settings, kept)


def reach(settings: dict[str, Any], source: str) -> int:
    """How far back the views look at facts of a source, and two days for what they are joined with."""
    longest = [0]
    for view in settings["features"]["views"].values():
        ((shape, body),) = view.items()
        if source != body["from"]:
            continue
        if shape == "latest" and "ttl" not in body:
            return 100 * 365 * DAY
        ago = body.get("change", {}).get("over", ["0s"])
        longest.append(duration(body.get("ttl", "0s")) + max(map(duration, ago)))
        longest += map(duration, (*body.get("last", ()), body.get("within", "0s")))
    return max(longest) + 2 * DAY


@pytest.fixture(scope="module")
def rows(flights: Flights) -> list[Version]:
    """Flights around the anchor, most of them not yet flown: the newest version of each, as known then."""
    schedule = flights.tables["schedule"]
    due = schedule["scheduled_departure"].cast(pa.int64())
    near = plain(flights.spec.row_source, schedule.filter(pc.greater(due, flights.anchor - 3 * HOUR)))
    newest = {tuple(row[c] for c in flights.spec.row_key): row for row in near}
    chosen = list(newest.values())[:: max(1, len(newest) // REQUESTS)][:REQUESTS]
    assert len(chosen) >= 500
    return chosen


def key_of(spec: Spec, row: Version) -> Version:
    return {column: row[column] for column in spec.row_key}


def window_features(spec: Spec) -> list[str]:
    views = {name for name, view in spec.features.views.items() if view.window or view.open}
    return [feature.name for feature in feature_list(spec) if feature.group in views]


@pytest.mark.parametrize("hours", [0, 1, 3])
def test_served_features_are_those_made_offline(flights: Flights, rows: list[Version], hours: int) -> None:
    now = flights.anchor + hours * HOUR
    served = serve_features(flights.store, [key_of(flights.spec, row) for row in rows], now)
    assert not served.looked.unknown.any()
    assert same_frames(served.frame, flights.offline(rows, now)) == []

    names = window_features(flights.spec)
    before = flights.offline(rows, now - HOUR)
    there = np.array([~is_missing(served.frame[name]) for name in names])
    moved = np.array([served.frame[name] != before[name] for name in names])
    assert there.mean() >= (0.8 if hours <= 1 else 0.7)  # a window without events has no mean
    assert (moved & there).sum() >= 0.25 * there.sum()


@pytest.mark.parametrize("hours", [0, 1, 3])
def test_served_features_are_those_of_the_oracle(flights: Flights, rows: list[Version], hours: int) -> None:
    """One request at a time, as most arrive."""
    now = flights.anchor + hours * HOUR
    for row in rows[hours :: len(rows) // CHECKED]:
        served = serve_features(flights.store, [key_of(flights.spec, row)], now)
        expected = [flights.oracle.features(row, now)]
        assert frame_differences(flights.spec, served.frame, expected, str(key_of(flights.spec, row))) == []


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_user_s_function_is_given_may_be_written_to(flights: Flights, rows: list[Version], count: int) -> None:
    """Of one row as of several: a function that fills gaps in place must not fail for single requests alone."""
    asked = [key_of(flights.spec, row) for row in rows[:count]]
    frame = serve_features(flights.store, asked, flights.anchor).frame
    assert [name for name, values in frame.items() if not values.flags.writeable] == []


def test_request_fields_stand_in_for_rows_that_are_not_stored(flights: Flights, rows: list[Version]) -> None:
    now = flights.anchor + HOUR
    given = [{**row, "flight": 9990 + i % 10, "known_at": None} for i, row in enumerate(rows[:UNKNOWN])]
    fields = {*flights.spec.serve.request, *flights.spec.row_key}
    requests = [{name: value for name, value in row.items() if name in fields} for row in given]
    served = serve_features(flights.store, requests, now)
    assert served.looked.unknown.all()
    assert same_frames(served.frame, flights.offline(given, now)) == []
    expected = [flights.oracle.features(row, now) for row in given]
    assert frame_differences(flights.spec, served.frame, expected, "unknown flight") == []
