"""The choice on valid_select: network, LightGBM, a bag of words, or a blend of the network with one of them. N rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.calibrate import Calibration, fit_calibration, sigmoid
from models.evaluate import auc, log_loss

WEIGHTS = tuple(round(0.1 * i, 1) for i in range(1, 10))
_SIMPLEST_FIRST = ("words", "gbdt", "gbdt_tuned", "network")


@dataclass(frozen=True)
class Candidate:
    """Members with weights that add up to 1; it answers the sigmoid of their mean calibrated logit."""

    name: str
    weights: Mapping[str, float]
    log_loss: float
    auc: float


@dataclass(frozen=True)
class Choice:
    """The candidate of least log loss on valid_select (ties: the simpler), among all that were compared."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    calibrations: Mapping[str, Calibration]


def choose(logits: Mapping[str, np.ndarray], label: np.ndarray) -> Choice:
    """Calibrates each member on these rows; compares members and blends of the network with each other one."""
    members = sorted(logits, key=_SIMPLEST_FIRST.index)
    calibrations = {name: fit_calibration(logits[name], label) for name in members}
    calibrated = {name: calibrations[name].logit(logits[name]) for name in members}
    candidates = [_candidate(name, {name: 1.0}, calibrated, label) for name in members]
    if "network" in members:
        candidates += [_best_blend(other, calibrated, label) for other in members if other != "network"]
    return Choice(simplest_best(candidates), tuple(candidates), calibrations)


def simplest_best(candidates: Sequence[Candidate]) -> Candidate:
    """Least log loss; at equal log loss the earlier, which is the simpler."""
    return min(candidates, key=lambda c: c.log_loss)


def _best_blend(other: str, calibrated: Mapping[str, np.ndarray], label: np.ndarray) -> Candidate:
    name = other.replace("gbdt", "blend") if other.startswith("gbdt") else f"blend_{other}"
    tried = [_candidate(name, {"network": w, other: round(1 - w, 1)}, calibrated, label) for w in WEIGHTS]
    return simplest_best(tried)


def _candidate(name: str, weights: Mapping[str, float], calibrated: Mapping[str, np.ndarray], label: np.ndarray) -> Candidate:
    probability = sigmoid(blend(weights, calibrated))
    return Candidate(name, dict(weights), log_loss(label, probability), auc(label, probability))


def blend(weights: Mapping[str, float], calibrated: Mapping[str, np.ndarray]) -> np.ndarray:
    """Weighted mean of calibrated logits (N), summed in the order of `weights`."""
    total = np.zeros(len(next(iter(calibrated.values()))))
    for name, weight in weights.items():
        total += weight * calibrated[name]
    return total
