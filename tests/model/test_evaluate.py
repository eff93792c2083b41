"""Metrics against scikit-learn, the paired bootstrap against a naive one, slices, curves, calibration."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sk

from models.calibrate import Calibration, fit_calibration, sigmoid
from models.ensemble import choose
from models.evaluate import METRICS, Evaluation, auc, curves, evaluate, interval, log_loss, metric_values, resample_weights
from pipelines.errors import MillraceError
from pipelines.manifest import canonical_json, digest_of
from pipelines.spec import Gate

Rows = tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]
GATE = Gate(resamples=60, slices=("a",))


def rows(count: int = 3_000, seed: int = 1) -> Rows:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=count) - 1
    label = (rng.random(count) < sigmoid(z)).astype(float)
    models = {n: sigmoid(z + rng.normal(size=count) * s) for n, s in (("challenger", 0.3), ("champion", 0.9))}
    models["gbdt"] = np.round(models["challenger"], 1)  # many ties
    models["prior"] = np.full(count, label.mean())
    return label, models, {"a": np.where(z > 0, "high", "low").astype(object)}


def naive_ece(label: np.ndarray, p: np.ndarray) -> float:
    order = np.argsort(-p, kind="stable")
    y, q = label[order], p[order]
    first = np.array([np.flatnonzero(q == v)[0] for v in q])  # ties stay together
    bins = first * 15 // len(q)
    return float(sum(abs((y[bins == b] - q[bins == b]).sum()) for b in np.unique(bins)) / len(q))


NAIVE: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auc": sk.roc_auc_score,
    "log_loss": sk.log_loss,
    "brier": sk.brier_score_loss,
    "pr_auc": sk.average_precision_score,
}


@pytest.mark.parametrize("model", ["challenger", "gbdt", "prior"])
def test_metrics_equal_scikit_learn(model: str) -> None:
    label, models, _ = rows()
    found = metric_values(label, models[model])
    for name, naive in NAIVE.items():
        assert found[name] == pytest.approx(naive(label, models[model]), abs=1e-12), name
    assert found["ece"] == pytest.approx(naive_ece(label, models[model]), abs=1e-12)


@pytest.mark.parametrize("metric", ["log_loss", "auc", "brier", "pr_auc"])
def test_bootstrap_equals_a_naive_one(metric: str) -> None:
    label, models, slices = rows(400)
    gate = GATE.model_copy(update={"metric": metric})
    found = evaluate(label, models, slices, gate, seed=5)
    weights = np.concatenate(list(resample_weights(400, gate.resamples, 5))).astype(int)
    sign = 1 if metric in ("auc", "pr_auc") else -1
    naive = NAIVE[metric]
    drawn = [np.repeat(np.arange(400), w) for w in weights]
    gains = np.array([sign * (naive(label[r], models["challenger"][r]) - naive(label[r], models["champion"][r])) for r in drawn])
    low, high = np.quantile(gains, [0.025, 0.975])
    assert found.gains["champion"][metric].low == pytest.approx(low, abs=1e-12)
    assert found.gains["champion"][metric].high == pytest.approx(high, abs=1e-12)
    values = np.array([naive(label[r], models["gbdt"][r]) for r in drawn])
    assert found.metrics["gbdt"][metric].low == pytest.approx(np.quantile(values, 0.025), abs=1e-12)
    inside = slices["a"] == "high"
    kept = [r[inside[r]] for r in drawn]
    part = [sign * (naive(label[r], models["challenger"][r]) - naive(label[r], models["champion"][r])) for r in kept]
    high_slice = next(s for s in found.slices if s.value == "high")
    assert high_slice.rows == inside.sum() and high_slice.positives == label[inside].sum()
    assert high_slice.gain.low == pytest.approx(np.quantile(part, 0.025), abs=1e-12)


def test_resamples_are_multinomial_and_repeatable() -> None:
    weights = np.concatenate(list(resample_weights(500, 80, 3)))
    assert weights.shape == (80, 500) and (weights.sum(axis=1) == 500).all()
    assert weights.var() == pytest.approx(1, rel=0.05)  # Poisson-like
    assert (weights == np.concatenate(list(resample_weights(500, 80, 3)))).all()
    assert (weights != np.concatenate(list(resample_weights(500, 80, 4)))).any()


def test_evaluation_is_json_and_repeatable() -> None:
    first, again = evaluate(*rows(), GATE, seed=5), evaluate(*rows(), GATE, seed=5)
    assert digest_of(first.to_dict()) == digest_of(again.to_dict())
    assert canonical_json(Evaluation.from_dict(first.to_dict()).to_dict()) == canonical_json(first.to_dict())
    assert set(first.metrics) == {"challenger", "champion", "gbdt", "prior"}
    assert set(first.gains) == {"champion", "gbdt", "prior"} and set(first.gains["gbdt"]) == set(METRICS)


def test_a_slice_of_one_class_is_undefined_not_wrong() -> None:
    label, models, slices = rows(500)
    slices = {"a": np.where(label > 0, "late", "early").astype(object)}
    found = evaluate(label, models, slices, GATE.model_copy(update={"metric": "auc"}), seed=5)
    assert all(s.gain.value is None and s.metrics["challenger"]["auc"] is None for s in found.slices)
    assert all(s.metrics["challenger"]["log_loss"] is not None for s in found.slices)
    canonical_json(found.to_dict())


@pytest.mark.parametrize(("bad", "said"), [(np.nan, "answers nan in row 7"), (1.2, "answers 1.2 in row 7")])
def test_broken_probabilities_are_an_error(bad: float, said: str) -> None:
    label, models, slices = rows(300)
    models["challenger"] = models["challenger"].copy()
    models["challenger"][7] = bad
    with pytest.raises(MillraceError, match=said):
        evaluate(label, models, slices, GATE, seed=5)


def test_a_bar_is_needed() -> None:
    label, models, slices = rows(300)
    with pytest.raises(MillraceError, match="champion or prior"):
        evaluate(label, {"challenger": models["challenger"]}, slices, GATE, seed=5)


def test_curves_are_thin_and_end_where_they_must() -> None:
    label, models, _ = rows()
    for model in models.values():
        found = curves(label, model)
        roc, pr, calibration = found["roc"], found["pr"], found["calibration"]
        assert len(roc["true_positive_rate"]) <= 200 and len(pr["recall"]) <= 200
        assert roc["true_positive_rate"][0] == roc["false_positive_rate"][0] == 0
        assert roc["true_positive_rate"][-1] == roc["false_positive_rate"][-1] == 1
        assert sum(calibration["rows"]) == len(label) and len(calibration["mean"]) <= 15
        assert calibration["mean"] == sorted(calibration["mean"])
    area = np.trapezoid(curves(label, models["challenger"])["roc"]["true_positive_rate"],
                        curves(label, models["challenger"])["roc"]["false_positive_rate"])  # fmt: skip
    assert area == pytest.approx(auc(label, models["challenger"]), abs=0.002)


def test_interval_needs_enough_defined_resamples() -> None:
    assert interval(0.5, np.array([np.nan, np.nan, 0.4]), 0.95).low is None
    assert interval(float("nan"), np.array([0.1, 0.2]), 0.95).value is None


def test_calibration_finds_the_line() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=60_000)
    label = (rng.random(60_000) < sigmoid(2 * z - 0.7)).astype(float)
    found = fit_calibration(z, label)
    assert found.a == pytest.approx(2, abs=0.06) and found.b == pytest.approx(-0.7, abs=0.04)
    best = log_loss(label, sigmoid(found.logit(z)))
    for a, b in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
        assert best < log_loss(label, sigmoid((found.a + a) * z + found.b + b))


def test_calibration_is_the_identity_where_a_line_would_lie() -> None:
    z = np.linspace(-2, 2, 400)
    assert fit_calibration(z, np.ones(400)) == Calibration()
    assert fit_calibration(z, (z < 0).astype(float)) == Calibration()  # it would turn the order over
    assert fit_calibration(np.full(400, np.nan), (z > 0).astype(float)) == Calibration()


def test_calibration_stays_finite_where_classes_are_apart() -> None:
    z = np.linspace(-2, 2, 400)
    found = fit_calibration(z, (z > 0).astype(float))
    p = sigmoid(found.logit(z))
    assert found.a > 1 and np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1
    flat = fit_calibration(np.zeros(400), (z > 1).astype(float))
    assert sigmoid(flat.logit(np.zeros(1)))[0] == pytest.approx(0.25, abs=0.01)


def test_the_blend_is_chosen_where_it_helps_and_the_simpler_at_a_tie() -> None:
    rng = np.random.default_rng(4)
    z = rng.normal(size=20_000)
    label = (rng.random(20_000) < sigmoid(z)).astype(float)
    one, other = z + rng.normal(size=20_000), z + rng.normal(size=20_000)
    choice = choose({"network": one, "gbdt": other}, label)
    assert choice.chosen.name == "blend" and sum(choice.chosen.weights.values()) == 1
    assert choice.chosen.log_loss == min(c.log_loss for c in choice.candidates)
    same = choose({"network": one, "gbdt": one, "gbdt_tuned": one}, label)
    assert same.chosen.name == "gbdt"
    assert [c.name for c in same.candidates] == ["gbdt", "gbdt_tuned", "network", "blend", "blend_tuned"]
