"""`train.power`: training rests between steps so that it stays below a cap of power, waits for cheap hours, keeps to a budget.

What is computed stays as it was, bit for bit: only when the next step begins is decided here.
"""

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from models.energy import Nvml, Tally, total
from models.job import FEWER
from pipelines.clock import duration_text, wall_us
from pipelines.errors import MillraceError
from pipelines.spec import Power

if TYPE_CHECKING:
    from models.train import Keeper

SLICE_S = 0.2  # a rank that rests beats so often
HOURS_S = 1.0  # between two looks at the hour
SPARE = 0.01  # of the cap, kept free
IDLE, WINDOWS = 0.55, 3  # half of the ranks would do: share of the time without work, over so many windows
EARLY = 0.05  # of the steps after which a budget that will not last is told


class PowerSaver(pl.Callback):
    """Keeps the ranks' power, energy and hours within `train.power`. Every rank rests by itself for its share of the cap;
    hours and budgets are rank 0's matter, which the others see in its tally.

    A rank's debt is the energy that it has used above the cap, and it rests until that is paid. The mean over any `window`
    stays below the cap because the aim is lower than that by the largest debt, spread over a window.
    """

    def __init__(self, power: Power, keeper: "Keeper", world: int) -> None:
        self.power, self.keeper, self.world, self.energy = power, keeper, world, keeper.energy
        meter = self.energy.meter
        self.window, self.every = power.window / 1e6, min(meter.every_s, power.window / 5e7)
        self.cap = power.cap_watts / world if power.cap_watts else math.inf
        self.patience = math.inf if world == 1 else keeper.job.train.hang_after / 2e6  # the other ranks wait in silence
        self.debt = self.largest = 0.0  # joules
        self.counted, self.seen = self.energy.at, (self.energy.tally["joules"], self.energy.tally["seconds"])
        self.rests = [0.0, 0.0]  # joules and seconds
        self.going = False  # what the start has used is paid
        self.told: set[str] = set()
        self.since: tuple[float, float, float] | None = None  # time, and work and rest until then, once the start was paid
        self.start, self.looked, self.lead = 0, -math.inf, Tally(keeper.folder / "energy-0")
        if keeper.rank == 0:
            self.lead["hold"] = 0.0
        if self.cap <= meter.idle_watts:
            raise MillraceError(
                f"train.power.cap_watts {power.cap_watts:g}: the machine draws {meter.idle_watts * world:.3g} W while training "
                f"rests ({meter.name}); give more than that, or leave it out"
            )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.keeper.between, self.start = self._pace, trainer.global_step
        self._count()
        self.counted = -math.inf  # the first step pays what the start has used
        if self.keeper.rank == 0:
            self._budget(self.start)
            if self.keeper.farewell:
                raise MillraceError(self.keeper.farewell)
            self._hours(self.start)
        if self.power.gpu_limit:
            self._limit()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        if self.power.cheap_hours:
            self._wait(trainer.global_step)
        if self._pace() and self.keeper.rank == 0:
            self._budget(trainer.global_step)
            self._fewer()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.counted = -math.inf
        self._pace()
        self._unlimit()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._unlimit()

    # --- the cap ---

    def _pace(self) -> bool:
        """Rests until the debt is paid; whether it was time to look."""
        self.keeper.beat()
        if time.perf_counter() - self.counted < self.every:
            return False
        self._count()
        self.largest = max(self.debt, 0.999 * self.largest)
        if self.going and self.cap * (1 - SPARE) - self.debt / self.window < (self.cap + self.at_rest) / 2:
            window = duration_text(self.power.window)
            self._tell("steps", f"steps are long for a window of {window}; the mean of several keeps the cap")
        began = self.energy.at
        while self.debt > 0 and not self.keeper.asked and not self._in_vain(self.counted - began):
            time.sleep(min(SLICE_S, max(1e-3, self.debt / max(1e-9, self._aim() - self.at_rest))))
            self.keeper.beat()
            self._count(resting=True)
        self.going = True
        self.keeper.clock.skip()
        return True

    def _count(self, *, resting: bool = False) -> None:
        """Adds to the debt what the rank has used since the last time, and takes off what it might have."""
        used, passed = self.energy.look(resting=resting)
        if resting:
            self.rests = [self.rests[0] + used, self.rests[1] + passed]
        self.counted, before = self.energy.at, self.seen
        self.seen = self.energy.tally["joules"], self.energy.tally["seconds"]  # others look too
        if self.cap < math.inf:
            self.debt = max(0.0, self.debt + self.seen[0] - before[0] - self._aim() * (self.seen[1] - before[1]))

    @property
    def at_rest(self) -> float:
        """Watts while the rank rests."""
        joules, seconds = self.rests
        return joules / seconds if seconds > SLICE_S else self.energy.meter.idle_watts

    def _aim(self) -> float:
        """Watts, below the cap by what a debt may add to a window."""
        return max(self.cap * (1 - SPARE) - self.largest / self.window, (self.cap + self.at_rest) / 2)

    def _in_vain(self, rested: float) -> bool:
        """Whether to rest on is of no use: the machine draws more than the cap anyhow, or the other ranks wait too long."""
        if rested > 1 and self.going:
            self._tell("rest", f"below {self.power.cap_watts:g} W training rests for more than a second at a time")
        if rested > self.window and self.at_rest >= self.cap:
            self.debt = 0.0
            shown = f"{self.energy.meter.name} shows {self.at_rest * self.world:.3g} W while training rests"
            self._tell("cap", f"the cap is not kept: {shown}; a step is done every {duration_text(self.power.window)}")
            return True
        if rested > self.patience:
            self._tell("cap", f"the cap is not kept: other ranks wait while one rests for more than {self.patience:g} s")
        return rested > self.patience

    def _tell(self, about: str, line: str) -> None:
        """A line for the record, one about each matter."""
        if about not in self.told:
            self.told.add(about)
            self.keeper.say(f"train.power: {line}")

    def _fewer(self) -> None:
        """Ends with a checkpoint, for half of the ranks to go on, where these would do as much: a rank rests, or waits for
        others that rest, for most of the time."""
        if not self.power.fewer_ranks or self.world == 1 or not self.going or self.keeper.asked:
            return
        worked = self.energy.tally["busy_s"] if isinstance(self.energy.meter, Nvml) else time.process_time()
        now = time.perf_counter(), worked, total(self.keeper.folder, "rest_s")
        self.since = self.since or now
        passed, worked, rest = (b - a for a, b in zip(self.since, now, strict=True))
        if passed > WINDOWS * self.window and worked < (1 - IDLE) * passed and rest > IDLE * passed:
            self.keeper.asked, self.keeper.code = True, FEWER

    def _limit(self) -> None:
        """What the limit was is kept in the tally, so that the start after a kill can undo it."""
        meter, tally = self.energy.meter, self.energy.tally
        if not isinstance(meter, Nvml):
            self._tell("limit", "gpu_limit: there is no GPU whose driver takes one; training rests between steps instead")
            return
        try:
            before, now = meter.limit(self.cap)
        except meter.nvml.NVMLError as error:
            self._tell("limit", f"gpu_limit: the driver refuses ({error}); training rests between steps instead")
            return
        tally["limit"] = tally["limit"] or before
        self._tell("limit", f"gpu_limit: {now:g} W instead of {tally['limit']:g} W until training ends")

    def _unlimit(self) -> None:
        meter, tally = self.energy.meter, self.energy.tally
        if tally["limit"] and isinstance(meter, Nvml):
            with suppress(meter.nvml.NVMLError):
                meter.limit(tally["limit"])
                tally["limit"] = 0.0

    # --- hours and budgets ---

    def _wait(self, step: int) -> None:
        """Waits where the hours say so. Rank 0 says it one step ahead, so that all ranks wait after the same step."""
        leads, held = self.keeper.rank == 0, self.lead["hold"]
        if held and step >= held:
            if leads:
                hours = f"{', '.join(self.power.cheap_hours)} ({self.power.zone})"
                self._tell("hours", f"waits from step {step} on for the hours {hours}")
            while self.lead["hold"] == held and not self.keeper.asked and not (leads and self.power.cheap(wall_us())):
                time.sleep(SLICE_S)
                self.keeper.beat()
                self._count(resting=True)
            self.keeper.clock.skip()
            if leads:
                self.lead["hold"] = 0.0
        if leads:
            self._hours(step)

    def _hours(self, step: int) -> None:
        """Looks at the clock once a second."""
        now = time.perf_counter()
        if self.power.cheap_hours and now - self.looked >= HOURS_S:
            self.looked = now
            if not self.power.cheap(wall_us()):
                self.lead["hold"] = step + 1

    def _budget(self, step: int) -> None:
        """Ends training with a checkpoint where the energy is used up; tells in time that it will not last."""
        if self.power.joules is None and self.power.grams is None:
            return
        used, steps = total(self.keeper.folder, "joules"), self.keeper.steps
        for unit, spent, allowed in (("J", used, self.power.joules), ("g CO2", self.power.grams_of(used), self.power.grams)):
            if allowed is None:
                continue
            if spent >= allowed:
                guess = ", an estimate" if self.energy.meter.estimated else ""
                self.keeper.farewell = (
                    f"train.power: {allowed:g} {unit} were allowed and are used up ({spent:.4g}{guess}) at step {step} of "
                    f"{steps}; allow more and run again, it goes on from there"
                )
                self.keeper.asked = True
            elif step >= max(self.start + 1, EARLY * steps) and (whole := spent * steps / step) > allowed:
                self._tell(unit, f"{allowed:g} {unit} will not last: by step {step} it looks like {whole:.3g} for all {steps}")
