"""Functions of bad challengers. The module goes into their bentos, so that it imports nothing but numpy."""

import time

import numpy as np

_kept: list[np.ndarray] = []


def _pace(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return {"pace": columns["length"] / ((columns["end"] - columns["due"]) / 3.6e9)}


def fails(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Never answers but with an error."""
    raise RuntimeError("no pace today")


def slow(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes its time."""
    time.sleep(0.3)
    return _pace(columns)


def hangs(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Does not come back."""
    time.sleep(600)
    return _pace(columns)


def leaks(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keeps 4 MB of each request."""
    _kept.append(np.ones(500_000))
    return _pace(columns)
