"""What stands between a request and its answer: its body, key, rate and place in the queue; its line in log and metrics.

All refusals are one sentence in JSON. A request is named by a random id (`X-Request-Id`, the answer's `request_id`, the
prediction log); a W3C `traceparent` that comes with it is passed on with a span of ours.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import secrets
import sys
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.keys import REFUSED, Keys, keys_file
from deploy.lean import READ_S, Door, has_come, tied
from deploy.meter import Meter
from deploy.requests import MAX_BYTES, BadRequest
from pipelines.clock import iso, wall_us
from pipelines.errors import MillraceError
from pipelines.spec import Spec

log, access = logging.getLogger("millrace.service"), logging.getLogger("millrace.access")
GONE = 499  # in log and metrics: the client did not wait for its answer
PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")
ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
PAGE = Path(__file__).with_name("page.html")


@dataclass(slots=True)
class Visit:
    """One request on its way: its id, what follows the `?`, who sent it, and its trace."""

    id: str
    query: str = ""
    who: str = ""
    trace: str = ""
    flags: str = ""
    seconds: float = 0.0  # of the worker's time that it has taken

    @classmethod
    def of(cls, scope: Scope) -> "Visit":
        visit = cls(secrets.token_hex(16), scope["query_string"].decode("latin-1"))
        if (sent := header(scope, b"traceparent")) and (found := PARENT.fullmatch(sent.strip())):
            visit.trace, visit.flags = found.groups()
        return visit

    @property
    def headers(self) -> dict[str, str]:
        """What goes back with the answer."""
        found = {"X-Request-Id": self.id}
        if self.trace:
            found["traceparent"] = f"00-{self.trace}-{secrets.token_hex(8)}-{self.flags}"
        return found


class Front:
    """The rules by which an endpoint lets requests in, and what it notes of them."""

    def __init__(self, spec: Spec, root: Path, meter: Meter, door: Door, release: str) -> None:
        self.spec = spec.serve.model_copy(update=json.loads(os.environ.get("MILLRACE_RULES", "{}")))
        self.meter, self.door, self.release = meter, door, release
        self.keys = Keys(keys_file(root, spec.pipeline), os.environ.get("MILLRACE_API_KEYS", ""), wanted=self.spec.api_keys)
        if os.environ.get("MILLRACE_PREFLIGHT"):  # on loopback, before it is released
            self.keys.wanted = False
        self.slow_s = self.spec.latency_budget / 1e6
        if not access.handlers and self.spec.access_log != "off":
            access.addHandler(logging.StreamHandler(sys.stderr))
            access.propagate, access.level = False, logging.INFO

    def admit(self, scope: Scope, visit: Visit) -> None:
        """Raises BadRequest for one without a key, or that comes too soon after those before it."""
        client = (scope.get("client") or ("",))[0]
        if self.keys.wanted:
            who = self.keys.who(Headers(scope=scope))
            if who is None:
                raise BadRequest(401, REFUSED)
            visit.who, client = who, f"key {who}"
        rate = self.spec.rate_limit
        if rate and (wait := self.meter.delay(client, rate, max(1.0, rate))):
            raise BadRequest(429, f"more than {rate:g} requests a second; come again in {wait:.3g} s", wait_s=math.ceil(wait))

    def note(self, visit: Visit, route: str, status: int, began: float) -> None:
        """Counts an answer, and logs it where the spec wants it."""
        took, wanted = time.perf_counter() - began, self.spec.access_log
        self.meter.answered(route, status)
        self.meter.took("whole", took)
        if wanted == "all" or (wanted == "slow" and (status >= 500 or took > self.slow_s)):
            line = {"time": iso(wall_us()), "request_id": visit.id, "trace_id": visit.trace or visit.id, "route": f"/{route}",
                    "status": status, "ms": round(took * 1e3, 3), "release": self.release}  # fmt: skip
            access.info("%s", json.dumps({**line, "key": visit.who} if visit.who else line))


class Straight:
    """Answers what is asked most before anything is routed: a dozen layers of two frameworks cost as much as its checks. All
    else is for `app`. An answer whose client has cut the connection goes unheard: uvloop makes an error of it."""

    def __init__(self, app: ASGIApp, posts: Mapping[str, ASGIApp]) -> None:
        self.app, self.posts = app, posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            tied()
        post = self.posts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        try:
            await (post or self.app)(scope, receive, send)
        except RuntimeError as error:
            if "the handler is closed" not in str(error):
                raise


# It lets others in before it computes, so that all who have come are counted, and leaves in `Visit.seconds` how long it computed
Answer = Callable[[bytes, Visit], Awaitable[dict[str, Any]]]


async def answered(front: Front, scope: Scope, receive: Receive, answer: Answer, route: str) -> Response:
    """The answer to a request, or why there is none."""
    began, visit = time.perf_counter(), Visit.of(scope)
    try:
        response = await _answered(front, scope, receive, answer, visit, began)
    except BadRequest as error:
        response = refusal(error, visit.headers)
    except ClientDisconnect:
        response = Response(status_code=GONE)
    except MillraceError as error:  # such as a served store that another version has fed
        response = refusal(BadRequest(503, str(error)), visit.headers)
    except Exception:
        log.exception("request %s", visit.id)
        response = refusal(BadRequest(500, f"there is no answer; the log of the endpoint says why, at {visit.id}"), visit.headers)
    front.note(visit, route, response.status_code, began)
    return response


async def _answered(front: Front, scope: Scope, receive: Receive, answer: Answer, visit: Visit, began: float) -> Response:
    front.admit(scope, visit)
    body, door = await read(scope, receive), front.door
    front.meter.took("read", time.perf_counter() - began)
    if door.full():
        said = f"{door.waiting()} requests are waiting, which is all that are answered in time; come again in a second"
        raise BadRequest(429, said)
    with door.entered():
        start = time.perf_counter()
        found = await answer(body, visit)
        door.took(visit.seconds or time.perf_counter() - start)
    return Response(ENCODE(found), 200, visit.headers, "application/json")


async def read(scope: Scope, receive: Receive) -> bytes:
    """Raises BadRequest for a body that is too large, or does not come."""
    length = header(scope, b"content-length")
    if length and not length.isdecimal():
        raise BadRequest(400, "Content-Length is not a number")
    if length and int(length) > MAX_BYTES:
        raise BadRequest(413, f"the body has {int(length):,} bytes; at most {MAX_BYTES:,} are taken")
    body = bytearray()
    try:
        async with nullcontext() if has_come(receive) else asyncio.timeout(READ_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BYTES:
                    raise BadRequest(413, f"the body is larger than {MAX_BYTES:,} bytes: send fewer rows")
    except TimeoutError:
        raise BadRequest(408, f"{len(body):,} bytes of the body came within {READ_S:g} s; send it at once") from None
    return bytes(body)


def header(scope: Scope, name: bytes) -> str:
    """A header of a request by its name in lower case; the first, where there are more; empty where there is none."""
    for known, value in scope["headers"]:
        if known == name:
            return str(value, "latin-1")
    return ""


async def http_error(request: Request, error: Exception) -> Response:
    """A wrong method, as a sentence too."""
    assert isinstance(error, HTTPException)
    allowed = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "")
    wanted = " or ".join(sorted(set(allowed.split(", ")) - {"HEAD"}))
    message = f"{request.method} is not answered here; send {wanted} {request.url.path}"
    return refusal(BadRequest(error.status_code, message), error.headers or {})


def refusal(error: BadRequest, headers: Mapping[str, str]) -> Response:
    """JSON in ASCII: a message may quote what is not valid text."""
    details = dict(error.details)
    more = {"Retry-After": str(details.pop("wait_s", 1))} if error.status in (429, 503) else {}
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps({"error": error.message, **details}), error.status, {**headers, **more}, "application/json")


def page() -> Response:
    """The playground and the documentation: one page that asks nobody but this endpoint. Its one script is named by its hash."""
    text = PAGE.read_text(encoding="utf-8")
    script = hashlib.sha256(text.partition("<script>")[2].partition("</script>")[0].encode()).digest()
    rules = ("default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
             f"form-action 'none'; frame-ancestors 'none'; script-src 'sha256-{b64encode(script).decode()}'")  # fmt: skip
    return Response(text, 200, {"Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff"}, "text/html")
