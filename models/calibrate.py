"""Platt scaling: a monotone line on the logit, fitted on valid_select. N rows."""

from dataclasses import dataclass

import numpy as np

_STEPS, _TOLERANCE = 100, 1e-12


@dataclass(frozen=True)
class Calibration:
    """Probability = sigmoid(a · logit + b), a > 0."""

    a: float = 1.0
    b: float = 0.0

    def logit(self, logit: np.ndarray) -> np.ndarray:
        """The calibrated logit (N)."""
        return self.a * logit + self.b


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−logit)), without overflow."""
    small = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1.0, small) / (1.0 + small)


def fit_calibration(logit: np.ndarray, label: np.ndarray) -> Calibration:
    """The line of least log loss against Platt's smoothed targets, by Newton's method with step halving.

    Identity where the label has one class, or where the best slope would not be positive (it would turn the
    order of the rows over). Platt (1999); Lin, Lin, Weng (2007).
    """
    positives = float(label.sum())
    negatives = len(label) - positives
    if not positives or not negatives or not np.isfinite(logit).all():
        return Calibration()
    target = np.where(label > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    a, b = 1.0, 0.0
    loss = _loss(a * logit + b, target)
    for _ in range(_STEPS):
        step_a, step_b = _newton(logit, a * logit + b, target)
        scale = 1.0
        while scale > 1e-10:
            found = _loss((a + scale * step_a) * logit + b + scale * step_b, target)
            if found < loss:
                break
            scale /= 2
        else:
            break
        a, b, gain, loss = a + scale * step_a, b + scale * step_b, loss - found, found
        if gain < _TOLERANCE * max(1.0, abs(loss)):
            break
    return Calibration(a, b) if a > 0 and np.isfinite([a, b]).all() else Calibration()


def _loss(logit: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0.0, logit) - target * logit).sum())


def _newton(z: np.ndarray, logit: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The Newton step in (a, b). Sums are numpy's own, not BLAS's: bits do not depend on threads."""
    p = sigmoid(logit)
    slope, weight = p - target, p * (1 - p)
    grad_a, grad_b = float((slope * z).sum()), float(slope.sum())
    aa, ab, bb = float((weight * z * z).sum()), float((weight * z).sum()), float(weight.sum())
    aa, bb = aa + 1e-12, bb + 1e-12
    det = aa * bb - ab * ab
    if det <= 1e-30:
        return -grad_a / aa, 0.0
    return -(bb * grad_a - ab * grad_b) / det, -(aa * grad_b - ab * grad_a) / det
