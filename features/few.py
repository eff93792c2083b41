"""The features of few rows from packed cells: a formula costs about as much for fifty features of one row as for one.

What holds of each stored view at a row's time is cut out of its packed value; all of them together are one matrix of
eight-byte cells, on which every formula of `features.views` runs once.
"""

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from features.facts import Columns
from features.packed import Layout
from features.steps import TIME
from features.views import FORMULAS, OWN, Made, Stored, absent, made_of, without_key
from pipelines.clock import MISSING
from pipelines.spec import Sequence as Chain
from pipelines.spec import Spec

FEW_ROWS = 64  # up to so many, rows are looked for one by one


@dataclass(frozen=True, slots=True)
class _Table:
    """A stored view: how it is packed, what stands where it has no step, and of a sequence what its step is before."""

    layout: Layout
    blank: bytes
    chain: Chain | None


@dataclass(frozen=True)
class _Alike:
    """F features of one formula: where they go, the cells (F) or columns of the row that go into it, and their numbers (F, 1)."""

    formula: str
    to: slice
    of: tuple[np.ndarray | list[str], ...]
    numbers: bool  # whether the cells are float64, not int64
    scale: np.ndarray
    older: np.ndarray


class Few:
    """How the features of a spec are made of its stored views. R rows, V stored views, W cells of a row."""

    def __init__(self, spec: Spec, stored: Sequence[Stored], layouts: Mapping[str, Layout]) -> None:
        views = spec.features.views
        self.tables = [_Table(layouts[s.name], _blank(s, layouts[s.name]), views[s.view].sequence) for s in stored]
        place: dict[tuple[str, str], int] = {}
        for s, table in zip(stored, self.tables, strict=True):
            columns = (*table.layout.times, *table.layout.numbers)
            place |= {(s.name, column): len(place) + i for i, column in enumerate(columns)}
        numbers = {(s.name, column) for s in stored for column in layouts[s.name].numbers}
        self.events = {s.view: place[s.name, "_event"] for s in stored if s.kind == "steps" and "_event" in s.integers}
        self.words: dict[int, dict[str, int]] = defaultdict(dict)  # stored view → category → which of its words
        self.keyed: dict[tuple[str, ...], list[str]] = defaultdict(list)  # key of a view → its features
        some: dict[str, list[tuple[str, Made]]] = defaultdict(list)
        at = {s.name: i for i, s in enumerate(stored)}
        for name, view in views.items():
            for feature, made in made_of(spec, name, view).items():
                self.keyed[view.shape.key].append(feature)
                if made.kind == "category":
                    ((title, column),) = made.of
                    self.words[at[title]][feature] = layouts[title].words.index(column)
                else:
                    some[made.formula].append((feature, made))
        self.names = [feature for alike in some.values() for feature, _ in alike]
        self.alike, begin = [], 0
        for formula, features in some.items():
            alike = [made for _, made in features]
            of = tuple([column for _, column in refs] if refs[0][0] == OWN else np.array([place[ref] for ref in refs])
                       for refs in zip(*(made.of for made in alike), strict=True))  # fmt: skip
            scale, older = (np.array([[getattr(made, which)] for made in alike]) for which in ("scale", "older"))
            to = slice(begin, begin := begin + len(alike))
            self.alike.append(_Alike(formula, to, of, alike[0].of[-1] in numbers, scale, older))

    def features(
        self, packed: Sequence[Sequence[bytes]], t: np.ndarray, own: Columns, null: Mapping[tuple[str, ...], np.ndarray]
    ) -> tuple[Columns, dict[str, np.ndarray]]:
        """Features (R) at times t, and event times of the latest views. `packed` (V, R), empty where a key has no value;
        `own`: columns of the rows; `null` (R): where part of a key is null, for the keys of which that is so."""
        steps, pieces = [], []
        for i, at in enumerate(t.tolist()):
            for table, values in zip(self.tables, packed, strict=True):
                value, layout, chain, step = values[i], table.layout, table.chain, -1
                if (end := layout.end(value)) > 4:
                    held = memoryview(value)[4:end].cast("q")
                    step = bisect_right(held[layout.when], at) - 1 if chain is None else _before(
                        layout, held, at, int(own[chain.order][i]), chain.within)  # fmt: skip
                steps.append(step)
                begin = 4 + step * layout.width
                pieces.append(value[begin : begin + layout.width] if step >= 0 else table.blank)
        cells = np.frombuffer(b"".join(pieces), np.int64).reshape(len(t), -1).T
        floats = cells.T.view(np.float64).T
        made = np.empty((len(self.names), len(t)))
        for alike in self.alike:
            source = floats if alike.numbers else cells
            columns = [np.array([own[c] for c in of]) if isinstance(of, list) else source[of] for of in alike.of]
            made[alike.to] = FORMULAS[alike.formula](*columns, t=t, scale=alike.scale, older=alike.older)
        features: Columns = dict(zip(self.names, made, strict=True))
        for which, named in self.words.items():
            layout, of_rows = self.tables[which].layout, steps[which :: len(self.tables)]
            words = [_words(layout, value, step) for value, step in zip(packed[which], of_rows, strict=True)]
            features |= {feature: np.array([of[word] for of in words], object) for feature, word in named.items()}
        for key, rows in null.items():
            features |= without_key({feature: features[feature] for feature in self.keyed.get(key, ())}, rows)
        return features, {view: cells[at] for view, at in self.events.items()}


def _before(layout: Layout, cells: "memoryview[int]", t: int, own: int, within: int) -> int:
    """The newest plan of a sequence that is live at t, with own − within ≤ order < own; −1 where none (`steps.previous`)."""
    if own == MISSING:
        return -1
    order, begins, ends = (cells[layout.times.index(name) :: layout.width // 8] for name in ("_order", TIME, "_live_to"))
    step = bisect_left(order, own) - 1
    while step >= 0 and order[step] >= own - within:
        if begins[step] <= t < ends[step]:
            return step
        step -= 1
    return -1


def _blank(stored: Stored, layout: Layout) -> bytes:
    """What stands where a view has no step."""
    row = np.empty(1, layout.dtype)
    for name in layout.times:
        row[name] = absent(name) if name in stored.integers else MISSING
    for name in layout.numbers:
        row[name] = np.nan
    return row.tobytes()


def _words(layout: Layout, packed: bytes, step: int) -> list[str | None]:
    """The words of a step of a packed value; −1: of none."""
    if step < 0:
        return [None] * len(layout.words)
    return [column[step] for column in json.loads(packed[layout.end(packed) :])]
