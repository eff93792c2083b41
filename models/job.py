"""What one training job is told and what it leaves: plain files in its folder, read without torch.

`job.json` in · `progress.jsonl`, `heartbeat-R`, `energy-R`, `rank-R.log`, `restarts.json`, `notes.json`, `checkpoints/` while
it runs · `timing.json`, `usage.json`, `profile/`, `network.safetensors`, `network.onnx` (where asked for) and last of all
`result.json` out.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.beat import Beat
from pipelines.manifest import file_digest, read_json, write_json
from pipelines.spec import Network, Train

# fields of Train that change no weight
NOT_RESULT = ("checkpoint_every", "ranks", "max_restarts", "hang_after", "strategy", "profile", "power")
LIBRARIES = ("torch", "pytorch-lightning", "numpy")  # a checkpoint is read by the versions that wrote it
PROFILE = "profile"  # folder, where train.profile asks for it
STOPPED = 75  # exit code of a rank that was asked to end and has left a checkpoint
FEWER = 76  # the same of one that wants half of the ranks to go on
Progress = Callable[[float, str], None]  # share done from 0 to 1, and a few words that say what is going on


def own_code(train: Train) -> dict[str, str]:
    """Digest of the file that holds the user's own module, if one is named: digests of Millrace's code leave it out."""
    if train.module is None:
        return {}
    try:
        found = importlib.util.find_spec(train.module.partition(":")[0])
    except Exception:  # it does not import, and the first rank says so
        found = None
    return {"module": file_digest(Path(found.origin)) if found and found.origin and Path(found.origin).is_file() else ""}


def share_done(folder: Path) -> float:
    """How far a running job has come, from 0 to 1: its first rank's heartbeat says step and number of steps."""
    try:
        return Beat(folder / "heartbeat-0").share
    except (OSError, ValueError):  # not begun, or just being made
        return 0.0


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
        if not (folder / "job.json").is_file() or identity(read_json(folder / "job.json")) != identity(self.to_dict()):
            shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "job.json", self.to_dict())


def identity(job: dict[str, Any]) -> dict[str, Any]:
    """What the result of a job depends on: where files lie, how it is restarted and kept does not count."""
    body: dict[str, Any] = json.loads(json.dumps(job))
    train = {k: v for k, v in body["train"].items() if k not in NOT_RESULT}
    return {**{k: v for k, v in body.items() if k not in ("arrays", "format_version", "accelerator")}, "train": train}


@dataclass(frozen=True)
class Epoch:
    """One epoch of the learning curve: mean training loss, and log loss and AUC on valid_fit (None: not finite)."""

    epoch: int
    train_loss: float | None
    log_loss: float | None
    auc: float | None


@dataclass(frozen=True)
class Result:
    """What a job came to. `best_epoch` is None when no epoch had a finite log loss. Holds nothing timed.

    `stopped`: at which batch and why training was given up because of a loss that is not finite; empty if it was not.
    """

    curve: tuple[Epoch, ...]
    best_epoch: int | None
    pruned: bool = False
    parameters: int = 0
    stopped: str = ""

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
    """How a job went: its result, how many ranks ran it, why it was restarted, and seconds of wall time.

    `notes`: what else happened that a person should know, such as a checkpoint that could not be written.
    """

    result: Result
    ranks: int
    restarts: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
