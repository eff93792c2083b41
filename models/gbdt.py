"""LightGBM: the baseline at fixed defaults that every run trains, and the tuned candidate.

N rows, F number and C category columns.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import lightgbm as lgb
import numpy as np

from features.preprocess import Batch
from features.rows import PARTS
from pipelines.spec import Gbdt

Param = float | int | str
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Trees:
    """A fitted booster as text, the same for any number of threads, and its log loss on valid_fit by round."""

    text: str
    curve: tuple[float, ...]
    rounds: int

    @property
    def log_loss(self) -> float:
        """Log loss on valid_fit at the round that was kept."""
        return self.curve[self.rounds - 1]


def fit_gbdt(
    params: Gbdt,
    batch: Batch,
    label: np.ndarray,
    part: np.ndarray,
    seed: int,
    *,
    extra: Mapping[str, Param] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trees:
    """Trees fitted on the train part, stopped early on valid_fit. `extra`: more LightGBM parameters by name.

    The text depends on data, parameters and seed alone: neither on threads nor on time.
    """
    fields = {**params.model_dump(), **(extra or {})}
    rounds, patience = int(fields.pop("max_rounds")), int(fields.pop("patience"))
    numbers, categories = batch.numbers.shape[1], batch.codes.shape[1]
    settings = {
        **fields,
        "objective": "binary",
        "metric": "binary_logloss",
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": threads or default_threads(),
        "verbosity": -1,
    }
    train = _dataset(batch, label, part == PARTS.index("train"), list(range(numbers, numbers + categories)))
    valid = _dataset(batch, label, part == PARTS.index("valid_fit"), "auto", reference=train)
    history: dict[str, dict[str, list[float]]] = {}
    callbacks: list[Callable[..., object]] = [
        lgb.early_stopping(patience, verbose=False),
        lgb.record_evaluation(history),
    ]
    if progress is not None:
        callbacks.append(_reporter(progress))
    booster = lgb.train(settings, train, rounds, valid_sets=[valid], valid_names=["valid_fit"], callbacks=callbacks)
    best = booster.best_iteration or booster.current_iteration()
    text = canonical_text(booster.model_to_string(num_iteration=best))
    # the last bits of the log loss depend on the number of threads, the trees do not
    curve = tuple(round(loss, 9) for loss in history["valid_fit"]["binary_logloss"])
    return Trees(text, curve, best)


def _dataset(
    batch: Batch,
    label: np.ndarray,
    rows: np.ndarray,
    categories: list[int] | str,
    reference: lgb.Dataset | None = None,
) -> lgb.Dataset:
    taken = batch.take(np.flatnonzero(rows))
    return lgb.Dataset(taken.trees, label[rows], reference=reference, categorical_feature=categories)  # type: ignore[arg-type]


def _reporter(progress: Progress) -> Callable[[lgb.callback.CallbackEnv], None]:
    def report(env: lgb.callback.CallbackEnv) -> None:
        if env.evaluation_result_list:
            progress(env.iteration + 1, float(env.evaluation_result_list[0][2]))

    return report


def canonical_text(text: str) -> str:
    """Model text without what the machine put into it: the number of threads."""
    return re.sub(r"^\[num_threads: .*\]$", "[num_threads: 0]", text, flags=re.MULTILINE)


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else as many as this process may use: results do not depend on it."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def importance(text: str) -> np.ndarray:
    """Total gain of each column of `Batch.trees`, as shares that add up to 1 (F + C, and V where there are texts)."""
    gain = np.asarray(lgb.Booster(model_str=text).feature_importance("gain"), np.float64)
    return gain / max(float(gain.sum()), 1e-300)
