"""Rows, labels, parts and features of the code against the oracle, on random pipelines; then mutants of the code.

The oracle is slow and reads like the text; the code is fast. Where they differ, one of them is wrong.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from features import facts, feed, frame, online, parts, rows, windows
from features.facts import Versions
from features.store import build_features, historical_features
from features.windows import Part
from pipelines.clock import NEVER
from pipelines.spec import Source, Spec
from tests.agreement import (
    Asked,
    World,
    arrow,
    features_at,
    frame_differences,
    make_world,
    row_differences,
    serve_world,
    served_differences,
)
from tests.oracle import Key
from tests.random_tables import seeds

BLOCKS, SIZE = 10, 20  # 200 random pipelines, in blocks
THROUGH_FEAST = (*range(1000, 1014), 1018, 1039, 1040)  # in the last ones a sequence shows a column of its key


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # thousands of small files


@pytest.fixture(autouse=True)
def old_rows_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The served store forgets rows by age; the random tables span hours to months, and few facts make a part of a view."""
    for module in (rows, feed, online):
        monkeypatch.setattr(module, "RECENT", 2**60)
    monkeypatch.setattr(parts, "FACTS", 3)
    monkeypatch.setattr(parts, "DAY_US", 1)


@pytest.mark.parametrize("block", seeds(BLOCKS, 1))
def test_the_code_agrees_with_the_oracle(block: int, folder: Path) -> None:
    differences, rows = [], 0
    for seed in range(block * SIZE, (block + 1) * SIZE):
        world = make_world(seed, folder / str(seed))
        asked = world.asked()
        rows += len(asked) - len(world.case.requests)
        served = serve_world(world, folder / str(seed))
        found = frame_differences(world.spec, features_at(served, asked), world.expected(asked), "row")
        found += row_differences(world)
        found += served_differences(world, served if seed % 3 else served_from_now_on(world, folder / str(seed)))
        differences += [f"seed {seed}: {text}" for text in found]
        shutil.rmtree(folder / str(seed))
    assert rows >= 2 * SIZE
    assert differences == []


def served_from_now_on(world: World, folder: Path) -> online.OnlineStore:
    """A store that was fed in the midst of the requests, from views that begin there."""
    middle = sorted(request.t for request in world.case.requests)[2]
    return serve_world(world, folder, since=middle, anchor=middle)


@pytest.mark.parametrize("seed", THROUGH_FEAST)
def test_training_features_through_feast_agree_with_the_oracle(seed: int, folder: Path) -> None:
    world = make_world(seed, folder)
    since = sorted(t for _, t in world.asked())[1]
    asked = [(version, t) for version, t in world.asked() if t >= since]
    built = build_features(world.spec, world.home, world.snapshot, since=since)
    table = arrow(world.spec.row_source, [version for version, _ in asked])
    found = historical_features(world.spec, world.home, built, table, np.array([t for _, t in asked]))
    assert row_differences(world) == []
    assert frame_differences(world.spec, found, world.expected(asked), "row") == []


# Mutants. Each is planted in the code for one row at a time, because one of them depends on the row.

Plant = Callable[[pytest.MonkeyPatch, Spec, Key, int], None]


def unchanged(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    """The code as it is: the same harness finds nothing."""


def join_on_event_time(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    def mutant(table: pa.Table, source: Source, honest: Callable[..., Versions] = facts.versions) -> Versions:
        v = honest(table, source)
        event = facts.int_times(table[str(source.event_time)])
        return replace(v, known_from=event, known_to=np.where(v.known_to < NEVER, np.append(event[1:], NEVER), NEVER))

    monkeypatch.setattr(facts, "versions", mutant)


def own_row_included(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    """The first version of each fact of the row's own key is known at the row's t already."""

    def mutant(table: pa.Table, source: Source, honest: Callable[..., Versions] = facts.versions) -> Versions:
        v = honest(table, source)
        if not set(spec.row_key) <= source.columns.keys() or source is spec.row_source:
            return v
        own = np.diff(v.fact, prepend=-1) > 0
        for name, value in zip(spec.row_key, key, strict=True):
            kind = source.columns[name].type
            column = table[name].cast(pa.int64()) if kind == "timestamp" else table[name]
            own &= pc.equal(column, value).to_numpy().astype(bool)
        return replace(v, known_from=np.where(own, np.minimum(v.known_from, t), v.known_from))

    monkeypatch.setattr(facts, "versions", mutant)


def window_begins_late(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    honest = windows.edges
    monkeypatch.setattr(windows, "edges", lambda over, length, ahead: _moved(honest(over, length, ahead=ahead), 1, 0))


def window_ends_late(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    honest = windows.edges
    monkeypatch.setattr(windows, "edges", lambda over, length, ahead: _moved(honest(over, length, ahead=ahead), 0, 1))


def _moved(edges: tuple[np.ndarray, np.ndarray], begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    return edges[0] + begin, edges[1] + end


def ttl_ignored(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    def mutant(code: np.ndarray, t: np.ndarray, row: np.ndarray, seen: np.ndarray, ttl: int) -> Part:
        return code, t, row, seen

    monkeypatch.setattr(windows, "_expire", mutant)


def correction_ignored(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    def mutant(table: pa.Table, source: Source, honest: Callable[..., Versions] = facts.versions) -> Versions:
        v = honest(table, source)
        first = np.diff(v.fact, prepend=-1) > 0
        return replace(v, known_from=np.where(first, v.known_from, NEVER), known_to=np.full(len(first), NEVER))

    monkeypatch.setattr(facts, "versions", mutant)


def null_key_matched(monkeypatch: pytest.MonkeyPatch, spec: Spec, key: Key, t: int) -> None:
    honest, honest_one = windows.text_keys, online.text_key
    for module in (facts, windows):
        monkeypatch.setattr(module, "text_keys", lambda columns, length: honest(
            [pc.fill_null(pc.cast(c, pa.string()), "null") for c in columns], length))  # fmt: skip
    monkeypatch.setattr(online, "text_key", lambda values: honest_one(["null" if v is None else v for v in values]))
    monkeypatch.setattr(frame, "null_keys", lambda own, key, rows: np.zeros(rows, bool))


MUTANTS = (join_on_event_time, own_row_included, window_begins_late, window_ends_late, ttl_ignored,
           correction_ignored, null_key_matched)  # fmt: skip
MUTATED = range(2000, 2012)  # pipelines in which each of them shows


def differences_of_rows(plant: Plant, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the comparison finds while a mutant is planted, row by row."""
    for i, row in enumerate(world.oracle.rows(world.case.as_of).rows):
        asked: list[Asked] = [(row.version, row.t)]
        with monkeypatch.context() as planted:
            plant(planted, world.spec, row.key, row.t)
            found = features_at(serve_world(world, folder / str(i)), asked)
        yield from frame_differences(world.spec, found, world.expected(asked), f"row {row.key}")


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_mutant_is_caught(plant: Plant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in MUTATED:
        world = make_world(seed, folder / str(seed))
        if next(differences_of_rows(plant, world, folder / f"{seed}served", monkeypatch), None):
            return
    pytest.fail("nothing differs")


def test_without_a_mutant_nothing_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(MUTATED[0], folder)
    assert list(differences_of_rows(unchanged, world, folder / "served", monkeypatch)) == []
