"""Training that may be killed: the parent's side of the supervisor, which outlives it.

`models.supervisor` is a process of its own. Dead or hung ranks are its matter; when it dies itself, a new one is
started here and goes on with its jobs, and when this process dies, the next one that launches a job resumes it.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.job import Outcome, Progress, Result, share_done
from pipelines.errors import MillraceError
from pipelines.manifest import read_json, write_json

LOOK_S = 0.25  # between two looks at how far a job is
HANG_S = 10.0  # silence after which a rank counts as hung, where its steps are quick
CLOSE_S = 8.0  # what the supervisor has to end in good order
_RANK_ENV = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",  # no threads before a fork
    "GLOO_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_MODULE_LOADING": "LAZY",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else torch.compile starts processes that outlive a rank
}  # fmt: skip


@dataclass
class _Job:
    """What the supervisor was told, and who waits for its answer."""

    line: dict[str, Any]
    future: Future[dict[str, Any]] = field(default_factory=Future)


class Zygote:
    """The parent's side: starts the supervisor at once, and gives it jobs, several at a time if wanted.

    One that dies is replaced while a job has restarts left.
    """

    def __init__(self, program: tuple[str, ...] = ("-m", "models.supervisor")) -> None:
        self.program = program
        self.waiting: dict[int, _Job] = {}
        self.lock = threading.RLock()
        self.count, self.gone = 0, False
        self._start()
        atexit.register(self.close)

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_RANK_ENV}, bufsize=1, start_new_session=True,  # Ctrl-C is for the parent
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(self.process,), daemon=True, name="zygote").start()

    def submit(self, folder: Path, *, ranks: int, max_restarts: int, hang_s: float = HANG_S) -> "Future[dict[str, Any]]":
        """Starts a job; its future holds what the supervisor says in the end."""
        with self.lock:
            self.count += 1
            allowed = len(_restarts(folder)) + max_restarts
            job = _Job({"id": self.count, "folder": str(folder), "ranks": ranks, "allowed": allowed, "hang_s": hang_s})
            if self.gone:
                job.future.set_exception(_died())
            else:
                self.waiting[self.count] = job
                self._tell(job.line)
        return job.future

    def resize(self, folder: Path, slots: list[int]) -> None:
        """From now on only these of a job's ranks work, numbered from 0: after a checkpoint, from where they are."""
        with self.lock:
            self._tell({"folder": str(folder), "world": slots})

    def _tell(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is dead: the listener does what is needed
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            with self.lock:
                job = self.waiting.pop(answer["id"], None)
            if job is not None:
                job.future.set_result(answer)
        code = process.wait()
        with self.lock:
            why = f"the supervisor died of signal {-code}" if code < 0 else "the supervisor ended"
            lost = [i for i, job in self.waiting.items() if self.gone or not _may_go_on(job, why)]
            dead = [self.waiting.pop(i) for i in lost]
            if self.waiting:
                self._start()
                for job in self.waiting.values():
                    self._tell(job.line)
            else:
                self.gone = True
        for job in dead:
            job.future.set_exception(_died())

    def close(self) -> None:
        """Ends the supervisor, and its ranks with it, after a last checkpoint."""
        with self.lock:
            self.gone = True
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def alive(self) -> bool:
        return not self.gone


def _may_go_on(job: _Job, why: str) -> bool:
    """Adds a reason to the job's record; false when it has no restart left."""
    folder = Path(job.line["folder"])
    reasons = [*_restarts(folder), why]
    if len(reasons) > job.line["allowed"]:
        return False
    with suppress(OSError):
        path = folder / "restarts.json"
        body = read_json(path) if path.is_file() else {"notes": [], "split": 1}
        write_json(path, {**body, "reasons": reasons})
    return True


def _died() -> MillraceError:
    return MillraceError("the training supervisor died; run again, it resumes")


_shared: list[Zygote] = []


def start_zygote() -> Zygote:
    """The zygote of this process, started if there is none: it imports in the background."""
    if not _shared or not _shared[0].alive():
        _shared[:] = [Zygote()]
    return _shared[0]


def launch(folder: Path, *, ranks: int, max_restarts: int, zygote: Zygote | None = None, hang_s: float = HANG_S) -> Outcome:
    """Runs the prepared job in `folder` to its end, restarting dead ranks. A finished job is not run again.

    Raises MillraceError with the last words of a rank when the restarts are used up, or would be of no use.
    """
    future = submit(folder, ranks=ranks, max_restarts=max_restarts, zygote=zygote, hang_s=hang_s)
    return finish(future, folder, ranks)


def submit(
    folder: Path, *, ranks: int, max_restarts: int, zygote: Zygote | None = None, hang_s: float = HANG_S
) -> "Future[dict[str, Any]]":
    """Starts the prepared job in `folder`, unless it has its result already. Ranks silent for `hang_s` are hung."""
    if (folder / "result.json").is_file():
        done: Future[dict[str, Any]] = Future()
        done.set_result({"ok": True, "restarts": _restarts(folder), "seconds": 0.0})
        return done
    chosen = zygote or start_zygote()
    return chosen.submit(folder, ranks=ranks, max_restarts=max_restarts, hang_s=hang_s)


def finish(
    future: "Future[dict[str, Any]]", folder: Path, ranks: int, progress: Progress | None = None,
    look: Callable[[], None] | None = None,
) -> Outcome:  # fmt: skip
    """Waits for a submitted job; `look` is called while it does. Raises MillraceError as `launch` does."""
    while (progress is not None or look is not None) and not future.done():
        wait([future], timeout=LOOK_S)
        if progress is not None:
            progress(share_done(folder), "network")
        if look is not None:
            look()
    answer = future.result()
    if not answer["ok"]:
        count = len(answer["restarts"])
        raise MillraceError(f"training in {folder} failed after {count} restarts: {answer['error']}")
    return Outcome(Result.load(folder), ranks, tuple(answer["restarts"]), answer["seconds"], _notes(folder))


def _restarts(folder: Path) -> list[str]:
    """Why the job was restarted so far, in this launch and earlier ones."""
    path = folder / "restarts.json"
    return list(read_json(path)["reasons"]) if path.is_file() else []


def _notes(folder: Path) -> tuple[str, ...]:
    """What else happened: the supervisor's notes, then the first rank's."""
    paths = [path for path in (folder / "restarts.json", folder / "notes.json") if path.is_file()]
    return tuple(note for path in paths for note in read_json(path).get("notes", []))
