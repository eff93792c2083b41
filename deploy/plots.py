"""The drawings of a report, as inline SVG that takes its colours and fonts from the page.

matplotlib draws in stand-in colours that variables of the page's style sheet replace, so that one drawing fits a light
and a dark screen. Lengths are CSS pixels. Call everything here within `style()`.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.findings import MODEL_TITLES, Findings, Learning, groups, models, slices, tone
from models.evaluate import CHALLENGER, CHAMPION, PRIOR, Evaluation, Interval
from pipelines.manifest import digest_of

TOP_FEATURES, SLICE_VALUES = 25, 20
# a tone or a model → the colour that stands in for its variable (`--soft`, `--m-gbdt`)
_TONES = ("ink", "soft", "line", "fill", "card", "bad", "odd", "ok")
_PAINT = {name: f"#0a0b{i + 1:02x}" for i, name in enumerate((*_TONES, *MODEL_TITLES))}
_VARIABLES = {p: f"var(--{'' if n in _TONES else 'm-'}{n.replace('_', '-')})" for n, p in _PAINT.items()}
_INK, _SOFT, _LINE, _CARD = (_PAINT[name] for name in ("ink", "soft", "line", "card"))
_GUESS: Any = {"color": _SOFT, "lw": 1, "ls": (0, (1, 2))}
_DASHES: dict[str, Any] = {
    CHALLENGER: "-", CHAMPION: "-", "gbdt": (0, (5, 1.5)), "gbdt_tuned": (0, (7, 2, 1.5, 2)), "network": (0, (2.5, 1.2)),
    "words": (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)), PRIOR: (0, (1, 1.5)),
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "figure.dpi": 72, "font.family": "DejaVu Sans", "font.size": 11,
    "text.color": _INK, "axes.edgecolor": _LINE, "axes.labelcolor": _SOFT, "axes.linewidth": 1, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": _LINE, "grid.linewidth": 0.7,
    "xtick.color": _SOFT, "ytick.color": _SOFT, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 5,
    "ytick.major.pad": 6, "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round", "path.simplify_threshold": 0.2,
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """What every drawing is made within: fonts, colours and line widths."""
    return matplotlib.rc_context(_STYLE)


def intervals(name: str, rows: Sequence[tuple[str, Interval, str]]) -> Markup:
    """Labels, values with intervals, and colours below one another, for a tile. Without labels they are held against 0."""
    labelled = rows[0][0] != ""
    axes = _axes(230, 22 + 17 * len(rows), left=66 if labelled else 4, right=8, top=4, bottom=18)
    ends = [v for _, i, _ in rows if i.value is not None for v in _ends(i)] + ([] if labelled else [0.0])
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    pad = 0.12 * (high - low) or 0.05
    axes.set(xlim=(low - pad, high + pad), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    axes.set_yticklabels([label for label, _, _ in rows], fontsize=10.5)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=3)
    axes.tick_params(axis="x", labelsize=9.5, pad=3)
    if not labelled:
        axes.axvline(0, color=_SOFT, lw=1, ls=(0, (2, 2)))
    for place, (_, found, colour) in enumerate(rows):
        _interval(axes, found, place, _PAINT[colour])
    return _svg(axes, f"strip-{name}", f"{name.replace('_', ' ')}: values with intervals")


def roc(evaluation: Evaluation) -> Markup:
    """ROC curves of all models but the prior."""
    axes = _square("ROC", "share of the negatives called", "share of the positives found")
    axes.plot([0, 1], [0, 1], **_GUESS)
    return _ranking(axes, evaluation, "roc", x="false_positive_rate", y="true_positive_rate", label="ROC curves of all models")


def precision(evaluation: Evaluation) -> Markup:
    """Precision-recall curves of all models but the prior."""
    axes = _square("Precision and recall", "share of the positives found (recall)", "share of the called that are positive")
    axes.axhline(evaluation.positives / evaluation.rows, **_GUESS)
    return _ranking(axes, evaluation, "pr", x="recall", y="precision", label="Precision-recall curves of all models")


def calibration(evaluation: Evaluation) -> Markup:
    """Share that came true by probability that was answered, of all models."""
    axes = _square("Calibration", "probability that was answered", "share that came true")
    axes.plot([0, 1], [0, 1], **_GUESS)
    ends = [1e-3]
    for name, look in _lines(evaluation):
        points = evaluation.curves[name]["calibration"]
        size = {CHALLENGER: 5.0, PRIOR: 7.0}.get(name, 3.5)
        axes.plot(points["mean"], points["share"], marker="o", ms=size, mec=_CARD, mew=0.7, **look)
        ends += [*points["mean"], *points["share"]]
    top = min(1.01, 1.06 * max(ends))
    axes.set(xlim=(-0.012 * top, top), ylim=(-0.012 * top, top))
    return _svg(axes, "calibration", "Calibration curves of all models")


def slice_gains(found: Findings, name: str) -> Markup:
    """Gain over the bar with its interval for the values of a slice, worst first.

    One scale serves all slices of a run: every interval that is judged and 0 lie on it, small slices may reach beyond.
    """
    fewest, ranked = found.spec.gate.slice_min_rows, slices(found)
    judged = [s for s in ranked if s.rows >= fewest] or ranked
    ends = [v for s in judged for v in _ends(s.gain)] + [0.0]
    pad = 0.06 * (max(ends) - min(ends)) or 0.01
    shown = [s for s in ranked if s.name == name][:SLICE_VALUES]
    labels = [_plain(s.value, 20) for s in shown]
    axes = _axes(500, 40 + 21 * len(shown), left=min(150, 14 + 7 * max(map(len, labels))), right=74, top=20, bottom=20)
    axes.set(xlim=(min(ends) - pad, max(ends) + pad), ylim=(len(shown) - 0.4, -0.6), yticks=range(len(shown)))
    axes.set_yticklabels(labels)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="x", labelsize=10)
    axes.axvline(0, color=_SOFT, lw=1.2)
    axes.text(1.14, 1 + 7 / (21 * len(shown)), "rows", transform=axes.transAxes, color=_SOFT, fontsize=10, ha="right")
    for place, one in enumerate(shown):
        colour = "soft" if one.rows < fewest else "bad" if tone(one.gain) == "bad" else CHALLENGER
        _interval(axes, one.gain, place, _PAINT[colour])
        axes.text(1.14, place, f"{one.rows:,}", transform=axes.get_yaxis_transform(), ha="right", va="center_baseline",
                  color=_SOFT, fontsize=10.5)  # fmt: skip
    return _svg(axes, f"slice-{name}", f"Gain by {name}, with intervals, worst first")


def importance(found: Findings) -> Markup:
    """Share of gain of the strongest features, and the groups that they come from."""
    shown = [w for w in found.weights if w.share > 0][:TOP_FEATURES]
    axes = _axes(620, 12 + 21 * len(shown), left=272, right=186, top=2, bottom=6)
    _bars(axes, [_plain(w.name, 42) for w in shown], [w.share for w in shown], CHALLENGER)
    for place, one in enumerate(shown):
        _beside(axes, one.share, place, f"{one.share:.1%}")
        axes.annotate(_plain(one.group, 25), (1, place), (184, 0), xycoords=axes.get_yaxis_transform(), color=_SOFT,
                      textcoords="offset points", ha="right", va="center_baseline", fontsize=10)  # fmt: skip
    return _svg(axes, "importance", "The strongest features by gain")


def group_importance(found: Findings) -> Markup:
    """Share of gain of the groups of features."""
    shown = [g for g in groups(found) if g.share > 0]
    axes = _axes(400, 12 + 21 * len(shown), left=178, right=52, top=2, bottom=6)
    _bars(axes, [_plain(g.name, 25) for g in shown], [g.share for g in shown], "gbdt")
    for place, group in enumerate(shown):
        _beside(axes, group.share, place, f"{group.share:.1%}")
    return _svg(axes, "groups", "Gain by group of features")


def search(found: Findings, study: str) -> Markup:
    """Every trial's log loss in the order of slots, generations shaded in turn, pruned ones hollow, the best ringed."""
    trials = [t for t in found.trials if t.study == study]
    paint = _PAINT.get(study, _PAINT[CHALLENGER])
    axes = _course(256, above=1.05, y="log loss on valid_fit", x="trial")
    for generation in sorted({t.generation for t in trials})[::2]:
        places = [i for i, t in enumerate(trials) if t.generation == generation]
        axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=_PAINT["fill"], lw=0)
    known = [(i, t, t.loss) for i, t in enumerate(trials) if t.loss is not None]
    done = [(i, loss) for i, t, loss in known if t.state == "complete"]
    axes.step([i for i, _ in done], list(accumulate((loss for _, loss in done), min)), where="post", color=_SOFT, lw=1.2)
    for place, trial, loss in known:
        face, edge = (paint, _CARD) if trial.state == "complete" else (_CARD, _SOFT)
        axes.plot([place], [loss], "o", ms=8, mfc=face, mec=edge, mew=1.4)
        if trial.best:
            axes.plot([place], [loss], "o", ms=14, mfc="none", mec=paint, mew=1.8)
    ticks = range(0, len(trials), max(1, len(trials) // 12))
    axes.set(xlim=(-0.6, len(trials) - 0.4), xticks=ticks, xticklabels=[str(trials[i].slot) for i in ticks])
    return _svg(axes, f"trials-{study}", f"Trials of the {study}: log loss by slot")


def learning_curve(one: Learning) -> Markup:
    """Log loss by epoch or round, the kept one ringed."""
    paint, count = _PAINT.get(one.model, _PAINT[CHALLENGER]), len(one.losses)
    few = count <= 40
    said = "log loss on valid_fit" + (", dashed: on train" if one.train else "")
    axes = _course(224, above=1.06, y=said, x=one.steps)
    if one.train:
        axes.plot(range(1, len(one.train) + 1), one.train, color=_SOFT, lw=1.4, ls=(0, (4, 2)))
    axes.plot(range(1, count + 1), one.losses, color=paint, lw=2, marker="o" if few else None, ms=6, mec=_CARD, mew=1)
    axes.plot([one.kept], [one.losses[one.kept - 1]], "o", ms=13 if few else 9, mfc="none", mec=paint, mew=1.8)
    if few:
        axes.set(xlim=(0.6, count + 0.4), xticks=range(1, count + 1, max(1, count // 10)))
    return _svg(axes, f"learning-{one.model}", f"Learning curve of {one.model}")


def learning_curves(a: Learning, b: Learning) -> Markup:
    """Log loss by epoch or round of the same model in two runs: the first dashed, the second in full."""
    paint, count = _PAINT.get(a.model, _PAINT[CHALLENGER]), max(len(a.losses), len(b.losses))
    axes = _course(224, above=1.06, y="log loss on valid_fit", x=a.steps)
    for one, colour, dashes in ((a, _SOFT, (0, (4, 2))), (b, paint, "-")):
        axes.plot(range(1, len(one.losses) + 1), one.losses, color=colour, lw=1.8, ls=dashes)
        axes.plot([one.kept], [one.losses[one.kept - 1]], "o", ms=9, mfc="none", mec=colour, mew=1.8)
    if count <= 40:
        axes.set(xlim=(0.6, count + 0.4), xticks=range(1, count + 1, max(1, count // 10)))
    return _svg(axes, f"both-{a.model}", f"Learning curves of {a.model} in both runs")


def stages(costs: Sequence[Mapping[str, Any]]) -> Markup:
    """Seconds, and CPU seconds below them, of every stage."""
    axes = _axes(460, 34 + 36 * len(costs), left=104, right=58, top=2, bottom=6)
    seconds, cpu = [s["seconds"] for s in costs], [s["cpu_s"] for s in costs]
    _bars(axes, [s["stage"].replace("_", " ") for s in costs], seconds, CHALLENGER, height=0.3)
    axes.barh([i + 0.31 for i in range(len(cpu))], cpu, height=0.2, color=_PAINT[CHALLENGER], alpha=0.38)
    axes.set(xlim=(0, max([*seconds, *cpu, 1e-3])), ylim=(len(costs) - 0.3, -0.5))
    for place, value in enumerate(seconds):
        _beside(axes, value, place, f"{value:,.1f} s")
    return _svg(axes, "stages", "Seconds and CPU seconds of every stage")


# Pieces


def _axes(width: float, height: float, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes in a figure of this size, with these margins."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    inner = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes: Axes = figure.add_axes(inner, facecolor="none")
    return axes


def _square(title: str, x: str, y: str) -> Axes:
    axes = _axes(340, 336, left=34, right=12, top=46, bottom=42)
    axes.text(-0.115, 1.105, title, transform=axes.transAxes, fontsize=13.5, fontweight="bold")
    axes.set_xlabel(x, fontsize=10.5, labelpad=6)
    axes.text(-0.115, 1.03, y, transform=axes.transAxes, fontsize=10.5, color=_SOFT)
    axes.grid(visible=True)
    axes.tick_params(labelsize=10)
    return axes


def _course(height: float, *, above: float, y: str, x: str) -> Axes:
    """Axes for what changes from step to step; `y` is written above them, at this share of their height."""
    axes = _axes(520, height, left=46, right=14, top=26, bottom=40)
    axes.grid(visible=True, axis="y")
    axes.text(-0.07, above, y, transform=axes.transAxes, color=_SOFT, fontsize=10.5)
    axes.set_xlabel(x, fontsize=10.5, labelpad=5)
    axes.margins(y=0.14)
    axes.locator_params(axis="y", nbins=5)
    return axes


def _lines(evaluation: Evaluation) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models from back to front, and how their lines look."""
    for name in reversed(models(evaluation)):
        dashes = _DASHES.get(name, (0, (4, 1.5)))
        yield name, {"color": _PAINT.get(name, _SOFT), "lw": 2.4 if name == CHALLENGER else 1.5, "ls": dashes}


def _ranking(axes: Axes, evaluation: Evaluation, curve: str, *, x: str, y: str, label: str) -> Markup:
    for name, look in _lines(evaluation):
        if name != PRIOR:
            points = evaluation.curves[name][curve]
            axes.plot(points[x], points[y], **look)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return _svg(axes, curve, label)


def _ends(found: Interval) -> list[float]:
    return [v for v in (found.low, found.value, found.high) if v is not None]


def _interval(axes: Axes, found: Interval, place: float, paint: str) -> None:
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place, place], color=paint, lw=2.2, alpha=0.55)
    if found.value is not None:
        axes.plot([found.value], [place], "o", color=paint, ms=6.5, mec=_CARD, mew=1)


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], colour: str, *, height: float = 0.62) -> None:
    axes.barh(range(len(values)), values, height=height, color=_PAINT[colour])
    axes.set(xlim=(0, max(values, default=1)), ylim=(len(values) - 0.4, -0.6), yticks=range(len(values)), xticks=[])
    axes.set_yticklabels(labels)
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.spines[["left", "bottom"]].set_visible(False)


def _beside(axes: Axes, value: float, place: float, text: str) -> None:
    axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center_baseline", fontsize=10.5)


def _plain(text: object, most: int) -> str:
    """Text for a plot: one line, printable, not longer than `most`."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _svg(axes: Axes, name: str, title: str) -> Markup:
    """The figure as inline SVG: no header, no name spaces, ids of its own, colours and fonts of the page."""
    figure, buffer = axes.get_figure(root=True), io.StringIO()
    assert isinstance(figure, Figure)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", text))
    prefix = f"{re.sub(r'[^a-z0-9]', '', name.lower())}-{digest_of(name)[:4]}-"
    text = re.sub(r"<[^>]+>", lambda tag: _clean(tag[0], used, prefix), text)
    text = re.sub(r">\s+<", "><", text)
    width = round(figure.get_size_inches()[0] * 72)
    size = f"min-width:{round(0.8 * width)}px;max-width:{width}px"  # a small screen scrolls, so that words stay legible
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(title)}" style="{size}"', 1))


def _clean(tag: str, used: set[str], prefix: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
    tag = tag.replace('xlink:href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    tag = re.sub(r"font-family: [^;\"]*(; )?", "", tag)
    tag = re.sub(r"#0a0b[0-9a-f]{2}", lambda m: _VARIABLES.get(m[0], m[0]), tag)
    return re.sub(r"(\.\d{2})\d+", r"\1", re.sub(r"\s*\n", " ", tag))
