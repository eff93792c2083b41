"""Trackers of experiments, told of each run: best effort, by processes of their own.

A follower (`deploy.follower`) reads the files that a run leaves while it works and tells one tracker. Nothing waits for it but
the end of the run, and that for a limited time: a tracker that is dead or slow costs the run no step, and one line in its record.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import MillraceError, UsageError
from pipelines.home import Home, process_env
from pipelines.manifest import read_json
from pipelines.run import Run, spec_from
from pipelines.spec import TrackerName

LIMIT_S = 30.0  # what a tracker has to take in the end of a run; a server that does not answer fails far earlier
FAILING_S = 3.0  # the same, for one that did not answer before
LOOK_S = 0.1  # between two looks whether a tracker has taken it
ANSWER_S = 5  # after which a request to an MLflow server fails
_INSTALL = {"mlflow": "mlflow>=3.17", "tensorboard": "tensorboard>=2.20", "wandb": "wandb>=0.31"}
_ENV = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet", "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """How it went with one tracker; where not well, `line` says why. `ui`: the command that shows what it holds."""

    tracker: str
    ok: bool
    line: str
    ui: str

    @property
    def words(self) -> str:
        return f"{self.tracker}: {self.ui if self.ok else self.line}"


def require(trackers: Sequence[TrackerName]) -> None:
    """Raises UsageError naming what to install for these trackers."""
    gone = [name for name in trackers if find_spec(name) is None]
    if gone:
        raise UsageError(
            f"tracking: {', '.join(gone)} {'is' if len(gone) == 1 else 'are'} not installed; type "
            f"`pip install {' '.join(shlex.quote(_INSTALL[name]) for name in gone)}`, or leave it out of `tracking`"
        )


def tracking_uri(home: Home) -> str:
    """Where MLflow keeps runs: $MLFLOW_TRACKING_URI, else SQLite in the home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.root / 'mlflow' / 'mlflow.db'}"


def ui(home: Home, tracker: str) -> str:
    """What to type, or the address to open, to see what a tracker holds."""
    if tracker == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(home.root / 'tensorboard'))}"
    if tracker == "wandb":
        return f"wandb leet {shlex.quote(str(home.root / 'wandb' / 'wandb'))}"
    uri = re.sub(r"//[^/@]+@", "//", tracking_uri(home))  # no password in a record
    if uri.startswith("http"):
        return uri
    command = f"MLFLOW_DISABLE_TELEMETRY=true mlflow server --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"
    return command if _has_pages() else f"pip install 'mlflow>=3.17' (its pages), then {command}"


def _has_pages() -> bool:
    """Whether all of MLflow is here: mlflow-skinny has no pages."""
    try:
        metadata.version("mlflow")
    except metadata.PackageNotFoundError:
        return False
    return True


def follow(home: Home, run: Run) -> None:
    """Starts the followers that the run's own spec wants, unless they work already."""
    for tracker in spec_from(run.folder(home) / "spec.json").tracking:
        key = (str(run.folder(home)), tracker)
        if key not in _working or _working[key].poll() is not None:
            with suppress(OSError):
                (run.folder(home) / "tracking" / f"{tracker}.json").unlink(missing_ok=True)  # of a try before
                _working[key] = _start(home, tracker, [run.pipeline, run.run_id], run.folder(home) / "tracking")


_working: dict[tuple[str, str], "subprocess.Popen[bytes]"] = {}  # run folder and tracker → its follower


def _start(home: Home, tracker: str, words: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    env = {**limits, **os.environ, **process_env(home), **_ENV}
    with (folder / f"{tracker}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.follower", tracker, *words], env=env, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def settle(home: Home, run: Run) -> tuple[Told, ...]:
    """Tells the followers that the manifest is written, and waits for them a little. Whatever happens, the run has ended well."""
    follow(home, run)
    mine = {tracker: process for (folder, tracker), process in _working.items() if folder == str(run.folder(home))}
    for process in mine.values():
        _finish(process)
    began, told, allowed = time.monotonic(), [], LIMIT_S
    for tracker, process in mine.items():
        path = run.folder(home) / "tracking" / f"{tracker}.json"
        while process.poll() is None and time.monotonic() < began + (allowed := _patience(path)):
            time.sleep(LOOK_S)
        code = _end(process)
        del _working[str(run.folder(home)), tracker]
        why, at = _why(_state(path), code, f"did not take everything within {allowed:g} s", tracker), ui(home, tracker)
        line = f"{f'{at}: ' if at.startswith('http') else ''}{why}; this run is not there, or not whole" if why else ""
        told.append(Told(tracker, not why, line, at))
    missed = [t for t in spec_from(run.folder(home) / "spec.json").tracking if t not in mine]
    return (*told, *(Told(t, False, "its process could not be started; this run is not there", ui(home, t)) for t in missed))


def mirror(home: Home, pipeline: str, trackers: Sequence[TrackerName]) -> str:
    """Lets MLflow's alias follow the champion, after a rollback; a line where that failed, else nothing."""
    if "mlflow" not in trackers:
        return ""
    folder = home.root / "mlflow"
    try:
        (folder / f"mirror-{pipeline}.json").unlink(missing_ok=True)
        process = _start(home, "mlflow", [pipeline], folder)
        _finish(process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT_S)
        code = _end(process)
    except OSError as error:
        return f"mlflow: {error}"
    why = _why(_state(folder / f"mirror-{pipeline}.json"), code, f"no answer within {LIMIT_S:g} s", "mlflow")
    return f"mlflow: its alias was not moved: {why}" if why else ""


def _finish(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it has died
        process.stdin.write(b"finish\n")
        process.stdin.flush()


def _patience(path: Path) -> float:
    """What a follower has to end in, by what it says of its tracker."""
    return FAILING_S if _state(path).get("state") == "failing" else LIMIT_S


def _end(process: "subprocess.Popen[bytes]") -> int:
    """The follower's exit code; one that has not ended is killed."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    return process.wait()


def _state(path: Path) -> Mapping[str, str]:
    with suppress(MillraceError, OSError):
        return read_json(path)
    return {}


def _why(state: Mapping[str, str], code: int, late: str, tracker: str) -> str:
    """Why a follower did not tell everything; empty where it did."""
    if code == 0:
        return ""
    return state.get("line") or (late if code < 0 else f"failed, see {tracker}.log")
