"""The skew check: equal logs give nothing, each planted difference is found and named, late facts are told apart.

The log is that of a live endpoint over the buses of `buses.py`, whose store is fed once more while it answers.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from deploy.monitor import monitor
from deploy.process import call, free_port, start, stop
from deploy.rollout import Release, bento_folder, feed_all, promote
from deploy.skew import Skew, check_skew, compare
from features.feed import feed
from features.frame import feature_list
from features.ingest import ingest
from features.online import OnlineStore, serve_features
from features.skew import different, known_features
from features.store import build_features
from pipelines.clock import MISSING, Anchor, iso, parse_time
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import ROOT, read_json, write_json
from pipelines.predlog import FEATURE, read_log
from pipelines.spec import Spec
from tests.command import Done, millrace
from tests.e2e.buses import EVERY, NOW, Buses, trip_at

HALF_HOUR = timedelta(minutes=30)
STAND_IN = {"line": "L1", "day": "2024-05-06T00:00:00Z", "trip": 1, "stop": "b", "due": "2024-05-06T12:12:00Z",
            "length": 5, "low_floor": True, "seats": 40}  # fmt: skip
UNNAMED = "no snapshot named: the store was down, fields that were given are not logged, or an older log"
NOBODY = {"line": "L9", "day": "2024-05-06T00:00:00Z", "trip": 2}


@dataclass(frozen=True)
class Answered:
    """A home whose released endpoint answered at noon and, from a store fed anew, half an hour later."""

    home: Home
    spec: Spec
    yaml: Path
    release: Release

    @property
    def log(self) -> pa.Table:
        return read_log(self.home.predictions("buses"))

    @property
    def part(self) -> Path:
        return next(self.home.predictions("buses").glob("hour=*/*.parquet"))


@pytest.fixture(scope="module")
def made(buses: Buses, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    made_in = buses.home.root.parent
    home = Home(tmp_path_factory.mktemp("skew") / "home")
    shutil.copytree(buses.home.root, home.root, ignore=shutil.ignore_patterns("predictions", "releases", "runs", "copies"))
    as_of = buses.snapshot.watermark_us
    release = Release(buses.bento.tag, buses.bento.path, "made", buses.snapshot.digest, as_of, buses.features.defs_digest,
                      "", (), MISSING)  # fmt: skip
    promote(home, "buses", release, expected="", why="test")
    log = home.root / "log.txt"
    service = start(home, bento_folder(home, release), port=free_port(), release=release.release, log=log, extra={})
    try:
        soon = [trip_at(NOW + i * EVERY) for i in range(1, 40)]
        assert ask(service.url, *soon, STAND_IN, NOBODY) == as_of
        land(home, "later", [(NOW + i * timedelta(minutes=1), f"L{i % 4}", i) for i in range(1, 31)])
        snapshot, later = ingest(buses.spec, home), as_of + int(HALF_HOUR.total_seconds() * 1e6)
        assert snapshot.watermark_us == later
        built = build_features(buses.spec, home, snapshot)
        assert feed_all(home, "buses", snapshot, Anchor(later, 0), built) == [release.release]
        assert ask(service.url, *soon[5:], STAND_IN) == later
    finally:
        stop(service)
    return Answered(home, buses.spec, made_in / "buses.yaml", release)


def ask(url: str, *rows: dict[str, Any]) -> int:
    """The clock's now of the answers."""
    status, answer = call(f"{url}/predict", {"rows": rows})
    assert status == 200, answer
    return int(pc.strptime(answer["now"], "%Y-%m-%dT%H:%M:%SZ", "us").cast(pa.int64()).as_py())


def land(home: Home, name: str, left: list[tuple[Any, str, int]]) -> None:
    """A file of departures of trips that nobody announced: when, line, minutes late."""
    rows = [{"line": line, "day": NOW.replace(hour=0), "trip": hash((name, i)) % 2**40, "at": at, "late": float(late)}
            for i, (at, line, late) in enumerate(left)]  # fmt: skip
    folder = home.landing("buses") / "departures"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(folder / "all.parquet")), folder / f"{name}.parquet")


@pytest.fixture
def answered(made: Answered, tmp_path: Path) -> Answered:
    """A copy of it, to be changed."""
    shutil.copytree(made.home.root, tmp_path / "home")
    return replace(made, home=Home(tmp_path / "home"))


def test_equal_logs_give_nothing(made: Answered) -> None:
    """Known rows, a row that its request stands in for, and one that nobody knows; before and after the second feed."""
    found = check_skew(made.home, "buses")
    assert found.answers == made.log.num_rows == 76
    assert found.cells == 76 * len(feature_list(made.spec))
    assert (found.skewed_cells, found.late_cells, found.samples, found.unchecked) == (0, 0, (), {})
    assert len(made.log["snapshot"].unique()) == 2
    assert (found.since, found.until) == ("2024-05-06T12:00:00Z", "2024-05-06T12:30:00Z")


@pytest.mark.parametrize(("feature", "change"), [
    ("line_late_1h__late_mean", lambda value: value + 2**-40),
    ("line_late_3h__count", lambda value: value + 1),
    ("pace", lambda value: None),
    ("place__zone", lambda value: None),
    ("place__zone", lambda value: value + " "),
])  # fmt: skip
def test_a_planted_change_is_found_and_named(made: Answered, feature: str, change: Callable[[Any], Any]) -> None:
    values = made.log[FEATURE + feature].to_pylist()
    at = next(i for i, value in enumerate(values) if value is not None)
    found = compare(made.home, "buses", planted(made.log, feature, at, change(values[at])))
    view = {f.name: f.group for f in feature_list(made.spec)}[feature]
    assert (found.skewed_cells, found.by_feature, found.by_view) == (1, {feature: 1}, {view: 1})
    row = made.log.slice(at, 1).to_pylist()[0]
    (sample,) = found.samples
    assert (sample["request_id"], sample["row"], sample["key"]) == (row["request_id"], row["row"], json.loads(row["key"]))
    assert (sample["served"], sample["offline"]) == (change(values[at]), values[at])


def test_a_value_where_training_has_none_is_found(made: Answered) -> None:
    values = made.log[FEATURE + "place__zone"].to_pylist()
    found = compare(made.home, "buses", planted(made.log, "place__zone", values.index(None), "A"))
    assert found.by_feature == {"place__zone": 1}
    assert (found.samples[0]["served"], found.samples[0]["offline"]) == ("A", None)


def planted(log: pa.Table, feature: str, at: int, value: Any) -> pa.Table:
    """The log with one cell changed."""
    name = FEATURE + feature
    values = log[name].to_pylist()
    values[at] = value
    return log.set_column(log.schema.get_field_index(name), name, pa.array(values, log[name].type))


def test_late_facts_are_told_apart(answered: Answered) -> None:
    """A departure before noon that lands after the answers: nothing is skewed, and the cells that it changes are counted."""
    land(answered.home, "late", [(NOW - timedelta(minutes=7), "L2", 11)])
    found = check_skew(answered.home, "buses")
    assert found.skewed_cells == 0
    on_line = sum(json.loads(key)["line"] == "L2" for key in answered.log["key"].to_pylist())
    assert found.late_by_view == {"line_late": found.late_cells} and found.late_cells == on_line * 4
    both = compare(answered.home, "buses", planted(answered.log, "line_late_3h__count", 0, 99.0))
    assert (both.skewed_cells, both.late_cells) == (1, found.late_cells)


def test_a_landing_that_is_refused_leaves_the_comparison(answered: Answered) -> None:
    (answered.home.landing("buses") / "departures" / "broken.parquet").write_bytes(b"PAR1")
    found = check_skew(answered.home, "buses")
    assert (found.skewed_cells, found.late_cells) == (0, None)
    assert "not known" in found.line


def test_time_and_number_of_rows_can_be_chosen(made: Answered) -> None:
    noon = made.release.as_of_us
    assert check_skew(made.home, "buses", until=noon).answers == 41
    assert check_skew(made.home, "buses", since=noon + 1).answers == 35
    few = check_skew(made.home, "buses", rows=10)
    assert (few.answers, few.since, few.until) == (10, iso(noon), "2024-05-06T12:30:00Z")


def test_answers_that_cannot_be_recomputed_are_counted(made: Answered) -> None:
    digests = made.log["snapshot"].to_pylist()
    gone, unnamed = ["0" * 64, *digests[1:]], [None, *digests[1:]]
    for listed, reason in ((gone, "snapshot 000000000000 is not in the home"), (unnamed, UNNAMED)):
        found = compare(made.home, "buses", with_column(made.log, "snapshot", listed))
        assert (found.answers, found.unchecked) == (75, {reason: 1})
        assert f"not compared: 1 ({reason})" in found.line
    with pytest.raises(MillraceError, match="none of the 76 logged answers can be compared: 76"):
        compare(made.home, "buses", with_column(made.log, "snapshot", [None] * 76))


def with_column(log: pa.Table, name: str, values: list[Any]) -> pa.Table:
    return log.set_column(log.schema.get_field_index(name), name, pa.array(values, pa.string()))


def no_log(it: Answered) -> None:
    shutil.rmtree(it.home.predictions("buses"))


def another_release(it: Answered) -> None:
    rewrite(it.part, lambda log: with_column(log, "release", ["millrace_buses:other"] * log.num_rows))


def no_bento(it: Answered) -> None:
    shutil.rmtree(it.home.root / it.release.bento)


def cut_short(it: Answered) -> None:
    it.part.write_bytes(it.part.read_bytes()[:-100])


def another_format(it: Answered) -> None:
    rewrite(it.part, lambda log: log.replace_schema_metadata({"format_version": "7"}))


def no_format(it: Answered) -> None:
    rewrite(it.part, lambda log: log.replace_schema_metadata({}))


def other_features(it: Answered) -> None:
    for part in it.home.predictions("buses").glob("hour=*/*.parquet"):
        rewrite(part, lambda log: log.drop_columns([FEATURE + "pace"]))


def other_types(it: Answered) -> None:
    first, *_ = it.home.predictions("buses").glob("hour=*/*.parquet")
    name = FEATURE + "pace"
    text = pq.read_table(first)
    column = pa.nulls(text.num_rows, pa.string())
    pq.write_table(text.set_column(text.schema.get_field_index(name), name, column), first.with_name("other.parquet"))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


@pytest.mark.parametrize(("damage", "sentence"), [
    (no_log, "no predictions of buses are logged yet: type `millrace serve buses`"),
    (another_release, "buses has no release 'millrace_buses:other' (releases: millrace_buses:"),
    (no_bento, "is not in the home: what its features mean is not known without it"),
    (cut_short, "of the prediction log is broken"),
    (another_format, "of the prediction log has format_version 7, this Millrace writes and reads 1"),
    (no_format, "of the prediction log has format_version none"),
    (other_features, "the prediction log has no pace of millrace_buses:"),
    (other_types, "hold features of other types"),
])  # fmt: skip
def test_errors_are_one_sentence(answered: Answered, damage: Callable[[Answered], None], sentence: str) -> None:
    damage(answered)
    with pytest.raises(MillraceError) as error:
        check_skew(answered.home, "buses")
    assert sentence in str(error.value) and error.value.exit_code == 1


def test_a_time_without_answers(made: Answered) -> None:
    with pytest.raises(MillraceError, match="newest hour with predictions is 2024-05-06T12:00:00Z"):
        check_skew(made.home, "buses", until=made.release.as_of_us - 1)


def test_the_command_line(answered: Answered) -> None:
    def skew(*words: str) -> Done:
        return millrace(answered.home.root, "skew", str(answered.yaml), *words, PYTHONPATH=str(ROOT))

    good = skew("--json")
    assert good.code == 0 and good.answer["skewed_cells"] == 0, good.err
    for part in answered.home.predictions("buses").glob("hour=*/*.parquet"):
        rewrite(part, lambda log: planted(log, "place__zone", 0, "Z"))
    bad = skew("--rows", "1000", "--since", "2024-05-06T11:00Z")
    assert bad.code == 3, bad.err
    assert "served 'Z', training computes" in bad.out and "place__zone" in bad.out


def test_the_monitor_alarms(answered: Answered) -> None:
    watched(answered)
    before = monitor(answered.home, "buses")
    assert before.skew is not None and before.skew.skewed_cells == 0
    assert not [alarm for alarm in before.alarms if alarm.startswith("skew")]
    for part in answered.home.predictions("buses").glob("hour=*/*.parquet"):
        rewrite(part, lambda log: planted(log, "place__zone", 0, "Z"))
    found = monitor(answered.home, "buses")
    (alarm,) = [alarm for alarm in found.alarms if alarm.startswith("skew")]
    assert "served cells are not what training computes, most in 'place__zone'" in alarm
    assert isinstance(found.skew, Skew) and json.loads(json.dumps(asdict(found.skew)))["skewed_cells"] > 0


def test_the_monitor_goes_on_where_nothing_can_be_compared(answered: Answered) -> None:
    watched(answered)
    for part in answered.home.predictions("buses").glob("hour=*/*.parquet"):
        rewrite(part, lambda log: with_column(log, "snapshot", [None] * log.num_rows))
    found = monitor(answered.home, "buses")
    assert found.skew is None and found.answers > 0 and found.drift
    assert found.not_compared == f"none of the 76 logged answers can be compared: 76 ({UNNAMED})"


def test_a_feed_in_the_midst_of_an_answer_is_seen_by_the_next(answered: Answered) -> None:
    """The clock's anchor and the cells are of one state of the store: else now would lie before what the store holds."""
    folder = answered.home.online("buses", answered.release.defs_digest)
    store, row = OnlineStore(answered.spec, folder), trip_key(NOW + 10 * EVERY)
    snapshot = ingest(answered.spec, answered.home)
    built = build_features(answered.spec, answered.home, snapshot)
    with store.reading():
        old = store.anchor()
        moved = Anchor(old.data_us + 3_600_000_000, 0)
        assert feed(answered.spec, answered.home.root / built.path, folder, moved, snapshot.digest)
        inside = serve_features(store, [row], old.data_us)
        assert store.anchor() == old
    assert store.anchor() == moved
    offline = known_features(answered.spec, answered.home, snapshot, [row], np.array([old.data_us]))
    assert not any(wrong.any() for wrong in different(inside.frame, offline.frame).values())


def trip_key(due: datetime) -> dict[str, Any]:
    """The key of a trip as the endpoint parses it."""
    key = trip_at(due)
    return key | {"day": parse_time(str(key["day"]))}


@pytest.mark.slow
def test_a_pipeline_without_time(tumours_home: Home, tumours_url: str) -> None:
    manifest = read_json(next(tumours_home.runs("tumours").glob("*/manifest.json")))
    example = read_json(tumours_home.root / manifest["stage_paths"]["preflight"] / "preflight.json")["example"]
    status, answer = call(f"{tumours_url}/predict", {"rows": [example, {"row_digest": "0" * 32}]})
    assert status == 200, answer
    deadline = time.monotonic() + 20
    while answer["request_id"] not in read_log(tumours_home.predictions("tumours"))["request_id"].to_pylist():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = check_skew(tumours_home, "tumours")
    assert found.answers >= 2 and (found.skewed_cells, found.late_cells, found.unchecked) == (0, 0, {})


def watched(it: Answered) -> None:
    """What the monitor reads of the run that made the champion."""
    training = it.home.root / "training"
    training.mkdir()
    shutil.copy(it.yaml.parent / "model" / "frame.parquet", training)
    pq.write_table(pa.table({"challenger": [0.1, 0.5, 0.9]}), training / "test.parquet")
    metrics = {"challenger": {"log_loss": {"value": 0.5}, "auc": {"value": 0.7}}}
    body = {"run_id": "made", "finished_wall_us": 0, "result_digest": "", "metrics": metrics,
            "stage_paths": {"training_set": "training", "evaluate": "training"}}  # fmt: skip
    write_json(it.home.runs("buses") / it.release.run_id / "manifest.json", body)
