"""The features of few rows from packed cells: a formula costs about as much for fifty features of one row as for one.

What holds of each stored view at a row's time is cut out of its packed value; all of them together are one matrix of
eight-byte cells, on which every formula of `features.views` runs once.
"""

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from features.facts import Columns
from features.packed import Layout
from features.steps import TIME
from features.views import FORMULAS, Made, Stored, absent, made_of, without_key
from pipelines.spec import Spec

FEW_ROWS = 64  # up to so many, rows are looked for one by one


@dataclass(frozen=True)
class _Alike:
    """F features of one formula: where they go, of which cells they are made, and their numbers (F, 1)."""

    formula: str
    to: slice
    cells: tuple[np.ndarray, ...]
    numbers: bool  # whether the cells are float64, not int64
    scale: np.ndarray
    older: np.ndarray


class Few:
    """How the features of a spec are made of its stored views; those of sequences are looked for elsewhere.

    R rows, V stored views, W cells of a row.
    """

    def __init__(self, spec: Spec, stored: Sequence[Stored], layouts: Mapping[str, Layout]) -> None:
        self.stored = [s for s in stored if s.kind != "sequence"]
        self.plan = [((layout := layouts[s.name]), _blank(s, layout)) for s in self.stored]
        place: dict[tuple[str, str], int] = {}
        for layout, _ in self.plan:
            place |= {(layout.view, column): len(place) + i for i, column in enumerate((*layout.times, *layout.numbers))}
        numbers = {(layout.view, column) for layout, _ in self.plan for column in layout.numbers}
        self.events = {s.view: place[s.name, "_event"] for s in self.stored if s.kind == "steps" and "_event" in s.integers}
        self.words: dict[int, dict[str, int]] = defaultdict(dict)  # stored view → category → which of its words
        self.keyed: dict[tuple[str, ...], list[str]] = defaultdict(list)  # key of a view → its features
        self.sequences: dict[str, dict[str, Made]] = {}  # by view: of what its features are made
        some: dict[str, list[tuple[str, Made]]] = defaultdict(list)
        at = {s.name: i for i, s in enumerate(self.stored)}
        for name, view in spec.features.views.items():
            every = made_of(spec, name, view)
            if view.sequence is not None:
                self.sequences[name] = every
                continue
            for feature, made in every.items():
                self.keyed[view.shape.key].append(feature)
                if made.kind == "category":
                    ((table, column),) = made.of
                    self.words[at[table]][feature] = layouts[table].words.index(column)
                else:
                    some[made.formula].append((feature, made))
        self.names = [feature for alike in some.values() for feature, _ in alike]
        self.alike, begin = [], 0
        for formula, features in some.items():
            alike = [made for _, made in features]
            cells = tuple(np.array([place[ref] for ref in refs]) for refs in zip(*(made.of for made in alike), strict=True))
            scale, older = (np.array([[getattr(made, which)] for made in alike]) for which in ("scale", "older"))
            to = slice(begin, begin := begin + len(alike))
            self.alike.append(_Alike(formula, to, cells, alike[0].of[0] in numbers, scale, older))

    def features(
        self, packed: Sequence[Sequence[bytes]], t: np.ndarray, null: Mapping[tuple[str, ...], np.ndarray]
    ) -> tuple[Columns, dict[str, np.ndarray]]:
        """Features (R) at times t, and event times of the latest views. `packed` (V, R), empty where a key has no value;
        `null` (R): where part of a key is null, for the keys of which that is so."""
        newest = [self._newest([of[i] for of in packed], now) for i, now in enumerate(t.tolist())]
        cells = np.frombuffer(b"".join([piece for row in newest for piece, _ in row]), np.int64).reshape(len(t), -1).T
        floats = cells.T.view(np.float64).T
        made = np.empty((len(self.names), len(t)))
        for alike in self.alike:
            source = floats if alike.numbers else cells
            columns = [source[of] for of in alike.cells]
            made[alike.to] = FORMULAS[alike.formula](*columns, t=t, scale=alike.scale, older=alike.older)
        found: Columns = dict(zip(self.names, made, strict=True))
        for table, features in self.words.items():
            words = [_words(self.plan[table][0], of, row[table][1]) for of, row in zip(packed[table], newest, strict=True)]
            found |= {feature: np.array([of[i] for of in words], object) for feature, i in features.items()}
        for key, rows in null.items():
            found |= without_key({feature: found[feature] for feature in self.keyed.get(key, ())}, rows)
        return found, {view: cells[at] for view, at in self.events.items()}

    def _newest(self, packed: Sequence[bytes], now: int) -> list[tuple[bytes, int]]:
        """The cells of the newest step with time ≤ now in each of V packed values, and which it is; −1 and blank where none."""
        found = []
        for value, (layout, blank) in zip(packed, self.plan, strict=True):
            width = layout.width
            end = 4 + int.from_bytes(value[:4], "little") * width
            row = bisect_right(memoryview(value)[4:end].cast("q")[layout.when], now) - 1 if end > 4 else -1
            found.append((value[4 + row * width : 4 + (row + 1) * width], row) if row >= 0 else (blank, -1))
        return found


def _blank(stored: Stored, layout: Layout) -> bytes:
    """What stands where a view has no step."""
    row = np.empty(1, layout.dtype)
    for name in layout.times:
        row[name] = 0 if name == TIME else absent(name)
    for name in layout.numbers:
        row[name] = np.nan
    return row.tobytes()


def _words(layout: Layout, packed: bytes, step: int) -> list[str | None]:
    """The words of a step of a packed value; −1: of none."""
    if step < 0:
        return [None] * len(layout.words)
    return [column[step] for column in json.loads(packed[4 + int.from_bytes(packed[:4], "little") * layout.width :])]
