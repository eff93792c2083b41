"""Batch scoring of files: what is to be scored, cut into parts; what of it is done; and the processes that do the rest.

The output is a folder of Parquet files, each made of some row groups of one input file and named after it, and a manifest.
A part is there whole or not at all; a second run makes the parts that are not there.
"""

import json
import os
import queue
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.rollout import KEPT, Release, bento_folder, bento_spec, champion, find_release, kept_releases
from deploy.tables import Counts, Job, Part, Way, check_columns, find_files, in_path, open_source, way_of
from features.cells import PUSHED, copy_cells
from features.online import OnlineStore, served_store
from features.packed import layouts
from pipelines.clock import Clock, iso
from pipelines.errors import MillraceError, Refused, UsageError
from pipelines.home import Home, process_env
from pipelines.manifest import digest_of, file_digest, library_versions, lock, read_json, write_json

MANIFEST, STORE = "_millrace.json", "_store"  # names that readers of the folder pass over
PART_ROWS = 250_000  # a part ends with the row group that reaches this
BATCH_ROWS = 8_192
LIBRARIES = ("lightgbm", "numpy", "onnxruntime", "pyarrow")  # that make numbers or bytes
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ScoredFiles:
    """What the folder holds now, and how many parts this run made; `refused` rows have no answer and say why."""

    pipeline: str
    release: str
    path: str
    by: Way
    rows: int
    parts: int
    made: int
    refused: int
    unknown: int
    line: str


@dataclass(frozen=True)
class _Input:
    name: str
    size: int
    changed_ns: int
    groups: tuple[int, ...]  # rows of each row group
    schema: pa.Schema


def score_files(
    home: Home, pipeline: str, source: str, output: Path, *, release: str | None = None, by: Way | None = None,
    workers: int | None = None, batch_rows: int | None = None, at: str = "", tell: Tell = lambda line: None,
) -> ScoredFiles:  # fmt: skip
    """Scores the rows of Parquet files (a file, a folder, a glob, a URI) as the endpoint of a release answers them.

    Rows that hold every feature are scored by them, others by their key, at one instant of one state of the served store
    (`at`: the server that holds it, where that is not the home). `{release}` in the output stands for the release's version.
    `batch_rows`: how many are in memory of each process; default: as many as when the folder was begun. A kill at any time
    costs the parts that were being made. Raises Refused where the folder was made of something else, UsageError for what is
    not there, MillraceError for rows that cannot be scored.
    """
    found = champion(home, pipeline) if release is None else find_release(home, pipeline, release)
    if found is None:
        raise MillraceError(f"{pipeline} has no champion: type `millrace run {pipeline}`")
    if not (bento_folder(home, found) / "src/deploy/batch.py").is_file():
        raise MillraceError(
            f"the bento of {found.release} is not there, or was packaged before files could be scored: "
            f"`millrace run {pipeline}` packages a new one"
        )
    output = Path(str(output).replace("{release}", found.release.partition(":")[2])).absolute()
    try:
        root, names = find_files(source)
        inside = Path(source).is_dir() and output.is_relative_to(root)  # where a second run would take it for input
        if inside or any(Path(root, name).is_relative_to(output) for name in names):
            raise UsageError(f"--output {output} and --input {source} lie one in the other; give a folder of its own")
        with lock(home.lock(f"score-{digest_of(str(output))[:16]}"), what=f"scoring into {output}"):
            return _Scoring(home, pipeline, found, root, output, by, batch_rows, at).run(names, workers, tell)
    except (OSError, sqlite3.Error) as error:
        raise MillraceError(f"--input {source}, --output {output}: {error}; free space or rights there, and type the command "
                            "again: finished parts stay") from None  # fmt: skip


class _Scoring:
    """One scoring into one folder, under its lock."""

    def __init__(
        self, home: Home, pipeline: str, release: Release, root: str, output: Path, by: Way | None,
        batch_rows: int | None, at: str
    ) -> None:  # fmt: skip
        self.home, self.pipeline, self.release, self.root, self.output = home, pipeline, release, root, output
        self.by, self.batch_rows, self.at, self.spec = by, batch_rows, at, bento_spec(home, release)
        self.system, self.base = open_source(root)

    def run(self, names: list[str], workers: int | None, tell: Tell) -> ScoredFiles:
        inputs = [self._input(name) for name in names]
        way = self._check(inputs)
        held = self._held()
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(names, pool.map(self._digest, inputs), strict=True))
        batch_rows = self.batch_rows or held.get("batch_rows") or BATCH_ROWS
        pins = {"pipeline": self.pipeline, "release": self.release.release, "by": way, "batch_rows": batch_rows,
                "libraries": dict(library_versions(*LIBRARIES))}  # fmt: skip
        if held:
            self._refuse_differences(held, pins, digests)
        planned = _cut(inputs)
        self._refuse_strangers({part.name for part in planned} if held else set())
        instant = held["instant"] if held else self._pin_store() if way == "keys" else {}
        parts = [replace(p, made_of=digest_of([digests[p.file], p.begin, p.end, pins, instant])) for p in planned]
        body = {**pins, "instant": instant, "what": "scores of Parquet files"}
        body["inputs"] = {i.name: {"digest": digests[i.name], "bytes": i.size, "rows": sum(i.groups)} for i in inputs}
        known = held["parts"] if held else {}
        todo = [part for part in parts if not self._is_done(part, known.get(part.name, {}))]
        if not held or todo or not held["finished"]:
            if way == "keys" and not (self.output / STORE).exists():
                raise MillraceError(f"{self.output}: parts are missing, and so is the copy of the served store that the others "
                                    "were looked up in; delete the folder and type the command again")  # fmt: skip
            write_json(self.output / MANIFEST, {**body, "parts": known, "finished": False})
            job = Job(self.root, str(self.output), way, batch_rows, instant.get("now_us", 0), str(self.output / STORE))
            self._work(job, todo, workers, {i.name: i for i in inputs}, tell)
            known = {part.name: self._told(part) for part in parts}
            write_json(self.output / MANIFEST, {**body, "parts": known, "finished": True})
        shutil.rmtree(self.output / STORE, ignore_errors=True)
        return self._summary(way, instant, known, len(todo), len(inputs))

    def _input(self, name: str) -> _Input:
        """What a file says of itself. Raises MillraceError where it is no Parquet."""
        path = f"{self.base}/{name}"
        info = self.system.get_file_info(path)
        try:
            with self.system.open_input_file(path) as raw, pq.ParquetFile(raw) as file:
                meta, schema = file.metadata, file.schema_arrow
                groups = tuple(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
        except (pa.ArrowException, OSError) as error:
            raise MillraceError(
                f"{self.root}/{name}: not readable as Parquet ({error}); replace it by a whole copy, or put `_` before its name"
            ) from None
        return _Input(name, info.size, info.mtime_ns, groups, schema)

    def _check(self, inputs: list[_Input]) -> Way:
        """How the rows are asked. Raises MillraceError for columns that do not fit it, and where there is no row."""
        said = [in_path(i.name) for i in inputs]
        first = {*inputs[0].schema.names, *said[0]}
        way = self.by or way_of(f"{self.root}/{inputs[0].name}", sorted(first), self.spec)
        for one, folders in zip(inputs, said, strict=True):
            check_columns(f"{self.root}/{one.name}", one.schema, folders, self.spec, way)
        if not any(sum(i.groups) for i in inputs):
            raise MillraceError(f"{self.root}: {len(inputs)} file(s) without a row; give files with rows to be scored")
        return way

    def _held(self) -> dict[str, Any]:
        """The manifest of the output folder, or nothing."""
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output} is a file; give a folder")
        return read_json(self.output / MANIFEST) if (self.output / MANIFEST).exists() else {}

    def _digest(self, one: _Input) -> str:
        digest = sha256()
        with self.system.open_input_stream(f"{self.base}/{one.name}") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def _refuse_differences(self, held: dict[str, Any], pins: dict[str, Any], digests: dict[str, str]) -> None:
        """Raises Refused where the folder was made of something else. New files are no difference, unless keys are asked."""
        told = [f"{name} is {pins[name]}, was {held[name]}" for name in pins if pins[name] != held[name]]
        for name, was in held["inputs"].items():
            if digests.get(name) != was["digest"]:
                told.append(f"input {name} {'has changed' if name in digests else 'is gone'}")
        if pins["by"] == "keys" and (new := [name for name in digests if name not in held["inputs"]]):
            told.append(f"input {new[0]} is new, and keys are asked as of one instant")
        if told:
            shown = "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "")
            raise Refused(f"{self.output} was made of something else: {shown}; give another folder, or delete this one")

    def _refuse_strangers(self, parts: set[str]) -> None:
        """Removes what killed processes left. Raises UsageError for a file in the output that is none of ours."""
        found = [path for path in self.output.rglob("*") if path.is_file() and self.output / STORE not in path.parents]
        left = [path for path in found if re.fullmatch(rf"\..*\.partial|\.{MANIFEST}\..*", path.name)]
        for path in left:
            path.unlink()
        names = sorted({path.relative_to(self.output).as_posix() for path in found if path not in left} - {*parts, MANIFEST})
        if names:
            raise UsageError(f"--output {self.output} holds something else ({', '.join(names[:3])}); give a folder of its own")

    def _pin_store(self) -> dict[str, Any]:
        """Copies the served store, so that all rows see one state of it, however long they take; which, and as of when."""
        if self.release.release not in {r.release for r in kept_releases(self.home, self.pipeline)}:
            raise MillraceError(
                f"the served store of {self.release.release} is no longer fed (the last {KEPT} champions' are); score rows that "
                "hold their features, or take a newer release"
            )
        place = served_store(self.at, self.pipeline, self.home.online(self.pipeline, self.release.defs_digest))
        OnlineStore(self.spec, place)  # is there, and packed as this release reads it
        copy_cells(place, self.output / STORE, [*layouts(self.spec)])
        store, clock = OnlineStore(self.spec, self.output / STORE), self.spec.clock
        now = Clock(clock.kind, clock.speed, clock.offset, store.anchor()).now_us() if clock else 0
        return {"now_us": now, "snapshot": store.last["snapshot"], "pushed": int(store.last.get(PUSHED, 0))}

    def _is_done(self, part: Part, told: dict[str, Any]) -> bool:
        """Whether a part is there, made of what it is to be made of and as it was written; what is not is removed."""
        path = self.output / part.name
        if not path.exists():
            return False
        try:
            made_of = (pq.read_metadata(path).metadata or {}).get(b"millrace.made_of", b"").decode()
            if made_of == part.made_of and told.get("digest") in (None, file_digest(path)):
                return True
        except (pa.ArrowException, OSError):
            pass
        path.unlink()
        return False

    def _told(self, part: Part) -> dict[str, Any]:
        """What the manifest says of a finished part."""
        path = self.output / part.name
        counts = json.loads(pq.read_metadata(path).metadata[b"millrace.counts"])
        return {"file": part.file, "row_groups": [part.begin, part.end], **counts, "digest": file_digest(path)}

    def _work(self, job: Job, todo: list[Part], workers: int | None, inputs: dict[str, _Input], tell: Tell) -> None:
        """Has the parts scored by processes of the bento, one thread each. Raises the first error; the others are stopped."""
        waiting: queue.SimpleQueue[Part] = queue.SimpleQueue()
        for part in todo:
            waiting.put(part)
        failed: list[BaseException] = []
        src, done = bento_folder(self.home, self.release) / "src", 0
        running: list[subprocess.Popen[str]] = []

        def one() -> None:
            nonlocal done
            try:
                with scoring_process(self.home, src, job, running) as ask:
                    while not failed and not waiting.empty():
                        part = waiting.get_nowait()
                        counts = ask(part)
                        self._refuse_change(inputs[part.file], part)
                        done += 1
                        tell(f"  {done} of {len(todo)} parts: {part.name}, {counts.rows:,} rows")
            except queue.Empty:
                pass
            except BaseException as error:
                failed.append(error)
                _kill(running)

        threads = [threading.Thread(target=one) for _ in range(min(workers or os.cpu_count() or 1, len(todo)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            _kill(running)
            for path in self.output.rglob(".*.partial"):
                path.unlink(missing_ok=True)
        if failed:
            raise failed[0]

    def _refuse_change(self, one: _Input, part: Part) -> None:
        """Raises MillraceError for a file that was written to since its digest was taken, without the part made of it."""
        info = self.system.get_file_info(f"{self.base}/{one.name}")
        if (info.size, info.mtime_ns) != (one.size, one.changed_ns):
            (self.output / part.name).unlink()
            raise MillraceError(f"{self.root}/{one.name} was written to while it was read; wait until it is whole, delete "
                                f"{self.output} and type the command again")  # fmt: skip

    def _summary(self, way: Way, instant: dict[str, Any], parts: dict[str, dict[str, Any]], made: int, files: int) -> ScoredFiles:
        rows, refused, unknown = (sum(part[name] for part in parts.values()) for name in ("rows", "refused", "unknown"))
        release = self.release.release
        when = f" at {iso(instant['now_us'])}" if instant and self.spec.timed else ""
        line = f"{rows:,} rows of {files:,} file(s) scored by their {way}{when} with {release}, {len(parts):,} part(s)"
        line = f"unchanged: {line}" if not made else f"{line}, {made:,} of them now"
        line += f"; {refused:,} not answered, column `refused` says why" if refused else ""
        line += f"; {unknown:,} unknown to the served store" if unknown else ""
        return ScoredFiles(self.pipeline, release, str(self.output), way, rows, len(parts), made, refused, unknown, line)


def _cut(inputs: list[_Input]) -> list[Part]:
    """The parts of the files: row groups of PART_ROWS rows or a few more, named after their file and place in it."""
    parts: list[Part] = []
    for one in inputs:
        stem, begin, first, rows, number = one.name.removesuffix(".parquet"), 0, 0, 0, 0
        for g, more in enumerate(one.groups):
            rows += more
            if rows and (rows >= PART_ROWS or g == len(one.groups) - 1):
                parts.append(Part(f"{stem}-{number:05d}.parquet", one.name, begin, g + 1, first, rows))
                begin, first, rows, number = g + 1, first + rows, 0, number + 1
    names = [part.name for part in parts]
    if len({*names}) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UsageError(f"two input files would be scored into {twice}; rename one of them")
    return parts


def _kill(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        process.kill()
        process.wait()


@contextmanager
def scoring_process(
    home: Home, src: Path, job: Job, running: list[subprocess.Popen[str]] | None = None
) -> Iterator[Callable[[Part], Counts]]:  # fmt: skip
    """Has a process of a bento score parts, one after another; it is noted among the `running`.

    Raises MillraceError as it says, or when it has ended.
    """
    env = {**os.environ, **process_env(home), "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen([sys.executable, "-m", "deploy.batch"], cwd=src, env=env, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=words, text=True)  # fmt: skip
        if running is not None:
            running.append(process)
        into, out = process.stdin, process.stdout
        assert into is not None and out is not None

        def ask(what: Job | Part) -> dict[str, Any]:
            try:
                print(json.dumps(asdict(what)), file=into, flush=True)
                line = out.readline()
            except BrokenPipeError:
                line = ""
            if not line.endswith("\n"):
                words.seek(0)
                last = (words.read().strip().splitlines() or ["it said nothing; is memory short? --workers 1 takes less"])[-1]
                raise MillraceError(f"a scoring process ended ({process.wait()}): {last[:300]}; type the command again: finished "
                                    "parts stay")  # fmt: skip
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise MillraceError(answer["error"])
            return answer

        try:
            if held := {what: names for what, names in ask(job).items() if names}:  # as in preflight
                raise MillraceError(f"a scoring process of {src} holds {held}: package the release again")
            yield lambda part: Counts(**ask(part))
        finally:
            with suppress(BrokenPipeError):
                into.close()
            process.wait()
