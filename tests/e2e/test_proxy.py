"""The proxy alone, before endpoints that only say their name: shares, entities, limits, and a proxy that is killed."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from deploy.process import free_port, stop
from deploy.proxy import MISSING, Place, Proxy, Traffic, installed
from pipelines.errors import MillraceError
from pipelines.home import Home
from tests.servers import NotInstalled

pytestmark = pytest.mark.haproxy


class Named(BaseHTTPRequestHandler):
    """Answers with the port it listens on; a body that says `fail` with 500."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.say(200)

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["content-length"]))
        self.say(500 if b"fail" in asked else 200)

    def say(self, status: int) -> None:
        body = str(self.server.server_address[1]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *told: object) -> None:
        pass


class Pair:
    """A proxy before two endpoints, in slots a and b."""

    def __init__(self, home: Home, sticky: str = "") -> None:
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Named) for _ in range(2)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.ports = [server.server_address[1] for server in self.servers]
        self.proxy, self.port, self.log_port, self.sticky = Proxy(home, "buses"), free_port(), free_port(), sticky
        self.share(90, 10)
        self.service = self.proxy.start(self.port)

    def share(self, a: int, b: int) -> None:
        places = {"a": Place(self.ports[0], a), "b": Place(self.ports[1], b)}
        self.proxy.write(places, port=self.port, log_port=self.log_port, sticky=self.sticky)

    def ask(self, body: bytes = b'{"rows": [{"line": "L1"}]}') -> tuple[int, str]:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            line.request("POST", "/predict", body)
            answer = line.getresponse()
            return answer.status, answer.read().decode()
        finally:
            line.close()

    def stop(self) -> None:
        stop(self.service, grace_s=2)
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    if not installed():
        raise NotInstalled(MISSING)
    # a home so deep that no path of a socket could lead there
    made = Pair(Home(tmp_path / ("deep" * 25) / "home"), getattr(request, "param", ""))
    yield made
    made.stop()


def test_traffic_is_shared_by_weight_and_a_proxy_that_is_killed_comes_back_with_the_weights(pair: Pair) -> None:
    def share(count: int = 200) -> float:
        """Of the second."""
        return Counter(pair.ask()[1] for _ in range(count))[str(pair.ports[1])] / count

    assert 0.02 < share() < 0.2
    pair.share(50, 50)  # on disk, and not yet told
    assert 0.02 < share() < 0.2
    (killed,) = [p for p in psutil.Process(pair.service.pid).children() if p.name() == "haproxy"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(5)
    pair.proxy.tell("show info")
    assert 0.35 < share() < 0.65 and pair.service.alive()
    pair.proxy.weigh({"a": 0, "b": 100})
    assert share(20) == 1
    pair.proxy.close("a")
    assert pair.proxy.stat()["a"]["status"] == "MAINT"
    pair.proxy.open("a", pair.ports[0])
    assert share(20) == 1  # ready, and of weight 0


@pytest.mark.parametrize("pair", ["line"], indirect=True)
def test_an_entity_stays_with_its_release_while_its_share_grows(pair: Pair) -> None:
    def holders() -> dict[int, str]:
        return {i: pair.ask(json.dumps({"rows": [{"trip": 1, "line": f"L{i}"}]}).encode())[1] for i in range(60)}

    first = holders()
    assert first == holders()
    new = str(pair.ports[1])
    few = {i for i, port in first.items() if port == new}
    assert 1 <= len(few) <= 18
    pair.proxy.weigh({"a": 50, "b": 50})
    many = {i for i, port in holders().items() if port == new}
    assert few <= many and 18 <= len(many) <= 42


def test_what_was_answered_is_told(pair: Pair) -> None:
    traffic = Traffic(pair.log_port)
    try:
        for body in (b"{}", b"{}", b"fail"):
            pair.ask(body)
        time.sleep(0.2)
        seen = traffic.take()
        assert [s.failed for s in seen] == [False, False, True] and {s.slot for s in seen} <= {"a", "b"}
        assert all(0 <= s.ms < 5_000 for s in seen) and traffic.take() == []
    finally:
        traffic.close()


def test_a_large_body_and_no_endpoint_are_said_in_a_sentence(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.port)) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4000001\r\n\r\n" + b" " * 20_000)
        answer = line.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413") and b"send fewer rows" in answer
    for slot in "ab":
        pair.proxy.close(slot)
    status, text = pair.ask()
    assert status == 503 and json.loads(text) == {"error": "no endpoint is ready: ask again"}


@pytest.mark.slow
def test_a_client_that_sends_slowly_is_sent_away_and_costs_the_others_nothing(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.port)) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert pair.ask()[0] == 200
        slow.settimeout(15)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_proxy_that_cannot_start_says_why(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Proxy(Home(tmp_path / "other"), "buses")
    other.write({}, port=pair.port, log_port=free_port(), sticky="")
    with pytest.raises(MillraceError, match="is taken; stop what listens there"):
        other.start(pair.port)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MillraceError, match="apt-get install haproxy"):
        other.start(free_port())
