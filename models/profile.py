"""`train.profile`: where the time of a step goes, as a trace for Perfetto or chrome://tracing and as a table."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.profiler import ProfilerActivity, profile, schedule

from models.clock import Clock
from pipelines.manifest import write_atomic

STEPS, QUIET = 20, 10  # recorded, after so many that are not
ROWS = 25


class Profile(pl.Callback):
    """Records some steps of one rank; leaves `trace.json.gz` and `table.txt` in a folder when training ends."""

    def __init__(self, folder: Path, steps: int, accelerator: str, clock: Clock) -> None:
        self.folder, self.clock, self.table = folder, clock, ""
        active = max(1, min(STEPS, steps - 1))
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerator == "gpu" else [])]
        self.by = "self_device_time_total" if accelerator == "gpu" else "self_cpu_time_total"
        self.profiler = profile(
            activities=kinds, schedule=schedule(wait=0, warmup=min(QUIET, max(0, steps - 1 - active)), active=active, repeat=1),
            on_trace_ready=self._leave,
        )  # fmt: skip

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.profiler.step()
        self.clock.skip()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.profiler.stop()
        write_atomic(self.folder / "table.txt", f"{self.clock.table()}\n\n{self.table}")

    def _leave(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        self.table = profiler.key_averages().table(sort_by=self.by, row_limit=ROWS, max_name_column_width=40)
