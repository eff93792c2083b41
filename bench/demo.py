"""`python -m bench.demo`: seconds and peak memory of the demo: first run, second run, after a stop, and set-up.

Figures: `first_s`, `second_s`, `stopped_s` (second run after `make stop`), `setup_s` (a clone's `make setup`; not with
--quick), `stages` (seconds each), `peak_rss_mb` (largest sum over the process tree).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from bench.record import options, report
from pipelines.manifest import ROOT, read_json

QUICK = ["tune.generations=1", "tune.size=2", "train.max_epochs=1", "split.train=20d", "gbdt.max_rounds=40",
         "serve.latency_budget=5s"]  # a busy machine refuses no smoke test


class Peak:
    """Largest resident memory of a process tree, sampled ten times a second, MB."""

    def __init__(self, pid: int) -> None:
        self.mb, self.root, self.over = 0.0, psutil.Process(pid), False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over:
            try:
                tree = [self.root, *self.root.children(recursive=True)]
                self.mb = max(self.mb, sum(_unique_mb(p) for p in tree))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)

    def stop(self) -> float:
        self.over = True
        self.thread.join()
        return self.mb


def _unique_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak MB of a command that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    peak = Peak(process.pid)
    code = process.wait()
    took, mb = time.monotonic() - began, peak.stop()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return took, mb


def setup_seconds() -> float:
    """Seconds of `make setup` in a clone of its own."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        began = time.monotonic()
        subprocess.run(["make", "-s", "setup"], cwd=clone, check=True)
        return time.monotonic() - began


def main() -> None:
    """Runs the demo in a home of its own and reports."""
    told = options("demo")
    home = Path(tempfile.mkdtemp(prefix="millrace-bench-")) / "home"
    if done := os.environ.get("BENCH_HOME"):  # of the tests of the demo: everything is there
        shutil.copytree(done, home, ignore=shutil.ignore_patterns("services"))
    env = {**os.environ, "MILLRACE_HOME": str(home)}
    port = ["serve.port=3900"]
    demo = [sys.executable, "-m", "flows.demo", "flights_demo", *port, *(QUICK if told.quick and not done else [])]
    try:
        first, peak = timed(demo, env)
        second, _ = timed(demo, env)
        down = [sys.executable, "-m", "flows.cli", "down"]
        timed(down, env)
        stopped, _ = timed(demo, env)
        timed(down, env)
        manifest = read_json(next((home / "runs" / "flights_demo").glob("*/manifest.json")))
    finally:
        shutil.rmtree(home.parent, ignore_errors=True)
    stages = {s["stage"]: s["seconds"] for s in manifest["stages"]}
    figures = {"first_s": round(first, 1), "second_s": round(second, 1), "stopped_s": round(stopped, 1),
               "setup_s": None if told.quick else round(setup_seconds(), 1), "stages": stages,
               "peak_rss_mb": round(peak)}  # fmt: skip
    report("demo", figures, manifest["stages"], told.json)


if __name__ == "__main__":
    main()
