"""Preprocessing: learned from the training part alone, and the same for a batch, for one row, and after it was saved."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.facts import Columns
from features.frame import Feature, arrow_columns
from features.preprocess import Preprocess, fit

FEATURES = [Feature("x", "number", "row"), Feature("y", "number", "row"), Feature("c", "category", "row")]
TRAIN = np.arange(200) < 150


@pytest.fixture
def frame() -> Columns:
    draw = np.random.default_rng(7)
    c = np.array([None, "often", "also", "seldom"], object)[np.r_[draw.integers(0, 3, 150), [3] * 50]]
    return {"x": np.where(draw.random(200) < 0.1, np.nan, draw.normal(5, 2, 200)), "y": draw.normal(size=200), "c": c}


def test_one_row_is_prepared_as_in_the_batch_also_after_it_was_saved(frame: Columns, tmp_path: Path) -> None:
    fitted = fit(frame, TRAIN, FEATURES)
    fitted.save(tmp_path / "preprocess.json")
    loaded, whole = Preprocess.load(tmp_path / "preprocess.json"), fitted.transform(frame)
    assert loaded == fitted
    for i in range(0, 200, 7):
        one = loaded.transform({name: values[i : i + 1] for name, values in frame.items()})
        for got, wanted in ((one.numbers, whole.numbers), (one.codes, whole.codes), (one.scaled, whole.scaled)):
            np.testing.assert_array_equal(got[0], wanted[i])


def test_it_learns_from_the_training_part_alone(frame: Columns) -> None:
    other = {"x": np.where(TRAIN, frame["x"], 1e6), "y": np.where(TRAIN, frame["y"], np.nan), "c": frame["c"]}
    assert fit(other, TRAIN, FEATURES) == fit(frame, TRAIN, FEATURES)


def test_what_is_missing_or_was_not_seen_is_told(frame: Columns) -> None:
    fitted = fit(frame, TRAIN, FEATURES)
    asked = {"x": np.array([np.nan, 5.0]), "y": np.array([0.0, np.nan]), "c": np.array(["seldom", None], object)}
    batch = fitted.transform(asked)
    assert batch.codes.tolist() == [[0], [0]] and fitted.unknown(asked, batch) == ([["x"], ["y", "c"]], [["c"], []])
    assert fitted.may_miss == (0,) and batch.scaled[:, 2].tolist() == [1.0, 0.0]
    assert batch.scaled[0, 0] == batch.scaled[1, 1] == 0.0


def test_numbers_beyond_all_are_clipped(frame: Columns) -> None:
    frame["y"][:20] = np.inf
    frame["y"][20:30] = -np.inf
    fitted = fit(frame, TRAIN, FEATURES)
    scaled = fitted.transform(frame).scaled
    assert np.isfinite(scaled).all() and fitted.may_miss == (0,)
    assert scaled[0, 1] == scaled[:, 1].max() and scaled[20, 1] == scaled[:, 1].min()


def test_arrow_columns_are_prepared_as_the_frame(frame: Columns) -> None:
    fitted = fit(frame, TRAIN, FEATURES)
    frame["x"][:2], frame["c"][0] = (-0.0, 1e300), "never"
    wanted, columns = fitted.transform(frame), arrow_columns(frame)
    for some in (columns, {**columns, "x": pa.array(frame["x"], from_pandas=True)}):  # a null is what NaN is
        got = fitted.transform_arrow(some)
        assert all(getattr(got, n).tobytes() == getattr(wanted, n).tobytes() for n in ("codes", "scaled"))
        np.testing.assert_array_equal(got.numbers, wanted.numbers)
    assert len(fitted.transform_arrow({name: column[:0] for name, column in columns.items()})) == 0
