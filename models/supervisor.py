"""`python -m models.supervisor`: the zygote. It forks ranks, watches them, and restarts all from the newest checkpoint.

Importing torch and Lightning costs seconds; the zygote pays it once and forks in milliseconds. It only imports: it
runs no backward pass, opens no process group and never touches a GPU. It is told jobs as lines of JSON on its standard
input and answers on its standard output; when that input closes, because its parent is gone, or on SIGTERM, rank 0 of
each job is asked for a checkpoint, and all end.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from models.beat import STEPS, Beat
from models.job import FEWER, STOPPED, identity
from pipelines.errors import MillraceError
from pipelines.manifest import read_json, write_json

POLL_S = 0.05
START_S = 120.0  # a rank that starts, or writes what it leaves, may be silent for so long
PAUSE_S = 1.0  # a stopped rank (SIGSTOP) counts as dead after so long
DRAIN_S = 6.0  # what rank 0 has to write a checkpoint when all is to end
OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGSTOP)  # what another did to a rank tells nothing about its device
WIDER_S = 60.0  # after so long ranks that were given up are tried again; twice as long after each failure
MAX_WAIT_S = 30.0
PR_SET_PDEATHSIG = 1
DONE, FAILED, OUT_OF_MEMORY, FINAL = 0, 1, 71, 77  # exit codes of a rank, as STOPPED and FEWER are
_BLAME = (FEWER, OUT_OF_MEMORY, FINAL, FAILED)  # after those that were killed: who took its peers along


@dataclass
class _Rank:
    """One process, as the supervisor sees it. `silent_s`, `stopped_s` are seconds in which the supervisor looked on."""

    rank: int
    pid: int
    fd: int
    beat: Beat
    beats: int = 0
    silent_s: float = 0.0
    stopped_s: float = 0.0


@dataclass
class _Group:
    """The ranks of one job. `ranks`: how many are wanted; `slots`: which of them are at work."""

    id: int
    folder: Path
    ranks: int
    allowed: int  # reasons that the folder may hold before the job is given up
    hang_s: float
    began: float
    job: dict[str, Any]
    slots: list[int] = field(default_factory=list)
    split: int = 1
    generation: int = 0
    members: list[_Rank] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    looked: float = 0.0
    slowest: float = 0.0  # seconds between two beats, forgotten slowly
    reached: int = 0  # highest step so far
    fruitless: int = 0  # restarts in a row that reached no new step
    blamed: list[int] = field(default_factory=list)  # slots that failed in these
    hung_at: int = -1
    due: float | None = None  # when the ranks are started, None while they run
    wider: float | None = None  # when lost ranks are tried again
    wider_s: float = field(default_factory=lambda: WIDER_S)
    asked_at: float | None = None  # when rank 0 was asked to end
    culprit: int = 0

    @classmethod
    def told(cls, line: dict[str, object]) -> "_Group":
        """A group as the parent wants it, with what earlier launches left in its folder."""
        folder, ranks = Path(str(line["folder"])), int(str(line["ranks"]))
        group = cls(int(str(line["id"])), folder, ranks, int(str(line["allowed"])), float(str(line["hang_s"])),
                    time.monotonic(), _job(folder), list(range(ranks)), due=0.0)  # fmt: skip
        path = folder / "restarts.json"
        if path.is_file():
            body = read_json(path)
            group.reasons, group.notes, group.split = list(body["reasons"]), list(body["notes"]), body["split"]
        return group

    def start(self) -> None:
        world = len(self.slots)
        with socket.socket() as probe:  # a new port each time: the old one's store may still be there
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.due, self.asked_at, self.looked = None, None, time.monotonic()
        for rank in range(world):
            beat = Beat.make(self.folder / f"heartbeat-{rank}")
            pid = _fork(self.folder, _environment(rank, self.slots, self.ranks, port, self.generation, self.split))
            self.members.append(_Rank(rank, pid, os.pidfd_open(pid), beat))
        self.generation += 1

    def kill(self) -> None:
        for member in self.members:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)  # works on stopped ranks too
        for member in self.members:
            with suppress(ChildProcessError):
                os.waitpid(member.pid, 0)
            os.close(member.fd)
        self.members = []

    def ask(self) -> None:
        """Asks rank 0 for a checkpoint and an end."""
        self.asked_at = time.monotonic()
        for member in self.members:
            if member.rank == 0:
                os.kill(member.pid, signal.SIGTERM)

    def look(self) -> tuple[str, int] | None:
        """Why the ranks must be restarted and the exit code that says so, None while all is well."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 10 * POLL_S), now  # a paused supervisor has not looked on
        codes = {}
        for member in list(self.members):
            gone, status = os.waitpid(member.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if gone and os.WIFSTOPPED(status):
                member.stopped_s = passed or POLL_S
            elif gone and os.WIFCONTINUED(status):
                member.stopped_s = 0.0
            elif gone:
                os.close(member.fd)
                self.members.remove(member)
                codes[member.rank] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            self.culprit = min(codes, key=lambda r: _BLAME.index(codes[r]) if codes[r] in _BLAME else -1 if codes[r] < 0 else 9)
            code = codes[self.culprit]
            return f"rank {self.culprit} died of signal {-code}" if code < 0 else f"rank {self.culprit} failed", code
        for member in self.members:
            self._listen(member, passed)
            if member.stopped_s > PAUSE_S:
                self.culprit = member.rank
                return f"rank {member.rank} was stopped", -signal.SIGSTOP
        for member in self.members:
            if member.silent_s > self.patience(member):
                self.culprit = member.rank
                return f"rank {member.rank} made no progress for {member.silent_s:.3g} s", FAILED
        return None

    def _listen(self, member: _Rank, passed: float) -> None:
        member.stopped_s += passed if member.stopped_s else 0.0
        member.silent_s += passed
        if member.beat.beats != member.beats:
            if member.beat.phase == STEPS:
                self.slowest = max(member.silent_s, 0.99 * self.slowest)
            member.beats, member.silent_s = member.beat.beats, 0.0

    def patience(self, member: _Rank) -> float:
        """Seconds of silence after which a rank is hung: ten times its slowest step, not less than it was told."""
        return max(self.hang_s, 10 * self.slowest) if member.beat.phase == STEPS else max(self.hang_s, START_S)

    def step(self) -> str | None:
        """Looks once and does what is needed: None while the job goes on, else what is wrong, empty for nothing."""
        if self.due is not None:
            if time.monotonic() >= self.due:
                self._begin()
            return None
        steps = max((m.beat.step for m in self.members), default=0)
        why = self.look()
        if why is None and not self.members:
            return "" if (self.folder / "result.json").is_file() else self._words("no result")
        if steps > self.reached:
            self.reached, self.fruitless, self.blamed = steps, 0, []
        if why is None:
            self._widen()
            if self.asked_at is not None and time.monotonic() - self.asked_at > DRAIN_S:
                why = "", STOPPED  # it has not come to the end of a step: what was kept before must do
            else:
                return None
        self.kill()
        return self._restart(*why, steps)

    def _begin(self) -> None:
        try:
            self.start()
        except OSError as error:  # a disk that is full, no process or port left
            self.kill()
            self._again(f"the ranks could not be started: {error}")

    def _restart(self, why: str, code: int, steps: int) -> str | None:
        if self.asked_at is not None and code in (STOPPED, FAILED, -signal.SIGTERM, -signal.SIGSTOP):
            # rank 0 took the others along
            self.due = time.monotonic()
            self._record()
            return None
        if code == FINAL:
            return self._words("")
        if code == FEWER:
            self.resize(self.slots[: (len(self.slots) + 1) // 2], "train.power: the ranks were at rest for most of the time")
            self.due = time.monotonic()
            return None
        if code == OUT_OF_MEMORY:
            self.split *= 2
            why = f"rank {self.culprit} ran out of memory: from here on its batch is worked through in {self.split} parts"
        if "no progress" in why and steps == self.hung_at:
            self.hang_s *= 2  # silent at the same step again: it may be slow there, not hung
        self.hung_at = steps
        if code not in OUTSIDE:
            self._narrow(self.slots[self.culprit])
        return self._again(why)

    def _again(self, why: str) -> str | None:
        self.reasons.append(why)
        self._record()
        if len(self.reasons) > self.allowed:
            return self._words(why)
        wait = 0.0 if not self.fruitless else min(MAX_WAIT_S, 0.25 * 2**self.fruitless)
        self.fruitless += 1
        self.due = time.monotonic() + wait
        return None

    def _narrow(self, slot: int) -> None:
        """Goes on without the half that holds a slot whose rank failed twice in a row."""
        self.blamed.append(slot)
        if len(self.slots) == 1 or self.blamed[-2:] != [slot, slot]:
            return
        left = [s for s in self.slots if s != slot]
        self.resize(left[: len(self.slots) // 2], f"rank {slot} failed twice without a step")
        self.wider = time.monotonic() + self.wider_s
        self.wider_s *= 2

    def resize(self, slots: list[int], why: str) -> None:
        """From the next start on these slots work."""
        self.notes.append(f"{why}: {len(slots)} rank(s) from step {self.reached} on, {len(self.slots)} before")
        self.slots, self.blamed, self.wider = slots, [], None
        self._record()

    def _widen(self) -> None:
        if self.wider is not None and time.monotonic() > self.wider and self.asked_at is None:
            self.resize(list(range(self.ranks)), "the lost ranks are tried again")
            self.ask()

    def _record(self) -> None:
        with suppress(OSError):  # a disk that is full
            body = {"reasons": self.reasons, "notes": self.notes, "split": self.split}
            write_json(self.folder / "restarts.json", body)

    def _words(self, why: str) -> str:
        """What went wrong, with the last words of the rank that began it."""
        said = _last_words(self.folder / f"rank-{self.culprit}.log")
        return f"{why}: {said}" if why else said


def _job(folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    return identity(read_json(path)) if path.is_file() else {}


def _leave_nothing_of(job: dict[str, Any], folder: Path) -> None:
    """Removes what ranks of this job wrote after another was prepared in their folder."""
    if job == _job(folder):
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "job.json":
            path.unlink()


def _environment(rank: int, slots: list[int], ranks: int, port: int, generation: int, split: int) -> dict[str, str]:
    world = str(len(slots))
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
             "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0", "NODE_RANK": "0",
             "TORCHELASTIC_RUN_ID": "millrace", "TORCHELASTIC_RESTART_COUNT": str(generation),
             "MILLRACE_SPLIT": str(split)}  # fmt: skip
    if len(slots) < ranks:  # a lost device is one that the others do not see
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks)))).split(",")
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[s] for s in slots if s < len(devices))
    return found


def _fork(folder: Path, environment: dict[str, str]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if environment["RANK"] != "0" else signal.SIG_DFL)
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the zygote
        if os.getppid() != parent:  # it died before it could be asked
            os._exit(FAILED)
        os.environ.update({**environment, "TMPDIR": str(folder)})
        log = os.open(folder / f"rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from models.train import main as train

        train(folder)
        code = DONE
    except BaseException as error:
        code = _code(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code(error: BaseException) -> int:
    """The exit code of a rank that ends by this error; its log says the same in words."""
    import traceback

    import torch

    if isinstance(error, MillraceError):
        print(error, file=sys.stderr)
        return FINAL
    traceback.print_exc()
    full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return OUT_OF_MEMORY if full else FAILED


def _last_words(log: Path) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


class _Desk:
    """Takes jobs from the parent, and answers when they end."""

    def __init__(self, out: int) -> None:
        self.out, self.groups, self.buffer, self.ended = out, list[_Group](), b"", False

    def end(self, signum: int, frame: FrameType | None) -> None:
        """Handler of SIGTERM."""
        self.ended = True
        if not self.groups:
            os._exit(0)

    def work(self) -> None:
        """Until the parent is gone. What ranks need only in the end is imported once the first of them are at work."""
        if select.select([0], [], [], 0)[0]:
            self._hear()
            self._turn()
        import models.export

        assert models.export is not None
        while not self.ended:
            watched = [0, *(m.fd for g in self.groups for m in g.members)]
            ready, _, _ = select.select(watched, [], [], POLL_S if self.groups else None)
            if 0 in ready and not self._hear():
                break
            self._turn()
        self._drain()

    def _turn(self) -> None:
        for group in list(self.groups):
            error = group.step()
            if error is not None:
                self.groups.remove(group)
                self._answer(group, error)

    def _hear(self) -> bool:
        data = os.read(0, 65_536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            same = [g for g in self.groups if g.folder == Path(told["folder"])]
            if "world" in told:
                for group in same:
                    self._resize(group, told["world"])
                continue
            for group in same:  # a stage that failed beside it is tried again
                group.kill()
                self.groups.remove(group)
                self._answer(group, "the job was started again")
                _leave_nothing_of(group.job, group.folder)
            self.groups.append(_Group.told(told))
        return bool(data)

    def _resize(self, group: _Group, slots: list[int]) -> None:
        if slots != group.slots:
            group.resize(slots, "told so")
            if group.due is None:
                group.ask()

    def _answer(self, group: _Group, error: str) -> None:
        answer = {"id": group.id, "ok": not error, "restarts": group.reasons[: group.allowed], "error": error,
                  "seconds": time.monotonic() - group.began}  # fmt: skip
        with suppress(BrokenPipeError):
            os.write(self.out, (json.dumps(answer) + "\n").encode())

    def _drain(self) -> None:
        """Gives every job the time for a last checkpoint, and ends."""
        for group in self.groups:
            group.ask()
        until = time.monotonic() + DRAIN_S
        while time.monotonic() < until and any(self._busy(g) for g in self.groups):
            time.sleep(0.01)
        for group in self.groups:
            group.kill()
            self._answer(group, "training was stopped; run again, it resumes")
        os._exit(0)  # taking torch down in good order would cost seconds

    def _busy(self, group: _Group) -> bool:
        group.look()
        return any(m.rank == 0 for m in group.members)


def serve() -> None:
    """The zygote's loop."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    desk = _Desk(out)
    signal.signal(signal.SIGTERM, desk.end)
    from models.train import warm_up

    warm_up()
    desk.work()


if __name__ == "__main__":
    serve()
