"""The quality gate: may the challenger replace the champion?"""

from dataclasses import dataclass

from models.evaluate import CHALLENGER, CHAMPION, PRIOR, Evaluation, Interval, SliceQuality
from pipelines.errors import MillraceError
from pipelines.spec import Gate

SAME = "same"  # the rule that stands for a gain where challenger and champion are one model


@dataclass(frozen=True)
class Rule:
    """One rule, whether it was passed, and a sentence with the figures."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """`reasons`: the sentences of the rules that refused, or of all rules when it is promoted."""

    promoted: bool
    reasons: tuple[str, ...]
    rules: tuple[Rule, ...]


def decide(evaluation: Evaluation, gate: Gate, *, has_champion: bool, equal: bool = False) -> Verdict:
    """The verdict of all rules. Without a champion the bar is the model that only knows the base rate.

    `equal`: the challenger answers every test row as the champion does. It need not gain then: what differs is how it is
    packaged, such as another threshold, or a new version of the code that serves.
    """
    bar = CHAMPION if has_champion else PRIOR
    if evaluation.bar != bar:
        raise MillraceError(f"the gate needs an evaluation against the {bar}, not the {evaluation.bar}")
    rules = tuple(rule(evaluation, gate) for rule in (_rows, _same if equal else _gain, _calibration, _slices))
    refused = tuple(rule.reason for rule in rules if not rule.passed)
    return Verdict(not refused, refused or tuple(rule.reason for rule in rules), rules)


def _rows(evaluation: Evaluation, gate: Gate) -> Rule:
    enough = evaluation.rows >= gate.min_rows
    compared = "at least" if enough else "fewer than"
    reason = f"{evaluation.rows:,} test rows, {compared} gate.min_rows {gate.min_rows:,}"
    return Rule("min_rows", enough, reason)


def _gain(evaluation: Evaluation, gate: Gate) -> Rule:
    found = evaluation.gains[evaluation.bar][gate.metric]
    passed = found.low is not None and found.low > gate.min_gain
    ours, theirs = (evaluation.metrics[m][gate.metric].value for m in (CHALLENGER, evaluation.bar))
    verb = "beats" if passed else "does not beat"
    reason = (
        f"the challenger {verb} the {_title(evaluation.bar)} on {gate.metric}: {_number(ours)} against "
        f"{_number(theirs)}, gain {_span(found, gate)}; its lower end must exceed {gate.min_gain:g}"
    )
    return Rule("gain", passed, reason)


def _same(evaluation: Evaluation, gate: Gate) -> Rule:
    return Rule(SAME, True, f"the challenger answers all {evaluation.rows:,} test rows exactly as the champion does")


def _calibration(evaluation: Evaluation, gate: Gate) -> Rule:
    found = evaluation.metrics[CHALLENGER]["ece"].value
    passed = found is not None and found <= gate.max_calibration_error
    reason = (
        f"calibration error {_number(found)}, {'within' if passed else 'above'} "
        f"gate.max_calibration_error {gate.max_calibration_error:g}"
    )
    return Rule("calibration", passed, reason)


def _slices(evaluation: Evaluation, gate: Gate) -> Rule:
    judged = [s for s in evaluation.slices if s.rows >= gate.slice_min_rows and s.gain.value is not None]
    lost = [s for s in judged if _loses(s, gate)]
    if lost:
        worst = sorted(lost, key=lambda s: s.gain.high if s.gain.high is not None else 0.0)
        listed = "; ".join(_slice_text(s, evaluation, gate) for s in worst[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        return Rule("slices", False, f"{listed}{more}; gate.max_slice_loss is {gate.max_slice_loss:g}")
    small = len(evaluation.slices) - len(judged)
    reason = (
        f"no slice loses more than {gate.max_slice_loss:g} of {gate.metric} against the "
        f"{_title(evaluation.bar)} ({len(judged)} judged, {small} too small to judge)"
    )
    return Rule("slices", True, reason)


def _loses(found: SliceQuality, gate: Gate) -> bool:
    """Whether the whole interval of the loss lies above what is accepted: chance alone refuses nobody."""
    return found.gain.high is not None and -found.gain.high > gate.max_slice_loss


def _slice_text(found: SliceQuality, evaluation: Evaluation, gate: Gate) -> str:
    return (
        f"slice {found.name}={found.value} ({found.rows:,} rows) is worse than the {_title(evaluation.bar)} "
        f"on {gate.metric}, gain {_span(found.gain, gate)}"
    )


def _title(bar: str) -> str:
    return "champion" if bar == CHAMPION else "prior-only model"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _span(found: Interval, gate: Gate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "undefined"
    return f"{found.value:+.4f} ({gate.confidence:.0%} interval {found.low:+.4f} to {found.high:+.4f})"
