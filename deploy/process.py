"""Endpoint processes: start one from a bento, wait until it is ready, find it again, stop it."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.clock import begin_s
from pipelines.errors import MillraceError
from pipelines.home import Home, process_env
from pipelines.manifest import ROOT, read_json, write_json

NOT_READY_S = 15.0  # how long an endpoint may say that it is not ready, and nothing new


@dataclass(frozen=True)
class Service:
    """A running endpoint."""

    pid: int
    started: float  # `begin_s`, so that a reused pid is not taken for it
    port: int
    release: str
    log: str
    offset_us: int = 0  # added to the data clock
    rules: str = ""  # of `serve`, by which it lets requests in
    shadow: bool = False  # it answers copies, and logs elsewhere

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and begin_s(self.pid) == self.started
        except psutil.NoSuchProcess:
            return False


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a service could listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start(
    home: Home, bento: Path, *, port: int, release: str, log: Path, extra: dict[str, str], wait_s: float = 90,
    name: str = "", shadow: bool = False,
) -> Service:  # fmt: skip
    """An endpoint that answered /readyz. Raises MillraceError with its last words when it does not come up.

    With a `name` it is remembered under it from its first moment, so that it is found again whoever is killed.
    """
    if not port_is_free(port):
        raise MillraceError(
            f"port {port} is taken; stop what listens there (`millrace down`), or choose another: --set serve.port=PORT"
        )
    if not (bento / "bento.yaml").is_file():
        raise MillraceError(f"bento {bento} is not there: run `millrace run` to build it again")
    log.parent.mkdir(parents=True, exist_ok=True)
    src = bento / "src"
    env = {**os.environ, **process_env(home), "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1", **extra}
    command = [sys.executable, "-m", "bentoml", "serve", str(bento), "--host", "127.0.0.1", "--port", str(port)]
    before = log.stat().st_size if log.exists() else 0
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=src, env=env, stdout=out, stderr=out, start_new_session=True)
    service = Service(process.pid, begin_s(process.pid), port, release, str(log),
                      int(extra.get("MILLRACE_CLOCK_OFFSET_US", "0")), extra.get("MILLRACE_RULES", ""), shadow)  # fmt: skip
    if name:
        remember(home, name, service)
    return wait_until_ready(service, wait_s=wait_s, since=before)


def wait_until_ready(service: Service, *, wait_s: float = 90, since: int = 0) -> Service:
    """An endpoint that answered /readyz. Raises MillraceError with its last words, and stops it, when it does not."""
    log, until, said = Path(service.log), time.monotonic() + wait_s, ""
    deadline, heard = until, set[str]()
    while time.monotonic() < deadline:
        if not service.alive() or "Application startup failed" in last_words(log, since=since):
            break  # BentoML would start its worker again and again
        try:
            with urllib.request.urlopen(f"{service.url}/readyz", timeout=2):
                return service
        except urllib.error.HTTPError as error:  # it says why not: perhaps it is only starting
            said = error.read().decode()
            if said not in heard:
                deadline = min(until, time.monotonic() + NOT_READY_S)
            heard.add(said)
            time.sleep(0.1)
        except OSError:
            time.sleep(0.1)
    stop(service)
    why = said or reason(log, since=since)
    raise MillraceError(f"the endpoint of {service.release} did not become ready: {why} (log: {log})")


def spawn(
    home: Home, name: str, command: list[str], port: int, extra: dict[str, str], *, tied: bool = False, release: str = ""
) -> Service:  # fmt: skip
    """Starts a Python module and remembers it. `tied`: it dies with us."""
    log = home.services(name) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **process_env(home), **extra}
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True,
            preexec_fn=_die_with_parent if tied else None,
        )  # fmt: skip
    service = Service(process.pid, begin_s(process.pid), port, release or name, str(log))
    remember(home, name, service)
    return service


def _die_with_parent() -> None:
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_words(log: Path, lines: int = 6, *, since: int = 0) -> str:
    """The end of a log file, of what was written after its first `since` bytes."""
    text = log.read_bytes()[since:].decode(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])[-1500:]


def reason(log: Path, *, since: int = 0) -> str:
    """The last exception that a log names, in one line without its traceback; its end where it names none."""
    text = log.read_bytes()[since:].decode(errors="replace") if log.exists() else ""
    named = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Refused): .+)", text, re.MULTILINE)
    return named[-1].removeprefix("MillraceError: ")[:600] if named else last_words(log, since=since)


def stop(service: Service, *, grace_s: float = 15) -> None:
    """Ends an endpoint and its workers: asked first, killed when it does not listen."""
    if not service.alive():
        return
    parent = psutil.Process(service.pid)
    family = [parent, *parent.children(recursive=True)]
    parent.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=grace_s)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)


def call(url: str, body: object | None = None, *, timeout: float = 30) -> tuple[int, Any]:
    """Status and JSON of a request; a body is posted."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            return error.code, json.loads(text)
        except ValueError:
            return error.code, {"error": text}


def remember(home: Home, pipeline: str, service: Service) -> None:
    """Notes the running endpoint of a pipeline, for `status` and `down`."""
    write_json(home.services(pipeline) / "endpoint.json", asdict(service))


def running(home: Home, pipeline: str) -> Service | None:
    """The endpoint of a pipeline, if it runs."""
    path = home.services(pipeline) / "endpoint.json"
    if not path.exists():
        return None
    body = read_json(path)
    del body["format_version"]
    service = Service(**body)
    return service if service.alive() else None
