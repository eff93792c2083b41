"""`millrace VERB …` as a person types it: a process of its own, with a home of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.manifest import ROOT

# the tumours pipeline with less work
QUICK = (
    "tune.generations=1", "tune.max_epochs=2", "train.max_epochs=8", "gbdt.max_rounds=40", "gate.resamples=50",
    "serve.latency_budget=5s",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code, what it printed, and its answer where that is JSON."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one sentence of an error; fails where there was none, or a traceback beside it."""
        assert self.code != 0 and "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith(("error: ", "refused: "))]
        assert len(lines) == 1, self.err
        return lines[0]


def command(verb: str, *words: str, sets: Sequence[str] = ()) -> list[str]:
    """The words of a command, with `--set` before each override."""
    return [sys.executable, "-m", "flows.cli", verb, *words, *(w for item in sets for w in ("--set", item))]


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The caller's environment with this home."""
    return {**os.environ, "MILLRACE_HOME": str(home), **extra}


def millrace(home: Path, verb: str, *words: str, sets: Sequence[str] = (), timeout: float = 400, **extra: str) -> Done:
    """Runs a command to its end; `extra` are environment variables."""
    done = subprocess.run(
        command(verb, *words, sets=sets), env=environment(home, **extra), cwd=ROOT, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)
