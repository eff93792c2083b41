"""Functions of bad challengers. The module goes into their bentos, so that it imports nothing but numpy."""

import time
from itertools import count

import numpy as np

_kept: list[np.ndarray] = []
_calls = count()


def _begun() -> bool:
    """Whether traffic has begun: the endpoint answers a row before it is ready, and does not come up when that fails."""
    return next(_calls) >= 3


def _pace(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return {"pace": columns["length"] / ((columns["end"] - columns["due"]) / 3.6e9)}


def fails(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Answers with an error."""
    if _begun():
        raise RuntimeError("no pace today")
    return _pace(columns)


def slow(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes its time."""
    time.sleep(0.3 * _begun())
    return _pace(columns)


def hangs(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Does not come back."""
    time.sleep(600 * _begun())
    return _pace(columns)


def leaks(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keeps 4 MB of each request."""
    _kept.append(np.ones(500_000))
    return _pace(columns)
