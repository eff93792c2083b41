"""The heartbeat of a rank: a few whole numbers in shared memory, so that every step may beat. Needs no torch."""

import mmap
from pathlib import Path

START, STEPS, END = range(3)  # phases: until the first step is done, training, writing what is left
_FIELDS = 4  # beats, phase, steps done, steps in all
_SIZE = 8 * _FIELDS


class Beat:
    """One rank's heartbeat at `path`. The supervisor makes the file; its rank writes, and anyone may read."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("q")

    @classmethod
    def make(cls, path: Path) -> "Beat":
        """A new heartbeat that has not beaten; who reads an old one at this path keeps reading that."""
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_bytes(bytes(_SIZE))
        scratch.replace(path)  # nobody sees it empty
        return cls(path)

    def __call__(self, phase: int | None = None, step: int | None = None, steps: int | None = None) -> None:
        """Says that something was done."""
        for cell, value in ((1, phase), (2, step), (3, steps)):
            if value is not None:
                self._cells[cell] = value
        self._cells[0] += 1

    @property
    def beats(self) -> int:
        return self._cells[0]

    @property
    def phase(self) -> int:
        return self._cells[1]

    @property
    def step(self) -> int:
        """Optimiser steps that are done, counted from the beginning of the training."""
        return self._cells[2]

    @property
    def share(self) -> float:
        """How far the training has come, from 0 to 1."""
        return min(1.0, self._cells[2] / max(1, self._cells[3]))
