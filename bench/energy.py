"""`python -m bench.energy`: what `train.power` does under a cap, on a simulated meter, and what counting energy costs.

No machine of ours has a meter that may be read, so joules are estimates and no saving is claimed. What is shown is that the cap
holds. A machine is simulated: beside the ranks, this process turns the CPU seconds that they use into watts (idle, busy, noise
of 15 %, a rise of 20 % as it warms up), and adds them up in files as Linux' RAPL shows them, which the ranks read. It also keeps
what it has added up, so that windows are judged by the machine, not by who was to keep the cap.

Figures: `over_cap_share` (windows whose mean power is above the cap, from the first step to the last), the same without a cap
(`over_cap_share_uncapped`), `weights_max_abs_diff` (capped against not, also with a rank killed), `meter_cost_share` (of the
loop's time, for counting energy), `window_watts_max` and `seconds_ratio` (capped over not), by number of ranks, and
`seconds_ratio_fewer` (two capped ranks of which one goes on, over two that both do).
"""

import bisect
import os
import random
import shutil
import signal
import tempfile
import time
import timeit
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from bench.record import options, report
from bench.train_loop import apart, write
from models.beat import STEPS, Beat
from models.elastic import Zygote, finish, submit
from models.energy import Energy, Estimate, meter_of
from models.job import Job
from pipelines.manifest import read_json
from pipelines.spec import Network, Power, Train

CAP, IDLE, BUSY = 45.0, 20.0, 45.0  # watts; busy: more for each busy core
TICK_S = 0.01
FEWER = "capped, fewer ranks"
KILL_S = 3.0  # after the first step
SUPERVISOR = """
import os
from pathlib import Path
import models.energy, models.supervisor
models.energy.POWERCAP = Path(os.environ["BENCH_POWERCAP"])
models.supervisor.serve()
"""


@dataclass
class Machine:
    """A machine that draws power while processes of a supervisor run. `log`: seconds, joules so far, whether steps are done."""

    folder: Path
    of: psutil.Process
    log: list[tuple[float, float, bool]] = field(default_factory=list)
    joules: float = 0.0
    pids: list[int] = field(default_factory=list)
    spent: dict[int, float] = field(default_factory=dict)
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    factor: float = 1.0

    def __post_init__(self) -> None:
        self.zone = self.folder / "intel-rapl:0"
        self.zone.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", "package-0"), ("max_energy_range_uj", "65532610987"), ("energy_uj", "0")):
            (self.zone / file).write_text(f"{text}\n")
        self.counter = os.open(self.zone / "energy_uj", os.O_WRONLY)
        self.began = self.at = time.perf_counter()

    def tick(self, working: bool) -> None:
        time.sleep(TICK_S)
        now, used = time.perf_counter(), 0.0
        if len(self.log) % 10 == 0:
            self.factor = self.noise.uniform(0.85, 1.15) * (1 + 0.2 * min(1.0, (now - self.began) / 20))
        if len(self.log) % 20 == 0:
            self.pids = [child.pid for child in self.of.children()]
        for pid in self.pids:
            with suppress(OSError):  # it is gone
                cpu = time.clock_gettime((~pid << 3) | 2)  # CPU clock of another process: nanoseconds
                used += cpu - self.spent.get(pid, 0.0)
                self.spent[pid] = cpu
        self.joules += IDLE * (now - self.at) + BUSY * self.factor * used
        self.at = now
        os.pwrite(self.counter, f"{int(self.joules * 1e6):<20}\n".encode(), 0)
        self.log.append((now, self.joules, working))

    def windows(self, seconds: float) -> list[float]:
        """Mean watts of all windows of this length in which steps are done throughout, ten a second."""
        log = [entry for entry in self.log if entry[2]]
        times = [t for t, _, _ in log]
        found, at = list[float](), times[0]
        while at + seconds <= times[-1]:
            (t0, j0, _), (t1, j1, _) = log[bisect.bisect(times, at) - 1], log[bisect.bisect(times, at + seconds) - 1]
            found.append((j1 - j0) / (t1 - t0))
            at += 0.1
        return found


@dataclass(frozen=True)
class Run:
    """One training on the simulated machine."""

    seconds: float
    windows: tuple[float, ...]
    weights: dict[str, np.ndarray]
    restarts: tuple[str, ...]
    notes: tuple[str, ...]
    usage: dict[str, Any]


def train(zygote: Zygote, folder: Path, job: Job, ranks: int, machine: Machine, window: float, kill: bool = False) -> Run:
    """Trains, and turns the machine on meanwhile; `kill`: a rank, once, with steps done."""
    job.prepare(folder)
    future = submit(folder, ranks=ranks, max_restarts=3, zygote=zygote)
    first, last = 0.0, 0.0
    while not future.done():
        heart = folder / "heartbeat-0"
        working = heart.is_file() and heart.stat().st_size > 0 and Beat(heart).phase == STEPS
        machine.tick(working)
        if working:
            first, last = first or machine.at, machine.at
        if kill and first and machine.at > first + KILL_S:
            os.kill(machine.of.children()[-1].pid, signal.SIGKILL)
            kill = False
    outcome = finish(future, folder, ranks)
    usage = read_json(folder / "usage.json")
    weights = load_file(folder / "network.safetensors")
    return Run(last - first, tuple(machine.windows(window)), weights, outcome.restarts, outcome.notes, usage)


def cost_share(folder: Path) -> float:
    """Share of a loop's time that counting takes: two looks at what is there, each by its own rhythm."""
    power = Power()
    shares = []
    for meter in (meter_of(power, "cpu", 0, 1), Estimate(power, 1)):
        energy = Energy(meter, folder / "energy-0")
        shares.append(timeit.timeit(energy.look, number=5_000) / 5_000 / meter.every_s)
    return max(shares)


def main() -> None:
    """Measures and reports."""
    told = options("energy")
    rows, epochs, window = (100_000, 4, 1.0) if told.quick else (200_000, 12, 5.0)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    plain = Train(network=Network(width=128, depth=2, frequencies=0, dropout=0.1), max_epochs=epochs, batch_size=4_096,
                  patience=epochs, checkpoint_every=1_000_000)  # fmt: skip
    capped = plain.model_copy(update={"power": Power(cap_watts=CAP, window=int(window * 1e6))})
    fewer = plain.model_copy(update={"power": capped.power.model_copy(update={"fewer_ranks": True})})
    os.environ["BENCH_POWERCAP"] = str(work / "powercap")
    zygote, lines, runs = Zygote(("-c", SUPERVISOR)), list[dict[str, Any]](), dict[tuple[str, int], Run]()
    try:
        arrays = work / "arrays"
        apart(write, rows, arrays, plain)
        for ranks in (1, 2):
            runs_of = {"plain": plain, "capped": capped, "capped, killed": capped, **({FEWER: fewer} if ranks == 2 else {})}
            for name, settings in runs_of.items():
                machine = Machine(work / "powercap", psutil.Process(zygote.process.pid))
                job = Job(str(arrays), settings, 1, epochs)
                run = train(zygote, work / f"{name}-{ranks}", job, ranks, machine, window, kill="killed" in name)
                runs[name, ranks] = run
                lines.append({
                    "what": name, "ranks": ranks, "seconds": round(run.seconds, 2), "windows": len(run.windows),
                    "window_watts_max": round(max(run.windows), 2), "window_watts_mean": round(float(np.mean(run.windows)), 2),
                    "over_cap_share": round(float(np.mean(np.array(run.windows) > CAP)), 4), "restarts": list(run.restarts),
                    "joules_counted": run.usage["joules"], "rest_s": run.usage["rest_s"], "meter": run.usage["meter"],
                })  # fmt: skip
                print(lines[-1], flush=True)
        cost = cost_share(work)
    finally:
        zygote.close()
        shutil.rmtree(work, ignore_errors=True)

    def worst(name: str, pick: Any) -> float:
        return float(pick(line["over_cap_share"] for line in lines if line["what"].startswith(name)))

    diffs = [float(np.abs(run.weights[w] - runs["plain", ranks].weights[w]).max()) for (name, ranks), run in runs.items()
             for w in run.weights if name != FEWER]  # fmt: skip
    real = meter_of(Power(), "cpu", 0, 1)
    report("energy", {
        "estimated": real.estimated, "meter": real.name, "simulated": f"{IDLE:g} W, {BUSY:g} W more a busy core",
        "cap_watts": CAP, "window_s": window, "over_cap_share": worst("capped", max),
        "over_cap_share_uncapped": worst("plain", min),
        "weights_max_abs_diff": max(diffs), "kills": sum(len(run.restarts) for run in runs.values()),
        "window_watts_max": {f"{n}, {r} rank(s)": round(max(run.windows), 2) for (n, r), run in runs.items()},
        "seconds_ratio": {r: round(runs["capped", r].seconds / runs["plain", r].seconds, 2) for r in (1, 2)},
        "seconds_ratio_fewer": round(runs[FEWER, 2].seconds / runs["capped", 2].seconds, 2), "notes_fewer": runs[FEWER, 2].notes,
        "meter_cost_share": round(cost, 6), "joules_saved_share": None,  # nothing is claimed without a real meter
    }, lines, told.json, "torch", "pytorch-lightning", "numpy", "nvidia-ml-py")  # fmt: skip


if __name__ == "__main__":
    main()
