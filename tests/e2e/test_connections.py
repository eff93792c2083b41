"""Connections that live long: many requests over one, several at once, idle for longer than they are kept, half closed."""

import asyncio
import json
import time
from collections.abc import Sequence
from itertools import cycle, islice

import psutil
import pytest

from deploy.process import Service, call
from tests.e2e.buses import EVERY, NOW, trip_at
from tests.e2e.raw_http import received, request
from tests.e2e.test_endpoint import SOON
from tests.e2e.test_front import numbers

MANY = 2_000
TRIPS = [trip_at(NOW + (2 + i) * EVERY) for i in range(100)]


async def asked_at_once(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trips: Sequence[dict[str, object]]
) -> list[float]:  # fmt: skip
    """Probabilities for trips that are asked about one after another, before the first is answered. Asserts the order."""
    writer.write(b"".join(request({"rows": [trip]}) for trip in trips))
    found = []
    for trip in trips:
        status, head, body = await asyncio.wait_for(received(reader), 30)
        answer = json.loads(body)
        assert status == 200 and "connection: close" not in head and answer["rows"][0]["key"] == trip, (status, answer)
        found.append(float(answer["rows"][0]["probability"]))
    return found


def memory_mb(service: Service) -> float:
    """Of the workers."""
    return sum(p.memory_info().rss for p in psutil.Process(service.pid).children(recursive=True)) / 1e6


def test_requests_that_come_before_their_answers_are_answered_in_order(buses_service: Service) -> None:
    alone = [call(f"{buses_service.url}/predict", {"rows": [trip]})[1]["rows"][0]["probability"] for trip in TRIPS]

    async def asked() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        found = await asked_at_once(reader, writer, TRIPS * 2)
        writer.write(b"".join(request({"rows": [{"line": n}]}) + request({"rows": [SOON]}) for n in range(20)))
        refused = [(await received(reader))[0] for _ in range(40)]
        writer.close()
        assert refused == [422, 200] * 20  # what is refused does not end the connection
        return found

    assert asyncio.run(asked()) == alone * 2


def test_a_client_that_asks_and_does_not_read_costs_the_others_nothing(buses_service: Service) -> None:
    async def asked() -> float:
        unread, more = await asyncio.open_connection("127.0.0.1", buses_service.port, limit=1_000)
        sent = b"".join(request({"rows": TRIPS}) for _ in range(200))  # answers of 5 MB, which no buffer of the system holds
        more.write(sent)
        await asyncio.sleep(0.5)
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        await asked_at_once(reader, writer, TRIPS[:20])
        took = time.perf_counter() - began
        assert not unread.at_eof()
        for one in (more, writer):
            one.transport.abort()
        return took

    before = memory_mb(buses_service)
    assert asyncio.run(asked()) < 5 and (first := memory_mb(buses_service)) < before + 50
    assert max(asyncio.run(asked()) for _ in range(4)) < 5 and memory_mb(buses_service) < first + 50


def test_a_connection_that_is_cut_in_the_midst_of_a_request_costs_nobody_anything(buses_service: Service) -> None:
    async def cut(at: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        writer.write(request({"rows": [SOON]}) + request({"rows": TRIPS})[:at])
        await asyncio.sleep(0.002 * (at % 3))
        writer.transport.abort()

    async def all_of() -> list[float]:
        await asyncio.gather(*(cut(at) for at in range(10, 4_000, 40)))
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        deadline = time.monotonic() + 30
        while True:  # the first requests of those that were cut are answered to nobody, and are many for a moment
            writer.write(request({"rows": [SOON]}))
            if (await received(reader))[0] == 200:
                break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        found = await asked_at_once(reader, writer, TRIPS[:5])
        writer.close()
        return found

    assert len(asyncio.run(all_of())) == 5
    deadline = time.monotonic() + 10
    while numbers(buses_service.url)[("millrace_requests_in_flight", ())]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_connection_that_is_half_closed_gets_its_answer_or_none(buses_service: Service) -> None:
    async def asked(body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        writer.write(body)
        writer.write_eof()
        found = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return found

    for body in [b"", request({"rows": [SOON]})[:-5], *[request({"rows": [SOON]})] * 5]:
        found = asyncio.run(asked(body))
        assert found == b"" or (found.startswith(b"HTTP/1.1 200") and found.endswith(b"}")), found
    assert call(f"{buses_service.url}/predict", {"rows": [SOON]})[0] == 200
    assert numbers(buses_service.url)[("millrace_requests_in_flight", ())] == 0


@pytest.mark.slow
def test_a_connection_that_is_used_for_hours(buses_service: Service) -> None:
    """Thousands of requests over one, while another lies idle until it is closed, which its owner sees."""

    async def idle() -> tuple[float, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        await asked_at_once(reader, writer, TRIPS[:1])
        began = time.monotonic()
        rest = await reader.read()  # until the other side closes it
        writer.close()
        return time.monotonic() - began, rest

    async def busy(count: int) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
        found: list[float] = []
        trips = cycle(TRIPS)
        while len(found) < count:
            found += await asked_at_once(reader, writer, list(islice(trips, 1 + len(found) // 100 % 20)))
        writer.close()
        return found

    async def both() -> tuple[tuple[float, bytes], list[float]]:
        return await asyncio.gather(idle(), busy(MANY))

    asyncio.run(busy(MANY))  # what is kept to be used again is there
    before = memory_mb(buses_service)
    (kept, rest), found = asyncio.run(both())
    assert memory_mb(buses_service) < before + 10
    assert rest == b"" and 1 < kept < 120, kept
    alone = dict(zip(range(100), found[:100], strict=True))
    assert all(found[i] == alone[i % 100] for i in range(len(found)))
