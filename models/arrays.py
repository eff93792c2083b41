"""What ranks train on: plain arrays in a folder, written once, memory-mapped by every process. Needs no torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.preprocess import Preprocess
from features.rows import PARTS
from features.tokens import Tokens
from features.trainset import TOKENS, TrainingSet
from pipelines.errors import UsageError
from pipelines.spec import Train

SCALED, CODE, LABEL, NUMBER = "scaled.", "code.", "label", "number"
SHARDS = "train.parquet"
SHARD_BYTES = 4 * 2**20
NAMES = ("scaled", "codes", "label", "part")
MIN_STEPS = 16  # steps per epoch that small tables get at least, by smaller batches


@dataclass(frozen=True)
class Arrays:
    """N rows: `scaled` float32 (N, F + M), `codes` int64 (N, C), `label` float32 (N), `part` int8 (N), `tokens` of texts.

    Without the training rows, where these lie in a Parquet file.
    """

    scaled: np.ndarray
    codes: np.ndarray
    label: np.ndarray
    part: np.ndarray
    preprocess: Preprocess
    tokens: Tokens | None = None

    @classmethod
    def load(cls, folder: Path) -> "Arrays":
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES}
        tokens = Tokens.load(folder / TOKENS) if (folder / TOKENS).is_file() else None
        return cls(**found, preprocess=Preprocess.load(folder / "preprocess.json"), tokens=tokens)


def write_arrays(data: TrainingSet, folder: Path, train: Train, newest: int | None = None) -> Path:
    """The folder with the arrays of a training set; one that is whole is left as it is.

    Where the (newest) training rows are streamed, they lie in a Parquet file beside arrays of the other rows.
    """
    if (folder / "preprocess.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept: slice | np.ndarray = slice(None)
    if streams(train, data, newest):
        write_shards(data, folder / SHARDS, newest)
        kept = data.part != PARTS.index("train")
    for name, value in zip(NAMES, (data.batch.scaled, data.batch.codes, data.label.astype(np.float32), data.part), strict=True):
        np.save(folder / f"{name}.npy", value[kept])
    if data.batch.tokens is not None:
        data.batch.tokens.save(folder / TOKENS)
    data.preprocess.save(folder / "preprocess.json")  # last: it says that the others are whole
    return folder


def streams(train: Train, data: TrainingSet, newest: int | None = None) -> bool:
    """Whether the (newest) training rows are read from disk again in each epoch: a function of spec and rows alone."""
    if train.feed != "auto" or data.batch.tokens is not None:  # tokens lie in a file in any case
        return train.feed == "stream"
    return len(_newest(data, newest)) * _row_bytes(data) > train.feed_memory_mb * 2**20


def _newest(data: TrainingSet, count: int | None) -> np.ndarray:
    """Positions of the newest training rows, of all if None."""
    rows = data.rows("train")
    return rows if count is None else rows[-count:]


def _row_bytes(data: TrainingSet) -> int:
    return 4 * data.batch.scaled.shape[1] + 8 * data.batch.codes.shape[1] + 4


def write_shards(data: TrainingSet, path: Path, newest: int | None = None) -> None:
    """The (newest) training rows as Parquet, in a random order that is always the same, SHARD_BYTES to a row group.

    Columns: `scaled.NAME`, `scaled.NAME missing` and `label` float32, `code.NAME` int32, `number` int64, 0 for the oldest.
    """
    rows = _newest(data, newest)
    order = np.random.default_rng(0).permutation(len(rows))
    size = max(1, min(SHARD_BYTES // _row_bytes(data), max(256, len(rows) // 64)))
    fitted = data.preprocess
    names = [f"{SCALED}{name}" for name in fitted.numbers] + [f"{SCALED}{fitted.numbers[i]} missing" for i in fitted.may_miss]
    codes = [f"{CODE}{name}" for name in fitted.categories]
    schema = pa.schema([*((name, pa.float32()) for name in names), *((name, pa.int32()) for name in codes),
                        (LABEL, pa.float32()), (NUMBER, pa.int64())])  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        for begin in range(0, len(rows), size):
            numbers = order[begin : begin + size]
            some = rows[numbers]
            columns = [*data.batch.scaled[some].T, *data.batch.codes[some].T, data.label[some], numbers]
            file.write_table(pa.table([pa.array(v).cast(f.type) for v, f in zip(columns, schema, strict=True)], schema), size)


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
