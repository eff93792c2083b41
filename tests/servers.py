"""Servers for a test, each on a port of its own: Redis and Postgres of Debian, and Moto, which speaks S3."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from deploy.process import free_port

REMOTE = [pytest.param("redis", marks=pytest.mark.redis), pytest.param("postgres", marks=pytest.mark.postgres)]
NAMES = count()  # of stores, that no two tests write to one
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))


class NotInstalled(Exception):
    """The server's package is missing on this machine; CI installs it."""


@dataclass
class Server:
    """A server that can be killed and started again on the same port, with the same data."""

    command: list[str]
    port: int
    url: str
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, user=self.user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    time.sleep(0.3)  # it listens; now it gets ready
                    return
            time.sleep(0.05)
        raise AssertionError(f"{self.command[0]} does not listen on {self.port}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def _running(server: Server, folder: Path) -> Iterator[Server]:
    """Started, and in the end killed and its folder removed."""
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis_server() -> Iterator[Server]:
    """An empty Redis. Raises NotInstalled."""
    if shutil.which("redis-server") is None:
        raise NotInstalled("redis-server is not installed (Debian: apt-get install redis-server)")
    port, folder = free_port(), tempfile.mkdtemp(prefix="millrace-redis-")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--appendonly", "yes", "--save", ""]
    with _running(Server(command, port, f"redis://127.0.0.1:{port}/0"), Path(folder)) as server:
        yield server


@contextmanager
def postgres_server() -> Iterator[Server]:
    """An empty Postgres; it refuses to run as root. Raises NotInstalled."""
    if not POSTGRES.exists():
        raise NotInstalled("initdb is not installed (Debian: apt-get install postgresql)")
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="millrace-postgres-"))
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    subprocess.run([POSTGRES / "initdb", "-D", data, "-A", "trust", "-U", "postgres"], user=user, check=True, capture_output=True,
                   cwd=folder)  # fmt: skip
    command = [str(POSTGRES / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    with _running(Server(command, port, url, user), folder) as server:
        yield server


@contextmanager
def s3_server() -> Iterator[Server]:
    """An empty store of objects, kept in memory; any credentials will do. Raises NotInstalled."""
    program = Path(sys.executable).with_name("moto_server")
    if not program.exists():
        raise NotInstalled("moto is not installed (the extra `dev`)")
    port, folder = free_port(), tempfile.mkdtemp(prefix="millrace-s3-")
    command = [str(program), "-H", "127.0.0.1", "-p", str(port)]
    with _running(Server(command, port, f"http://127.0.0.1:{port}"), Path(folder)) as server:
        yield server


class Valve:
    """A port before a server's. Closed, it takes connections, and what comes over them, and passes nothing on."""

    def __init__(self, port: int) -> None:
        self.behind, self.open = port, threading.Event()
        self.open.set()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                far = socket.create_connection(("127.0.0.1", self.behind))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError), other:
            while some := one.recv(100_000):
                self.open.wait()
                other.sendall(some)


@contextmanager
def valve(port: int) -> Iterator[Valve]:
    made = Valve(port)
    try:
        yield made
    finally:
        made.open.set()
        made.listening.close()
