"""Batch scoring: the endpoint's numbers, each part once, whatever is killed; what is wrong is said and leaves nothing."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from deploy import score_parts
from deploy.process import Service, call
from deploy.requests import key_fields
from deploy.rollout import Release, bento_folder, champion, promote
from deploy.score_parts import MANIFEST, ScoredFiles, score_files, scoring_process
from deploy.tables import Job, Part, check_text, in_path, values_of
from features.feed import feed
from pipelines.clock import Anchor, parse_time
from pipelines.errors import MillraceError, Refused, UsageError
from pipelines.home import Home
from pipelines.manifest import ROOT, digest_of, lock, read_json
from pipelines.spec import load_spec
from tests.command import command, environment, millrace
from tests.e2e.buses import EVERY, NOW, Buses, trip_at

MEAN = "mean_radius"


def rows_of(home: Home) -> pa.Table:
    """The landed tumours, the first without some of its features, beside columns that no model knows."""
    table = pq.read_table(next((home.landing("tumours") / "tumours").glob("*.parquet")))
    radius = table[MEAN].to_numpy().copy()
    radius[0] = np.nan
    table = table.set_column(table.schema.get_field_index(MEAN), MEAN, pa.array(radius))
    texture = pc.if_else(pa.array(np.arange(len(table)) % 7 == 0), None, table["mean_texture"])
    table = table.set_column(table.schema.get_field_index("mean_texture"), "mean_texture", texture)
    table = table.append_column("note", pa.array([f"n{i}" for i in range(len(table))]))
    return table.append_column("at", pa.array(range(len(table))))


def land(table: pa.Table, folder: Path, *, rows: int = 100) -> Path:
    """Two files in folders of days, in small row groups; and what is no data."""
    for day, some in (("1", table.slice(0, 350)), ("2", table.slice(350))):
        (folder / f"day={day}").mkdir(parents=True)
        pq.write_table(some, folder / f"day={day}" / "rows.parquet", row_group_size=rows)
    (folder / "_SUCCESS").touch()
    return folder


def asked(url: str, route: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    status, answer = call(f"{url}/{route}", {"rows": [{k: v for k, v in r.items() if v is not None and v == v} for r in rows]})
    assert status == 200, answer
    found: list[dict[str, Any]] = answer["rows"]
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def scored(tumours_home: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ScoredFiles]:
    """Input and output of a scoring by two processes, and what it said. Read only."""
    folder = tmp_path_factory.mktemp("scored")
    source, out = land(rows_of(tumours_home), folder / "in"), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_parts, "PART_ROWS", 150)
        return source, out, score_files(tumours_home, "tumours", str(source), out, workers=2, batch_rows=64)


@pytest.fixture
def copied(scored: tuple[Path, Path, ScoredFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same, to be changed."""
    monkeypatch.setattr(score_parts, "PART_ROWS", 150)
    for path in scored[:2]:
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / "in", tmp_path / "out"


def test_scores_by_features_are_the_endpoints(
    scored: tuple[Path, Path, ScoredFiles], tumours_home: Home, tumours_url: str
) -> None:  # fmt: skip
    """Bit for bit, asked all at once and row by row; every input row once, with the columns that are no features."""
    _, out, found = scored
    table = rows_of(tumours_home)
    got = ds.dataset(out, partitioning="hive").to_table().sort_by("at")
    assert got.column_names == ["target", "note", "at", "probability", "decision", "release", "day"]
    assert got["at"].to_pylist() == list(range(569)) and got["day"].to_pylist() == [1] * 350 + [2] * 219
    assert got.select(["target", "note"]) == table.select(["target", "note"])
    features = [n for n in table.column_names if n not in ("target", "note", "at")]
    rows = table.select(features).to_pylist()
    answers = asked(tumours_url, "predict_features", rows)
    assert [a["probability"] for a in answers] == got["probability"].to_pylist()
    assert [a["decision"] for a in answers] == got["decision"].to_pylist()
    alone = [asked(tumours_url, "predict_features", [row])[0]["probability"] for row in rows[:25]]
    assert alone == got["probability"].to_pylist()[:25]
    assert "mean_radius" in answers[0]["missing"] and len({*got["probability"].to_pylist()}) > 300
    release = champion(tumours_home, "tumours")
    assert release and set(got["release"].to_pylist()) == {release.release}
    assert (found.rows, found.parts, found.made, found.by) == (569, 4, 4, "features")
    assert found.line == f"569 rows of 2 file(s) scored by their features with {release.release}, 4 part(s), 4 of them now"


def test_a_second_run_makes_what_is_missing(
    scored: tuple[Path, Path, ScoredFiles], copied: tuple[Path, Path], tumours_home: Home
) -> None:  # fmt: skip
    """A part that is gone, one that was cut short, one that was written to, and one of a file that is new."""
    source, out = copied
    whole = files_in(scored[1])
    names = [name for name in whole if name.endswith(".parquet")]
    assert sorted(names) == [f"day={d}/rows-0000{n}.parquet" for d in "12" for n in "01"]
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    again = score_files(tumours_home, "tumours", str(source), out, batch_rows=64)
    assert again.made == 0 and again.line == f"unchanged: {scored[2].line.removesuffix(', 4 of them now')}"
    assert files_in(out) == whole and before == {name: (out / name).stat().st_mtime_ns for name in names}

    (out / names[0]).unlink()
    (out / names[1]).write_bytes(whole[names[1]][:-100])
    (out / names[2]).write_bytes(whole[names[2]][:4] + b"\xff" + whole[names[2]][5:])
    (out / ".rows-00001.parquet.4711.partial").write_bytes(b"what a killed process left")
    (source / "day=3").mkdir()
    shutil.copy(source / "day=1/rows.parquet", source / "day=3/rows.parquet")
    more = score_files(tumours_home, "tumours", str(source), out, batch_rows=64)
    assert (more.made, more.parts, more.rows) == (5, 6, 569 + 350)
    now = files_in(out)
    assert {name: now[name] for name in names} == {name: whole[name] for name in names}
    assert len(now) == 7 and read_json(out / MANIFEST)["finished"]


# --- rows that are named by their keys ---


@pytest.fixture(scope="module")
def released_buses(buses: Buses, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A copy of the buses' home in which their bento is champion."""
    home = Home(tmp_path_factory.mktemp("released") / "home")
    shutil.copytree(buses.home.root, home.root, ignore=shutil.ignore_patterns("predictions", "releases"))
    release = Release(buses.bento.tag, buses.bento.path, "", buses.snapshot.digest, parse_time("2024-05-06T12:00Z"),
                      buses.features.defs_digest, "", (), 0)  # fmt: skip
    assert promote(home, "buses", release, expected="", why="test")
    return home


def trips(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as requests write them, in other types than the spec's: what may be widened."""
    zoned = pa.timestamp("ms", "Europe/Rome")
    types = {"line": pa.dictionary(pa.int8(), pa.string()), "day": pa.date32(), "trip": pa.int16(), "stop": pa.large_string(),
             "due": zoned, "end": zoned, "length": pa.float32(), "low_floor": pa.bool_(), "seats": pa.uint8()}  # fmt: skip

    def plain(name: str, value: Any) -> Any:
        return None if value is None else parse_time(value) // 1_000 if name in ("due", "end") else value

    columns = {}
    for name, kind in types.items():
        values = [plain(name, row.get(name)) for row in rows]
        if name == "day":
            values = [None if v is None else v[:10] for v in values]
            columns[name] = pa.array(values, pa.string()).cast(kind)
        else:
            columns[name] = pa.array(values, pa.int64()).cast(kind) if name in ("due", "end") else pa.array(values).cast(kind)
    return pa.table({**columns, "passed_on": pa.array(range(len(rows)))})


def test_scores_by_keys_are_the_endpoints(released_buses: Home, buses_service: Service, tmp_path: Path) -> None:
    """Known rows soon and later, unknown ones with and without fields, closed ones, and ones that say what is not stored."""
    known = [trip_at(NOW + n * EVERY) for n in range(-3, 60)]
    nobody = {"line": "L9", "day": "2024-05-06T00:00:00Z", "trip": 1}
    given = {"stop": "b", "due": "2024-05-06T12:12:00Z", "end": "2024-05-06T12:42:00Z", "length": 8.0, "low_floor": True,
             "seats": 40}  # fmt: skip
    rows: list[dict[str, Any]] = [*known, trip_at(NOW - timedelta(hours=5))]
    rows += [nobody, {**nobody, **given}, {**nobody, "line": "L1", **given}]
    rows += [{**known[10], "stop": "z"}, {**known[11], "length": 99.5}, {**known[12], "due": "2024-05-06T20:00:00Z"}]
    (tmp_path / "in").mkdir()
    pq.write_table(trips(rows), tmp_path / "in" / "keys.parquet", row_group_size=20)
    found = score_files(released_buses, "buses", str(tmp_path / "in" / "*.parquet"), tmp_path / "out", batch_rows=16)
    got = pq.read_table(tmp_path / "out/keys-00000.parquet").to_pylist()
    assert found.by == "keys" and " scored by their keys at 2024-05-06T12:00:00Z with " in found.line and len(got) == len(rows)
    statuses = []
    for i, (row, made) in enumerate(zip(rows, got, strict=True)):
        assert made["passed_on"] == i and made["line"] == row["line"] and made["trip"] == row["trip"]
        status, answer = call(f"{buses_service.url}/predict", {"rows": [row]})
        statuses.append(status)
        if status == 200:
            wanted = answer["rows"][0]
            assert made["refused"] is None and {**made, **wanted, "key": 0} == {**made, "key": 0}, (row, wanted, made)
        else:
            assert made["probability"] is None and made["decision"] is None
            why = str(answer["error"]).partition(" was closed at ")[2] if status == 409 else str(answer["error"])
            assert f"rows[0].{made['refused']} (" in why if status == 422 else made["refused"] == f"already_closed at {why}"
    assert {200, 409, 422} == set(statuses) and found.refused == sum(s != 200 for s in statuses) and found.unknown == 3
    assert f"{found.refused} not answered, column `refused` says why; 3 unknown to the served store" in found.line
    assert [*files_in(tmp_path / "out")] and not (tmp_path / "out/_store").exists()


def test_bad_keys_are_named_by_row() -> None:
    fields = key_fields(load_spec("flights"))
    batch = pa.record_batch({"carrier": ["a", None], "flight": pa.array([1, 2**63], pa.uint64()), "word": ["x", "y\x1f"]})
    with pytest.raises(MillraceError, match="k: row 8: carrier is null; expected text: give the whole key"):
        values_of("k", batch, {}, fields["carrier"], 7)
    with pytest.raises(MillraceError, match=r"k: column 'flight': .*9223372036854775808.*; expected whole numbers"):
        values_of("k", batch, {}, fields["flight"], 0)
    late = pa.record_batch({"time_hour": pa.array([None, 1, 2**62], pa.timestamp("us", "UTC"))})
    with pytest.raises(MillraceError, match=r"k: row 2: time_hour is out of range; .*: give times in the years 2 to 9998"):
        values_of("k", late, {}, replace(fields["time_hour"], required=False), 0)
    with pytest.raises(MillraceError, match="k: row 4: carrier is longer than 1,000 characters, or holds a control character"):
        check_text("k", batch["word"], fields["carrier"], 3)
    with pytest.raises(MillraceError, match=r"k: column 'carrier' from row 3 on: .*UTF"):
        check_text("k", pa.array([b"\xff"]).view(pa.string()), fields["carrier"], 3)


def test_a_key_may_lie_in_the_names_of_folders() -> None:
    fields, batch = key_fields(load_spec("flights")), pa.record_batch({"other": [1, 2]})
    said = in_path("carrier=U%20A/flight=7/time_hour=2013-12-30/x.parquet")
    got = [values_of("k", batch, said, fields[name], 0).to_pylist()[1] for name in ("carrier", "flight", "time_hour")]
    assert got == ["U A", 7, datetime(2013, 12, 30, tzinfo=UTC)]
    with pytest.raises(MillraceError, match=r"k: column 'flight': .*seven.*; expected whole numbers"):
        values_of("k", batch, {"flight": "seven"}, fields["flight"], 0)


# --- what is wrong ---


def write(path: Path, table: pa.Table | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(table) if isinstance(table, bytes) else pq.write_table(table, path)


Changes = dict[str, tuple[Callable[[pa.Table], pa.Table | bytes | None], str]]
WRONG: Changes = {
    "no such file": (lambda t: None, "there is no such file or folder; give Parquet: a file, a folder or a glob"),
    "not Parquet": (lambda t: b"carrier,flight", "in/a.parquet: not readable as Parquet (Parquet magic bytes not found"),
    "cut short": (lambda t: pq_bytes(t)[:-9], "in/a.parquet: not readable as Parquet ("),
    "no rows": (lambda t: t.slice(0, 0), "in: 1 file(s) without a row; give files with rows to be scored"),
    "a feature is missing": (
        lambda t: t.rename_columns(["radius_mean" if n == MEAN else n for n in t.column_names]),
        "in/a.parquet: neither the row key ('row_digest' missing) nor the features ('mean_radius' missing) are columns of it",
    ),
    "text for a number": (
        lambda t: t.set_column(0, t.column_names[0], t["note"]),
        "in/a.parquet: column 'mean_radius' is of type string, expected numbers; cast it",
    ),
    "a column that scoring writes": (
        lambda t: t.rename_columns(["decision" if n == "note" else n for n in t.column_names]),
        "in/a.parquet: a column is named 'decision', which scoring writes; rename it, or leave it out",
    ),
    "a column twice": (lambda t: t.append_column("note", t["note"]), "in/a.parquet: two columns are named 'note'; rename one"),
}


def pq_bytes(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return bytes(out.getvalue())


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input(tumours_home: Home, tmp_path: Path, case: str) -> None:
    made, expected = WRONG[case]
    table = made(rows_of(tumours_home))
    if table is not None:
        write(tmp_path / "in" / "a.parquet", table)
    with pytest.raises(MillraceError) as error:
        score_files(tumours_home, "tumours", str(tmp_path / "in"), tmp_path / "out")
    assert expected in str(error.value) and str(tmp_path / "in") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_way_that_is_asked_for_needs_its_columns(tumours_home: Home, tmp_path: Path) -> None:
    table = rows_of(tumours_home)
    write(tmp_path / "in/a.parquet", table.rename_columns(["Mean_radius" if n == MEAN else n for n in table.column_names]))
    expected = r"'mean_radius' not among its columns \(.*; nearest: 'Mean_radius'\); scoring by features needs every feature"
    with pytest.raises(MillraceError, match=expected + ": add those that are not known as columns of nulls"):
        score_files(tumours_home, "tumours", str(tmp_path / "in"), tmp_path / "out", by="features")
    with pytest.raises(MillraceError, match=r"'row_digest' not among its columns .* scoring by keys needs the whole key"):
        score_files(tumours_home, "tumours", str(tmp_path / "in"), tmp_path / "out", by="keys")


def test_a_wrong_output(tumours_home: Home, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write(source / "a.parquet", rows_of(tumours_home))
    write(tmp_path / "full" / "theirs.csv", b"1,2")
    write(tmp_path / "file", b"")
    for out, expected in {
        "full": "holds something else (theirs.csv); give a folder of its own", "file": "is a file; give a folder",
        "in": "lie one in the other; give a folder of its own", "in/scores": "lie one in the other",
        ".": "lie one in the other",
    }.items():  # fmt: skip
        with pytest.raises(UsageError) as error:
            score_files(tumours_home, "tumours", str(source), tmp_path / out)
        assert expected in str(error.value)
    assert sorted(files_in(tmp_path)) == ["file", "full/theirs.csv", "in/a.parquet"]
    with pytest.raises(MillraceError, match=r"tumours has no release 'older' \(releases: millrace_tumours:"):
        score_files(tumours_home, "tumours", str(source), tmp_path / "out", release="older")
    with pytest.raises(MillraceError, match="tumours has no champion: type `millrace run tumours`"):
        score_files(Home(tmp_path / "empty"), "tumours", str(source), tmp_path / "out")


def test_what_was_made_of_something_else_is_refused_with_the_difference(copied: tuple[Path, Path], copied_home: Home) -> None:
    source, out = copied
    before = files_in(out)
    now = champion(copied_home, "tumours")
    assert now is not None
    promote(copied_home, "tumours", replace(now, release="millrace_tumours:other"), expected=now.release, why="test")
    changed = source / "day=1" / "rows.parquet"
    pq.write_table(pq.read_table(changed, partitioning=None).slice(1), changed)
    shutil.rmtree(source / "day=2")
    with pytest.raises(Refused) as error:
        score_files(copied_home, "tumours", str(source), out, batch_rows=65)
    assert str(error.value) == (
        f"{out} was made of something else: release is millrace_tumours:other, was {now.release}; batch_rows is 65, was 64; "
        "input day=1/rows.parquet has changed; input day=2/rows.parquet is gone; give another folder, or delete this one"
    )
    assert files_in(out) == before


def test_a_part_that_cannot_be_scored_leaves_nothing_and_the_next_is_scored(tumours_home: Home, tmp_path: Path) -> None:
    """A file that is corrupt in the middle, one with an infinite number, one that is gone, and a disk that is full."""
    release, source, table = champion(tumours_home, "tumours"), tmp_path / "in", rows_of(tumours_home)
    assert release is not None
    source.mkdir()
    pq.write_table(table, source / "good.parquet")
    pq.write_table(table, source / "torn.parquet", row_group_size=100, write_page_checksum=True)
    at = pq.read_metadata(source / "torn.parquet").row_group(3).column(20).data_page_offset
    with (source / "torn.parquet").open("r+b") as file:
        file.seek(at + 60)
        file.write(bytes(200))
    area = table.schema.get_field_index("mean_area")
    areas = pa.array([float("inf") if i == 400 else 1.0 for i in range(569)])
    pq.write_table(table.set_column(area, "mean_area", areas), source / "infinite.parquet")
    out = tmp_path / "out"
    running: list[subprocess.Popen[str]] = []
    job = Job(str(source), str(out), "features", 64, 0, "")
    with scoring_process(tumours_home, bento_folder(tumours_home, release) / "src", job, running) as ask:

        def error(name: str, groups: int = 1) -> str:
            with pytest.raises(MillraceError) as found:
                ask(Part(f"{name}-0.parquet", f"{name}.parquet", 0, groups, 0, 569))
            assert not files_in(out)
            return str(found.value)

        torn, end = error("torn", 6), "; put a whole copy there, and type the command again"
        assert torn.startswith(f"{source}/torn.parquet: rows from 256 on (row groups 0 to 5) cannot be read: "), torn
        assert torn.endswith(end)
        infinite = "infinite.parquet: row 400: mean_area is inf; expected a number below 2^63, or null"
        assert error("infinite") == f"{source}/{infinite}"
        assert "gone.parquet: rows from 0 on" in error("gone")
        limits = resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        full = error("good")
        assert full.startswith(f"{out}/good-0.parquet: cannot be written (") and "File too large" in full, full
        assert full.endswith("; free space or rights there, and type the command again: finished parts stay")
        resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, limits)
        assert ask(Part("good-0.parquet", "good.parquet", 0, 1, 0, 569)).rows == 569
    assert [*files_in(out)] == ["good-0.parquet"]


def test_a_disk_that_is_full_when_the_store_is_copied(released_buses: Home, tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", trips([trip_at(NOW + 3 * EVERY)]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(MillraceError, match=r"--output .*/out: .*; free space or rights there, and type the command again"):
            score_files(released_buses, "buses", str(tmp_path / "in"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert score_files(released_buses, "buses", str(tmp_path / "in"), tmp_path / "out").rows == 1


def test_two_at_once_into_one_folder(tumours_home: Home, scored: tuple[Path, Path, ScoredFiles]) -> None:
    source, out, _ = scored
    held = tumours_home.lock(f"score-{digest_of(str(out))[:16]}")
    with lock(held, what="a test"), pytest.raises(MillraceError, match=rf"scoring into {out} is already running \(process \d+\)"):
        score_files(tumours_home, "tumours", str(source), out)


def test_the_command_line_says_what_is_wrong(tumours_home: Home, tmp_path: Path) -> None:
    done = millrace(tumours_home.root, "score", "tumours", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert done.code == 2 and not done.out
    expected = "there is no such file or folder; give Parquet: a file, a folder or a glob"
    assert done.error == f"error: --input {tmp_path}/none: {expected}"


# --- kills ---


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_is_killed_the_output_is_the_same_to_the_byte(tumours_home: Home, tmp_path: Path) -> None:
    """The command, or one of its processes, again and again; then the manifest and every part are as if nothing had been."""
    draw, table = random.Random(3), rows_of(tumours_home)
    for i in range(12):
        write(tmp_path / f"in/{i:02}.parquet", pa.concat_tables([table.slice(i * 30)] * 40))
    words = ["tumours", "--input", str(tmp_path / "in"), "--json", "--output"]
    whole = millrace(tumours_home.root, "score", *words, str(tmp_path / "whole"), "--workers", "1")
    assert whole.code == 0 and whole.answer["made"] == 12, whole.err
    out, kills, partly = tmp_path / "out", 0, set()
    while kills < 8:
        process = subprocess.Popen(command("score", *words, str(out), "--workers", "2"), env=environment(tumours_home.root),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        parts = len([*out.glob("*.parquet")])
        while process.poll() is None and len([*out.glob("*.parquet")]) <= parts and parts < 12:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        if process.poll() is None:
            victims = [process] if kills % 2 else psutil.Process(process.pid).children()
            draw.choice(victims or [process]).send_signal(signal.SIGKILL)
            kills += 1
        said = process.communicate(timeout=60)
        assert process.returncode in (0, 1, -signal.SIGKILL) and "Traceback" not in said[1], said
        if process.returncode == 1:
            assert "error: a scoring process ended (-9): it said nothing; is memory short?" in said[1], said
        partly.add(len([*out.glob("*.parquet")]))
        if process.returncode == 0:
            shutil.rmtree(out)
    last = millrace(tumours_home.root, "score", *words, str(out), "--workers", "2")
    assert last.code == 0 and partly & {*range(1, 12)}, partly  # some were killed halfway
    assert files_in(out) == files_in(tmp_path / "whole")
    deadline = time.monotonic() + 10
    while any("deploy.batch" in " ".join(p.info["cmdline"] or ()) and str(tumours_home.root) in (p.info["cwd"] or "")
              for p in psutil.process_iter(["cmdline", "cwd"])):  # fmt: skip
        assert time.monotonic() < deadline, "a process outlived its command"
        time.sleep(0.1)


@pytest.mark.slow
def test_keys_are_asked_of_one_state_of_the_store_whatever_is_fed_meanwhile(
    buses: Buses, released_buses: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A scoring that breaks off goes on as of its own instant, though the store has moved on."""
    home = Home(tmp_path / "home")
    shutil.copytree(released_buses.root, home.root)
    for name in "abc":
        write(tmp_path / f"in/{name}.parquet", trips([trip_at(NOW + n * EVERY) for n in range(2, 100)]))
    source = str(tmp_path / "in")
    score_files(home, "buses", source, tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(score_parts._Scoring, "_refuse_change", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score_files(home, "buses", source, tmp_path / "out", workers=1)
    left = files_in(tmp_path / "out")
    assert "_store/store.sqlite" in left and 0 < len([n for n in left if n.endswith(".parquet")]) < 3, [*left]
    later = Anchor(parse_time("2024-05-06T12:30Z"), 0)
    store = home.online("buses", buses.features.defs_digest)
    assert feed(buses.spec, home.root / buses.features.path, store, later, "another")
    score_files(home, "buses", source, tmp_path / "out", workers=1)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    score_files(home, "buses", source, tmp_path / "later", workers=1)
    assert files_in(tmp_path / "later")["a-00000.parquet"] != files_in(tmp_path / "whole")["a-00000.parquet"]
    write(tmp_path / "in/d.parquet", trips([trip_at(NOW + 3 * EVERY)]))
    with pytest.raises(Refused, match=r"input d.parquet is new, and keys are asked as of one instant; give another folder"):
        score_files(home, "buses", source, tmp_path / "out")


@pytest.mark.slow
def test_an_input_that_is_written_to_meanwhile_is_refused(copied: tuple[Path, Path], tumours_home: Home, tmp_path: Path) -> None:
    source, out = copied[0] / "day=1", tmp_path / "new"
    touched = source / "rows.parquet"
    with pytest.raises(MillraceError, match=rf"{touched} was written to while it was read; wait until it is whole, delete"):
        score_files(tumours_home, "tumours", str(source), out, workers=1, tell=lambda line: os.utime(touched, (1, 1)))
    assert sorted(files_in(out)) == [MANIFEST, "rows-00000.parquet"] and not read_json(out / MANIFEST)["finished"]


@pytest.mark.slow
@pytest.mark.s3
def test_input_on_a_server_that_speaks_s3(scored: tuple[Path, Path, ScoredFiles], tumours_home: Home, s3: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(score_parts, "PART_ROWS", 150)
    fs.copy_files(str(scored[0]), "bucket/in", destination_filesystem=fs.S3FileSystem(endpoint_override=s3))
    score_files(tumours_home, "tumours", "s3://bucket/in", tmp_path / "out", batch_rows=64)
    assert files_in(tmp_path / "out") == files_in(scored[1])
    with pytest.raises(UsageError, match="--input s3://bucket/none: there is no such file or folder"):
        score_files(tumours_home, "tumours", "s3://bucket/none", tmp_path / "other")


@pytest.mark.slow
def test_the_flow_scores_what_is_new(copied: tuple[Path, Path], copied_home: Home, tmp_path: Path) -> None:
    """As a schedule does it: into a folder of the release that is champion then."""
    code = ("import sys; from flows.inprocess import run_story; from pipelines.home import open_home, process_env; import os; "
            "home = open_home(); os.environ.update(process_env(home)); "
            "print(run_story(home, 'score', *sys.argv[1:], again='again').line)")  # fmt: skip
    words = [sys.executable, "-c", code, "tumours", str(copied[0]), str(tmp_path / "{release}")]
    lines = []
    for _ in range(2):
        done = subprocess.run(words, env=environment(copied_home.root), cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(done.stdout.splitlines()[-1])
    now = champion(copied_home, "tumours")
    assert now and (tmp_path / now.release.partition(":")[2] / MANIFEST).is_file()
    assert lines[0].startswith("569 rows of 2 file(s)") and lines[1].startswith("unchanged: 569 rows of 2 file(s)")
