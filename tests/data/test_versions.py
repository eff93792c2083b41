"""Data versions: tracked by DVC, checked out in another home, and what nothing names is collected."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.collect import collect
from features.ingest import cut, ingest, read_snapshot
from features.store import build_features
from features.versions import Version, check_out, files_of, track, version_of
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home
from pipelines.manifest import ROOT, Note, make_artifact, write_json
from tests.command import millrace
from tests.e2e.buses import NOW, SPEC, Buses


@pytest.fixture
def home(buses: Buses, tmp_path: Path) -> Home:
    """A copy of the buses, in which one run has ended on their snapshot."""
    shutil.copytree(buses.home.root, tmp_path / "first")
    home = Home(tmp_path / "first")
    run_on(home, buses.snapshot.digest, "run-1")
    return home


def run_on(home: Home, snapshot: str, name: str, version: Version | None = None) -> Path:
    inputs = {"snapshot": snapshot, "previous_snapshot": ""}
    folder = home.runs("buses") / name
    write_json(folder / "inputs.json", inputs)
    paths = {"training_set": f"artifacts/training_set/{name}"}
    body = {"pipeline": "buses", "run_id": name, "inputs": inputs, "stage_paths": paths}
    write_json(folder / "manifest.json", body | ({"data_version": vars(version)} if version else {}))
    make_artifact(home.root, "training_set", name, lambda out: Note(str(write_json(out / "counts.json", {"name": name}))))
    return folder / "manifest.json"


def land_late(home: Home, name: str) -> None:
    folder = home.landing("buses") / "stops"
    row = {"stop": name, "zone": name.upper(), "since": NOW}
    pq.write_table(pa.Table.from_pylist([row], pq.read_schema(folder / "all.parquet")), folder / f"{name}.parquet")


def test_a_snapshot_is_tracked_once_and_shares_its_bytes(home: Home, buses: Buses) -> None:
    digest = buses.snapshot.digest
    version = track(home, "buses", digest)
    assert version.remote == str(home.dvc / "remote") and version.files == 3 + 2 and version.md5.endswith(".dir")
    assert {p.stat().st_nlink for p in home.objects.glob("*.parquet")} == {2}  # with DVC's cache
    assert set(files_of(home, "buses", digest)) > {"", "snapshot.json", "landing.json"}
    assert not (home.dvc / "buses" / digest).exists()
    before = {p: p.stat().st_mtime_ns for p in home.dvc.rglob("*") if p.is_file()}
    assert track(home, "buses", digest) == version == version_of(home, "buses", digest)
    assert {p: p.stat().st_mtime_ns for p in home.dvc.rglob("*") if p.is_file()} == before


def test_another_home_checks_the_exact_data_out_by_a_manifest(home: Home, buses: Buses, tmp_path: Path) -> None:
    """From the command line, with a manifest of another home: landing, objects, snapshot; the same digest once more."""
    manifest = run_on(home, buses.snapshot.digest, "run-2", track(home, "buses", buses.snapshot.digest))
    (tmp_path / "buses.yaml").write_text(SPEC)
    done = millrace(tmp_path / "second", "checkout", str(tmp_path / "buses.yaml"), "--manifest", str(manifest), "--json")
    assert done.code == 0, done.err
    assert (done.answer["objects"], done.answer["landed"]) == (3, 3)
    second = open_home(tmp_path / "second")
    assert read_snapshot(second, "buses", buses.snapshot.digest).rows == buses.snapshot.rows
    assert ingest(buses.spec, second).digest == buses.snapshot.digest
    again = millrace(tmp_path / "second", "checkout", str(tmp_path / "buses.yaml"), "--manifest", str(manifest), "--json")
    assert (again.answer["objects"], again.answer["landed"]) == (0, 0)
    wrong = millrace(tmp_path / "second", "checkout", str(tmp_path / "buses.yaml"), "--json")
    assert wrong.code == 2 and "give either --run RUN_ID" in wrong.error


def test_data_as_of_an_earlier_time_is_checked_out_as_such(home: Home, buses: Buses, tmp_path: Path) -> None:
    early = cut(buses.spec, home, buses.snapshot, buses.snapshot.watermark_us - 86_400_000_000)
    version = track(home, "buses", early.digest)
    second = open_home(tmp_path / "second")
    check_out(second, "buses", early.digest, version)
    assert replace(read_snapshot(second, "buses", early.digest), path="") == replace(early, path="")


def test_a_remote_that_lacks_it_or_was_changed_is_said_so_and_leaves_nothing(home: Home, buses: Buses, tmp_path: Path) -> None:
    digest = buses.snapshot.digest
    version = track(home, "buses", digest)
    second = open_home(tmp_path / "second")
    with pytest.raises(MillraceError, match=f"snapshot {digest[:12]} of buses .* cannot be had from .*nowhere: .*--remote"):
        check_out(second, "buses", digest, version, str(tmp_path / "nowhere"))
    sha, md5 = next((n, m) for n, m in files_of(home, "buses", digest).items() if n.startswith("objects/"))
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(home.root / sha).slice(1), other)
    held = home.dvc / "remote/files/md5" / md5[:2] / md5[2:]
    held.chmod(0o644)
    shutil.copy(other, held)
    with pytest.raises(MillraceError):
        check_out(second, "buses", digest, version)
    assert not [*second.snapshots("buses").glob("*.json"), *second.objects.glob("*"), *second.dvc.glob("buses/*")]


def test_a_remote_that_does_not_answer_fails_nothing_and_the_next_track_pushes(home: Home, buses: Buses, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    assert track(home, "buses", buses.snapshot.digest, str(blocked / "remote")).remote == ""
    blocked.unlink()
    assert track(home, "buses", buses.snapshot.digest, str(blocked / "remote")).remote == str(blocked / "remote")
    assert (blocked / "remote" / "files").is_dir()


def test_tracking_that_was_killed_is_finished_by_the_next(home: Home, buses: Buses) -> None:
    """Killed while DVC adds: what it left in the cache or beside it is taken up or written over."""
    code = ("import os, sys, features.versions as v; from pipelines.home import open_home; from dvc.repo import Repo\n"
            "if sys.argv[2] == 'add': Repo.add = lambda *a, **k: os.kill(os.getpid(), 9)\n"
            "Repo.push = lambda *a, **k: os.kill(os.getpid(), 9)\n"
            "v.track(open_home(), 'buses', sys.argv[1])")  # fmt: skip
    for where in ("add", "push"):
        env = {**os.environ, "MILLRACE_HOME": str(home.root), "PYTHONPATH": str(ROOT)}
        assert subprocess.run([sys.executable, "-c", code, buses.snapshot.digest, where], env=env).returncode == -9
    version = track(home, "buses", buses.snapshot.digest)
    assert version.remote and len(files_of(home, "buses", buses.snapshot.digest)) == 6


def test_gc_keeps_what_a_run_names_and_removes_the_rest_when_told(home: Home, buses: Buses) -> None:
    kept = buses.snapshot.digest
    track(home, "buses", kept)
    land_late(home, "x")
    named = ingest(buses.spec, home)
    run_on(home, named.digest, "run-3")
    track(home, "buses", named.digest)
    build_features(buses.spec, home, named)
    (home.landing("buses") / "stops" / "x.parquet").unlink()
    shutil.rmtree(home.runs("buses") / "run-3")  # a person deletes a run
    index = home.snapshots("buses") / "landing.json"
    body = json.loads(index.read_text())
    del body["files"]["stops/x.parquet"]
    index.write_text(json.dumps(body))
    before = {p: p.stat().st_size for p in home.root.rglob("*") if p.is_file() and "locks" not in p.parts}
    dry = collect(home)
    assert {p: p.stat().st_size for p in before} == before and not dry.deleted
    assert dry.counts == {"snapshots": 1, "objects": 1, "features": 1, "artifacts": 1, "versions": 1}
    assert dry.line.endswith("that no run or release names; --delete removes it")
    done = collect(home, delete=True)
    assert (done.counts, done.deleted) == (dry.counts, True)
    assert collect(home).counts == dict.fromkeys(dry.counts, 0)
    assert version_of(home, "buses", kept) and version_of(home, "buses", named.digest) is None
    assert ingest(buses.spec, home).digest == kept
    assert len([*home.dvc.glob("remote/files/md5/*/*")]) == len([*home.dvc.glob(".dvc/cache/files/md5/*/*")]) == 6
    land_late(home, "x")
    assert ingest(buses.spec, home).digest == named.digest  # what was collected can be made again


def test_gc_keeps_stage_outputs_while_a_run_has_yet_to_end(home: Home, buses: Buses) -> None:
    make_artifact(home.root, "train", "lonely", lambda out: Note("x"))
    write_json(home.runs("buses") / "open" / "inputs.json", {"snapshot": buses.snapshot.digest, "previous_snapshot": ""})
    assert collect(home, delete=True).counts["artifacts"] == 0
    shutil.rmtree(home.runs("buses") / "open")
    assert collect(home, delete=True).counts["artifacts"] == 1
