"""`python -m bench.serving`: an endpoint under an open load, with the load generator on the same machine.

The flights of the demo (--quick: the tumours): one row by its key, all feature views looked up. Requests leave at their time
whether those before are answered or not, over connections that are kept; a latency counts from when a request should have left.
Beside it, in turn, the same model on the same features from the same store by FastAPI, as most write it, by a service of BentoML
with all that it puts around a route, by LitServe and by MLflow's scoring server. These neither check nor log.

Figures: at `rps` requests a second for `seconds`: `p50_ms`, `p99_ms`, `shed_share` (told to come again) with as many `workers` as
there are cores (`serve.workers`), and of `one_worker`, as all comparisons are; `cpu_ms` a request of each server, and
`cpu_ratio_vs` each; `cpu_ratio_vs_fastapi_ort` (both running, median of twenty rounds in turn of two seconds);
`max_rps_under_50ms` (largest rate whose p99 is below with nothing shed, at one of two tries); `ready_s`; `rss_growth_mb` over
`requests`; `equal` (the answers of all, bit for bit); `not_installed`: peers that are not here.
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.record import options, released, report
from deploy.process import call, free_port, start, stop
from deploy.rollout import bento_folder, champion
from pipelines.home import Home
from pipelines.manifest import read_json
from tests.command import QUICK, environment
from tests.e2e.raw_http import received, request

NEEDS = {"fastapi": "fastapi", "bentoml": "bentoml", "litserve": "litserve", "mlflow": "mlflow.pyfunc.scoring_server"}
RATE = 200


class Load:
    """Requests at a rate, over as many connections as are needed."""

    def __init__(self, port: int, sent: list[bytes]) -> None:
        self.port, self.sent = port, sent
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.taken: list[tuple[float, int]] = []

    async def one(self, due: float, number: int) -> None:
        while True:
            kept = bool(self.idle)
            reader, writer = self.idle.pop() if kept else await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(self.sent[number % len(self.sent)])
                status, _, _ = await received(reader)
                break
            except (asyncio.IncompleteReadError, ConnectionError):
                if not kept:  # one that lay idle may have been closed
                    raise
        self.taken.append((time.perf_counter() - due, status))
        self.idle.append((reader, writer))

    async def run(self, rate: float, seconds: float) -> None:
        begin, running = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            due = begin + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.create_task(self.one(due, number)))
        await asyncio.gather(*running)
        for _, writer in self.idle:
            writer.close()


def load(port: int, sent: list[bytes], rate: float, seconds: float) -> dict[str, float]:
    """Latencies in ms, and the share that was told to come again."""
    made = Load(port, sent)
    asyncio.run(made.run(rate, seconds))
    took, statuses = np.array([t for t, _ in made.taken]) * 1e3, np.array([s for _, s in made.taken])
    assert set(statuses.tolist()) <= {200, 429}, set(statuses.tolist())
    p50, p99 = np.percentile(took[statuses == 200], [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "shed_share": float((statuses == 429).mean()), "requests": len(took)}


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def cpu_s(pid: int) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in family(pid))


def rss_mb(pid: int) -> float:
    return sum(p.memory_info().rss for p in family(pid)) / 2**20


@contextmanager
def ours(home: Home, pipeline: str, workers: int = 1) -> Iterator[tuple[int, int, float]]:
    """The product's endpoint: port, process, seconds until it was ready."""
    release = champion(home, pipeline)
    assert release is not None
    began = time.perf_counter()
    folder, log = bento_folder(home, release), home.root / "bench.log"
    found = start(home, folder, port=free_port(), release=release.release, log=log, extra={"MILLRACE_WORKERS": str(workers)})
    took = time.perf_counter() - began
    try:
        yield found.port, found.pid, took
    finally:
        stop(found)


@contextmanager
def peer(home: Home, pipeline: str, kind: str, row: dict[str, Any]) -> Iterator[tuple[int, int, float]]:
    """Another framework's."""
    release = champion(home, pipeline)
    assert release is not None
    port, began = free_port(), time.perf_counter()
    command = [sys.executable, "-m", "bench.serving_peers", kind, str(bento_folder(home, release) / "src/bundle"), str(home.root)]
    with (home.root / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen([*command, str(port)], env=environment(home.root), stdout=log, stderr=log)
    try:
        while not _answers(port, kind, row):
            assert process.poll() is None, (home.root / f"{kind}.log").read_text()[-2_000:]
            time.sleep(0.05)
        yield port, process.pid, time.perf_counter() - began
    finally:
        with suppress(psutil.NoSuchProcess):  # it has died, and the log says of what
            every = family(process.pid)
            process.terminate()
            process.wait(30)
            for left in psutil.wait_procs(every, timeout=3)[1]:  # LitServe's workers outlive it
                left.kill()


def asked(kind: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request to a server."""
    return ("/invocations", {"dataframe_records": [row]}) if kind == "mlflow" else ("/predict", {"rows": [row]})


def _answers(port: int, kind: str, row: dict[str, Any]) -> bool:
    path, body = asked(kind, row)
    try:
        return call(f"http://127.0.0.1:{port}{path}", body, timeout=5)[0] == 200
    except OSError:
        return False


def in_turn(ours: tuple[int, int], other: tuple[int, int], sent: list[bytes], rounds: int, seconds: float) -> float:
    """CPU of a request of ours by that of another that runs beside it (port and process of each): the median over rounds in
    turn, so short that a machine whose speed changes is the same for both."""
    found = []
    for _ in range(rounds):
        took = []
        for port, pid in (ours, other):
            before = cpu_s(pid)
            took.append((load(port, sent, RATE, seconds), cpu_s(pid) - before)[1])
        found.append(took[0] / took[1])
    return statistics.median(found)


def fastest(port: int, sent: list[bytes], quick: bool) -> int:
    """The largest rate, in steps of 50, whose p99 stays below 50 ms with nothing shed, at the second try if not at the first:
    a machine that halts for a tenth of a second says nothing of a rate."""

    def held(rate: int) -> bool:
        found = load(port, sent, rate, 1 if quick else 8)
        return found["p99_ms"] <= 50 and not found["shed_share"]

    best = 0
    for rate in range(50, 2_000, 400 if quick else 50):
        if not any(held(rate) for _ in range(2)):
            break
        best = rate
    return best


def main() -> None:
    """Measures and reports."""
    told = options("serving")
    seconds, rounds, many, warm = (2, 1, 400, 1) if told.quick else (60, 2, 100_000, 2)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    pipeline, sets = ("tumours", QUICK) if told.quick else ("flights_demo", ("tune.generations=1", "tune.size=2"))
    try:
        home = released(work / "home", pipeline, sets)
        paths = read_json(next(home.runs(pipeline).glob("*/manifest.json")))["stage_paths"]
        row = read_json(home.root / paths["preflight"] / "preflight.json")["example"]
        sent = [request({"rows": [row]})]
        peers = [kind for kind, package in NEEDS.items() if not _missing(package)]
        served: dict[str, Callable[[], Any]] = {"millrace": lambda: ours(home, pipeline)}
        served |= {kind: (lambda kind=kind: peer(home, pipeline, kind, row)) for kind in peers}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in served}
        answers = {}
        for turn in range(rounds):
            for kind, opened in served.items():
                with opened() as (port, pid, ready):
                    path, body = asked(kind, row)
                    told_so = [request(body, path)]
                    load(port, told_so, 50, warm)
                    before = cpu_s(pid)
                    one = load(port, told_so, RATE, seconds if kind == "millrace" and not turn else min(seconds, 10))
                    found[kind].append({**one, "cpu_ms": (cpu_s(pid) - before) / one["requests"] * 1e3, "ready_s": ready})
                    _, answer = call(f"http://127.0.0.1:{port}{path}", body)
                    answers[kind] = answer["predictions"][0] if kind == "mlflow" else answer["rows"][0]["probability"]
        with ours(home, pipeline) as (port, pid, _):
            load(port, sent, 50, warm)
            best_alone = fastest(port, sent, told.quick)
            with peer(home, pipeline, "fastapi", row) as (other, its, _):
                load(other, sent, 50, warm)
                against_fastapi = in_turn((port, pid), (other, its), sent, 2 if told.quick else 20, seconds=warm)
        with ours(home, pipeline, workers := os.cpu_count() or 1) as (port, pid, _):
            load(port, sent, 100, warm if told.quick else 10)  # all of them are warm
            first = load(port, sent, RATE, seconds)
            best = fastest(port, sent, told.quick)
            load(port, sent, RATE, warm)
            begin = rss_mb(pid)
            rate = max(RATE, 0.8 * best)
            load(port, sent, rate, many / rate)
            grown = rss_mb(pid) - begin
    finally:
        shutil.rmtree(work, ignore_errors=True)

    def ratio(kind: str) -> float:
        return round(statistics.median(a["cpu_ms"] / b["cpu_ms"] for a, b in zip(found["millrace"], found[kind], strict=True)), 3)

    def latency(one: dict[str, float]) -> dict[str, float]:
        return {name: round(one[name], 4 if name == "shed_share" else 2) for name in ("p50_ms", "p99_ms", "shed_share")}

    figures = {
        "rps": RATE, "seconds": seconds, "workers": workers, **latency(first),
        "one_worker": {**latency(found["millrace"][0]), "max_rps_under_50ms": best_alone},
        "cpu_ms": {kind: round(statistics.median(r["cpu_ms"] for r in runs), 3) for kind, runs in found.items()},
        "cpu_ratio_vs_fastapi_ort": round(against_fastapi, 3),
        "cpu_ratio_vs": {kind: ratio(kind) for kind in peers},
        "p99_ms_of": {kind: round(statistics.median(r["p99_ms"] for r in runs), 2) for kind, runs in found.items()},
        "max_rps_under_50ms": best, "ready_s": round(statistics.median(r["ready_s"] for r in found["millrace"]), 2),
        "requests": many, "rss_growth_mb": round(grown, 1), "equal": len(set(answers.values())) == 1,
        "not_installed": [kind for kind in NEEDS if kind not in peers],
    }  # fmt: skip
    rows = [{"what": kind, **{n: round(v, 3) for n, v in run.items()}} for kind, runs in found.items() for run in runs]
    report("serving", figures, rows, told.json, "bentoml", "fastapi", "uvicorn", "onnxruntime", "lightgbm")


def _missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


if __name__ == "__main__":
    main()
