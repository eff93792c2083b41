"""Why a row got its answer: what each feature adds to the log-odds. B rows, G features.

Trees: TreeSHAP by LightGBM. Bags of words: their own weights. Networks: Shapley values of a few walks from a row of mean numbers,
unknown categories and no text to the row that is asked about; each walk ends at the row, so that the sum is exact and only the
shares are sampled. All of them add up, and so does what is made of them: calibration is a line, a blend a weighted sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from features.preprocess import Batch, Preprocess
from models.score import Model, TreeScorer
from models.words import Words

WALKS, AT_MOST, AT_MOST_TEXTS = 16, 1_024, 64  # walks of a network, and rows that it is asked about for one explanation


@dataclass(frozen=True)
class Explained:
    """`base` + the sum of `shares` over features = the log-odds of the answer (B). `shares`: float64 (B, G) by `names`."""

    names: tuple[str, ...]
    base: np.ndarray
    shares: np.ndarray
    exact: bool

    def top(self, row: int, count: int) -> tuple[list[tuple[str, float]], float]:
        """The largest shares of a row, and the sum of the others."""
        shares = self.shares[row]
        order = np.argsort(-np.abs(shares), kind="stable")
        return [(self.names[i], float(shares[i])) for i in order[:count].tolist()], float(shares[order[count:]].sum())


class Explainer:
    """Explains the answers of a model. `beside`: also while another thread asks the model itself, as ONNX Runtime and LightGBM
    may be; of what compiled networks allow nothing is known."""

    def __init__(self, model: Model, preprocess: Preprocess) -> None:
        self.model, self.preprocess = model, preprocess
        texts = (" + ".join(preprocess.texts),) if preprocess.texts else ()
        self.names = (*preprocess.numbers, *preprocess.categories, *texts)
        networks = [name for name, kind in model.kinds.items() if kind == "network"]
        self.exact, self.beside = not networks, not any(name in model.served for name in networks)

    def explain(self, batch: Batch) -> Explained:
        """The shares of the rows of a batch, each of them as if it were alone."""
        base, shares = np.zeros(len(batch)), np.zeros((len(batch), len(self.names)))
        for slope, offset, scorer in self.model.parts():
            if isinstance(scorer, TreeScorer):
                low, found = self._trees(scorer, batch)
            elif isinstance(scorer, Words):
                low, found = self._words(scorer, batch)
            else:
                each = [self._walked(scorer.logit, batch.take(np.array([i]))) for i in range(len(batch))]
                low, found = np.array([b for b, _ in each]), np.stack([s for _, s in each])
            base += slope * low + offset
            shares += slope * found
        return Explained(self.names, base, shares, self.exact)

    def _trees(self, scorer: TreeScorer, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        found = scorer.contributions(batch)
        dense = len(self.preprocess.numbers) + len(self.preprocess.categories)
        shares, base = found[:, :-1], found[:, -1]
        if shares.shape[1] > dense:
            shares = np.concatenate([shares[:, :dense], shares[:, dense:].sum(axis=1, keepdims=True)], axis=1)
        return base, shares

    def _words(self, scorer: Words, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        tokens, scaled = scorer.contributions(batch)
        numbers = self._of_numbers(scaled)
        categories = np.zeros((len(batch), len(self.preprocess.categories)))  # a bag of words does not look at them
        return np.full(len(batch), scorer.bias), np.concatenate([numbers, categories, tokens[:, None]], axis=1)

    def _of_numbers(self, scaled: np.ndarray) -> np.ndarray:
        """(B, F): a number and whether it is missing are one feature."""
        count = len(self.preprocess.numbers)
        found = scaled[:, :count].copy()
        for column, number in enumerate(self.preprocess.may_miss, count):
            found[:, number] += scaled[:, column]
        return found

    def _walked(self, logit: Callable[[Batch], np.ndarray], row: Batch) -> tuple[float, np.ndarray]:
        """What a network says of the mean row, and what each feature of one row adds to it (G)."""
        shares = np.zeros(len(self.names))
        groups = [g for g in range(len(self.names)) if self._differs(row, g)]
        if not groups:
            return float(logit(row)[0]), shares
        most = AT_MOST if row.tokens is None else AT_MOST_TEXTS
        pairs = max(1, min(WALKS, most // len(groups)) // 2)
        draw, walks = np.random.default_rng(0), list[Sequence[int]]()
        for _ in range(pairs):  # each order and its reverse: what two features do together is shared evenly
            order = draw.permutation(groups).tolist()
            walks += [order, order[::-1]]
        inside = np.zeros((len(walks), len(groups) + 1, len(self.names)), bool)
        for i, order in enumerate(walks):
            for step, group in enumerate(order, 1):
                inside[i, step:, group] = True
        flat = inside.reshape(-1, len(self.names))
        asked, place = np.unique(flat, axis=0, return_inverse=True)  # the ends are those of all walks
        said = logit(self._mixed(row, asked))[place.reshape(-1)].reshape(len(walks), -1)
        for i, order in enumerate(walks):
            shares[order] += np.diff(said[i]) / len(walks)
        return float(said[0, 0]), shares

    def _differs(self, row: Batch, group: int) -> bool:
        """Whether a feature of a row is not as in the mean row."""
        numbers, dense = len(self.preprocess.numbers), len(self.preprocess.numbers) + len(self.preprocess.categories)
        if group < numbers:
            return bool(row.scaled[0, self._columns[group]].any())
        if group < dense:
            return bool(row.codes[0, group - numbers])
        return row.tokens is not None and bool(row.tokens.lengths[0])

    @cached_property
    def _columns(self) -> list[list[int]]:
        """The scaled columns of each number feature."""
        count = len(self.preprocess.numbers)
        missing = {number: column for column, number in enumerate(self.preprocess.may_miss, count)}
        return [[i, missing[i]] if i in missing else [i] for i in range(count)]

    def _mixed(self, row: Batch, inside: np.ndarray) -> Batch:
        """Rows that have of one row the features that are inside (N, G), and are the mean row in the others."""
        count, dense = len(self.preprocess.numbers), len(self.preprocess.numbers) + len(self.preprocess.categories)
        wide = np.concatenate([inside[:, :count], inside[:, list(self.preprocess.may_miss)]], axis=1)
        scaled = np.where(wide, row.scaled, np.float32(0))
        codes = np.where(inside[:, count:dense], row.codes, 0)
        tokens = None
        if row.tokens is not None:
            tokens = row.tokens.take(np.zeros(len(inside), np.int64))
            tokens = replace(tokens, end=np.where(inside[:, dense], tokens.end, tokens.begin))
        return Batch(np.repeat(row.numbers, len(inside), axis=0), codes, scaled.astype(np.float32), tokens)
