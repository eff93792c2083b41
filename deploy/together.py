"""Requests that come while another is answered are looked up together: one pass over the views for all of them.

None waits for others: who comes alone is looked up at once. What a row's features are does not depend on its neighbours.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from features.few import FEW_ROWS
from features.online import Served

Row = dict[str, Any]
Found = tuple[Served, str]  # and what a store that is down said
ALONE_S = 0.001  # after the last look: those who came during it have been heard by then, and who comes now comes alone


@dataclass(frozen=True)
class _Waiting:
    rows: Sequence[Row]
    found: "asyncio.Future[tuple[Served, str, float]]"


class Together:
    """`look` gives what is known of rows; it is called in the event loop's own thread."""

    def __init__(self, look: Callable[[list[Row]], Found]) -> None:
        self.look = look
        self.waiting: list[_Waiting] = []
        self.ended = time.perf_counter()  # the last look

    async def served(self, rows: Sequence[Row]) -> tuple[Served, str, float]:
        """What is known of R rows, what the store said if it is down, and the request's share of the seconds that it took."""
        if not self.waiting and (began := time.perf_counter()) - self.ended > ALONE_S:
            found, down = self.look([*rows])
            self.ended = time.perf_counter()
            return found, down, self.ended - began
        loop = asyncio.get_running_loop()
        if not self.waiting:
            loop.call_soon(self._turn)
        one = _Waiting(rows, loop.create_future())
        self.waiting.append(one)
        return await one.found

    def _turn(self) -> None:
        waiting, self.waiting = [one for one in self.waiting if not one.found.cancelled()], []
        while waiting:
            count, rows = 1, len(waiting[0].rows)
            while count < len(waiting) and rows + len(waiting[count].rows) <= FEW_ROWS:
                rows += len(waiting[count].rows)
                count += 1
            self._answer(waiting[:count])
            waiting = waiting[count:]
        self.ended = time.perf_counter()

    def _answer(self, some: Sequence[_Waiting]) -> None:
        began = time.perf_counter()
        try:
            served, down = self.look([row for one in some for row in one.rows])
        except Exception as error:
            if len(some) == 1:
                some[0].found.set_exception(error)
                return
            for one in some:  # one of them may be the only cause
                self._answer([one])
            return
        share, at = (time.perf_counter() - began) / len(some), 0
        for one in some:
            end = at + len(one.rows)
            one.found.set_result((served if len(some) == 1 else served.part(slice(at, end)), down, share))
            at = end
