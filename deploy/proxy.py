"""HAProxy before the endpoints: its configuration, its process, what it is told while it runs, and what it tells of requests.

Each endpoint has a slot, a server of the proxy's one backend. The file on disk always says what is wanted: a proxy that died
is started again by the shell loop around it, and comes back with the right addresses and weights.
"""

import csv
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.process import Service, port_is_free, reason, remember, running, stop
from deploy.requests import MAX_BYTES
from pipelines.clock import begin_s
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import write_atomic

SLOTS = ("a", "b", "c", "d")
DRAIN_S = 35.0  # longer than the longest answer
MISSING = "haproxy is not installed (Debian: apt-get install haproxy)"
LOOP = "trap 'kill $p; wait $p; exit 0' TERM; while :; do haproxy -db -f haproxy.cfg & p=$!; wait $p; sleep 0.1; done"
CONFIG = """global
  stats socket unix@sock mode 600 level admin
  log 127.0.0.1:{log_port} format raw local0
defaults
  mode http
  log global
  timeout connect 2s
  timeout client 5m
  timeout server 30s
  timeout check 5s
  timeout http-keep-alive 5m
  timeout http-request 10s   # a client that sends slowly
  option redispatch 1
  option forwardfor
  retries 3
  retry-on conn-failure empty-response   # a request is a question: asked twice it does no harm
  http-error status 400 content-type application/json string '{{"error": "this is not HTTP"}}'
  http-error status 408 content-type application/json string '{{"error": "the request did not come within 10 s"}}'
  http-error status 413 content-type application/json string '{{"error": "more than {max_bytes} bytes: send fewer rows"}}'
  http-error status 502 content-type application/json string '{{"error": "the endpoint broke off: ask again"}}'
  http-error status 503 content-type application/json string '{{"error": "no endpoint is ready: ask again"}}'
  http-error status 504 content-type application/json string '{{"error": "no answer within 30 s: ask again"}}'
frontend f
  bind 127.0.0.1:{port}
  maxconn 1000
  option http-buffer-request
  http-request deny deny_status 413 if {{ req.body_size gt {max_bytes} }}
  http-request set-log-level silent unless METH_POST
  log-format "%s %ST %Tr %ts"
  default_backend b
backend b
  balance {balance}
  hash-type consistent sdbm avalanche
  option httpchk GET /readyz
  http-check expect status 200
  default-server check inter 500ms fall 4 rise 1
{servers}
"""


@dataclass(frozen=True)
class Place:
    """What a slot holds: the port of an endpoint and its share of the traffic, percent."""

    port: int
    weight: int


def installed() -> bool:
    """Whether there is a proxy on this machine."""
    return shutil.which("haproxy") is not None


class Proxy:
    """The proxy of one pipeline's endpoints."""

    def __init__(self, home: Home, pipeline: str) -> None:
        self.home, self.name = home, f"{pipeline}.proxy"
        self.folder = home.services(self.name)

    def running(self) -> Service | None:
        """Its process, if it runs."""
        return running(self.home, self.name)

    def write(self, places: Mapping[str, Place], *, port: int, log_port: int, sticky: str) -> None:
        """What it does when it starts."""
        servers = [
            f"  server {slot} 127.0.0.1:{places[slot].port} weight {places[slot].weight}" if slot in places
            else f"  server {slot} 127.0.0.1:1 weight 0 disabled" for slot in SLOTS
        ]  # fmt: skip
        # round robin goes on with a turn of hundreds of requests when weights change, and keeps step with regular clients
        balance = f"hash 'req.body,json_query(\"$.rows[0].{sticky}\")'" if sticky else "random(1)"
        text = CONFIG.format(port=port, log_port=log_port, max_bytes=MAX_BYTES, balance=balance, servers="\n".join(servers))
        write_atomic(self.folder / "haproxy.cfg", text)

    def start(self, port: int) -> Service:
        """The proxy, with a loop around it that starts it again. Raises MillraceError with its last words."""
        if not installed():
            raise MillraceError(MISSING)
        if not port_is_free(port):
            raise MillraceError(
                f"port {port} is taken; stop what listens there (`millrace down`), or choose another: --set serve.port=PORT"
            )
        log = self.folder / "log.txt"
        (self.folder / "sock").unlink(missing_ok=True)
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            process = subprocess.Popen(["sh", "-c", LOOP], cwd=self.folder, stdout=out, stderr=out, start_new_session=True)
        service = Service(process.pid, begin_s(process.pid), port, "proxy", str(log))
        remember(self.home, self.name, service)
        try:
            self.tell("show info")
        except MillraceError:
            stop(service, grace_s=2)
            raise MillraceError(f"the proxy did not start: {reason(log, since=before)} (log: {log})") from None
        return service

    def tell(self, command: str, *, wait_s: float = 10) -> str:
        """Its answer to a command. One that is being started again is waited for. Raises MillraceError."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return self._ask(command).strip()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise MillraceError(f"the proxy {self.name} does not answer ({error}): type `millrace serve` again") from None
                time.sleep(0.05)

    def _ask(self, command: str) -> str:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(5)
                line.connect(f"/proc/self/fd/{folder}/sock")  # a path of its own may be too long for a socket
                line.sendall(command.encode() + b"\n")
                return line.makefile(encoding="utf-8").read()
        finally:
            os.close(folder)

    def stat(self) -> dict[str, dict[str, str]]:
        """What it counts, by slot."""
        lines = self.tell("show stat").removeprefix("# ").splitlines()
        return {row["svname"]: row for row in csv.DictReader(lines) if row["pxname"] == "b" and row["svname"] in SLOTS}

    def open(self, slot: str, port: int, *, wait_s: float = 20) -> None:
        """Returns when a slot's endpoint is seen to be ready; its weight stays. Raises MillraceError when it is not."""
        if self.tell(f"set server b/{slot} addr 127.0.0.1 port {port}").startswith("Invalid"):
            raise MillraceError(f"the proxy {self.name} takes no address: type `millrace down` and serve again")
        self.tell(f"set server b/{slot} state ready")  # one in MAINT never becomes UP by itself
        deadline = time.monotonic() + wait_s
        while not self.stat()[slot]["status"].startswith(("UP", "DRAIN")):  # DRAIN: ready, and of weight 0
            if time.monotonic() > deadline:
                raise MillraceError(f"the proxy {self.name} does not see the endpoint on port {port} as ready")
            time.sleep(0.05)

    def weigh(self, weights: Mapping[str, int]) -> None:
        """Shares the traffic out; what goes up goes first, so that there is always someone to ask."""
        for slot, weight in sorted(weights.items(), key=lambda item: -item[1]):
            self.tell(f"set weight b/{slot} {weight}")

    def close(self, slot: str) -> None:
        """Returns when a slot's endpoint has answered all that it was asked, and is asked no more."""
        self.tell(f"set weight b/{slot} 0")
        self.tell(f"set server b/{slot} state drain")
        deadline = time.monotonic() + DRAIN_S
        while int(self.stat()[slot]["scur"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.tell(f"set server b/{slot} state maint")


@dataclass(frozen=True)
class Answered:
    """A request as the proxy saw it: the slot that answered, whether it failed or was refused for load, after how many ms."""

    slot: str
    failed: bool
    ms: float


class Traffic:
    """What the proxy tells of every request while someone listens; it never waits for that."""

    def __init__(self, port: int) -> None:
        self._line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._line.bind(("127.0.0.1", port))
        self._line.settimeout(0.2)
        self._seen: list[Answered] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="traffic", daemon=True)
        self._thread.start()

    def take(self) -> list[Answered]:
        """What was answered since the last call. A client that went away is not counted."""
        with self._lock:
            seen, self._seen = self._seen, []
        return seen

    def close(self) -> None:
        """Listens no more."""
        self._over.set()
        self._thread.join()
        self._line.close()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                slot, status, ms, ended = self._line.recv(1_000).decode().split()
            except (TimeoutError, ValueError):
                continue
            if not ended.startswith("C"):
                answered = Answered(slot, not 0 < int(status) < 500 or status == "429", float(ms))
                with self._lock:
                    self._seen.append(answered)
