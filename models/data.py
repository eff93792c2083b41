"""Training rows for ranks: memory-mapped arrays, and a loader whose order depends on (seed, epoch) alone.

N rows, B rows of a global batch, F + M scaled columns, C categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.preprocess import Preprocess
from features.rows import PARTS
from models.arrays import Arrays
from pipelines.errors import UsageError

MIN_STEPS = 16  # steps per epoch that small tables get at least, by smaller batches


@dataclass(frozen=True)
class Shape:
    """How an epoch is cut: `steps` global batches of `batch` rows; what is left over waits for the next shuffle."""

    batch: int
    steps: int


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
