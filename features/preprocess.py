"""From the frame to what models eat: fitted on the training part, applied everywhere by the same function.

B rows, F number features, C category features, M features that were missing somewhere in training, V tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from features.facts import Columns
from features.frame import Feature
from features.keys import codes_of, filled
from features.tokens import Reader, Tokens, learn
from pipelines.manifest import read_json, write_json
from pipelines.spec import Text

if TYPE_CHECKING:
    from scipy.sparse import csr_array

UNSEEN = 0  # code of a missing value and of a category that training did not know


@dataclass(frozen=True)
class Batch:
    """Model inputs of B rows.

    `numbers` float64 (B, F) with NaN; `codes` int64 (B, C), 0 for missing or unseen; `scaled` float32 (B, F + M):
    standardised numbers, 0 where missing, then one 0/1 column for each feature that may be missing; `tokens` of the texts,
    where there are texts.
    """

    numbers: np.ndarray
    codes: np.ndarray
    scaled: np.ndarray
    tokens: Tokens | None = None

    @property
    def trees(self) -> "np.ndarray | csr_array":
        """float64 (B, F + C), or sparse (B, F + C + V): numbers, category codes and counts of tokens, as LightGBM reads them."""
        dense = np.concatenate([self.numbers, self.codes.astype(np.float64)], axis=1)
        if self.tokens is None:
            return dense
        from scipy.sparse import csr_array, hstack

        return hstack([csr_array(dense), self.tokens.bag()], format="csr")

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> "Batch":
        """The rows at these positions, or where this mask is true."""
        tokens = self.tokens.take(rows) if self.tokens is not None else None
        return Batch(self.numbers[rows], self.codes[rows], self.scaled[rows], tokens)


@dataclass(frozen=True)
class Preprocess:
    """What was learned from the training part. Saved as JSON: no pickle, floats exact."""

    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    may_miss: tuple[int, ...]
    vocabulary: tuple[tuple[str, ...], ...]
    reader: Reader | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of text."""
        return self.reader.columns if self.reader else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each category feature, the unseen one included."""
        return tuple(len(words) + 1 for words in self.vocabulary)

    @property
    def width(self) -> int:
        """Columns of `Batch.scaled`: F + M."""
        return len(self.numbers) + len(self.may_miss)

    def transform(self, frame: Columns, tokens: Tokens | None = None) -> Batch:
        """The model inputs of a frame of B rows; `tokens`: of its texts, where they have been read before."""
        rows = len(next(iter(frame.values())))
        numbers = np.empty((rows, len(self.numbers)))
        if rows == 1 and self.numbers:
            np.concatenate([frame[name] for name in self.numbers], out=numbers[0])
        else:
            for i, name in enumerate(self.numbers):
                numbers[:, i] = frame[name]
        codes = np.zeros((rows, len(self.categories)), np.int64)
        for i, (name, lookup) in enumerate(zip(self.categories, self._lookups, strict=True)):
            codes[:, i] = [lookup.get(value, UNSEEN) for value in frame[name].tolist()]
        return self.inputs(numbers, codes, self.reader.read(frame) if self.reader and tokens is None else tokens)

    def transform_arrow(self, columns: Mapping[str, pa.Array]) -> Batch:
        """The same of B rows as Arrow columns, text or float64: no Python object per value, texts excepted."""
        rows = len(next(iter(columns.values())))
        numbers, codes = np.empty((rows, len(self.numbers))), np.empty((rows, len(self.categories)), np.int64)
        for i, name in enumerate(self.numbers):
            numbers[:, i] = filled(columns[name], np.nan)
        for i, (name, words) in enumerate(zip(self.categories, self._words, strict=True)):
            codes[:, i] = codes_of(columns[name], words) + 1
        texts = {name: np.array(columns[name].to_pylist(), object) for name in self.texts}
        return self.inputs(numbers, codes, self.reader.read(texts) if self.reader else None)

    def inputs(self, numbers: np.ndarray, codes: np.ndarray, tokens: Tokens | None) -> Batch:
        """The model inputs of B rows by their numbers (B, F) and codes (B, C)."""
        missing = np.isnan(numbers)
        scaled = (np.clip(numbers, self.low, self.high) - self.mean) / self.std
        scaled = np.concatenate([np.where(missing, 0.0, scaled), missing[:, list(self.may_miss)]], axis=1)
        return Batch(numbers, codes, scaled.astype(np.float32), tokens)

    def unknown(self, frame: Columns, batch: Batch) -> tuple[list[list[str]], list[list[str]]]:
        """For each of B rows the features without a value (numbers, then categories and texts), and the categories whose value
        is not among those learned."""
        missing: list[list[str]] = [[] for _ in range(len(batch))]
        unseen: list[list[str]] = [[] for _ in range(len(batch))]
        for row, i in zip(*(places.tolist() for places in np.isnan(batch.numbers).nonzero()), strict=True):
            missing[row].append(self.numbers[i])
        for row, codes in enumerate(batch.codes.tolist()):
            for name, code in zip(self.categories, codes, strict=True):
                if code == UNSEEN:
                    (missing if frame[name][row] is None else unseen)[row].append(name)
        for name in self.texts:
            for row, value in enumerate(frame[name].tolist()):
                if value is None:
                    missing[row].append(name)
        return missing, unseen

    @cached_property
    def _lookups(self) -> list[dict[str, int]]:
        return [{word: i + 1 for i, word in enumerate(words)} for words in self.vocabulary]

    @cached_property
    def _words(self) -> list[pa.Array]:
        return [pa.array(words, pa.string()) for words in self.vocabulary]

    def save(self, path: Path) -> None:
        write_json(path, {name: value for name, value in asdict(self).items() if name != "reader" or value})

    @classmethod
    def load(cls, path: Path) -> "Preprocess":
        body: dict[str, Any] = read_json(path)
        del body["format_version"]
        body["vocabulary"] = [tuple(words) for words in body["vocabulary"]]
        reader = body.pop("reader", None)
        reader = Reader(**{**reader, "columns": tuple(reader["columns"])}) if reader else None
        return cls(**{name: tuple(value) for name, value in body.items()}, reader=reader)


def fit(
    frame: Mapping[str, np.ndarray], train: np.ndarray, features: Sequence[Feature], *, rare: int = 20, text: Text | None = None
) -> Preprocess:  # fmt: skip
    """Learns ranges, scales, vocabularies and tokens from the rows where `train` is true.

    Numbers are clipped to their 0.1 and 99.9 percentiles before scaling. Categories seen fewer than `rare` times
    share the code of the unseen.
    """
    numbers = [f.name for f in features if f.kind == "number"]
    categories = [f.name for f in features if f.kind == "category"]
    learned: dict[str, list[float]] = {"low": [], "high": [], "mean": [], "std": []}
    may_miss = []
    for i, name in enumerate(numbers):
        values = frame[name][train]
        known = values[np.isfinite(values)]
        if np.isnan(values).any():
            may_miss.append(i)
        low, high = np.quantile(known, [0.001, 0.999]) if len(known) else (0.0, 0.0)
        clipped = np.clip(known, low, high)
        std = float(clipped.std()) if len(known) else 0.0
        scale = (low, high, clipped.mean() if len(known) else 0.0, std if std > 1e-12 else 1.0)
        for key, value in zip(learned, scale, strict=True):
            learned[key].append(float(value))
    vocabulary = []
    for name in categories:
        words, counts = np.unique([v for v in frame[name][train] if v is not None], return_counts=True)
        vocabulary.append(tuple(str(w) for w, n in zip(words, counts, strict=True) if n >= rare))
    scales = {name: tuple(values) for name, values in learned.items()}
    return Preprocess(
        numbers=tuple(numbers), categories=tuple(categories), may_miss=tuple(may_miss), vocabulary=tuple(vocabulary),
        reader=learn(text, frame, train) if text else None, **scales
    )
