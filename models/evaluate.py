"""Quality of models on the same rows: metrics, paired bootstrap intervals, slices, curves. Pure functions.

N rows, R resamples. Every metric is computed from row weights W_RN, so that the point value (weights of 1)
and each resample (how often a row was drawn) take one path.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.errors import MillraceError
from pipelines.spec import Gate

METRICS = ("auc", "log_loss", "brier", "ece", "pr_auc")
HIGHER_IS_BETTER = frozenset({"auc", "pr_auc"})
CHALLENGER, CHAMPION, PRIOR = "challenger", "champion", "prior"
_BINS, _POINTS, _CHUNK = 15, 200, 400_000
_TINY, _EPS = 1e-300, float(np.finfo(np.float64).eps)
Curve = dict[str, list[float]]
_Values = dict[str, np.ndarray]  # metric → value under each row of weights (R)


@dataclass(frozen=True)
class Interval:
    """A value and its bootstrap interval; None where it is undefined, such as the AUC of one class."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SliceQuality:
    """Quality in the rows where slice `name` has this `value`; `gain` is the challenger's over the bar."""

    name: str
    value: str
    rows: int
    positives: int
    metrics: Mapping[str, Mapping[str, float | None]]
    gain: Interval


@dataclass(frozen=True)
class Evaluation:
    """All models on the same rows. `gains[m][metric]` > 0: the challenger is better than m by that much."""

    rows: int
    positives: int
    metric: str
    bar: str
    confidence: float
    resamples: int
    metrics: Mapping[str, Mapping[str, Interval]]
    gains: Mapping[str, Mapping[str, Interval]]
    slices: tuple[SliceQuality, ...]
    curves: Mapping[str, Mapping[str, Curve]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "slices": [asdict(s) for s in self.slices]}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`."""
        fields = dict(body)
        for name in ("metrics", "gains"):
            fields[name] = {m: {k: Interval(**v) for k, v in d.items()} for m, d in body[name].items()}
        slices = tuple(SliceQuality(**{**s, "gain": Interval(**s["gain"])}) for s in body["slices"])
        return cls(**{**fields, "slices": slices})


class _Scored:
    """One model's probabilities, sorted once (descending): what every metric needs of them."""

    def __init__(self, label_N: np.ndarray, probability_N: np.ndarray) -> None:
        self.order = np.argsort(-probability_N, kind="stable")
        y, p = label_N[self.order], probability_N[self.order]
        last = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)  # last row of each group
        self.ends = last if len(last) < len(p) else None  # None: no ties, every row is a group
        first = np.append(0, last[:-1] + 1)
        bins = first * _BINS // len(p)
        starts = np.append(0, np.flatnonzero(np.diff(bins)) + 1)
        self.bins = first[starts]  # first row of each bin; ties stay together
        safe = np.clip(p, _EPS, 1 - _EPS)
        self.y, self.gap = y, y - p
        self.loss = -np.where(y > 0, np.log(safe), np.log1p(-safe))
        self.square = self.gap**2

    def values(self, W_RN: np.ndarray, names: tuple[str, ...] = METRICS) -> dict[str, np.ndarray]:
        """Each metric under each row of weights (R)."""
        w = W_RN[:, self.order]
        total = w.sum(axis=1)
        found = {}
        if "log_loss" in names:
            found["log_loss"] = (w * self.loss).sum(axis=1) / total
        if "brier" in names:
            found["brier"] = (w * self.square).sum(axis=1) / total
        if "ece" in names:
            found["ece"] = np.abs(np.add.reduceat(w * self.gap, self.bins, axis=1)).sum(axis=1) / total
        if "auc" in names or "pr_auc" in names:
            found |= self._ranking(w)
        return {name: found[name] for name in names}

    def _ranking(self, w: np.ndarray) -> dict[str, np.ndarray]:
        seen, hits = np.cumsum(w, axis=1), np.cumsum(w * self.y, axis=1)
        if self.ends is not None:
            seen, hits = seen[:, self.ends], hits[:, self.ends]
        positives, all_rows = hits[:, -1], seen[:, -1]
        new = np.diff(hits, axis=1, prepend=0.0)
        misses = np.diff(seen, axis=1, prepend=0.0) - new
        with np.errstate(invalid="ignore", divide="ignore"):
            auc_R = (misses * (hits - new / 2)).sum(axis=1) / (positives * (all_rows - positives))
            pr_R = (new * hits / np.maximum(seen, _TINY)).sum(axis=1) / positives
        return {"auc": auc_R, "pr_auc": pr_R}


def metric_values(label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Every metric of one model; NaN where undefined."""
    ones = np.ones((1, len(label)))
    return {name: float(v[0]) for name, v in _Scored(label, probability).values(ones).items()}


def auc(label: np.ndarray, probability: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half."""
    return metric_values(label, probability)["auc"]


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
    """Mean negative log likelihood, nats."""
    return metric_values(label, probability)["log_loss"]


def resample_weights(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn in each resample (R, N), in chunks along R: a function of its arguments."""
    rng = np.random.default_rng([seed, rows, resamples])
    chunk = max(1, _CHUNK // rows)
    for begin in range(0, resamples, chunk):
        size = min(chunk, resamples - begin)
        drawn = [np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in range(size)]
        yield np.stack(drawn).astype(np.float64)


def evaluate(
    label: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    slices: Mapping[str, np.ndarray],
    gate: Gate,
    seed: int,
) -> Evaluation:
    """Quality of all models on N rows. `probabilities` holds `challenger`, and `champion` or else `prior`: the
    bar. All models and slices share the resamples; intervals are percentiles.

    Raises MillraceError for a probability that is not a number from 0 to 1.
    """
    _check(label, probabilities)
    bar = CHAMPION if CHAMPION in probabilities else PRIOR
    scored = {name: _Scored(label, p) for name, p in probabilities.items()}
    ones = np.ones((1, len(label)))
    points = {name: s.values(ones) for name, s in scored.items()}
    parts = _slices(label, probabilities, slices, gate.metric, bar)
    drawn: dict[str, list[_Values]] = {name: [] for name in scored}
    for W_RN in resample_weights(len(label), gate.resamples, seed):
        for name, s in scored.items():
            drawn[name].append(s.values(W_RN))
        for part in parts:
            part.draw(W_RN)
    samples = {name: _joined(chunks) for name, chunks in drawn.items()}
    others = [name for name in scored if name != CHALLENGER]
    return Evaluation(
        rows=len(label),
        positives=int(label.sum()),
        metric=gate.metric,
        bar=bar,
        confidence=gate.confidence,
        resamples=gate.resamples,
        metrics={name: _intervals(points[name], samples[name], gate) for name in scored},
        gains={
            name: _intervals(_gains(points[CHALLENGER], points[name]), _gains(samples[CHALLENGER], samples[name]), gate)
            for name in others
        },
        slices=tuple(part.quality(gate.confidence) for part in parts),
        curves={name: curves(label, p) for name, p in probabilities.items()},
    )


def _joined(chunks: list[_Values]) -> _Values:
    return {m: np.concatenate([chunk[m] for chunk in chunks]) for m in METRICS}


def _gains(challenger: _Values, other: _Values) -> _Values:
    return {m: gain(m, challenger[m], other[m]) for m in METRICS}


def _intervals(points: _Values, samples: _Values, gate: Gate) -> dict[str, Interval]:
    return {m: interval(float(points[m][0]), samples[m], gate.confidence) for m in METRICS}


def gain(metric: str, challenger: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much better the challenger is: positive is better, whichever way the metric points."""
    return challenger - other if metric in HIGHER_IS_BETTER else other - challenger


def interval(value: float, samples_R: np.ndarray, confidence: float) -> Interval:
    """Percentile interval; without bounds when under half of the resamples define the metric."""
    known = samples_R[np.isfinite(samples_R)]
    point = float(value) if np.isfinite(value) else None
    if point is None or 2 * len(known) < len(samples_R):
        return Interval(point, None, None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(point, float(low), float(high))


def _check(label: np.ndarray, probabilities: Mapping[str, np.ndarray]) -> None:
    if CHALLENGER not in probabilities or not {CHAMPION, PRIOR} & set(probabilities):
        given = ", ".join(probabilities)
        raise MillraceError(f"evaluate needs {CHALLENGER}, and {CHAMPION} or {PRIOR}; given: {given}")
    for name, p in probabilities.items():
        if p.shape != label.shape or not len(label):
            raise MillraceError(f"evaluate: {name} has shape {p.shape}, labels {label.shape}; they must match")
        bad = ~((p >= 0) & (p <= 1))  # NaN compares false
        if bad.any():
            raise MillraceError(
                f"evaluate: {name} answers {p[bad][0]} in row {np.flatnonzero(bad)[0]} ({bad.sum()} such rows); "
                "a probability lies between 0 and 1: the model is broken, train again"
            )


class _Part:
    """The rows of one slice, and what the challenger gains on the bar in each resample."""

    def __init__(
        self, name: str, value: str, rows: np.ndarray, label: np.ndarray, models: Mapping[str, np.ndarray],
        metric: str, bar: str,
    ) -> None:  # fmt: skip
        self.name, self.value, self.rows, self.metric, self.bar = name, value, rows, metric, bar
        self.positives = int(label[rows].sum())
        self.scored = {m: _Scored(label[rows], p[rows]) for m, p in models.items()}
        self.gains: list[np.ndarray] = []

    def draw(self, W_RN: np.ndarray) -> None:
        w = W_RN[:, self.rows]
        with np.errstate(invalid="ignore", divide="ignore"):  # a slice may be absent from a resample
            drawn = [self.scored[m].values(w, (self.metric,))[self.metric] for m in (CHALLENGER, self.bar)]
        self.gains.append(gain(self.metric, *drawn))

    def quality(self, confidence: float) -> SliceQuality:
        ones = np.ones((1, len(self.rows)))
        points = {m: {k: float(v[0]) for k, v in s.values(ones).items()} for m, s in self.scored.items()}
        ours, theirs = (np.array(points[m][self.metric]) for m in (CHALLENGER, self.bar))
        metrics = {m: {k: v if np.isfinite(v) else None for k, v in p.items()} for m, p in points.items()}
        found = interval(float(gain(self.metric, ours, theirs)), np.concatenate(self.gains), confidence)
        return SliceQuality(self.name, self.value, len(self.rows), self.positives, metrics, found)


def _slices(
    label: np.ndarray,
    models: Mapping[str, np.ndarray],
    slices: Mapping[str, np.ndarray],
    metric: str,
    bar: str,
) -> list[_Part]:
    parts = []
    for name, values in slices.items():
        words, inverse = np.unique([str(v) for v in values], return_inverse=True)
        for i, word in enumerate(words):
            parts.append(_Part(name, str(word), np.flatnonzero(inverse == i), label, models, metric, bar))
    return parts


def curves(label: np.ndarray, probability: np.ndarray) -> dict[str, Curve]:
    """Points of the calibration, ROC and precision-recall curves, at most 200 each."""
    order = np.argsort(-probability, kind="stable")
    y, p = label[order], probability[order]
    ends = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)
    hits, seen = np.cumsum(y)[ends], ends + 1.0
    positives, negatives = max(float(y.sum()), 1.0), max(float(len(y) - y.sum()), 1.0)
    kept = np.unique(np.linspace(0, len(ends) - 1, min(_POINTS - 1, len(ends))).round().astype(int))
    hits, seen = hits[kept], seen[kept]
    return {
        "calibration": calibration_points(label, probability),
        "roc": {
            "false_positive_rate": [0.0, *((seen - hits) / negatives).tolist()],
            "true_positive_rate": [0.0, *(hits / positives).tolist()],
        },
        "pr": {"recall": (hits / positives).tolist(), "precision": (hits / seen).tolist()},
    }


def calibration_points(label: np.ndarray, probability: np.ndarray) -> Curve:
    """Mean probability, share of positives and rows in each of at most 15 bins of equally many rows."""
    scored = _Scored(label, probability)
    p = probability[scored.order]
    rows = np.diff(np.append(scored.bins, len(p))).astype(float)
    mean, share = np.add.reduceat(p, scored.bins) / rows, np.add.reduceat(scored.y, scored.bins) / rows
    return {"mean": mean[::-1].tolist(), "share": share[::-1].tolist(), "rows": rows[::-1].tolist()}
