"""Every rule of the gate is seen to refuse, and to let pass."""

from dataclasses import replace

import numpy as np
import pytest

from models.calibrate import sigmoid
from models.evaluate import Evaluation, evaluate
from models.gate import Verdict, decide
from pipelines.errors import MillraceError
from pipelines.spec import Gate

GATE = Gate(resamples=60, min_rows=1_000, slice_min_rows=100, slices=("place",))
RNG = np.random.default_rng(6)
Z = RNG.normal(size=4_000) - 0.5
LABEL = (RNG.random(4_000) < sigmoid(Z)).astype(float)
PLACE = np.array([f"p{i}" for i in RNG.integers(0, 4, 4_000)], object)
GOOD = sigmoid(Z)
POOR = sigmoid(Z + RNG.normal(size=4_000))


def judged(challenger: np.ndarray, champion: np.ndarray | None = None, gate: Gate = GATE) -> Verdict:
    probabilities = {"challenger": challenger, "prior": np.full(len(LABEL), LABEL.mean())}
    if champion is not None:
        probabilities["champion"] = champion
    found = evaluate(LABEL, probabilities, {"place": PLACE}, gate, seed=5)
    equal = champion is not None and np.array_equal(challenger, champion)
    return decide(found, gate, has_champion=champion is not None, equal=equal)


def refusing(verdict: Verdict) -> list[str]:
    assert verdict.promoted == all(rule.passed for rule in verdict.rules)
    return [rule.name for rule in verdict.rules if not rule.passed]


def test_a_better_challenger_is_promoted_with_figures() -> None:
    verdict = judged(GOOD, POOR)
    assert refusing(verdict) == [] and len(verdict.reasons) == 4
    assert "beats the champion on log_loss" in verdict.reasons[1] and "95% interval +0." in verdict.reasons[1]


def test_a_first_run_must_beat_the_prior() -> None:
    assert "beats the prior-only model" in judged(GOOD).reasons[1]
    coin = judged(np.full(4_000, LABEL.mean()))
    assert refusing(coin) == ["gain"] and "does not beat the prior-only model" in coin.reasons[0]


@pytest.mark.parametrize("metric", ["log_loss", "auc", "brier", "pr_auc"])
def test_a_worse_challenger_is_refused(metric: str) -> None:
    gate = GATE.model_copy(update={"metric": metric, "max_slice_loss": 1.0, "max_calibration_error": 0.9})
    assert refusing(judged(POOR, GOOD, gate)) == ["gain"]
    assert refusing(judged(GOOD * (1 - 1e-12), GOOD, gate)) == ["gain"]  # no gain is not a gain
    assert refusing(judged(GOOD, POOR, gate)) == []


def test_a_challenger_that_answers_as_the_champion_does_may_be_packaged_anew() -> None:
    verdict = judged(GOOD, GOOD)
    assert refusing(verdict) == []
    assert verdict.reasons[1] == "the challenger answers all 4,000 test rows exactly as the champion does"
    assert refusing(judged(POOR, POOR, GATE.model_copy(update={"max_calibration_error": 0.001}))) == ["calibration"]


def test_a_gain_below_the_least_gain_is_refused() -> None:
    assert refusing(judged(GOOD, POOR, GATE.model_copy(update={"min_gain": 0.5}))) == ["gain"]


def test_a_gain_within_chance_is_refused() -> None:
    slightly = sigmoid(Z + RNG.normal(size=4_000) * 0.05)
    assert refusing(judged(GOOD, slightly)) in (["gain"], [])
    verdict = judged(sigmoid(Z * 1.001), GOOD)
    assert refusing(verdict) == ["gain"]


def test_too_few_rows_are_refused() -> None:
    verdict = judged(GOOD, POOR, GATE.model_copy(update={"min_rows": 4_001}))
    assert refusing(verdict) == ["min_rows"]
    assert verdict.reasons == ("4,000 test rows, fewer than gate.min_rows 4,001",)


def test_a_miscalibrated_challenger_is_refused() -> None:
    verdict = judged(np.clip(GOOD + 0.2, 0, 1), np.full(4_000, 0.02))
    assert refusing(verdict) == ["calibration"]
    assert "above gate.max_calibration_error 0.1" in verdict.reasons[0]


def test_a_slice_that_breaks_is_refused_and_named() -> None:
    broken = np.where(PLACE == "p2", sigmoid(-1.5 * Z), GOOD)
    verdict = judged(broken, sigmoid(Z + 1.5 * RNG.normal(size=4_000)), GATE.model_copy(update={"max_calibration_error": 0.9}))
    assert "slices" in refusing(verdict)
    assert "slice place=p2" in verdict.reasons[-1] and "interval -0." in verdict.reasons[-1]
    small = GATE.model_copy(update={"slice_min_rows": 3_000, "max_calibration_error": 0.9})
    assert "slices" not in refusing(judged(broken, POOR, small))  # shown, not judged


def test_a_slice_that_loses_by_chance_is_not() -> None:
    tilted = np.where(PLACE == "p2", sigmoid(Z + 0.05 * RNG.normal(size=4_000)), GOOD)
    assert "slices" not in refusing(judged(tilted, GOOD))


def test_every_reason_is_told_when_several_rules_refuse() -> None:
    gate = GATE.model_copy(update={"min_rows": 9_000})
    assert refusing(judged(np.clip(POOR + 0.3, 0, 1), GOOD, gate)) == ["min_rows", "gain", "calibration", "slices"]


def test_the_bar_must_be_the_one_that_was_evaluated() -> None:
    found: Evaluation = evaluate(LABEL, {"challenger": GOOD, "prior": POOR}, {}, GATE, seed=5)
    with pytest.raises(MillraceError, match="against the champion, not the prior"):
        decide(found, GATE, has_champion=True)
    assert decide(replace(found, rows=10), GATE, has_champion=False).promoted is False
