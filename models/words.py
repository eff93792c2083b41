"""A bag of words: logistic regression on the tokens of the texts, the baseline of every network that reads.

B rows, V tokens, F + M scaled columns. Serving reads it; only fitting needs scikit-learn.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.manifest import read_json, write_json

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from features.preprocess import Batch

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)  # inverses of the penalty, of which valid_fit chooses


@dataclass(frozen=True)
class Words:
    """`weight` of each token's tf-idf and of each scaled column, and `bias`; `idf`: how rare each token is. float64."""

    idf: np.ndarray
    weight: np.ndarray
    bias: float

    def logit(self, batch: "Batch") -> np.ndarray:
        """float64 (B)."""
        found: np.ndarray = _columns(batch, self.idf) @ self.weight + self.bias
        return found

    def contributions(self, batch: "Batch") -> tuple[np.ndarray, np.ndarray]:
        """What the tokens (B) and each scaled column (B, F + M) add to `bias`; float64."""
        columns = len(self.weight) - batch.scaled.shape[1]
        tokens: np.ndarray = _columns(batch, self.idf)[:, :columns] @ self.weight[:columns]
        return tokens, batch.scaled.astype(np.float64) * self.weight[columns:]

    def save(self, path: Path) -> None:
        write_json(path, {"idf": self.idf.tolist(), "weight": self.weight.tolist(), "bias": self.bias})

    @classmethod
    def load(cls, path: Path) -> "Words":
        body: dict[str, Any] = read_json(path)
        return cls(np.array(body["idf"]), np.array(body["weight"]), body["bias"])


def _columns(batch: "Batch", idf: np.ndarray) -> "csr_array":
    """Sparse (B, V + F + M): tf-idf with the logarithm of counts, each row of length 1; then the scaled columns."""
    from scipy.sparse import csr_array, hstack

    assert batch.tokens is not None
    found = batch.tokens.bag()
    found.data = (1 + np.log(found.data)) * idf[found.indices]
    rows = np.repeat(np.arange(len(batch)), np.diff(found.indptr))
    norm = np.sqrt(np.bincount(rows, found.data**2, len(batch)))
    found.data /= norm[rows]
    return hstack([found, csr_array(batch.scaled.astype(np.float64))], format="csr")


def fit_words(batch: "Batch", label: np.ndarray, part: np.ndarray) -> Words:
    """Fitted on the train part, with the penalty that is best on valid_fit."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    from features.rows import PARTS

    assert batch.tokens is not None
    train, valid = (np.flatnonzero(part == PARTS.index(name)) for name in ("train", "valid_fit"))
    seen = np.bincount(batch.tokens.take(train).bag().indices, minlength=batch.tokens.size)
    idf = np.log((1 + len(train)) / (1 + seen)) + 1
    columns, judged = _columns(batch.take(train), idf), _columns(batch.take(valid), idf)
    found = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1_000).fit(columns, label[train])
        found.append((log_loss(label[valid], model.predict_proba(judged)[:, 1]), strength, model))
    _, _, best = min(found, key=lambda one: one[:2])
    return Words(idf, best.coef_[0].astype(np.float64), float(best.intercept_[0]))
