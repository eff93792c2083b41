"""A function of the buses pipeline: its module goes into the bento, so that it imports nothing but numpy."""

import numpy as np


def pace(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kilometres per hour."""
    with np.errstate(all="ignore"):
        return {"pace": columns["length"] / ((columns["end"] - columns["due"]) / 3.6e9)}
