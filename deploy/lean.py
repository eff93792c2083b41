"""What stands around a request: less of BentoML than it would put there, and what it lacks. Runs in the serving process.

BentoML traces every request, also where nobody listens, keeps a context of each, and cancels none that computes: that costs more
than an answer. Without it a request has to come in time, and no more are let in than are answered within the latency budget.
"""

import ctypes
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from deploy.meter import INSIDE, LIMIT, SHED, Meter

log = logging.getLogger("millrace.service")
AROUND = {"OpenTelemetryMiddleware", "TimeoutMiddleware", "ContextMiddleware"}
READ_S = 10.0  # within which the head of a request must have come, and then its body
CONNECTIONS = 4_000  # of one worker
FEWEST = 16  # requests that are let in at once, however slow they are
SHARE = 0.1  # of the newest request in the mean time of one


def trim() -> None:
    """Takes what costs out of BentoML's application; `MILLRACE_TRACING` keeps its tracing. Another BentoML is left as it is."""
    from _bentoml_impl.server import app

    whole = getattr(getattr(app.ServiceAppFactory, "middlewares", None), "fget", None)
    if whole is None:
        log.warning("this BentoML is not known: requests cost more than they need")
        return
    unwanted = AROUND - ({"OpenTelemetryMiddleware"} if os.environ.get("MILLRACE_TRACING") else set())
    logging.getLogger("uvicorn.access").propagate = False  # the root's level lets nothing through: no line is made for it then
    kept = property(lambda factory: [m for m in whole(factory) if getattr(m.cls, "__name__", "") not in unwanted])
    app.ServiceAppFactory.middlewares = kept


def hurry() -> None:
    """Closes connections whose head of a request has not come `READ_S` after they were made, or after it began: uvicorn waits
    for it without end. More than `CONNECTIONS` at a time are closed at once."""
    from uvicorn.protocols.http import h11_impl

    protocols: list[Any] = [h11_impl.H11Protocol]
    with suppress(ImportError):
        from uvicorn.protocols.http import httptools_impl

        protocols.append(httptools_impl.HttpToolsProtocol)
    for protocol in protocols:
        if not all(hasattr(protocol, name) for name in ("connection_made", "data_received", "timeout_keep_alive_handler")):
            log.warning("this uvicorn is not known: a client that sends nothing is waited for without end")
            continue
        protocol.connection_made = _made(protocol.connection_made)
        protocol.data_received = _received(protocol.data_received)


def joined() -> None:
    """Sends the head of an answer together with its body: uvicorn sends them one after the other, and wakes the client twice."""
    with suppress(ImportError):
        from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as Cycle

        whole: Any = Cycle.send

        async def send(self: Any, message: Any) -> None:
            if not isinstance(self.transport, _Joined):
                self.transport = _Joined(self.transport)
            await whole(self, message)
            if message["type"] != "http.response.start":
                self.transport.flush()

        Cycle.send = send  # type: ignore[method-assign]


class _Joined:
    """A transport that keeps what is written until more comes."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.kept = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        """Keeps the first part (the head), and sends it with the next."""
        if self.kept:
            data, self.kept = self.kept + data, b""
            self.transport.write(data)
        else:
            self.kept = data

    def flush(self) -> None:
        """Sends what is kept: an answer without a body, or the end of one."""
        if self.kept:
            self.transport.write(self.kept)
            self.kept = b""

    def close(self) -> None:
        """As the transport, after what is kept."""
        self.flush()
        self.transport.close()


def tied() -> None:
    """Ends this worker when BentoML's own process is killed: it would answer on for ever, known to nobody. To be called by its
    main thread, with which the kernel would forget it."""
    with suppress(AttributeError, OSError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def has_come(receive: Any) -> bool:
    """Whether the body of a request is there as a whole, so that to read it waits for nobody; False where that is not known."""
    return not getattr(getattr(receive, "__self__", None), "more_body", True)  # uvicorn's


def eager() -> None:
    """Lets uvicorn run on asyncio's own loop: libuv's takes one new connection between two rounds of answers, so that in a flood
    the others wait in the socket for seconds, where `Door` does not see them."""
    from uvicorn import config

    if "auto" not in getattr(config, "LOOP_FACTORIES", {}):
        log.warning("this uvicorn is not known: new connections may wait unseen")
        return
    config.LOOP_FACTORIES["auto"] = config.LOOP_FACTORIES["asyncio"]


def _made(whole: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def connection_made(self: Any, transport: Any) -> None:
        whole(self, transport)
        self.head_by = None
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self.timeout_keep_alive_task = self.loop.call_later(READ_S, self.timeout_keep_alive_handler)  # the first byte ends it

    return connection_made


def _received(whole: Callable[[Any, bytes], None]) -> Callable[[Any, bytes], None]:
    def data_received(self: Any, data: bytes) -> None:
        whole(self, data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.head_by = None
        elif not self.transport.is_closing():  # the head goes on: it must be there in time, however often more of it comes
            now = self.loop.time()
            self.head_by = self.head_by or now + READ_S
            self.timeout_keep_alive_task = self.loop.call_later(self.head_by - now, self.timeout_keep_alive_handler)

    return data_received


class Door:
    """Lets in as many requests as are answered within a budget (s): those who would wait longer are told to come again.

    A worker answers one at a time, so its own queue is bounded by its own mean time; all workers together let in no more than
    their cores answer, and where answers are slow `FEWEST` is of all of them. What they have let in stands in `meter`: two that
    look in the same microsecond may let one more in.
    """

    def __init__(self, budget_s: float, meter: Meter | None = None) -> None:
        self.budget_s, self.mean_s = budget_s, 0.0
        self.inside = self.shed = self.answered = 0
        self.meter = meter or Meter(None, 1, (), ())  # of this process alone

    @property
    def limit(self) -> int:
        """Requests at a time in this worker, by the mean time of one."""
        return max(FEWEST, int(self.budget_s / self.mean_s)) if self.mean_s else FEWEST

    def of_all(self) -> int:
        """Requests at a time in all workers."""
        workers = self.meter.workers()
        return max(FEWEST, int(self.meter.total(LIMIT) * min(1.0, (os.cpu_count() or 1) / workers)))

    def waiting(self) -> int:
        """Requests that are let in and not answered, of all workers."""
        return int(self.meter.total(INSIDE))

    def full(self) -> bool:
        """Whether one more would wait for too long; it is counted."""
        if self.inside < self.limit and ((let_in := self.waiting()) < FEWEST or let_in < self.of_all()):
            return False
        self.shed += 1
        self.meter.row[SHED] += 1
        return True

    @contextmanager
    def entered(self) -> Iterator[None]:
        self._move(1)
        try:
            yield
        finally:
            self._move(-1)

    def _move(self, step: int) -> None:
        self.inside += step
        self.meter.row[INSIDE] = self.inside

    def took(self, seconds: float) -> None:
        """An answer took so long to compute."""
        self.answered += 1
        self.mean_s += (SHARE if self.mean_s else 1.0) * (seconds - self.mean_s)
        self.meter.row[LIMIT] = self.budget_s / self.mean_s
