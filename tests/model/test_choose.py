"""Which proposed features stay: leaks, twins and constants go, the training part alone decides, the same twice.

Buses, with columns planted: a twin, a constant, a date, a code of each trip; an answer known in time, and one known after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from features.feed import feed
from features.frame import feature_list
from features.ingest import Snapshot, ingest
from features.online import OnlineStore, serve_features
from features.rows import split_bounds
from features.store import build_features, historical_features
from models.choose import alone_auc, choose_into
from pipelines.clock import Anchor
from pipelines.errors import Refused
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.run import spec_from
from pipelines.spec import Spec
from tests.agreement import arrow, plain, same_frames
from tests.e2e.buses import SPEC, land

HOUR = 3_600_000_000
KEY = ["line", "day", "trip"]
PLANTED = {"twin": "int64", "fixed": "float64", "serial": "float64", "code": "string", "told_in_time": "float64"}


@dataclass(frozen=True)
class Chosen:
    """What was chosen: the spec that came of it, and the verdict on each feature."""

    home: Home
    snapshot: Snapshot
    asked: Spec
    spec: Spec
    verdicts: dict[str, dict[str, Any]]
    text: str

    def reason(self, feature: str) -> str:
        return str(self.verdicts[feature]["reason"])


def planted_spec() -> Spec:
    settings = yaml.safe_load(SPEC)
    settings["sources"]["trips"]["columns"] |= PLANTED
    columns = {**{c: settings["sources"]["trips"]["columns"][c] for c in KEY}, "at": "timestamp", "was_late": "float64"}
    settings["sources"]["refunds"] = {"key": KEY, "event_time": "at", "known_at": {"lag": "30m"}, "columns": columns}
    return Spec.model_validate({**settings, "pipeline": "buses", "features": {"auto": {"last": ["1h", "3h", "12h"]}}})


def plant(home: Home) -> None:
    """The planted columns, and refunds, half an hour after each departure."""
    land(home)
    folder = home.landing("buses")
    trips, departures = (pq.read_table(folder / name / "all.parquet") for name in ("trips", "departures"))
    late = {row["trip"]: float(row["late"] > 5) for row in departures.to_pylist()}
    serial = np.arange(trips.num_rows, dtype=np.float64)
    for name, values in {
        "twin": pc.multiply(trips["seats"], 10), "fixed": np.full(trips.num_rows, 3.0), "serial": serial,
        "code": [f"c{i}" for i in range(trips.num_rows)], "told_in_time": [late.get(t, 0.0) for t in trips["trip"].to_pylist()],
    }.items():  # fmt: skip
        trips = trips.append_column(name, values if isinstance(values, pa.ChunkedArray) else pa.array(values))
    pq.write_table(trips, folder / "trips" / "all.parquet")
    refunds = departures.select([*KEY, "at"])
    refunds = refunds.append_column("was_late", pa.array([late[trip] for trip in refunds["trip"].to_pylist()]))
    (folder / "refunds").mkdir()
    pq.write_table(refunds, folder / "refunds" / "all.parquet")


def chosen_in(root: Path, change: Callable[[Home], None] = lambda home: None) -> Chosen:
    home, spec = open_home(root), planted_spec()
    plant(home)
    change(home)
    snapshot = ingest(spec, home)
    out = root / "chosen"
    out.mkdir()
    choose_into(spec, home, snapshot, snapshot.watermark_us, out)
    verdicts = {v["feature"]: v for v in read_json(out / "chosen.json")["verdicts"]}
    text = (out / "chosen.json").read_text() + (out / "spec.json").read_text()
    return Chosen(home, snapshot, spec, spec_from(out / "spec.json"), verdicts, text)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    return chosen_in(tmp_path_factory.mktemp("chosen"))


def test_planted_leaks_twins_and_constants_go_and_the_report_says_why(chosen: Chosen) -> None:
    assert chosen.reason("told_in_time") == "too good" and "AUC of 1.000" in chosen.verdicts["told_in_time"]["why"]
    assert chosen.reason("refunds__was_late") == "known only after"
    assert chosen.reason("departures.late") == "known only after"
    assert chosen.reason("fixed") == "constant"
    assert {chosen.reason("twin"), chosen.reason("seats")} >= {"duplicate"}
    assert chosen.reason("code") == "too many values"
    assert chosen.reason("serial") == "follows time"
    assert all(v["why"] for v in chosen.verdicts.values())


def test_what_tells_something_is_kept_and_nothing_else_is_stored(chosen: Chosen) -> None:
    kept = {name for name, v in chosen.verdicts.items() if v["reason"] == "kept"}
    assert kept == {feature.name for feature in feature_list(chosen.spec)}
    assert any(name == "line" or "by_line" in name for name in kept)
    assert chosen.spec.features.auto is None and set(chosen.spec.features.views) <= {f.group for f in feature_list(chosen.spec)}


def test_the_same_twice_and_later_parts_change_nothing(chosen: Chosen, tmp_path: Path) -> None:
    """Labels, facts and rows after the training part are other ones, and not a byte of the choice changes."""
    as_of = chosen.snapshot.watermark_us
    _, end, _ = split_bounds(chosen.asked, as_of)[0]

    def later_is_other(home: Home) -> None:
        path = home.landing("buses") / "departures" / "all.parquet"
        table = pq.read_table(path)
        after = pc.greater(table["at"].cast(pa.int64()), end + HOUR)
        late = pc.if_else(after, pc.subtract(11.0, table["late"]), table["late"])
        pq.write_table(table.set_column(table.column_names.index("late"), "late", late), path)

    assert chosen_in(tmp_path / "same").text == chosen.text
    assert chosen_in(tmp_path / "other", later_is_other).text == chosen.text


def test_what_is_served_is_what_training_sees(chosen: Chosen) -> None:
    """At the anchor, and an hour later without a fact: the served store of the chosen spec against the offline one."""
    spec, home, anchor = chosen.spec, chosen.home, chosen.snapshot.watermark_us
    built = build_features(spec, home, chosen.snapshot)
    feed(spec, home.root / built.path, home.root / "served", Anchor(anchor, 0), chosen.snapshot.digest)
    store = OnlineStore(spec, home.root / "served")
    rows = [row for row in plain(spec.row_source, pq.read_table(home.landing("buses") / "trips" / "all.parquet"))
            if row["due"] > anchor][:60]  # fmt: skip
    for now in (anchor, anchor + HOUR):
        served = serve_features(store, [{c: row[c] for c in KEY} for row in rows], now)
        table = arrow(spec.row_source, rows)
        assert same_frames(served.frame, historical_features(spec, home, built, table, np.full(len(rows), now))) == []


def test_where_nothing_tells_the_label_it_is_said(chosen: Chosen) -> None:
    """No split is possible with such leaves."""
    leaves = chosen.asked.gbdt.model_copy(update={"min_data_in_leaf": 100_000})
    spec = chosen.asked.model_copy(update={"gbdt": leaves})
    told = r"none of \d+ proposed features tells the label better than noise does \(480 training rows"
    with pytest.raises(Refused, match=told):
        choose_into(spec, chosen.home, chosen.snapshot, chosen.snapshot.watermark_us, chosen.home.root)


def test_auc_alone_sees_any_shape_and_what_is_missing() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=4_000)
    assert alone_auc(x, (np.abs(x) > 1).astype(float)) > 0.97
    assert alone_auc(np.where(x > 1, -np.inf, 0.0), (x > 1).astype(float)) == 1.0
    assert 0.45 < alone_auc(x, rng.integers(0, 2, 4_000).astype(float)) < 0.55
