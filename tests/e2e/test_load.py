"""More requests than can be answered, and clients that do not send: each gets an answer or is told to come again, in time."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from deploy.front import read
from deploy.lean import AROUND, FEWEST, Door, has_come
from deploy.process import Service, call
from tests.e2e.buses import EVERY, NOW, Buses, trip_at
from tests.e2e.raw_http import received, request
from tests.e2e.test_endpoint import SOON


def test_a_door_lets_in_what_is_answered_within_the_budget() -> None:
    door = Door(0.05)
    assert door.limit == FEWEST  # nothing is known yet
    for _ in range(200):
        door.took(0.001)
    assert door.limit in (49, 50) and not door.full()
    for _ in range(200):
        door.took(0.5)
    assert door.limit == FEWEST
    with door.entered():
        assert door.inside == 1
    door.inside = FEWEST
    assert door.full() and door.shed == 1 and door.answered == 400


async def ask(port: int, sent: bytes, ready: asyncio.Event) -> tuple[int, str, float]:
    """Status, head of the answer and seconds; connected before, sent when all are ready."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await ready.wait()
    began = time.perf_counter()
    writer.write(sent)
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode()
    writer.close()
    return int(head.split()[1]), head, time.perf_counter() - began


async def flood(port: int, count: int) -> list[tuple[int, str, float]]:
    ready = asyncio.Event()
    asked = [asyncio.create_task(ask(port, request({"rows": [SOON]}), ready)) for _ in range(count)]
    await asyncio.sleep(0.5)
    ready.set()
    return await asyncio.gather(*asked)


def test_a_flood_is_answered_or_told_to_come_again(buses_service: Service) -> None:
    found: list[tuple[int, str, float]] = []
    for _ in range(5):  # a machine that is busy elsewhere may send them slowly
        found += asyncio.run(flood(buses_service.port, 400))
        counts = Counter(status for status, _, _ in found)
        assert counts.keys() <= {200, 429} and counts[200] >= FEWEST, counts
        if counts[429]:
            break
    assert counts[429], counts
    assert all("retry-after: 1" in head.lower() for status, head, _ in found if status == 429)
    status, _ = call(f"{buses_service.url}/predict", {"rows": [SOON]})
    assert status == 200  # all are out again


def test_new_connections_are_seen_at_once(buses_service: Service) -> None:
    """Those that wait in the socket are counted too: libuv would take one of them for each answer, and shed none."""

    async def rush(count: int) -> list[tuple[int, str, float]]:
        (ready := asyncio.Event()).set()
        return await asyncio.gather(*(ask(buses_service.port, request({"rows": [SOON]}), ready) for _ in range(count)))

    statuses: set[int] = set()
    for _ in range(5):
        statuses |= {status for status, _, _ in asyncio.run(rush(400))}
    assert statuses == {200, 429}


def test_ten_thousand_keys_at_once_are_answered_or_told_to_come_again(buses_service: Service) -> None:
    """In one request they are refused; in ten at the same time each gets its own answers, those that nobody knows too."""
    trips = [trip_at(NOW + (1 + i) * EVERY) for i in range(10_000)]
    status, refused = call(f"{buses_service.url}/predict", {"rows": trips})
    assert status == 422 and refused["error"].startswith("10000 rows; send 1 to 1,000")

    async def asked(some: list[dict[str, object]]) -> list[dict[str, Any]]:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
            writer.write(request({"rows": some}))
            status, _, body = await asyncio.wait_for(received(reader), 60)
            writer.close()
            if status == 200:
                return list(json.loads(body)["rows"])
            assert status == 429
            await asyncio.sleep(1)

    async def all_of() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(asked(trips[i::10]) for i in range(10)))

    found = asyncio.run(all_of())
    assert all([row["key"] for row in rows] == trips[i::10] for i, rows in enumerate(found))
    known = Counter(row["unknown_entity"] for rows in found for row in rows)
    assert known == {True: 9_760, False: 240}, known


@pytest.mark.slow
def test_a_client_that_does_not_send_is_let_go_and_holds_up_nobody(buses_service: Service) -> None:
    async def slow() -> tuple[int, str, float]:
        whole = request({"rows": [SOON]})
        return await ask(buses_service.port, whole[:-10], ready)

    async def both() -> tuple[list[tuple[int, str, float]], list[float]]:
        waiting = [asyncio.create_task(slow()) for _ in range(200)]
        ready.set()
        took = []
        for _ in range(20):
            took.append((await ask(buses_service.port, request({"rows": [SOON]}), ready))[2])
        return await asyncio.gather(*waiting), took

    ready = asyncio.Event()
    late, took = asyncio.run(both())
    assert {status for status, _, _ in late} == {408} and max(seconds for _, _, seconds in late) < 20
    assert sorted(took)[10] < 1


@pytest.mark.slow
def test_a_client_whose_request_does_not_begin_or_drips_is_let_go(buses_service: Service) -> None:
    async def silent(sent: bytes, drip: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        began = time.perf_counter()
        writer.write(sent)
        while not reader.at_eof():
            with suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(100_000), 0.5)
            with suppress(ConnectionError):
                writer.write(drip)
        writer.close()
        return time.perf_counter() - began

    async def all_of() -> list[float]:
        whole = request({"rows": [SOON]})  # a connection that was used before is no better
        begun = b"POST / HTTP/1.1\r\nX: "
        return await asyncio.gather(silent(b"", b""), silent(b"POST /pre", b""), silent(begun, b"y"), silent(whole + begun, b"y"))

    took = asyncio.run(all_of())
    assert all(8 < seconds < 15 for seconds in took[:3]) and 8 < took[3] < 17, took
    status, _ = call(f"{buses_service.url}/predict", {"rows": [SOON]})
    assert status == 200


SENDS = """
import asyncio, sys
from asyncio.selector_events import _SelectorSocketTransport as Transport
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState
import deploy.lean

routes = [Route("/whole", lambda _: Response(b"x" * 70_000)), Route("/none", lambda _: Response(status_code=204)),
          Route("/parts", lambda _: StreamingResponse(iter([b"one", b"two", b"three"])))]
sends, write = [], Transport.write

def counted(self, data):
    if data and self.get_extra_info("sockname")[1] == port:
        sends.append(1)
    write(self, data)

Transport.write = counted

async def ask(head):
    sends.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b" HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    answer = await reader.read()
    writer.close()
    return [line for line in answer.split(b"\\r\\n") if not line.startswith(b"date")], len(sends)

async def main():
    global port
    config = uvicorn.Config(Starlette(routes=routes), lifespan="off", log_level="error")
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: HttpToolsProtocol(config, ServerState(), {}), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asked = [b"GET /whole", b"HEAD /whole", b"GET /none", b"GET /parts", b"GET /unknown"]
    before = [await ask(head) for head in asked]
    deploy.lean.joined()
    after = [await ask(head) for head in asked]
    assert [answer for answer, _ in before] == [answer for answer, _ in after]
    print([count for _, count in before], [count for _, count in after])

asyncio.run(main())
"""


def test_head_and_body_of_an_answer_are_sent_at_once() -> None:
    """The same bytes in fewer sends; an answer without a body, or in parts, and one after which the connection is closed."""
    done = subprocess.run([sys.executable, "-c", SENDS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.strip() == "[2, 1, 1, 5, 2] [1, 1, 1, 4, 1]"


def test_a_body_that_is_there_is_not_waited_for() -> None:
    """Uvicorn says so; where it no longer does, a time limit is set for each body, which costs a little."""
    said = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        said.append(has_come(receive))
        said.append(await read(scope, receive))
        await Response()(scope, receive, send)

    async def main() -> None:
        config = uvicorn.Config(app, lifespan="off", log_level="error")
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: HttpToolsProtocol(config, ServerState(), {}), "127.0.0.1", 0)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
        for parts in ([head + b"abc"], [head, b"ab", b"c"]):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.1)
            assert (await received(reader))[0] == 200
            writer.close()

    asyncio.run(main())
    assert said == [True, b"abc", False, b"abc"]


@pytest.mark.parametrize(("tracing", "expected"), [("", set()), ("1", {"OpenTelemetryMiddleware"})])
def test_bentoml_s_application_is_as_we_know_it(buses: Buses, tracing: str, expected: set[str]) -> None:
    """The property that is trimmed is there, and what is taken out of it was in it."""
    code = (
        "from _bentoml_impl.server.app import ServiceAppFactory as F; whole = F.middlewares.fget; import deploy.service as s; "
        "s.Millrace.inject_config(); f = F(s.Millrace); "
        "print([m.cls.__name__ for m in whole(f)], [m.cls.__name__ for m in f.middlewares], sep='|')"
    )
    src = buses.folder / "src"
    env = {**os.environ, "PYTHONPATH": str(src), "MILLRACE_TRACING": tracing, "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(src), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    whole, kept = ({*eval(part)} for part in done.stdout.strip().splitlines()[-1].split("|"))
    assert whole >= AROUND and whole - kept == AROUND - expected and kept & AROUND == expected
    assert "Straight" in kept
