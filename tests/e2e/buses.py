"""A small pipeline with time: buses that may be late. Its spec, its landing, and a bento of a small LightGBM model.

Now is noon of NOW's day. Known then: every trip due until noon of the next day, and what has left until noon.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.bundle import Bento, build_bento
from features.feed import feed
from features.ingest import Snapshot, ingest
from features.store import FeatureSet, build_features
from features.trainset import TrainingSet, build_training_set, load_training_set
from models.gbdt import fit_gbdt
from pipelines.clock import Anchor, parse_time
from pipelines.home import Home, open_home
from pipelines.manifest import write_json
from pipelines.spec import Spec, load_spec

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)
EVERY = timedelta(minutes=6)
SPEC = """
title: Will this bus leave more than five minutes late?
clock: {kind: data, speed: 0}
sources:
  trips:
    kind: plan
    key: [line, day, trip]
    event_time: due
    known_at: {column: told}
    columns:
      line: string
      day: timestamp
      trip: int64
      stop: string
      due: timestamp
      end: {type: timestamp, nulls: 1}
      length: {type: float64, nulls: 0.1, resolution: 0.1}
      low_floor: {type: bool, nulls: 0.1}
      seats: {type: int64, nulls: 0.1}
      told: timestamp
  departures:
    key: [line, day, trip]
    event_time: at
    known_at: {lag: 0s}
    columns: {line: string, day: timestamp, trip: int64, at: timestamp, late: {type: float64, resolution: 1}}
  stops:
    key: [stop]
    event_time: since
    known_at: {lag: 0s}
    columns: {stop: string, zone: string, since: timestamp}
rows: {from: trips, key: [line, day, trip]}
predict_at: {column: due, lead: 10m, tolerance: 5m}
closed_by: [departures]
label: {from: departures, column: late, gt: 5}
label_delay: 1h
split: {train: 2d, valid_fit: 12h, valid_select: 12h, test: 12h, purge: 1h}
features:
  row: [line, length, low_floor, seats]
  calendar: {column: due, timezone: Europe/Rome, parts: [minute_of_day, weekday, day_of_year]}
  functions:
    - {call: "tests.e2e.pace:pace", inputs: [length, due, end], outputs: [pace]}
  views:
    line_late: {window: {from: departures, key: [line], last: [1h, 3h], mean: [late]}}
    backlog: {open: {from: trips, over: due, last: [1h], closed_by: [departures]}}
    place: {latest: {from: stops, key: [stop], columns: [zone]}}
gbdt: {num_leaves: 7, min_data_in_leaf: 20, max_rounds: 30}
serve: {request: [stop, due, end, length, low_floor, seats], port: 3009}
"""


@dataclass(frozen=True)
class Buses:
    """The pipeline with everything up to a bento and a fed store."""

    home: Home
    spec: Spec
    snapshot: Snapshot
    features: FeatureSet
    data: TrainingSet
    bento: Bento

    @property
    def folder(self) -> Path:
        return self.home.root / self.bento.path


def trip_at(due: datetime) -> dict[str, object]:
    """The request that names the trip due at a time."""
    index = round((due - NOW) / EVERY)
    return {"line": f"L{index % 4}", "day": f"{due:%Y-%m-%d}T00:00:00Z", "trip": 5_000 + index}


def make_buses(root: Path) -> Buses:
    """Lands, ingests, builds features and training set, fits LightGBM, packages and feeds: seconds."""
    home = open_home(root / "home")
    (root / "buses.yaml").write_text(SPEC)
    text = json.dumps(load_spec(str(root / "buses.yaml")).model_dump(mode="json", by_alias=True), sort_keys=True)
    spec = Spec.model_validate_json(text)  # as a run reads it: the served store is packed in this order of columns
    land(home)
    snapshot = ingest(spec, home)
    as_of = parse_time(f"{NOW:%Y-%m-%dT%H:%MZ}")
    assert snapshot.watermark_us == as_of
    features = build_features(spec, home, snapshot)
    folder = root / "model"
    folder.mkdir()
    build_training_set(spec, home, snapshot, features, as_of, folder)
    data = load_training_set(folder)
    (folder / "gbdt.txt").write_text(fit_gbdt(spec.gbdt, data.batch, data.label, data.part, spec.seed, threads=1).text)
    member = {"name": "gbdt", "kind": "gbdt", "file": "gbdt.txt", "a": 1.0, "b": 0.0}
    prior = float(data.label[data.rows("train")].mean())
    body = {"chosen": "gbdt", "members": [member], "prior": prior, "candidates": {"gbdt": {"gbdt": 1.0}}}
    write_json(folder / "model.json", body)
    with tempfile.TemporaryDirectory(dir=home.root) as scratch:
        files = [folder / name for name in ("model.json", "gbdt.txt", "preprocess.json")]
        bento = build_bento(spec, home, files, features.defs_digest, Path(scratch))
    store = home.online("buses", features.defs_digest)
    assert feed(spec, home.root / features.path, store, Anchor(as_of, 0), snapshot.digest)
    return Buses(home, spec, snapshot, features, data, bento)


def land(home: Home) -> None:
    """Parquet files of trips, departures and stops."""
    draw = random.Random(7)
    trips, departures = [], []
    due = NOW - timedelta(days=5)
    while due <= NOW + timedelta(days=1):
        key = {"line": (asked := trip_at(due))["line"], "day": datetime(due.year, due.month, due.day, tzinfo=UTC),
               "trip": asked["trip"]}  # fmt: skip
        gap = draw.random() < 0.05
        trips.append({**key, "stop": draw.choice("abc"), "due": due, "end": None if gap else due + timedelta(minutes=30),
                      "length": None if gap else draw.randrange(50, 200) / 10, "low_floor": draw.random() < 0.5,
                      "seats": draw.randrange(20, 60), "told": due - timedelta(days=1)})  # fmt: skip
        late = float(draw.randrange(12)) + (2 if key["line"] == "L1" else -2)
        at = due + timedelta(minutes=late)
        if at <= NOW:
            departures.append({**key, "at": at, "late": late})
        due += EVERY
    stops = [{"stop": s, "zone": s.upper(), "since": NOW - timedelta(days=9)} for s in "abc"]
    utc = pa.timestamp("us", "UTC")
    own = [("line", pa.string()), ("day", utc), ("trip", pa.int64())]
    schemas = {
        "trips": pa.schema([*own, ("stop", pa.string()), ("due", utc), ("end", utc), ("length", pa.float64()),
                            ("low_floor", pa.bool_()), ("seats", pa.int64()), ("told", utc)]),
        "departures": pa.schema([*own, ("at", utc), ("late", pa.float64())]),
        "stops": pa.schema([("stop", pa.string()), ("zone", pa.string()), ("since", utc)]),
    }  # fmt: skip
    for (name, schema), rows in zip(schemas.items(), (trips, departures, stops), strict=True):
        path = home.landing("buses") / name / "all.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
