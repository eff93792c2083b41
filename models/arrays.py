"""What ranks train on: plain arrays in a folder, written once, memory-mapped by every process. Needs no torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.preprocess import Preprocess
from features.trainset import TrainingSet
from pipelines.errors import UsageError

NAMES = ("scaled", "codes", "label", "part")
MIN_STEPS = 16  # steps per epoch that small tables get at least, by smaller batches


@dataclass(frozen=True)
class Arrays:
    """N rows: `scaled` float32 (N, F + M), `codes` int64 (N, C), `label` float32 (N), `part` int8 (N)."""

    scaled: np.ndarray
    codes: np.ndarray
    label: np.ndarray
    part: np.ndarray
    preprocess: Preprocess

    @classmethod
    def load(cls, folder: Path) -> "Arrays":
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES}
        return cls(**found, preprocess=Preprocess.load(folder / "preprocess.json"))


def write_arrays(data: TrainingSet, folder: Path) -> Path:
    """The folder with the arrays of a training set; one that is whole is left as it is."""
    if (folder / "preprocess.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = (data.batch.scaled, data.batch.codes, data.label.astype(np.float32), data.part)
    for name, value in zip(NAMES, values, strict=True):
        np.save(folder / f"{name}.npy", value)
    data.preprocess.save(folder / "preprocess.json")  # last: it says that the others are whole
    return folder


@dataclass(frozen=True)
class Shape:
    """How an epoch is cut: `steps` global batches of `batch` rows; what is left over waits for the next shuffle."""

    batch: int
    steps: int

    def updates(self, together: int) -> int:
        """Optimiser steps of an epoch when the gradients of so many batches are added up."""
        return -(-self.steps // together)


def epoch_shape(rows: int, batch_size: int, world: int) -> Shape:
    """The same for every world size that divides the batch. Raises UsageError for one that does not."""
    batch = max(2, min(batch_size, rows // MIN_STEPS))
    batch -= batch % 8 if batch >= 8 else batch % 2
    if batch % world:
        raise UsageError(
            f"train.ranks {world}: a batch of {batch} rows cannot be cut into {world} equal parts; "
            f"choose a number of ranks that divides {batch}, or another train.batch_size"
        )
    return Shape(batch, max(1, rows // batch))
