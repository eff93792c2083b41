"""The admin port of an endpoint, on loopback only: it takes pushed events into the served store.

`POST /push {"events": [{"id": …, "source": …, "row": {…}}]}` answers when they are served, or says why they are not; what
arrives meanwhile is taken together. Who listens here may write: a web page may not, and nobody without a key where the
endpoint asks for one. `python -m deploy.admin PIPELINE STORE PORT`.
"""

import asyncio
import json
import os
import queue
import sys
import threading
from concurrent.futures import Future
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.keys import REFUSED, Keys, keys_file
from deploy.requests import BadRequest, Field, field_type, listed, typed_row
from deploy.rollout import bento_spec, champion
from features.cells import Event, Meta
from features.online import anchor_of
from features.push import BadEvent, Pusher, Receipt
from pipelines.clock import Clock, wall_us
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home
from pipelines.spec import Spec

MAX_EVENTS = 10_000  # of one request, and of what is taken together
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Waiting = tuple[list[Event], "Future[Receipt]"]


class Intake:
    """One thread that takes events into a served store, as many at once as have come."""

    def __init__(self, home: Home, spec: Spec, store: str, offset_us: int) -> None:
        self.home, self.spec, self.store, self.offset_us = home, spec, store, offset_us
        self.fields = {
            name: {column: Field(column, field_type(spec, name, column), False) for column in source.columns}
            for name, source in spec.sources.items()
        }
        self.waiting: queue.Queue[Waiting] = queue.Queue(1_000)
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    def put(self, body: bytes) -> "Future[Receipt]":
        """Takes the events of a request, all or none. Raises BadRequest."""
        items, now = listed(body, "events"), wall_us()
        if not 1 <= len(items) <= MAX_EVENTS:
            raise BadRequest(422, f"{len(items)} events; send 1 to {MAX_EVENTS:,}")
        events, receipt = [self._event(i, item, now + i) for i, item in enumerate(items)], Future[Receipt]()
        try:
            self.waiting.put_nowait((events, receipt))
        except queue.Full:
            raise BadRequest(429, "too many requests wait: send this one again in a second") from None
        return receipt

    def _event(self, i: int, item: Any, wall: int) -> Event:
        where = f"events[{i}]"
        if not isinstance(item, dict) or set(item) != {"id", "source", "row"}:
            raise BadRequest(422, f'{where} is not an event; send {{"id": text, "source": name, "row": {{…}}}}')
        if not isinstance(item["id"], str) or not 0 < len(item["id"]) <= 200:
            raise BadRequest(422, f"{where}.id is not a text of 1 to 200 characters")
        if item["source"] not in self.fields:
            raise BadRequest(422, f"{where}.source is not one of {', '.join(self.fields)}")
        row = typed_row(f"{where}.row", item["row"], self.fields[item["source"]])
        return Event(item["id"], item["source"], json.dumps(row), wall)

    def _now_us(self, meta: Meta) -> int:
        """The endpoint's now."""
        clock = self.spec.clock
        if not meta or clock is None:
            raise MillraceError(f"the served store is not fed: run `millrace run {self.spec.pipeline}`")
        return Clock(clock.kind, clock.speed, clock.offset + self.offset_us, anchor_of(meta)).now_us()

    def _run(self) -> None:
        pusher: Pusher | None = None
        while True:
            taken = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(events) for events, _ in taken) < MAX_EVENTS:
                taken.append(self.waiting.get_nowait())
            try:
                pusher = pusher or Pusher(self.spec, self.home, self.store)
                self._take(pusher, taken)
            except Exception as error:  # such as a store that is down: those who wait are told, the next ones try again
                pusher = None
                for _, receipt in taken:
                    if not receipt.done():
                        receipt.set_exception(error)

    def _take(self, pusher: Pusher, taken: list[Waiting]) -> None:
        """All together; one by one where one of them cannot be taken."""
        now = self._now_us(pusher.cells.meta())
        try:
            together = pusher.push([event for events, _ in taken for event in events], now)
        except BadEvent:
            for events, receipt in taken:
                try:
                    receipt.set_result(pusher.push(events, now))
                except BadEvent as error:
                    receipt.set_exception(error)
            return
        left = set(together.ids)
        for events, receipt in taken:
            own = left & {event.id for event in events}
            left -= own
            receipt.set_result(Receipt(len(own), len(events) - len(own), together.last))


def app(intake: Intake) -> Starlette:
    """The HTTP side."""

    rules = json.loads(os.environ.get("MILLRACE_RULES", "{}"))
    wanted = rules.get("api_keys", intake.spec.serve.api_keys)
    keys = Keys(keys_file(intake.home.root, intake.spec.pipeline), os.environ.get("MILLRACE_API_KEYS", ""), wanted=wanted)

    async def push(request: Request) -> Response:
        if "origin" in request.headers or request.url.hostname not in LOOPBACK:  # a page of another site, in a browser here
            return JSONResponse({"error": "events are not taken from web pages: send them from a program, to 127.0.0.1"}, 403)
        if keys.wanted and keys.who(request.headers) is None:
            return JSONResponse({"error": REFUSED}, 401)
        try:
            receipt = await asyncio.wrap_future(intake.put(await request.body()))
        except BadRequest as error:
            return JSONResponse({"error": error.message}, error.status)
        except BadEvent as error:
            return JSONResponse({"error": str(error)}, 422)
        except MillraceError as error:
            return JSONResponse({"error": str(error)}, 503)
        return JSONResponse({"taken": receipt.taken, "again": receipt.again, "last": receipt.last})

    async def ready(request: Request) -> Response:
        return JSONResponse({"pipeline": intake.spec.pipeline, "sources": list(intake.fields)})

    return Starlette(routes=[Route("/push", push, methods=["POST"]), Route("/readyz", ready)])


def main(pipeline: str, store: str, port: str) -> None:
    """Listens on loopback until it is stopped."""
    home = open_home()
    release = champion(home, pipeline)
    if release is None:
        raise MillraceError(f"{pipeline} has no champion: type `millrace run {pipeline}`")
    offset = int(os.environ.get("MILLRACE_CLOCK_OFFSET_US", "0"))
    intake = Intake(home, bento_spec(home, release), store, offset)
    uvicorn.run(app(intake), host="127.0.0.1", port=int(port), log_level="warning", limit_concurrency=1_000)


if __name__ == "__main__":
    main(*sys.argv[1:])
