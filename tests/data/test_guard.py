"""Guard rails: what they let through, what they take back, and how seldom they are wrong however often one looks."""

from typing import Any

import numpy as np
import pytest

from deploy.guard import BOUND, Seen, Side, figures, higher_than, log_losses, more_than, reasons
from deploy.stages import stages, under_way
from pipelines.spec import Guard

GUARD = Guard()


def looks(bad: np.ndarray, share: float) -> float:
    """The largest evidence of all looks at a stream."""
    return max(more_than(int(k), n, share) for n, k in enumerate(np.cumsum(bad), start=1))


def test_a_good_challenger_is_seldom_taken_back_though_every_answer_is_looked_at() -> None:
    draw = np.random.default_rng(1)
    wrong = sum(looks(draw.random(200) < 0.05, 0.05) >= 20 for _ in range(100))
    assert wrong / 100 <= 0.05


def test_a_bad_one_is_taken_back_after_few_answers() -> None:
    assert more_than(2, 2, 0.01) > 1_000 > more_than(1, 1, 0.01)
    assert more_than(5, 100, 0.01) < 1_000 < more_than(12, 100, 0.01)
    assert more_than(0, 10_000, 0.01) < 1e-3


def test_quality_is_told_by_betting_and_seldom_wrong() -> None:
    draw = np.random.default_rng(2)
    label = (draw.random((200, 500)) < 0.3).astype(float)
    same = [log_losses(row, np.full(500, 0.31)) - log_losses(row, np.full(500, 0.3)) for row in label]
    assert np.mean([higher_than(d, 0.02) >= 20 for d in same]) <= 0.05
    worse = [log_losses(row, np.full(500, 0.9)) - log_losses(row, np.full(500, 0.3)) for row in label[:20]]
    assert all(higher_than(d, 0.02) >= 1_000 for d in worse)
    at_margin = draw.choice([-BOUND, BOUND], (300, 300))
    assert np.mean([higher_than(d, 0.001) >= 20 for d in at_margin]) <= 0.05
    assert higher_than(np.zeros(0), 0.02) == 1


def test_drift_is_not_taken_for_chance() -> None:
    draw = np.random.default_rng(4)
    rail = Guard(max_psi=0.05)
    for _ in range(100):
        scores = draw.random(700)
        assert not reasons(rail, Seen(Side(scores=list(scores[:600])), Side(scores=list(scores[600:]))), 50)
    moved = Side(scores=list(draw.random(100) * 0.6 + 0.4))
    assert reasons(rail, Seen(Side(scores=list(scores[:600])), moved), 50)


def side(**given: Any) -> Side:
    draw = np.random.default_rng(3)
    told: dict[str, Any] = {"answers": 300, "ms": list(draw.uniform(2, 6, 300)), "scores": list(draw.random(300))}
    return Side(**(told | given))


def test_one_that_is_like_the_champion_stays() -> None:
    assert reasons(GUARD, Seen(side(), side()), 50) == []
    assert reasons(GUARD, Seen(side(failed=30), side(failed=30)), 50) == []  # as the champion's do
    assert reasons(GUARD, Seen(), 50) == []


@pytest.mark.parametrize(("given", "said"), [
    ({"failed": 20, "errors": ["no pace"]}, "errors: 20 of 300 answers failed, 1.0% is accepted (no pace)"),
    ({"ms": [70.0] * 30}, "latency: 30 of 30 answers took more than 50 ms"),
    ({"ms": [], "hung": 4}, "latency: 4 of 4 requests hang"),
    ({"scores": [0.9] * 300}, "drift: PSI of its scores is "),
    ({"scores": [0.5, float("nan")]}, "NaN: 1 of 2 answers are no number"),
    ({"rss_mb": [100.0, 320.0]}, "memory: 100 MB grew to 320 MB, 200 MB more is accepted"),
])  # fmt: skip
def test_a_breach_is_said(given: dict[str, Any], said: str) -> None:
    (why,) = reasons(GUARD, Seen(side(), side(**given)), 50)
    assert why.startswith(said)


def test_figures_of_pairs() -> None:
    seen = Seen(side(), side(), pairs=[(0.4, 0.6), (0.1, 0.1), (0.7, 0.8), (0.9, 0.9)], not_copied=3)
    shown = figures(seen, 0.5)
    assert shown["pairs"] == 4 and shown["decisions_differ"] == 0.25 and shown["not_copied"] == 3
    assert shown["mean_abs_gap"] == pytest.approx(0.075) and shown["max_abs_gap"] == pytest.approx(0.2)


def log(*told: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"event": e, "body": b, "when": str(i), "who": "me", "why": f"why {i}"} for i, (e, b) in enumerate(told)]


A, B, C = ({"release": name} for name in "abc")
BEGIN = [("release", A), ("promote", {**A, "from": ""}), ("release", B), ("challenger", {**B, "from": "a"})]


def test_states_follow_from_the_log() -> None:
    steps = [("shadow", B), ("canary", {**B, "share": 5}), ("hold", B)]
    found = stages(log(*BEGIN, *steps), "a")
    assert [s.words for s in found.values()] == ["champion", "canary 5 % (held)"]
    assert found["b"].why == "why 5" and under_way(found) == found["b"]
    done = stages(log(*BEGIN, *steps, ("resume", B), ("promote", {**B, "from": "a"})), "b")
    assert [s.words for s in done.values()] == ["retired", "champion"] and done["a"].why == "b became champion"
    gone = stages(log(*BEGIN, *steps, ("retire", B)), "a")
    assert gone["b"].words == "retired" and under_way(gone) is None


def test_the_pointer_is_the_truth_where_the_log_was_cut_short() -> None:
    found = stages(log(*BEGIN, ("canary", {**B, "share": 50})), "b")
    assert [s.state for s in found.values()] == ["retired", "champion"] and under_way(found) is None


def test_a_rollback_ends_what_was_on_its_way() -> None:
    found = stages(log(*BEGIN, ("promote", {**B, "from": "a"}), ("release", C), ("challenger", {**C, "from": "b"}),
                       ("shadow", C), ("rollback", {**A, "from": "b"})), "a")  # fmt: skip
    assert [s.state for s in found.values()] == ["champion", "retired", "retired"]
    assert under_way(found) is None
