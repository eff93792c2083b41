"""Requests that are looked up together get what each would get alone."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from deploy.process import Service, call
from deploy.together import Together
from features.few import FEW_ROWS
from features.online import Looked, Served
from tests.e2e.buses import EVERY, NOW
from tests.e2e.raw_http import received, request
from tests.e2e.test_endpoint import GONE, trip_at

TRIPS = [trip_at(NOW + (2 + i) * EVERY) for i in range(40)]


def served(rows: list[dict[str, Any]]) -> tuple[Served, str]:
    """Features that are the rows' own number; a row that is 13 is an error."""
    numbers = np.array([row["x"] for row in rows], np.float64)
    if 13 in numbers:
        raise ValueError("thirteen")
    looked = Looked({"x": numbers}, {}, numbers < 0, numbers.astype(np.int64), {}, frozenset(), "s", 0)
    return Served(7, {"x": numbers}, looked), ""


def test_who_waits_is_looked_up_together_and_an_error_is_his_who_made_it() -> None:
    counts: list[int] = []

    def look(rows: list[dict[str, Any]]) -> tuple[Served, str]:
        counts.append(len(rows))
        return served(rows)

    async def all_of(*each: list[int]) -> list[Any]:
        together = Together(look)
        return await asyncio.gather(*(together.served([{"x": x} for x in xs]) for xs in each), return_exceptions=True)

    found = asyncio.run(all_of([1], [2, 3], [4]))
    assert counts == [4]
    assert [f[0].frame["x"].tolist() for f in found] == [[1], [2, 3], [4]]
    assert [f[0].looked.closed_at.tolist() for f in found] == [[1], [2, 3], [4]] and all(f[2] > 0 for f in found)
    counts.clear()
    found = asyncio.run(all_of([1], [13], [2]))
    assert isinstance(found[1], ValueError) and [found[i][0].frame["x"].tolist() for i in (0, 2)] == [[1], [2]]
    counts.clear()
    asyncio.run(all_of([0] * FEW_ROWS, [1], [0] * 900, [2], [3]))
    assert counts == [FEW_ROWS, 1, 900, 2]  # many rows hold up no one beside them


def test_a_request_that_was_given_up_is_not_looked_up() -> None:
    seen: list[float] = []

    def look(rows: list[dict[str, Any]]) -> tuple[Served, str]:
        seen.extend(row["x"] for row in rows)
        return served(rows)

    async def both() -> None:
        together = Together(look)
        one, other = (asyncio.create_task(together.served([{"x": x}])) for x in (1, 2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.wait([one, other])

    asyncio.run(both())
    assert seen in ([2], [1, 2])  # the turn may have come first


def test_answers_of_a_crowd_are_those_of_each_alone(buses_service: Service) -> None:
    def plain(answer: dict[str, Any]) -> Any:
        return answer.get("rows", answer)

    wrong = [GONE, {**TRIPS[0], "trip": "x"}]
    asked = [[trip] for trip in TRIPS] + [[w] for w in wrong] + [TRIPS[:5]]
    alone = [call(f"{buses_service.url}/predict", {"rows": rows}) for rows in asked]
    assert [status for status, _ in alone] == [200] * len(TRIPS) + [409, 422, 200]

    async def crowd() -> list[tuple[int, Any]]:
        return await asyncio.gather(*(one(rows) for rows in asked))

    async def one(rows: list[dict[str, Any]]) -> tuple[int, Any]:
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", buses_service.port)
            writer.write(request({"rows": rows}))
            status, _, body = await received(reader)
            writer.close()
            if status != 429:
                return status, json.loads(body)
            await asyncio.sleep(0.05)
        raise AssertionError("always told to come again")

    for _ in range(3):
        found = asyncio.run(crowd())
        assert [status for status, _ in found] == [status for status, _ in alone]
        assert [plain(body) for _, body in found] == [plain(body) for _, body in alone]


@pytest.mark.parametrize("count", [2, 7, FEW_ROWS, FEW_ROWS + 1])
def test_rows_of_one_request_are_answered_as_alone(buses_service: Service, count: int) -> None:
    rows = [TRIPS[i % len(TRIPS)] for i in range(count)]
    status, answer = call(f"{buses_service.url}/predict", {"rows": rows})
    assert status == 200
    for i in {0, 1, count // 2, count - 1}:
        assert answer["rows"][i] == call(f"{buses_service.url}/predict", {"rows": [rows[i]]})[1]["rows"][0]
