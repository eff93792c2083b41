"""`python -m bench.score`: files scored by a release, against a script by hand and against what its live endpoint answers.

Figures: `rows_per_s` of a whole command with one process (imports, digests and manifest with it), `ratio_to_handwritten` (its
rate over that of `bench.score_by_hand`, also started anew, also with one thread), `cpu_ratio_to_handwritten` (the same of CPU
seconds, which others on the machine change less), `loop_ratio_to_handwritten` (the same as the first, from the first row on), all
medians of rounds in turn; `speedup_2` of two processes; `keys_rows_per_s` of a whole command;
`endpoint_equal` (probabilities of the live endpoint, by features, at once and one by one, and by keys: equal exactly) of how
many `endpoint_rows`; `kill_resume_equal` (after `kills` by SIGKILL the folder is the one of a scoring that was never killed, to
the byte); `peak_mb` of the largest process by thousands of rows, and `raw_mb`, what the most rows hold as numbers of 8 bytes.
"""

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.record import options, released, report
from deploy.process import Service, call, free_port, start, stop
from deploy.rollout import Release, bento_folder, bento_spec, champion
from deploy.score_parts import BATCH_ROWS, MANIFEST, scoring_process
from deploy.scoring import key_table, known_rows
from deploy.tables import Job, Part
from features.frame import arrow_columns
from features.online import OnlineStore
from features.trainset import load_training_set
from pipelines.home import Home, process_env
from pipelines.manifest import ROOT, read_json
from tests.command import QUICK

FULL = ("split.train=35d", "tune.generations=1", "tune.size=2", "tune.max_epochs=1", "gate.resamples=50",
        "serve.latency_budget=5s")  # fmt: skip
GROUP = 25_000  # rows of a row group
SAMPLE, ALONE = 2_000, 100  # rows that the endpoint is asked about in large requests, and one by one
PARTS = 8


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its seconds and CPU seconds, what it said, and the peak MB of the largest of its processes."""

    seconds: float
    cpu_s: float
    said: str
    peak_mb: int


def run(home: Home, *words: str) -> Ran:
    """Runs a Python module. Raises SystemExit where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", *words], env=environment(home), cwd=ROOT, stdout=out,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        peak, ended = 0, 0
        while not ended:
            peak = max(peak, highest_mb(process.pid))
            time.sleep(0.02)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode, took = os.waitstatus_to_exitcode(status), time.monotonic() - began
        out.seek(0)
        said = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {said}")
    return Ran(took, used.ru_utime + used.ru_stime, said, peak)


def highest_mb(pid: int) -> int:
    """The most that a process or one of its children has held so far. (rusage would count what its parent held at the fork.)"""
    peak = 0
    with suppress(psutil.Error, OSError):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error, OSError):
                held = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, int(held[1]) // 1_000 if held else 0)
    return peak


def millrace(home: Home, *words: str) -> Ran:
    """Runs a command."""
    return run(home, "flows.cli", *words, "--json")


def environment(home: Home) -> dict[str, str]:
    """Of every process here, the one by hand too."""
    return {**os.environ, **process_env(home)}


def in_one_process(home: Home, release: Release, source: Path, out: Path) -> float:
    """Seconds in which a scoring process that has started scores a file."""
    meta = pq.read_metadata(source)
    job = Job(str(source.parent), str(out), "features", BATCH_ROWS, 0, "")
    with scoring_process(home, bento_folder(home, release) / "src", job) as ask:
        began = time.monotonic()
        ask(Part("part.parquet", source.name, 0, meta.num_row_groups, 0, meta.num_rows))
        return time.monotonic() - began


def write_rows(home: Home, path: Path, rows: int, seed: int) -> None:
    """Rows of the training set, drawn again and again."""
    frame = load_training_set(next((home.root / "artifacts/training_set").iterdir())).frame
    drawn = np.random.default_rng(seed).integers(0, len(next(iter(frame.values()))), rows)
    table = pa.table({**arrow_columns({n: v[drawn] for n, v in frame.items()}), "row_id": np.arange(rows) + seed * rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=GROUP)


def write_keys(home: Home, release: Release, path: Path, rows: int) -> None:
    """Keys that the served store knows, again and again."""
    spec = bento_spec(home, release)
    store = OnlineStore(spec, home.online(spec.pipeline, release.defs_digest))
    known = key_table(spec, known_rows(spec, store))
    path.parent.mkdir(parents=True)
    pq.write_table(known.take(pa.array(np.arange(rows) % len(known))), path, row_group_size=GROUP)


def answers(service: Service, route: str, rows: list[dict[str, Any]], at_once: int) -> list[float]:
    """Probabilities of the live endpoint."""
    found: list[float] = []
    for begin in range(0, len(rows), at_once):
        status, answer = call(f"{service.url}/{route}", {"rows": rows[begin : begin + at_once]})
        if status != 200:
            raise SystemExit(f"{route} answered {status}: {answer}")
        found += [row["probability"] for row in answer["rows"]]
    return found


def requests(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as JSON has them; what is missing is left out."""
    times = [f.name for f in table.schema if pa.types.is_timestamp(f.type)]
    rows = [{n: v for n, v in row.items() if v is not None and v == v} for row in table.to_pylist()]
    return [{n: v.isoformat() if n in times else v for n, v in row.items()} for row in rows]


def equal_answers(service: Service, rows: Path, scores: Path, by_keys: Path, keys: list[str]) -> tuple[bool, int]:
    """Whether the endpoint answers a sample of what was scored with the same numbers; and how many rows that is."""
    some = pa.array(np.random.default_rng(1).choice(pq.read_metadata(rows).num_rows, SAMPLE, replace=False))
    asked = requests(pq.read_table(rows).drop_columns("row_id").take(some))
    wanted = pq.read_table(scores)["probability"].take(some).to_pylist()
    named = pq.read_table(by_keys)
    named = named.filter(pc.is_null(named["refused"])).slice(0, SAMPLE)
    equal = [
        answers(service, "predict_features", asked, 500) == wanted,
        answers(service, "predict_features", asked[:ALONE], 1) == wanted[:ALONE],
        answers(service, "predict", requests(named.select(keys)), 500) == named["probability"].to_pylist(),
    ]
    return all(equal), SAMPLE + ALONE + len(named)


def killed(home: Home, words: list[str], out: Path, most: int, span: float) -> int:
    """Scores into a folder with one SIGKILL after another, then in peace; how many were killed at work. Each kill comes at an
    instant drawn from the `span` seconds in which a scoring writes its parts; one that is through by then is begun anew.
    """
    draw, kills = random.Random(5), 0
    while kills < most:
        process = subprocess.Popen([sys.executable, "-m", "flows.cli", *words, str(out)], env=environment(home), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        before = len([*out.glob("*.parquet")])
        while process.poll() is None and len([*out.glob("*.parquet")]) <= before:
            time.sleep(0.002)  # until there is one part more
        time.sleep(draw.random() * span * (1 - before / PARTS))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / MANIFEST).exists() and read_json(out / MANIFEST)["finished"]:
            shutil.rmtree(out)
        else:
            kills += 1
    millrace(home, *words, str(out))
    return kills


def writing_s(out: Path) -> float:
    """Seconds from the first part of a folder to its last."""
    times = [path.stat().st_mtime for path in out.glob("*.parquet")]
    return max(times) - min(times)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def measure(
    home: Home, release: Release, folder: Path, rows: int, rounds: int, kills: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Figures and rounds of everything but the release itself."""
    name, bundle = release.release.partition(":")[0].removeprefix("millrace_"), bento_folder(home, release) / "src/bundle"
    source, few, many, parts = (folder / name for name in ("in/rows.parquet", "few/rows.parquet", "many/rows.parquet", "parts"))
    write_rows(home, source, rows, 0)
    write_rows(home, few, rows // PARTS, 0)
    write_rows(home, many, rows * 4, 0)
    for i in range(PARTS):
        write_rows(home, parts / f"{i}.parquet", rows // PARTS, i)
    write_keys(home, release, folder / "keys/rows.parquet", rows // PARTS)

    def score(path: Path, out: str, workers: int) -> Ran:
        return millrace(home, "score", name, "--input", str(path), "--workers", str(workers), "--output", str(folder / out))

    ran: list[dict[str, Any]] = []
    peak = {n * rows // PARTS // 1000: score(path, f"out-{n}", 2).peak_mb for n, path in ((1, few), (4 * PARTS, many))}
    for i in range(rounds):
        ours = score(source, f"one-{i}", 1)
        hand = run(home, "bench.score_by_hand", str(bundle), str(source), str(folder / "hand.parquet"))
        loop = in_one_process(home, release, source, folder / f"loop-{i}")
        two = score(parts, f"two-{i}", 2)
        took = {"command_s": ours.seconds, "script_by_hand_s": hand.seconds, "two_s": two.seconds, "loop_s": loop,
                "loop_by_hand_s": float(hand.said), "command_cpu_s": ours.cpu_s, "script_by_hand_cpu_s": hand.cpu_s}  # fmt: skip
        ran.append({name: round(seconds, 3) for name, seconds in took.items()})
    scores = folder / "one-0/rows-00000.parquet"
    numbers = [pq.read_table(path)["probability"].to_numpy() for path in (scores, folder / "hand.parquet")]
    if not np.abs(numbers[0] - numbers[1]).max() < 1e-9:
        raise SystemExit("the script by hand answers otherwise")
    by_keys = score(folder / "keys", "by-keys", 1)
    words = ["score", name, "--input", str(parts), "--workers", "2", "--output"]
    kills = killed(home, words, folder / "killed", kills, writing_s(folder / "two-0"))
    service = start(home, bento_folder(home, release), port=free_port(), release=release.release, log=folder / "log", extra={})
    try:
        keys = [*bento_spec(home, release).row_key]
        equal, asked = equal_answers(service, source, scores, folder / "by-keys/rows-00000.parquet", keys)
    finally:
        stop(service)

    def ratio(ours: str, theirs: str) -> float:
        return round(statistics.median(r[theirs] / r[ours] for r in ran), 3)

    seconds = statistics.median(r["command_s"] for r in ran)
    figures = {
        "rows_per_s": round(rows / seconds), "ratio_to_handwritten": ratio("command_s", "script_by_hand_s"),
        "cpu_ratio_to_handwritten": ratio("command_cpu_s", "script_by_hand_cpu_s"),
        "loop_ratio_to_handwritten": ratio("loop_s", "loop_by_hand_s"), "speedup_2": ratio("two_s", "command_s"),
        "keys_rows_per_s": round(rows // PARTS / by_keys.seconds), "endpoint_equal": equal, "endpoint_rows": asked,
        "kill_resume_equal": contents(folder / "killed") == contents(folder / "two-0"), "kills": kills, "peak_mb": peak,
        "raw_mb": round(4 * rows * len(pq.read_schema(source)) * 8 / 1e6), "model": read_json(bundle / "model.json")["chosen"],
    }  # fmt: skip
    return figures, ran


def main() -> None:
    """Makes a release, measures and reports."""
    told = options("score")
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    name, sets, rows, rounds, kills = ("tumours", QUICK, 40_000, 1, 2) if told.quick else ("flights_demo", FULL, 100_000, 3, 5)
    try:
        home = released(folder / "home", name, sets)
        release = champion(home, name)
        assert release is not None
        figures, ran = measure(home, release, folder, rows, rounds, kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("score", figures, ran, told.json, "numpy", "pyarrow", "onnxruntime", "lightgbm", "bentoml")


if __name__ == "__main__":
    main()
