"""Guard rails of a canary: what was seen of champion and challenger, and why the challenger is to be taken back.

The tests are sequential: each is a nonnegative supermartingale that starts at 1 while the challenger is good, so it ever reaches
1/α with a chance of at most α (Ville), however often one looks. See Ramdas, Grünwald, Vovk, Shafer, "Game-theoretic statistics
and safe anytime-valid inference", Statistical Science 38 (2023).
"""

from collections import deque
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field

import numpy as np

from deploy.monitor import psi
from pipelines.spec import Guard

CHANCE = 50.0  # × (1/n + 1/m): what PSI of ten degrees of freedom reaches by chance in one of 3 million looks
COLD = 8  # slow answers that no cold start explains
GRID = 64  # alternatives that a test bets on, evenly
NEWEST = 20_000  # answers whose latency and score are kept
CLIP = 1e-3  # scores are taken to lie in [CLIP, 1 − CLIP], so that a log loss is bounded
BOUND = float(np.log((1 - CLIP) / CLIP))  # of the difference of two log losses
BETS = np.geomspace(0.01, 0.9, 16)  # shares of the wealth


def more_than(bad: int, count: int, share: float) -> float:
    """Evidence (e-value) that more than `share` of what is counted is bad: the mean of likelihood ratios over larger shares."""
    other = share + (1 - share) * (np.arange(GRID) + 0.5) / GRID
    logs = bad * np.log(other / share) + (count - bad) * np.log((1 - other) / (1 - share))
    return float(np.exp(np.minimum(logs, 600)).mean())


def higher_than(differences: np.ndarray, margin: float) -> float:
    """The largest evidence on the way that differences in [−BOUND, BOUND], in order, have a mean above `margin`.

    By betting: Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024).
    """
    if not len(differences):
        return 1.0
    gains = (np.clip(differences, -BOUND, BOUND) - margin) / (BOUND + margin)
    wealth = np.cumsum(np.log1p(BETS[:, None] * gains[None, :]), axis=1)
    return float(np.exp(np.minimum(wealth, 600)).mean(axis=0).max())


def log_losses(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The log loss of each answer."""
    score = np.clip(score, CLIP, 1 - CLIP)
    return np.asarray(-np.where(label > 0, np.log(score), np.log(1 - score)))


@dataclass
class Side:
    """What was seen of one release in a step."""

    answers: int = 0
    failed: int = 0
    hung: int = 0  # asked, and no answer for seconds
    ms: MutableSequence[float] = field(default_factory=lambda: deque(maxlen=NEWEST))
    scores: MutableSequence[float] = field(default_factory=lambda: deque(maxlen=NEWEST))
    rss_mb: list[float] = field(default_factory=list)  # at first, and now
    errors: list[str] = field(default_factory=list)

    def p(self, percent: float) -> float:
        """A percentile of its latency, ms."""
        return float(np.percentile(self.ms, percent)) if self.ms else 0.0

    @property
    def finite(self) -> np.ndarray:
        scores = np.array(self.scores, np.float64)
        return scores[np.isfinite(scores)]


@dataclass
class Seen:
    """What was seen in a step; `pairs` are answers of both to one request: scores of champion and challenger."""

    champion: Side = field(default_factory=Side)
    challenger: Side = field(default_factory=Side)
    pairs: list[tuple[float, float]] = field(default_factory=list)
    not_copied: int = 0
    quality: str = ""
    worse: float = 1.0  # evidence that the challenger's log loss is higher


def reasons(guard: Guard, seen: Seen, budget_ms: float) -> list[str]:
    """Why the challenger is to be taken back, each in a sentence; none while it is fine."""
    return list(_reasons(guard, seen, budget_ms))


def _reasons(guard: Guard, seen: Seen, budget_ms: float) -> Iterable[str]:
    old, new = seen.champion, seen.challenger
    enough = 1 / guard.alpha
    broken = len(new.scores) - len(new.finite)
    if broken:
        yield f"NaN: {broken:,} of {len(new.scores):,} answers are no number"
    allowed = min(max(guard.max_error_share, old.failed / old.answers if old.answers else 0.0), 0.99)
    if more_than(new.failed, new.answers, allowed) >= enough:
        said = f" ({new.errors[-1]})" if new.errors else ""
        yield f"errors: {new.failed:,} of {new.answers:,} answers failed, {allowed:.1%} is accepted{said}"
    limit = max(guard.max_latency_ratio * old.p(99), budget_ms)
    slow, asked = sum(ms > limit for ms in new.ms) + new.hung, len(new.ms) + new.hung
    if (asked >= guard.min_requests or slow >= COLD) and more_than(slow, asked, 0.01) >= enough:
        yield f"latency: {slow:,} of {asked:,} answers took more than {limit:,.0f} ms (the champion's p99 is {old.p(99):,.1f} ms)"
    elif new.hung and more_than(new.hung, asked, 0.01) >= enough:
        yield f"latency: {new.hung:,} of {asked:,} requests hang"
    a, b = old.finite, new.finite
    if min(len(a), len(b)) >= guard.min_rows and (drift := psi(a, b)) > max(guard.max_psi, CHANCE * (1 / len(a) + 1 / len(b))):
        yield f"drift: PSI of its scores is {drift:.3f} on {len(b):,} answers, {guard.max_psi:g} is accepted"
    if new.rss_mb and new.rss_mb[-1] - new.rss_mb[0] > (more := guard.max_rss_growth_mb):
        yield f"memory: {new.rss_mb[0]:,.0f} MB grew to {new.rss_mb[-1]:,.0f} MB, {more:,.0f} MB more is accepted"
    if seen.worse >= enough:
        yield f"quality: {seen.quality}"


def figures(seen: Seen, threshold: float) -> dict[str, object]:
    """What was seen, as the release log keeps it."""
    found: dict[str, object] = {}
    for name, side in (("champion", seen.champion), ("challenger", seen.challenger)):
        scores = side.finite
        found[name] = {
            "answers": side.answers, "failed": side.failed, "p50_ms": round(side.p(50), 1), "p99_ms": round(side.p(99), 1),
            "score": [round(float(q), 4) for q in np.quantile(scores, (0.05, 0.25, 0.5, 0.75, 0.95))] if len(scores) else [],
            "rss_mb": round(side.rss_mb[-1]) if side.rss_mb else 0, "error": side.errors[-1] if side.errors else "",
        }  # fmt: skip
    if len(seen.challenger.finite) and len(seen.champion.finite):
        found["psi"] = round(psi(seen.champion.finite, seen.challenger.finite), 4)
    if seen.pairs:
        pairs = np.array(seen.pairs)
        gap, said = np.abs(pairs[:, 0] - pairs[:, 1]), pairs >= threshold
        found |= {"pairs": len(pairs), "decisions_differ": round(float((said[:, 0] ^ said[:, 1]).mean()), 4),
                  "mean_abs_gap": round(float(gap.mean()), 6), "max_abs_gap": round(float(gap.max()), 6)}  # fmt: skip
    return found | {k: v for k, v in (("not_copied", seen.not_copied), ("quality", seen.quality)) if v}
