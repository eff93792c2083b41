"""A Prefect server of a test's own (home, SQLite, free port), and other processes that end with the test."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PR_SET_PDEATHSIG = 1
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    # On disk: leases in memory are lost with the server, and with them the runs of limited deployments.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
T = TypeVar("T")


@dataclass(frozen=True)
class PrefectServer:
    """A running server: where it answers, and the environment in which everything else talks to it."""

    home: Path
    port: int

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, less its Prefect settings: a developer's PREFECT_API_URL stays out."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        own = {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.api_url, "TZ": "UTC"}
        return {**inherited, **SETTINGS, **own, "PYTHONSAFEPATH": "1"}

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    def prefect(self, *arguments: str, cwd: Path) -> str:
        """What `prefect ARGUMENTS` printed; raises with its output if it failed."""
        command = [sys.executable, "-m", "prefect", *arguments]
        environment = {**self.environment, "PWD": str(cwd)}  # prefect.yaml reads it, not the real directory
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"prefect {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def prefect_server(home: Path, *, timeout_s: float = 120) -> Iterator[PrefectServer]:
    """A server that answers; raises with the end of its log if it does not within `timeout_s`."""
    home.mkdir(parents=True, exist_ok=True)
    server = PrefectServer(home, free_port())
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with running([*command, "--port", str(server.port)], server.environment, server.log) as process:

        def answers() -> bool:
            assert process.poll() is None, f"the server ended: {tail(server.log)}"
            with suppress(OSError), urllib.request.urlopen(f"{server.api_url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        wait_for(answers, timeout_s, lambda: f"a server that answers: {tail(server.log)}")
        yield server


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    cwd: Path | None = None,
    grace_s: float = 30,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, killed `grace_s` after SIGTERM, and that dies if the test does."""
    libc = ctypes.CDLL(None)
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_for(look: Callable[[], T], timeout_s: float, wanted: str | Callable[[], str], *, pause_s: float = 0.1) -> T:
    """The first true answer of `look`; fails the test, saying what was wanted, when there is none in time."""
    give_up = time.monotonic() + timeout_s
    while not (answer := look()):
        if time.monotonic() > give_up:
            message = wanted if isinstance(wanted, str) else wanted()
            raise AssertionError(f"not seen in {timeout_s:.0f} s: {message}")
        time.sleep(pause_s)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, characters: int = 3000) -> str:
    return log.read_text(errors="replace")[-characters:] if log.exists() else "(no log)"
