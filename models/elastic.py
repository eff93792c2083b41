"""Ranks that may die: a zygote forks them, watches them, and restarts all from the newest checkpoint.

Importing torch and Lightning costs seconds; the zygote, a process of its own, pays it once and forks in
milliseconds. It only imports: it runs no backward pass, opens no process group and never touches a GPU. It is told
jobs as lines of JSON on its standard input and answers on its standard output; when that input closes, because its
parent is gone, it kills its ranks and ends.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.job import Outcome, Progress, Result, share_done
from pipelines.errors import MillraceError
from pipelines.manifest import read_json, write_json

POLL_S = 0.05
LOOK_S = 0.25  # between two looks at how far a job is
STALE_S = 120.0  # a rank without a heartbeat for so long is hung
PR_SET_PDEATHSIG = 1
_RANK_ENV = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",  # no threads before a fork
    "GLOO_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_MODULE_LOADING": "LAZY",
}  # fmt: skip


class Zygote:
    """The parent's side: starts the zygote at once, and gives it jobs, several at a time if wanted."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "models.elastic"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_RANK_ENV}, bufsize=1, start_new_session=True,  # Ctrl-C is for the parent
        )  # fmt: skip
        self.waiting: dict[int, Future[dict[str, Any]]] = {}
        self.lock = threading.Lock()
        self.count, self.gone = 0, False
        threading.Thread(target=self._listen, daemon=True, name="zygote").start()
        atexit.register(self.close)

    def submit(self, folder: Path, *, ranks: int, max_restarts: int, stale_s: float = STALE_S) -> "Future[dict[str, Any]]":
        """Starts a job; its future holds what the zygote says in the end."""
        future: Future[dict[str, Any]] = Future()
        with self.lock:
            if self.gone:
                future.set_exception(_died())
                return future
            self.count += 1
            self.waiting[self.count] = future
            line = {"id": self.count, "folder": str(folder), "ranks": ranks, "max_restarts": max_restarts,
                    "stale_s": stale_s}  # fmt: skip
            assert self.process.stdin is not None
            with suppress(OSError):  # it is dead: the listener tells all who wait
                self.process.stdin.write(json.dumps(line) + "\n")
                self.process.stdin.flush()
        return future

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.lock:
                future = self.waiting.pop(answer["id"])
            future.set_result(answer)
        with self.lock:
            self.gone, left, self.waiting = True, self.waiting, {}
        for future in left.values():
            future.set_exception(_died())

    def close(self) -> None:
        """Ends the zygote, and its ranks with it."""
        self.process.kill()
        self.process.wait()

    def alive(self) -> bool:
        return self.process.poll() is None


def _died() -> MillraceError:
    return MillraceError("the training supervisor died; run again, it resumes")


_shared: list[Zygote] = []


def start_zygote() -> Zygote:
    """The zygote of this process, started if there is none: it imports in the background."""
    if not _shared or not _shared[0].alive():
        _shared[:] = [Zygote()]
    return _shared[0]


def launch(folder: Path, *, ranks: int, max_restarts: int, zygote: Zygote | None = None, stale_s: float = STALE_S) -> Outcome:
    """Runs the prepared job in `folder` to its end, restarting dead ranks. A finished job is not run again.

    Raises MillraceError with the last words of a rank when the restarts are used up.
    """
    future = submit(folder, ranks=ranks, max_restarts=max_restarts, zygote=zygote, stale_s=stale_s)
    return finish(future, folder, ranks)


def submit(
    folder: Path, *, ranks: int, max_restarts: int, zygote: Zygote | None = None, stale_s: float = STALE_S
) -> "Future[dict[str, Any]]":
    """Starts the prepared job in `folder`, unless it has its result already. Ranks silent for `stale_s` are hung."""
    if (folder / "result.json").is_file():
        done: Future[dict[str, Any]] = Future()
        done.set_result({"ok": True, "restarts": _restarts(folder), "seconds": 0.0})
        return done
    chosen = zygote or start_zygote()
    return chosen.submit(folder, ranks=ranks, max_restarts=max_restarts, stale_s=stale_s)


def finish(future: "Future[dict[str, Any]]", folder: Path, ranks: int, progress: Progress | None = None) -> Outcome:
    """Waits for a submitted job. Raises MillraceError as `launch` does."""
    while progress is not None and not future.done():
        wait([future], timeout=LOOK_S)
        progress(share_done(folder), "network")
    answer = future.result()
    if not answer["ok"]:
        count = len(answer["restarts"])
        raise MillraceError(f"training in {folder} failed after {count} restarts: {answer['error']}")
    return Outcome(Result.load(folder), ranks, tuple(answer["restarts"]), answer["seconds"])


@dataclass
class _Group:
    """The ranks of one job, as the zygote sees them."""

    id: int
    folder: Path
    ranks: int
    max_restarts: int
    stale_s: float
    began: float
    allowed: int = 0  # reasons that the folder may hold: earlier launches' and max_restarts more
    generation: int = 0
    culprit: int = 0  # rank that was lost last
    pids: dict[int, int] = field(default_factory=dict)  # pid → rank
    reasons: list[str] = field(default_factory=list)

    def start(self) -> None:
        for stale in self.folder.glob("heartbeat-*"):
            stale.unlink()
        with socket.socket() as probe:  # a new port each time: the old one's store may still be there
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.born = time.monotonic()
        self.pids = {_fork(self.folder, rank, self.ranks, port, self.generation): rank for rank in range(self.ranks)}

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # works on stopped ranks too
            os.waitpid(pid, 0)
        self.pids = {}

    def poll(self) -> str | None:
        """Why the group must be restarted, None while all is well."""
        codes = {}
        for pid, rank in list(self.pids.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del self.pids[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            self.culprit = min(codes, key=lambda rank: codes[rank])  # a killed one, not the peers that it took along
            code = codes[self.culprit]
            return f"rank {self.culprit} died of signal {-code}" if code < 0 else f"rank {self.culprit} failed"
        for rank in self.pids.values():
            heart = self.folder / f"heartbeat-{rank}"
            # heartbeats are file times; only their change is used, never their value
            seen = _age(heart) if heart.exists() else time.monotonic() - self.born
            if seen > self.stale_s:
                self.culprit = rank
                return f"rank {rank} made no progress for {self.stale_s:g} s"
        return None


_beats: dict[Path, tuple[int, float]] = {}


def _age(heart: Path) -> float:
    """Seconds since the file was last seen to change."""
    stamp = heart.stat().st_mtime_ns
    if heart not in _beats or _beats[heart][0] != stamp:
        _beats[heart] = (stamp, time.monotonic())
    return time.monotonic() - _beats[heart][1]


def _fork(folder: Path, rank: int, world: int, port: int, generation: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the zygote
        if os.getppid() != parent:  # it died before it could be asked
            os._exit(1)
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0", NODE_RANK="0",
            TORCHELASTIC_RUN_ID="millrace", TORCHELASTIC_RESTART_COUNT=str(generation), TMPDIR=str(folder),
        )  # fmt: skip
        log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from models.train import main as train

        train(folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _restarts(folder: Path) -> list[str]:
    """Why the job was restarted so far, in this launch and earlier ones."""
    path = folder / "restarts.json"
    return list(read_json(path)["reasons"]) if path.is_file() else []


def _last_words(log: Path) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


def serve() -> None:
    """The zygote's loop: takes jobs, watches their ranks, answers when they end."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    import models.train  # noqa: F401 - the imports that every rank needs

    groups: list[_Group] = []
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], POLL_S if groups else None)
        if ready:
            data = os.read(0, 65_536)
            if not data:
                for group in groups:
                    group.kill()
                os._exit(0)  # taking torch down in good order would cost seconds
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                folder, began = Path(told.pop("folder")), time.monotonic()
                groups = [group for group in groups if not _superseded(group, folder, out)]
                group = _Group(folder=folder, began=began, reasons=_restarts(folder), **told)
                group.allowed = len(group.reasons) + group.max_restarts
                group.start()
                groups.append(group)
        groups = [group for group in groups if not _step(group, out)]


def _step(group: _Group, out: int) -> bool:
    """Looks at one group once; true when it has ended."""
    why = group.poll()
    if why is None and group.pids:
        return False
    if why is not None:
        group.kill()
        group.reasons.append(why)
        write_json(group.folder / "restarts.json", {"reasons": group.reasons})
        if len(group.reasons) <= group.allowed:
            group.generation += 1
            group.start()
            return False
    ok = why is None and (group.folder / "result.json").is_file()
    _answer(group, out, "" if ok else f"{why or 'no result'}: {_last_words(group.folder / f'rank-{group.culprit}.log')}")
    return True


def _superseded(group: _Group, folder: Path, out: int) -> bool:
    """Ends the group if a new one is to work in its folder: a stage that failed beside it is tried again."""
    if group.folder != folder:
        return False
    group.kill()
    _answer(group, out, "the job was started again")
    return True


def _answer(group: _Group, out: int, error: str) -> None:
    answer = {"id": group.id, "ok": not error, "restarts": group.reasons[: group.allowed], "error": error,
              "seconds": time.monotonic() - group.began}  # fmt: skip
    os.write(out, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    serve()
