"""`python -m bench.recovery`: two gloo ranks on the CPU, killed with -9 and stopped at random moments, until all is trained.

A network (2 × 128) is trained once in peace, then again under fire: `kill -9` of rank 0, of the other rank, of all ranks and
of the supervisor, and SIGSTOP of either rank, each up to 1.5 s after the last blow was made good; a training that ends is
begun again while blows are left. Checkpoints are two seconds apart.

Figures: `recovered_share` (of all blows, those after which training went beyond the step that it had reached),
`kill_to_step_p95_s` (kill of ranks → end of the first optimiser step after it; `kill_to_ground_p95_s` → first step that had
never been done), `supervisor_kill_ratio` (the same for the supervisor, over the seconds that a process takes to import torch
and Lightning, measured just before with the training paused; median of the ratios), `hang_to_step_p95_s`, `steps_lost_p95`
(done, but not in the checkpoint), `weights_max_abs_diff` against the undisturbed training, `checkpoint_stall_share` (of the
undisturbed training: seconds that its loop waited for checkpoints), `writing_slowdown` (time of a step while a checkpoint is
written over that of others).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from bench.record import options, report
from features.preprocess import Preprocess
from models.beat import STEPS, Beat
from models.elastic import Zygote, finish, submit
from models.job import Job
from pipelines.manifest import read_json
from pipelines.spec import Network, Train

RANKS, COLUMNS, EVERY_US = 2, 30, 2_000_000
PATIENCE_S = 180.0  # a blow that is not made good by then has ended the training
KILLS = ("rank 0", "other rank", "all ranks", "supervisor")
STOPS = ("stop rank 0", "stop other rank")


@dataclass(frozen=True)
class Blow:
    """One blow: what it hit, seconds until the first step after it and until new ground, and steps done in vain."""

    target: str
    to_step_s: float
    to_ground_s: float
    steps_lost: int
    import_s: float = 0.0


def write_arrays(folder: Path, rows: int) -> Path:
    """Seeded numbers, and a label that depends on them; 0.85 of the rows train."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True)
    scaled = rng.normal(size=(rows, COLUMNS)).astype(np.float32)
    score = scaled[:, 0] - scaled[:, 1] + np.sin(3 * scaled[:, 2])
    np.save(folder / "scaled.npy", scaled)
    np.save(folder / "codes.npy", np.zeros((rows, 0), np.int64))
    np.save(folder / "label.npy", (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(np.float32))
    np.save(folder / "part.npy", (np.arange(rows) >= 0.85 * rows).astype(np.int8))
    names, one = tuple(f"x{i}" for i in range(COLUMNS)), (1.0,) * COLUMNS
    low, zero = (-9.0,) * COLUMNS, (0.0,) * COLUMNS
    Preprocess(names, (), low, tuple(-v for v in low), zero, one, (), ()).save(folder / "preprocess.json")
    return folder


def import_s(paused: list[int]) -> float:
    """Seconds of a process that imports torch and Lightning, while the processes `paused` stand still."""
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, pytorch_lightning"], check=True)
    seconds = time.monotonic() - began
    for pid in reversed(paused):
        os.kill(pid, signal.SIGCONT)
    return seconds


def heart(folder: Path) -> tuple[int, Beat] | None:
    """The heartbeat of rank 0 with the number of its file: every generation of ranks has a new one."""
    path = folder / "heartbeat-0"
    try:
        return path.stat().st_ino, Beat(path)
    except (OSError, ValueError):
        return None


class Training:
    """One training under fire."""

    def __init__(self, folder: Path, job: Job, zygote: Zygote, rng: random.Random) -> None:
        self.folder, self.zygote, self.rng = folder, zygote, rng
        job.prepare(folder)
        self.future = submit(folder, ranks=RANKS, max_restarts=10_000, zygote=zygote)

    def stepping(self, *, since: int = -1, beyond: int = -1) -> tuple[int, Beat] | None:
        """Waits for a step of ranks that are not `since`, with a number above `beyond`; None when the training is over."""
        until = time.monotonic() + PATIENCE_S
        while not self.future.done() and time.monotonic() < until:
            found = heart(self.folder)
            if found is not None and found[0] != since and found[1].phase == STEPS and found[1].step > beyond:
                return found
            time.sleep(0.001)
        return None

    def strike(self, target: str) -> Blow | None:
        """Waits for a random moment, strikes, and waits until it is made good. None when it was too late for that."""
        alive = self.stepping()
        time.sleep(self.rng.uniform(0, 1.5))
        if alive is None or self.future.done() or alive[1].share > 0.9:
            return None
        pids = sorted(child.pid for child in psutil.Process(self.zygote.process.pid).children())
        if len(pids) != RANKS:
            return None
        seconds = import_s([self.zygote.process.pid, *pids]) if target == "supervisor" else 0.0
        hit = {"rank 0": pids[:1], "other rank": pids[1:], "all ranks": pids, "supervisor": [self.zygote.process.pid]}
        began, before = time.monotonic(), alive[1].step
        for pid in hit[target.removeprefix("stop ")]:
            os.kill(pid, signal.SIGSTOP if target in STOPS else signal.SIGKILL)
        new = self.stepping(since=alive[0])
        if new is None:
            return Blow(target, float("inf"), float("inf"), before)
        to_step_s, resumed = time.monotonic() - began, new[1].step - 1
        ground = self.stepping(since=alive[0], beyond=before)
        to_ground_s = time.monotonic() - began if ground else float("inf")
        return Blow(target, to_step_s, to_ground_s, max(0, before - resumed), seconds)


def under_fire(root: Path, job: Job, targets: list[str], rng: random.Random) -> tuple[list[Blow], list[Path]]:
    """The blows, and the folders of the trainings that ended."""
    blows: list[Blow] = []
    folders: list[Path] = []
    zygote = Zygote()
    while targets:
        training = Training(root / f"torn-{len(folders)}", job, zygote, rng)
        while targets and not training.future.done():
            blow = training.strike(targets[-1])
            if blow is None:
                break
            blows.append(blow)
            targets.pop()
            print(f"{blow.target:<16} step {blow.to_step_s:6.2f} s, new ground {blow.to_ground_s:6.2f} s, "
                  f"{blow.steps_lost} steps lost", flush=True)  # fmt: skip
        finish(training.future, training.folder, RANKS)
        folders.append(training.folder)
    zygote.close()
    return blows, folders


def main() -> None:
    """Measures and reports."""
    told = options("recovery")
    each, stops, rows, epochs = (1, 1, 60_000, 20) if told.quick else (6, 6, 200_000, 24)
    rng = random.Random(7)
    targets = [*KILLS * each, *(STOPS * stops)[:stops]]
    rng.shuffle(targets)
    count = len(targets)
    root = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        train = Train(network=Network(width=128, depth=2, frequencies=0, dropout=0.1), batch_size=1024, patience=epochs,
                      checkpoint_every=EVERY_US, learning_rate=1e-3)  # fmt: skip
        job = Job(str(write_arrays(root / "arrays", rows)), train, 1, epochs)
        zygote = Zygote()
        job.prepare(root / "calm")
        began = time.monotonic()
        finish(submit(root / "calm", ranks=RANKS, max_restarts=0, zygote=zygote), root / "calm", RANKS)
        calm_s = time.monotonic() - began
        zygote.close()
        timing = read_json(root / "calm" / "timing.json")
        blows, folders = under_fire(root, job, targets, rng)
        calm = load_file(root / "calm" / "network.safetensors")
        diffs = [float(np.max(np.abs(load_file(f / "network.safetensors")[n] - v))) for f in folders for n, v in calm.items()]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report("recovery", _figures(blows, max(diffs), timing) | {
        "trainings": len(folders), "calm_s": round(calm_s, 2), "planned": count,
    }, [asdict(b) for b in blows], told.json, "torch", "pytorch-lightning")  # fmt: skip


def _figures(blows: list[Blow], diff: float, timing: dict[str, Any]) -> dict[str, Any]:
    kills = [b for b in blows if b.target in KILLS and b.target != "supervisor"]
    supervisor = [b for b in blows if b.target == "supervisor"]
    hangs = [b.to_step_s for b in blows if b.target in STOPS]
    return {
        "recovered_share": sum(np.isfinite(b.to_ground_s) for b in blows) / len(blows),
        "kills": len(blows) - len(hangs), "hangs": len(hangs),
        "kill_to_step_p95_s": _p95([b.to_step_s for b in kills]), "kill_to_ground_p95_s": _p95([b.to_ground_s for b in kills]),
        "kill_to_step_median_s": round(float(np.median([b.to_step_s for b in kills])), 3),
        "supervisor_kill_ratio": round(float(np.median([b.to_step_s / b.import_s for b in supervisor])), 3),
        "supervisor_kill_p95_s": _p95([b.to_step_s for b in supervisor]),
        "import_median_s": round(float(np.median([b.import_s for b in supervisor])), 3),
        "hang_to_step_p95_s": _p95(hangs), "steps_lost_p95": _p95([b.steps_lost for b in blows]),
        "weights_max_abs_diff": diff, "checkpoint_stall_share": round(timing["stall_s"] / timing["loop_s"], 5),
        "checkpoints": timing["checkpoints"], "steps_per_s": round(timing["steps"] / timing["loop_s"], 1),
        "writing_slowdown": round(timing["step_writing_s"] / timing["step_quiet_s"], 3),
    }  # fmt: skip


def _p95(values: list[float] | list[int]) -> float:
    return round(float(np.percentile(values, 95)), 3)


if __name__ == "__main__":
    main()
