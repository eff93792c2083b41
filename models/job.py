"""What one training job is told and what it leaves: plain files in its folder, read without torch.

`job.json` in · `progress.jsonl`, `heartbeat-R`, `rank-R.log`, `restarts.json`, `checkpoints/` while it runs ·
`network.safetensors`, `network.onnx` (where asked for) and last of all `result.json` out.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.manifest import read_json, write_json
from pipelines.spec import Network, Train

Progress = Callable[[float, str], None]  # share done from 0 to 1, and a few words that say what is going on


def share_done(folder: Path) -> float:
    """How far a running job has come, from 0 to 1: its first rank's heartbeat says step and number of steps."""
    try:
        step, steps = (folder / "heartbeat-0").read_text().split()
    except (OSError, ValueError):  # not begun, or just being written
        return 0.0
    return min(1.0, int(step) / max(1, int(steps)))


@dataclass(frozen=True)
class Job:
    """A network to train. `arrays`: folder of `models.data.write_arrays`; `rows`: newest training rows, all if None.

    `prune_above`: log loss by epoch above which training is given up, None for no limit; `export`: write the weights.
    """

    arrays: str
    train: Train
    seed: int
    max_epochs: int
    rows: int | None = None
    prune_above: tuple[float | None, ...] = ()
    export: bool = True
    accelerator: str = "cpu"

    @property
    def network(self) -> Network:
        return self.train.network

    def to_dict(self) -> dict[str, Any]:
        body = {**asdict(self), "train": self.train.model_dump(mode="json")}
        return {**body, "prune_above": list(self.prune_above)}

    @classmethod
    def load(cls, folder: Path) -> "Job":
        body = read_json(folder / "job.json")
        del body["format_version"]
        train = Train.model_validate(body["train"])
        return cls(**{**body, "train": train, "prune_above": tuple(body["prune_above"])})

    def prepare(self, folder: Path) -> None:
        """Writes `job.json`; what another job left in the folder is removed, what this one left stays."""
        if (folder / "job.json").is_file() and _same(read_json(folder / "job.json"), self.to_dict()):
            return
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "job.json", self.to_dict())


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two jobs lead to the same result: where files lie and how often checkpoints are made does not count."""
    ignored = ("arrays", "format_version", "accelerator")
    pair = [{k: v for k, v in job.items() if k not in ignored} for job in (found, wanted)]
    for job in pair:
        job["train"] = {k: v for k, v in job["train"].items() if k not in ("checkpoint_every", "ranks", "max_restarts")}
    return json.dumps(pair[0], sort_keys=True) == json.dumps(pair[1], sort_keys=True)


@dataclass(frozen=True)
class Epoch:
    """One epoch of the learning curve: mean training loss, and log loss and AUC on valid_fit (None: not finite)."""

    epoch: int
    train_loss: float | None
    log_loss: float | None
    auc: float | None


@dataclass(frozen=True)
class Result:
    """What a job came to. `best_epoch` is None when no epoch had a finite log loss. Holds nothing timed."""

    curve: tuple[Epoch, ...]
    best_epoch: int | None
    pruned: bool = False
    parameters: int = 0

    @property
    def log_loss(self) -> float | None:
        """Log loss on valid_fit of the weights that were kept."""
        return None if self.best_epoch is None else self.curve[self.best_epoch - 1].log_loss

    def save(self, folder: Path) -> None:
        write_json(folder / "result.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Result":
        body = read_json(folder / "result.json")
        del body["format_version"]
        return cls(**{**body, "curve": tuple(Epoch(**e) for e in body["curve"])})


@dataclass(frozen=True)
class Outcome:
    """How a job went: its result, how many ranks ran it, why it was restarted, and seconds of wall time."""

    result: Result
    ranks: int
    restarts: tuple[str, ...] = field(default=())
    seconds: float = 0.0
