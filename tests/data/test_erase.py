"""Erasure: after it no byte of the home tells of the entity, at every kill a repeat finishes, and nothing brings it back."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.erase import erase
from deploy.redact import Redactor
from deploy.rollout import Release, bento_folder, feed_all, promote
from features.cells import Event, open_cells
from features.erased import Entity
from features.ingest import Snapshot, ingest, read_snapshot, read_table
from features.online import OnlineStore, serve_features
from features.packed import ROWS
from features.push import BadEvent, Pusher
from features.store import build_features
from features.trainset import build_training_set
from features.versions import Version, check_out, files_of, track
from pipelines.clock import DAY_US, MISSING, Anchor, parse_time, wall_us
from pipelines.errors import UsageError
from pipelines.home import Home, open_home
from pipelines.manifest import ROOT, find_artifact, make_artifact, read_json, write_json
from pipelines.predlog import BASE
from pipelines.spec import Spec
from tests.command import millrace
from tests.data.test_backfill import filled, yaml_of
from tests.e2e.buses import EVERY, NOW, Buses, trip_at

STOP, LIKE = "STOP-ERASE-77", "STOP-ERASE-778"  # the second one is another stop, and stays
NOON = parse_time(NOW.isoformat())


def bytes_of(path: Path) -> bytes:
    """What a file says: Parquet read and as it is, and anything else as it is."""
    said = path.read_bytes()
    if said[:4] == b"PAR1":  # whatever its name is: DVC's are md5s
        said += json.dumps(pq.ParquetFile(path).read().to_pydict(), default=str).encode()
        said += str(pq.read_schema(path).metadata).encode() + str(pq.read_metadata(path).to_dict()).encode()
    return said


def telling(root: Path, value: str) -> list[str]:
    """Files that hold a value as a whole word."""
    word = value.encode()
    found = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        said = bytes_of(path).replace(LIKE.encode(), b"") if value == STOP else bytes_of(path)
        if word in said or word in str(path).encode():
            found.append(path.relative_to(root).as_posix())
    return found


@pytest.fixture(scope="module")
def made(buses: Buses, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Spec, Snapshot]:
    """Buses with trips from the stop, and everything that comes of them: run, release, store, log, backfill, pages, version."""
    root = tmp_path_factory.mktemp("erase")
    shutil.copytree(buses.home.root, root / "home", ignore=shutil.ignore_patterns("copies"))
    home, spec = Home(root / "home"), buses.spec
    (root / "buses.yaml").write_text(yaml_of(buses))
    land(home)
    snapshot = ingest(spec, home)
    features = build_features(spec, home, snapshot)
    kept = make_artifact(home.root, "training_set", "key",
                         lambda out: build_training_set(spec, home, snapshot, features, NOON, out))  # fmt: skip
    release = Release(buses.bento.tag, buses.bento.path, "run-1", snapshot.digest, NOON, features.defs_digest, "", (), MISSING)
    promote(home, "buses", release, expected="", why=f"better at {STOP}")
    assert feed_all(home, "buses", snapshot, Anchor(NOON + 60_000_000, 0), features)
    shutil.copy(home.root / kept.path / "rows.parquet", bento_folder(home, release) / "src/bundle/replay.parquet")
    inputs = {"snapshot": snapshot.digest, "previous_snapshot": buses.snapshot.digest}
    for name, pins in (("run-0", {**inputs, "snapshot": buses.snapshot.digest}), ("run-1", inputs)):
        write_json(home.runs("buses") / name / "inputs.json", pins)
        version = track(home, "buses", pins["snapshot"])
        write_json(home.runs("buses") / name / "manifest.json", {
            "pipeline": "buses", "run_id": name, "inputs": pins, "result_digest": "x", "finished_wall_us": 1,
            "data_version": vars(version), "stage_paths": {"training_set": kept.path}})  # fmt: skip
    (home.runs("buses") / "run-1" / "report.html").write_text(f"<td>{STOP}</td><td>{LIKE}</td>")
    log(home, release.release)
    filled(home, root / "buses.yaml", NOON - DAY_US, NOON)
    database(home)
    return home, spec, snapshot


def land(home: Home, name: str = "erased") -> None:
    folder, day = home.landing("buses"), NOW.replace(hour=0)
    trips = [{"line": "L7", "day": day, "trip": 9_000 + i, "stop": stop, "due": NOW + (i - 40) * EVERY, "end": None,
              "length": 5.0, "low_floor": True, "seats": 30, "told": NOW - timedelta(days=1)}
             for i, stop in enumerate([STOP, LIKE] * 40)]  # fmt: skip
    left = [{"line": "L7", "day": day, "trip": t["trip"], "at": t["due"], "late": 9.0} for t in trips if t["due"] <= NOW]
    stops = [{"stop": s, "zone": s.lower(), "since": NOW - timedelta(days=9)} for s in (STOP, LIKE)]
    for table, rows in (("trips", trips), ("departures", left), ("stops", stops)):
        schema = pq.read_schema(folder / table / "all.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / table / f"{name}.parquet")


def log(home: Home, release: str) -> None:
    rows = [{"request_id": f"r{i}", "row": 0, "release": release, "key": json.dumps({"line": "L7", "trip": i}),
             "request": json.dumps({"stop": stop, "seats": 3})} for i, stop in enumerate((STOP, LIKE, "a"))]  # fmt: skip
    folder = home.predictions("buses") / "hour=2024-05-06T12"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, BASE), folder / "w-000001.parquet")


def database(home: Home) -> None:
    (home.root / "prefect").mkdir(exist_ok=True)
    with closing(sqlite3.connect(home.root / "prefect" / "prefect.db")) as db:
        db.execute("CREATE TABLE artifact (id INTEGER, data TEXT)")
        db.executemany("INSERT INTO artifact VALUES (?, ?)", [(1, f"|{STOP}|"), (2, f"|{LIKE}|"), (3, f"gone {STOP}")])
        db.execute("DELETE FROM artifact WHERE id = 3")  # its page is free, and still holds the text
        db.commit()


@pytest.fixture
def home(made: tuple[Home, Spec, Snapshot], tmp_path: Path) -> Home:
    """A copy, with hard links as they were: the cache of DVC and the objects share their bytes."""
    subprocess.run(["cp", "-a", str(made[0].root), str(tmp_path / "home")], check=True)
    for path in (tmp_path / "home" / "dvc").rglob("*.json"):
        if path.name != "landing.json" and "remote" in (body := read_json(path)):
            write_json(path, {"remote": body["remote"].replace(str(made[0].root), str(tmp_path / "home"))})
    return Home(tmp_path / "home")


def entity(spec: Spec) -> Entity:
    return Entity.of(spec, [f"stop={STOP}"])


def test_no_byte_of_the_home_tells_of_an_erased_entity(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    spec, snapshot = made[1], made[2]
    before = telling(home.root, STOP)
    for place in ("landing/", "objects/", "dvc/.dvc/cache", "dvc/remote", "features/", "artifacts/", "bentoml/", "runs/",
                  "releases/", "predictions/", "online/", "prefect/"):  # fmt: skip
        assert any(name.startswith(place) for name in before), place
    others, files = telling(home.root, LIKE), len(before)
    found = erase(home, spec, entity(spec))
    assert telling(home.root, STOP) == []
    assert (found.landed_rows, found.object_rows) == (41, 41) and files > 15
    assert (found.runs, found.releases) == (("run-1",), (made_release(home),)) and found.snapshots == (snapshot.digest,)
    lost = {name.split("/")[0] for name in others} - {name.split("/")[0] for name in telling(home.root, LIKE)}
    assert lost == set()
    again = erase(home, spec, entity(spec))
    assert (again.landed_rows, again.object_rows, again.files, again.runs) == (0, 0, 0, found.runs)


def made_release(home: Home) -> str:
    found: str = read_json(home.releases("buses") / "champion.json")["release"]
    return found


def test_what_is_left_goes_on_working(home: Home, made: tuple[Home, Spec, Snapshot], tmp_path: Path) -> None:
    """The snapshot, its version, stage outputs, the served store and the next snapshot."""
    spec, snapshot = made[1], made[2]
    store = OnlineStore(spec, next(home.root.glob("online/buses/*")))
    meta, keys = dict(store.meta()), len(store.cells.keys(ROWS))
    erase(home, spec, entity(spec))
    left = read_table(spec, home, read_snapshot(home, "buses", snapshot.digest), "trips")
    assert set(left["stop"].to_pylist()) == {"a", "b", "c", LIKE} and left.num_rows == snapshot.rows["trips"] - 40
    assert read_snapshot(home, "buses", snapshot.digest).rows["trips"] == left.num_rows
    told = {name: text for name, text in store.meta().items() if name != "whole_us"}  # it was written whole now
    assert told == {name: meta[name] for name in told}
    assert len(store.cells.keys(ROWS)) == keys - 40  # by the reader that was open all the time
    frame = serve_features(store, [{"line": "L7", "day": NOON - DAY_US // 2, "trip": 9_050}], NOON + 60_000_000).frame
    assert np.isnan(frame["seats"][0])
    assert find_artifact(home.root, "training_set", "key") is not None
    body = read_json(home.runs("buses") / "run-1" / "manifest.json")
    second = open_home(tmp_path / "second")
    check_out(second, "buses", snapshot.digest, Version(**body["data_version"]))
    assert telling(second.root, STOP) == [] and len(files_of(second, "buses", snapshot.digest)) == 9
    newest = ingest(spec, home)
    assert newest.digest != snapshot.digest and newest.rows["trips"] == left.num_rows and newest.new_files == 0


def test_a_copy_that_lands_again_is_left_out(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    spec = made[1]
    erase(home, spec, entity(spec))
    first = ingest(spec, home)
    land(home, "once-more")
    csv = home.landing("buses") / "stops" / "again.csv"
    csv.write_text(f"stop,zone,since\n{STOP},q,2024-05-01T00:00:00Z\n")
    second = ingest(spec, home)
    assert second.new_files == 4 and second.digest == first.digest and second.rows == first.rows
    assert telling(home.root, STOP) == [] and not csv.exists()
    third = ingest(spec, home)
    assert (third.new_files, third.digest) == (0, first.digest)
    assert pq.read_table(home.landing("buses") / "trips" / "once-more.parquet").num_rows == 40  # of the other stop


KILLED = """
import os, signal, sys
from pathlib import Path
import deploy.erase as e
from features.erased import Entity
from pipelines.home import open_home
from pipelines.spec import Spec
honest = getattr(e, sys.argv[1])
count = [0]
def dying(*args, **kwargs):
    count[0] += 1
    if count[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args, **kwargs)
setattr(e, sys.argv[1], dying)
spec = Spec.model_validate_json(Path(sys.argv[3]).read_text())
e.erase(open_home(), spec, Entity.of(spec, sys.argv[4:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("step", "number"), [
    ("_drop_rows", 2), ("_objects", 1), ("store_object", 2), ("_versions", 1), ("drop", 1), ("drop", 2), ("forget", 1),
    ("track", 1), ("_scrub", 1), ("_sign", 1), ("_serve", 1), ("feed", 1),
])  # fmt: skip
def test_what_a_kill_left_half_done_a_repeat_finishes(
    step: str, number: int, home: Home, made: tuple[Home, Spec, Snapshot], tmp_path: Path
) -> None:
    spec = made[1]
    (tmp_path / "spec.json").write_text(spec.model_dump_json(by_alias=True))
    command = [sys.executable, "-c", KILLED, step, str(number), str(tmp_path / "spec.json"), f"stop={STOP}"]
    env = {**os.environ, "MILLRACE_HOME": str(home.root), "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env).returncode == -signal.SIGKILL
    assert telling(home.root, STOP)
    found = erase(home, spec, entity(spec))
    assert telling(home.root, STOP) == []
    assert (found.runs, found.releases) == (("run-1",), (made_release(home),))
    assert files_of(home, "buses", made[2].digest)


def test_an_entity_of_several_columns_is_only_where_all_hold(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    spec = made[1]
    found = erase(home, spec, Entity.of(spec, ["line=L7", "trip=9002"]))
    assert found.object_rows == 2  # announced, and departed
    assert 9002 not in read_table(spec, home, ingest(spec, home), "departures")["trip"].to_pylist()
    logged = pq.read_table(home.predictions("buses") / "hour=2024-05-06T12" / "w-000001.parquet")
    assert logged.num_rows == 3
    erase(home, spec, Entity.of(spec, ["line=L7", "trip=9001"]))
    rows = {tuple(r.values()) for r in read_table(spec, home, ingest(spec, home), "trips").select(["line", "trip"]).to_pylist()}
    assert not {("L7", 9001), ("L7", 9002)} & rows and ("L7", 9003) in rows


def test_a_number_is_erased_where_text_names_it(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    """Pages, JSON, logs and databases: beside its column or below it, and nothing else that looks like it."""
    spec, run = made[1], home.runs("buses") / "run-1"
    stays = {"rows": 9001, "other": {"line": "L7", "trip": 9002}, "longer": {"line": "L7", "trip": 19001}}
    said = {**stays, "example": {"line": "L7", "trip": 9001}}
    write_json(run / "example.json", said)
    sample = {"sample_columns": ["line", "trip"], "sample_rows": [["L7", "9001"], ["L7", "9002"]]}
    write_json(run / "contract.json", {"checks": [{"count": 9001, **sample}]})
    text = "trips [range]: line=L7 trip=9001 | line=L8 trip=9001\nthe fact {'line': 'L7', 'trip': '9001'}\n"
    (run / "trips.log").write_text(text)
    cells = "".join(f"<tr><td>{line}</td><td>{trip}</td></tr>" for line, trip in (("L7", 9001), ("L7", 9002), ("L8", 9001)))
    (run / "page.html").write_text(f"<p>9001</p><table><tr><th>line</th><th>trip</th></tr>{cells}</table>")
    with closing(sqlite3.connect(home.root / "prefect" / "prefect.db")) as db:
        db.execute("INSERT INTO artifact VALUES (9001, ?)", ('{"line": "L7", "trip": 9001}',))
        db.commit()
    erase(home, spec, Entity.of(spec, ["line=L7", "trip=9001"]))
    found = read_json(run / "example.json")
    assert found["example"] == {"line": "erased", "trip": None}
    assert {name: found[name] for name in stays} == stays
    assert read_json(run / "contract.json")["checks"] == [{"count": 9001, **sample, "sample_rows": [["L7", "9002"]]}]
    text = "trips [range]: line=erased trip=erased | line=L8 trip=9001\nthe fact {'line': 'erased', 'trip': 'erased'}\n"
    assert (run / "trips.log").read_text() == text
    left = cells.replace("<tr><td>L7</td><td>9001</td></tr>", "")
    assert (run / "page.html").read_text() == f"<p>9001</p><table><tr><th>line</th><th>trip</th></tr>{left}</table>"
    with closing(sqlite3.connect(home.root / "prefect" / "prefect.db")) as db:
        kept = db.execute("SELECT id, data FROM artifact WHERE id = 9001").fetchall()
    assert kept == [(9001, '{"line": "erased", "trip": null}')]


@pytest.mark.parametrize(("given", "text", "left"), [
    ('stop=Zoë "A" & Co', r'{"stop": "Zo\u00eb \"A\" & Co"} Zoë &#34;A&#34; &amp; Co', '{"stop": "erased"} erased'),
    ("day=2024-05-06", "day=2024-05-06T00:00:00Z, day=2024-05-06T00:00:00.5Z", "day=erased, day=2024-05-06T00:00:00.5Z"),
    ("day=2024-05-06", '{"day": 1714953600000000, "due": 1714953600000000}', '{"day": null, "due": 1714953600000000}'),
    ("low_floor=true", "{'low_floor': True} low_floor: false", "{'low_floor': erased} low_floor: false"),
    ("trip=7", r'"{\"trip\": 7}" &quot;trip&quot;: 7', r'"{\"trip\": null}" &quot;trip&quot;: null'),
    ("trip=7", "trip=7.5 strip=7 trip = 70 trip: 7.", "trip=7.5 strip=7 trip = 70 trip: erased."),
])  # fmt: skip
def test_a_value_is_known_in_every_spelling(made: tuple[Home, Spec, Snapshot], given: str, text: str, left: str) -> None:
    given = given.replace("day=2024-05-06", "day=2024-05-06T00:00:00Z")
    assert Redactor(Entity.of(made[1], [given])).clean(text) == left


def test_a_word_that_is_cut_where_a_page_ends_is_erased_too(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    path = home.root / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    for filling in range(4_000, 4_200):
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE tags (value TEXT)")
            db.execute("INSERT INTO tags VALUES (?)", (f"{'-' * 9_000} {STOP} {'-' * filling}",))
            db.commit()
        if STOP.encode() not in path.read_bytes():
            break
    assert STOP.encode() not in path.read_bytes()
    erase(home, made[1], entity(made[1]))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT value FROM tags").fetchall() == [(f"{'-' * 9_000} erased {'-' * filling}",)]


def test_what_a_killed_tracker_has_left_tells_of_it_no_more(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    spec, snapshot = made[1], made[2]
    (half,) = (home.dvc / "buses").glob(f"{snapshot.digest}.dvc")
    (half.with_suffix("") / "objects").mkdir(parents=True)
    for sha in (p.stem for p in home.objects.glob("*.parquet")):
        os.link(home.objects / f"{sha}.parquet", half.with_suffix("") / "objects" / f"{sha}.parquet")
    half.unlink()  # the bytes are in the cache, and no one says which
    half.with_suffix(".json").unlink()
    erase(home, spec, entity(spec))
    assert telling(home.root, STOP) == []


@pytest.mark.parametrize(("key", "said"), [
    ("stpo=x", "no source of buses has a column 'stpo'; nearest: 'stop'; write COLUMN=VALUE"),
    ("trip=many", "invalid literal for int"), ("day=2024-05-06T12:00", "has no time zone"),
    ("late=3.0", "give a value of a column of text"), ("stop=", "give a value of a column of text"),
])  # fmt: skip
def test_a_key_that_names_nothing(made: tuple[Home, Spec, Snapshot], key: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Entity.of(made[1], [key])
    assert said in str(caught.value)


def test_a_key_that_is_given_twice(made: tuple[Home, Spec, Snapshot]) -> None:
    with pytest.raises(UsageError, match="stop is given twice; erase one entity after the other"):
        Entity.of(made[1], ["stop=a", "stop=b"])


def test_an_entity_that_is_not_there_changes_nothing(home: Home, tmp_path: Path, made: tuple[Home, Spec, Snapshot]) -> None:
    path = tmp_path / "buses.yaml"
    shutil.copy(made[0].root.parent / "buses.yaml", path)
    done = millrace(home.root, "erase", str(path), "--key", "stop=nobody")
    assert done.code == 2 and done.error == "error: no row of buses has stop = nobody"
    assert not home.erased.exists()



def test_pushed_events_and_files_of_other_forms_tell_of_it_no_more(home: Home, made: tuple[Home, Spec, Snapshot]) -> None:
    spec = made[1]
    folder = next(home.root.glob("online/buses/*"))
    row = {"stop": STOP, "zone": "z", "since": NOON - DAY_US // 2}
    events = [Event(name, "stops", json.dumps({**row, "stop": stop}), wall_us()) for name, stop in (("one", STOP), ("two", LIKE))]
    pusher = Pusher(spec, home, folder)
    assert pusher.push(events, NOON + 60_000_000).taken == 2
    csv = home.landing("buses") / "stops" / "more.csv"
    csv.write_text(f"stop,zone,since\n{STOP},q,2024-05-01T00:00:00Z\n{LIKE},q,2024-05-01T00:00:00Z\n")
    before = ingest(spec, home)
    erase(home, spec, entity(spec))
    assert telling(home.root, STOP) == []
    assert not csv.exists() and pq.read_table(f"{csv}.parquet")["stop"].to_pylist() == [LIKE]
    assert [event.id for event in open_cells(folder).events()] == ["two"]
    after = ingest(spec, home)
    assert before.rows["stops"] - after.rows["stops"] == 2 and after.new_files == 0
    with pytest.raises(BadEvent, match="was erased"):
        Pusher(spec, home, folder).push([events[0]], NOON + 60_000_000)
    new = {"stop": LIKE, "zone": "new", "since": NOON + 30_000_000}
    assert pusher.push([Event("three", "stops", json.dumps(new), wall_us())], NOON + 60_000_000).taken == 1
    assert {stop for name in ("trips", "stops") for stop in pusher.tables[name]["stop"].to_pylist()} == {"a", "b", "c", LIKE}
    trip = {**trip_at(NOW + EVERY), "day": NOON - DAY_US // 2}
    frame = serve_features(OnlineStore(spec, folder), [trip], NOON + 60_000_000).frame
    assert frame["place__zone"][0] is not None
