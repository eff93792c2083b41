"""Joules of a training: read where the GPU or the CPU counts them, else estimated, which the record says. Needs no torch.

Each rank counts its own share: its GPU, or one of `world` parts of the machine. The ranks' shares together are the training's.
"""

import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pipelines.spec import Power

POWERCAP = Path("/sys/class/powercap")
CELLS = ("joules", "seconds", "rest_joules", "rest_s", "busy_s", "hold", "limit")
_SIZE = 8 * len(CELLS)


class Meter(Protocol):
    """`every_s`: how often it is worth a look; `idle_watts`: what is drawn at rest, 0 where that is not known."""

    name: str
    estimated: bool
    every_s: float
    idle_watts: float

    def joules(self) -> float:
        """Energy of this rank's share since the meter was made."""

    def busy(self) -> float | None:
        """Share of the time in which the device is at work now, None where it does not say."""


class Estimate:
    """So many watts for a busy core and for an idle one, by the CPU seconds of this process."""

    estimated, every_s = True, 0.1

    def __init__(self, power: Power, world: int) -> None:
        self.name = f"estimate: {power.busy_watts:g} W a busy core, {power.idle_watts:g} W an idle one"
        self.idle_watts = power.idle_watts * len(os.sched_getaffinity(0)) / world
        self.more = power.busy_watts - power.idle_watts
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def joules(self) -> float:
        return self.idle_watts * (time.perf_counter() - self.began) + self.more * (time.process_time() - self.cpu)

    def busy(self) -> float | None:
        return None


class Rapl:
    """The counters of CPU packages and their memory: all that runs on the machine. Raises OSError where there are none."""

    estimated, every_s, idle_watts, name = False, 0.1, 0.0, "RAPL: CPU packages and memory, whole machine"

    def __init__(self, world: int) -> None:
        zones = [p for p in POWERCAP.glob("intel-rapl:*") if (p / "name").read_text().startswith(("package", "dram"))]
        self.files = {zone / "energy_uj": int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self.last = {file: int(file.read_text()) for file in self.files}
        if not self.last:
            raise FileNotFoundError(f"no package under {POWERCAP}")
        self.world, self.used = world, 0

    def joules(self) -> float:
        with suppress(OSError):
            for file, most in self.files.items():
                now = int(file.read_text())
                self.used += (now - self.last[file]) % (most + 1)  # it starts again at 0
                self.last[file] = now
        return self.used / 1e6 / self.world

    def busy(self) -> float | None:
        return None


class Nvml:
    """The counter of one GPU, read beside CUDA. Raises an error where there is none."""

    estimated, every_s, idle_watts = False, 1.0, 0.0  # the driver takes a millisecond or more

    def __init__(self, rank: int) -> None:
        import pynvml

        self.nvml: Any = pynvml
        pynvml.nvmlInit()
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        place = given.split(",")[rank].strip() if given else str(rank)
        by = pynvml.nvmlDeviceGetHandleByIndex if place.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        self.device = by(int(place) if place.isdigit() else place)
        self.name = "NVML: the GPU alone"
        self.first = self.now = self._counter()

    def _counter(self) -> int:
        """Millijoules since the driver was loaded."""
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device))

    def joules(self) -> float:
        with suppress(self.nvml.NVMLError):
            self.now = self._counter()
        return (self.now - self.first) / 1e3

    def busy(self) -> float | None:
        with suppress(self.nvml.NVMLError):
            return float(self.nvml.nvmlDeviceGetUtilizationRates(self.device).gpu) / 100
        return None

    def limit(self, watts: float) -> tuple[float, float]:
        """Sets the driver's limit as near as it goes: watts before and now. Raises NVMLError where it may not be set."""
        before = self.nvml.nvmlDeviceGetPowerManagementLimit(self.device)
        low, high = self.nvml.nvmlDeviceGetPowerManagementLimitConstraints(self.device)
        self.nvml.nvmlDeviceSetPowerManagementLimit(self.device, now := int(min(max(watts * 1e3, low), high)))
        return before / 1e3, now / 1e3


def meter_of(power: Power, accelerator: str, rank: int, world: int) -> Meter:
    """The best meter that there is for a rank."""
    try:
        return Nvml(rank) if accelerator == "gpu" else Rapl(world)
    except Exception:  # no driver, no counter, none that this user may read
        found = Estimate(power, world)
        found.name += "; the GPU is not counted" if accelerator == "gpu" else ""
        return found


class Tally:
    """Numbers of one rank in a file that is mapped into memory: they outlive a kill, and other ranks see them."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("a+b") as file:
                if file.seek(0, os.SEEK_END) != _SIZE:
                    file.truncate(0)
                    file.write(bytes(_SIZE))
                    file.flush()
                cells = mmap.mmap(file.fileno(), _SIZE)
        except OSError:  # a disk that is full
            cells = mmap.mmap(-1, _SIZE)
        self.cells = memoryview(cells).cast("d")

    def __getitem__(self, name: str) -> float:
        return self.cells[CELLS.index(name)]

    def __setitem__(self, name: str, value: float) -> None:
        self.cells[CELLS.index(name)] = value


class Energy:
    """What a rank has used so far, over all its starts. `due`: when the next look is worth its time (perf_counter)."""

    def __init__(self, meter: Meter, path: Path) -> None:
        self.meter, self.tally = meter, Tally(path)
        self.at, self.seen = time.perf_counter(), 0.0
        self.due = self.at + meter.every_s

    def look(self, *, resting: bool = False) -> tuple[float, float]:
        """Joules and seconds since the last look, which count as rest or as work."""
        joules, now = self.meter.joules(), time.perf_counter()
        used, passed = joules - self.seen, now - self.at
        self.seen, self.at, self.due = joules, now, now + self.meter.every_s
        busy = self.meter.busy()
        for name, more in (("joules", used), ("seconds", passed), ("busy_s", (busy or 0.0) * passed)):
            self.tally[name] += more
        if resting:
            self.tally["rest_joules"] += used
            self.tally["rest_s"] += passed
        return used, passed


def total(folder: Path, name: str) -> float:
    """Sum of one number over all ranks that have worked on the job in a folder."""
    return sum(Tally(path)[name] for path in folder.glob("energy-*"))
