"""`python -m bench.fuzz`: what an endpoint makes of requests that no client of good will sends.

A live endpoint of the buses of the tests, over real sockets: schemathesis by its OpenAPI document, and a grammar of our own that
knows HTTP as well: broken and doubled JSON, numbers beyond all, deep and huge values, bytes that are no UTF-8, odd methods, paths
and headers, wrong lengths and chunks, pipelines, connections that are half closed, cut or slow, and thousands of keys at once.

Figures: `requests`; `server_errors` (a status from 500 on; 503 with a sentence is documented); `leaks` (a body that shows a trace,
a path or an address; a file, thread or 20 MB of memory more than after the first quarter); `no_answer` (the connection ended
without one, where the request was whole); `schema_findings` (what schemathesis says of answers that are not as documented);
`rss_growth_mb`; `alive`: a good request gets the same answer as before. `statuses` by kind are in the rows.
"""

import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from bench.record import options, report
from deploy.process import Service, call, free_port, start, stop
from tests.e2e.buses import EVERY, NOW, make_buses, trip_at

ROUTES = ("/predict", "/predict_features")
PAGES = ("/", "/docs", "/openapi.json", "/docs.json", "/info", "/metrics", "/livez", "/readyz", "/healthz", "/schema.json")
SHOWN = re.compile(rb"Traceback|File \"|site-packages|\.py\b|line \d+, in |0x[0-9a-f]{6,}|/(tmp|work|home|usr|root)/")
AT_ONCE, LINES = 8, 400_000
ODD: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1.5, -0.0, 1e300, -1e300, 5e-324, "", " ", "x" * 999, "x" * 1001,
    "\x00", "\x1f", "\ud800", "😀", "\u202e", "' OR 1=1 --", "{{7*7}}", "../../etc/passwd", "<script>", [], {}, [[]], {"a": 1}, "NaN",
    "2024-05-06", "2024-05-06T12:00:00Z", "2024-02-30T00:00:00Z", "0001-01-01T00:00Z", "9999-12-31T23:59:59.999999-23:59",
    "2024-05-06T12:00:60Z", "1e999", "0x10", "١٢", "5002",
]  # fmt: skip
Kind = Callable[[random.Random], bytes]


class Row:
    """Good rows of the two routes, to be spoilt."""

    by_key = {**trip_at(NOW + 2 * EVERY)}
    features: dict[str, Any] = {"line": "L1", "length": 4.5}


def good(draw: random.Random, route: str) -> dict[str, Any]:
    return dict(Row.by_key if route == "/predict" else Row.features)


def http(route: str, body: bytes, *headers: bytes, method: bytes = b"POST", length: bool = True) -> bytes:
    lines = [method + b" " + route.encode() + b" HTTP/1.1", b"Host: x", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def posted(draw: random.Random, body: bytes) -> bytes:
    return http(draw.choice(ROUTES), body, b"Content-Type: application/json")


def damaged(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    body = bytearray(json.dumps({"rows": [good(draw, route)] * draw.randrange(1, 4), "explain": True}).encode())
    for _ in range(draw.randrange(1, 8)):
        at = draw.randrange(len(body) or 1)
        body[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
    return http(route, bytes(body))


def odd_values(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    row = {name: draw.choice(ODD) if draw.random() < 0.5 else value for name, value in good(draw, route).items()}
    if draw.random() < 0.2:
        row[str(draw.choice(ODD))[:2_000]] = draw.choice(ODD)
    return http(route, json.dumps({"rows": [row], **({"explain": draw.choice(ODD)} if draw.random() < 0.3 else {})}).encode())


def numbers(draw: random.Random) -> bytes:
    text = draw.choice(["NaN", "-Infinity", "1e999", "-1e999", "9" * draw.choice((20, 400, 5_000)), "1." + "0" * 5_000, "1e-99999", "-", "01",
                        "+1", ".5", "1.", "0x1F", "1_000", "1e", "--1", "9223372036854775807", "-9223372036854775808"])  # fmt: skip
    return http(draw.choice(ROUTES), b'{"rows": [{"line": "L1", "trip": %s, "length": %s}]}' % (text.encode(), text.encode()))


def nested(draw: random.Random) -> bytes:
    depth, (opens, closes) = draw.choice((10, 500, 990, 5_000, 50_000)), draw.choice(((b"[", b"]"), (b'{"rows":[', b"]}"), (b'{"a":', b"}")))
    inside = opens * depth + b"1" + closes * draw.choice((depth, 0))
    return posted(draw, inside if draw.random() < 0.5 else b'{"rows": [{"line": ' + inside + b"}]}")


def huge(draw: random.Random) -> bytes:
    size = draw.choice((10_000, 200_000, 3_999_000, 4_000_001))
    body = draw.choice((b'{"rows": [{"line": "%s"}]}' % (b"x" * size), b'{"rows": [%s]}' % b",".join([b"{}"] * (size // 3)), b" " * size))
    return posted(draw, body)


def doubled(draw: random.Random) -> bytes:
    return posted(draw, draw.choice((
        b'{"rows": [{}], "rows": [{}]}', b'{"rows": [{"line": "L1", "line": "L2"}]}', b'{"rows": [{"line": "L1"}], "explain": 1, "explain": 2}',
        b'{"rows": [{"li\\u006ee": "L1", "line": "L1"}]}', b'{"__proto__": {}, "rows": [{}]}')))  # fmt: skip


def no_utf8(draw: random.Random) -> bytes:
    text = json.dumps({"rows": [good(draw, "/predict")]})
    return posted(draw, draw.choice((text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + text.encode(), draw.randbytes(200),
                                     text.replace("L", "\\ud83d").encode(), text.encode().replace(b"L", b"\xff\xfe"))))  # fmt: skip


def methods(draw: random.Random) -> bytes:
    method = draw.choice((b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"POST", b"CONNECT", b"FOO", b"get", b"P\x00ST"))
    return http(draw.choice((*ROUTES, *PAGES)), b"{}", method=method)


def paths(draw: random.Random) -> bytes:
    path = draw.choice(("/predict/", "//predict", "/predict%00", "/..%2f..%2fetc/passwd", "/../../etc/passwd", "/%ff%fe", "/predict;x=1", "*",
                        "/static_content/../../x", "/static_content/", "/assets/x", "/predict?" + "a" * 3_000, "/" + "a" * 50_000, "/preflight/features",
                        "/predict?explain=" + draw.choice(("1", "true", "-1", "9" * 400, "%00", "%ff", "1&explain=2", "")), "/predict?" + "&" * 500,
                        "/predict?x[]=1&y=%zz", "http://evil/predict", "/push", "/admin", "/predict#x"))  # fmt: skip
    return http(path, json.dumps({"rows": [good(draw, "/predict")]}).encode(), method=draw.choice((b"POST", b"GET")))


def headers(draw: random.Random) -> bytes:
    odd = draw.choice((
        [b"Content-Type: application/vnd.bentoml+pickle"], [b"Content-Encoding: gzip"], [b"Content-Type: multipart/form-data; boundary=x"],
        [b"traceparent: " + draw.randbytes(20).hex().encode()], [b"traceparent: 00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01"],
        [b"Authorization: Bearer " + b"x" * 5_000], [b"X-API-Key: \xff\xfe"], [b"X-Forwarded-For: " + b"1.2.3.4, " * 500], [b"X: " + b"y" * 70_000],
        [b"A%d: b" % i for i in range(300)], [b"Expect: 100-continue"], [b"Bad Header: x"], [b": x"], [b"X\x00: y"], [b"X: a\r\n b"],
        [b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13"], [b"Upgrade: h2c"],
        [b"Accept: */*;q=nan"], [b"Host: y"], [b"Range: bytes=0-1"], [b"If-None-Match: *"], [b"Cookie: " + b"a=b; " * 1_000],
        [b"X-Request-Id: " + b"z" * 2_000]))  # fmt: skip
    return http(draw.choice((*ROUTES, *PAGES[:6])), json.dumps({"rows": [good(draw, "/predict")]}).encode(), *odd,
                method=draw.choice((b"POST", b"GET")))  # fmt: skip


def lengths(draw: random.Random) -> bytes:
    body = json.dumps({"rows": [good(draw, "/predict")]}).encode()
    length = draw.choice((b"-1", b"abc", b"", b"0", b"+5", b"1e3", b"99999999999999999999", b"5, 5", b"5 5", b"%d" % (len(body) - 3), b"0x10"))
    more = draw.choice(([], [b"Content-Length: 3"], [b"Transfer-Encoding: chunked"]))
    return http("/predict", body, b"Content-Length: " + length, *more, length=False)


def chunked(draw: random.Random) -> bytes:
    body = json.dumps({"rows": [good(draw, "/predict")]}).encode()
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    whole = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    end = draw.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"zz\r\n", b"-1\r\n\r\n", b"0;a=b\r\n\r\n", b"ffffffffffffffff1\r\n"))
    return http("/predict", whole + end, b"Transfer-Encoding: " + draw.choice((b"chunked", b"chunked", b"gzip, chunked", b"Chunked")), length=False)


def many(draw: random.Random) -> bytes:
    rows = [good(draw, "/predict")] * draw.choice((0, 20, 21, 200, 1_001, 10_000))
    return http("/predict", json.dumps({"rows": rows, "explain": draw.random() < 0.3}).encode())


def right(draw: random.Random) -> bytes:
    route = draw.choice(ROUTES)
    return http(route, json.dumps({"rows": [good(draw, route)], "explain": draw.random() < 0.2}).encode())


def pages(draw: random.Random) -> bytes:
    return http(draw.choice(PAGES), b"", method=b"GET", length=False)


def noise(draw: random.Random) -> bytes:
    return draw.choice((draw.randbytes(300), b"\x16\x03\x01\x02\x00\x01\x00" + draw.randbytes(100), b"GET\r\n\r\n", b"\r\n" * 50, b"POST /predict HTTP/9.9\r\n\r\n",
                        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /predict HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")) + b"\r\n\r\n"  # fmt: skip


KINDS: dict[str, tuple[Kind, int]] = {  # and how often
    "damaged": (damaged, 20), "odd values": (odd_values, 20), "numbers": (numbers, 8), "nested": (nested, 4), "huge": (huge, 1),
    "doubled": (doubled, 3), "no UTF-8": (no_utf8, 5), "methods": (methods, 5), "paths": (paths, 6), "headers": (headers, 8), "lengths": (lengths, 5),
    "chunked": (chunked, 5), "many": (many, 1), "right": (right, 8), "pages": (pages, 4), "noise": (noise, 3),
}  # fmt: skip
WHOLE = ("damaged", "odd values", "numbers", "nested", "huge", "doubled", "no UTF-8", "many", "right", "pages")  # each has an answer


class Fuzz:
    """Sends to one endpoint and notes what comes back."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.draw = port, random.Random(seed)
        self.statuses: dict[str, Counter[int]] = {}
        self.errors: list[str] = []
        self.shown: list[str] = []
        self.sent = self.unanswered = 0

    async def one(self, kind: str, draw: random.Random, how: str) -> None:
        """One connection: a request, or several in a pipeline; slowly, cut off or half closed where `how` says so."""
        make = KINDS[kind][0]
        requests = [make(draw) for _ in range(draw.randrange(2, 6) if how == "pipelined" else 1)]
        self.sent += len(requests)
        data = b"".join(requests)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        try:
            if how == "cut":
                writer.write(data[: draw.randrange(len(data) + 1)])
                await asyncio.sleep(draw.random() * 0.02)
                writer.transport.abort()
                return
            if how == "slow":
                for i in range(0, min(len(data), 2_000), 200):
                    writer.write(data[i : i + 200])
                    await asyncio.sleep(0.01)
                writer.write(data[2_000:])
            else:
                writer.write(data)
            if how == "half closed" and writer.can_write_eof():
                writer.write_eof()
            for number, request in enumerate(requests):
                status = await self._answer(reader, kind, request, number)
                if status is None:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.statuses.setdefault(kind, Counter())[0] += 1
            self.unanswered += kind in WHOLE and how in ("", "slow")
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, kind: str, request: bytes, number: int) -> int | None:
        """Status of the next answer; None where no more will come."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.4 if kind not in WHOLE else 30)
            while head.startswith(b"HTTP/1.1 100"):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            status, low = int(head.split()[1]), head.lower()
            length = re.search(rb"content-length: *(\d+)", low)
            if status in (204, 304) or request.startswith(b"HEAD"):
                body = b""
            elif length:
                body = await asyncio.wait_for(reader.readexactly(int(length[1])), 30)
            else:
                body = await asyncio.wait_for(reader.read(LINES), 1)
        except TimeoutError:
            self.statuses.setdefault(kind, Counter())[0] += 1  # it waits for what was announced and did not come
            self.unanswered += kind in WHOLE
            return None
        self.statuses.setdefault(kind, Counter())[status] += 1
        if status >= 500 and not (status == 503 and body.startswith(b'{"error"')):
            self.errors.append(f"{status} {request[:300]!r} → {body[:200]!r}")
        if not request.startswith((b"GET / ", b"GET /docs ")) and (found := SHOWN.search(body)):
            self.shown.append(f"{found[0]!r} {request[:300]!r} → {body[max(0, found.start() - 80) : found.end() + 80]!r}")
        return None if b"connection: close" in low else status

    async def run(self, count: int) -> None:
        """At least `count` requests."""
        names, weights = [*KINDS], [often for _, often in KINDS.values()]
        until = self.sent + count

        async def worker(draw: random.Random) -> None:
            while self.sent < until:
                how = draw.choices(("", "slow", "cut", "half closed", "pipelined"), (84, 1, 5, 5, 5))[0]
                await self.one(draw.choices(names, weights)[0], draw, how)

        await asyncio.gather(*(worker(random.Random(self.draw.random())) for _ in range(AT_ONCE)))

    async def slowloris(self, count: int) -> Counter[int]:
        """Clients that send half of a request and then nothing; they are let go."""

        async def wait() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(right(random.Random(1))[:-10])
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            writer.close()
            return int(head.split()[1])

        self.sent += count
        return Counter(await asyncio.gather(*(wait() for _ in range(count))))


def held(service: Service) -> dict[str, float]:
    """Files, threads and MB of the endpoint's processes, once its connections have ended."""
    time.sleep(6)  # idle connections are closed after 5 s
    family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
    return {"files": sum(p.num_fds() for p in family), "threads": sum(p.num_threads() for p in family),
            "mb": sum(p.memory_info().rss for p in family) / 2**20}  # fmt: skip


def by_schema(url: str, examples: int) -> tuple[int, list[str]]:
    """Requests of schemathesis, and what it found. A whole number that is written `5.0` is no integer here, which JSON schema
    cannot say: that valid data are accepted is not asked of it."""
    checks = "all"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-n", str(examples), "--seed", "7", "--no-color", "-c", checks,
               "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--workers", "1", "--suppress-health-check", "all"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1_800)
    tested = re.search(r"([\d,]+) generated", done.stdout)
    if tested is None:
        raise RuntimeError((done.stdout + done.stderr)[-2_000:])
    return int(tested[1].replace(",", "")), re.findall(r"^- (.+)$", done.stdout, re.MULTILINE)


def main() -> None:
    """Sends and reports."""
    told = options("fuzz")
    count, examples, slow = (2_000, 10, 20) if told.quick else (20_000, 400, 200)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        buses = make_buses(work)
        log = work / "endpoint.log"
        service = start(buses.home, buses.folder, port=free_port(), release=buses.bento.tag, log=log, extra={})
        try:
            fuzz, row = Fuzz(service.port, 7), {"rows": [Row.by_key]}
            document = call(f"{service.url}/openapi.json")[1]["components"]["schemas"]
            Row.features = document["AskedFeatures"]["examples"][0]["rows"][0]
            before = call(f"{service.url}/predict", row)[1]["rows"]
            asyncio.run(fuzz.run(count // 4))
            first = held(service)
            asyncio.run(fuzz.run(count - count // 4))
            late = asyncio.run(fuzz.slowloris(slow))
            tested, findings = by_schema(service.url, examples) if find_spec("schemathesis") else (0, [])
            last = held(service)
            alive = call(f"{service.url}/predict", row)[1]["rows"] == before
        finally:
            stop(service)
        traces = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception).*", log.read_text(), re.MULTILINE)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    grown = {name: last[name] - first[name] for name in first}
    leaks = len(fuzz.shown) + (grown["files"] > 0) + (grown["threads"] > 0) + (grown["mb"] > 20)
    figures = {
        "requests": fuzz.sent + tested, "server_errors": len(fuzz.errors) + sum("erver error" in f for f in findings), "leaks": leaks,
        "by_schemathesis": tested, "schema_findings": len(findings), "no_answer": fuzz.unanswered, "exceptions_logged": len(traces),
        "files_growth": grown["files"], "threads_growth": grown["threads"], "rss_growth_mb": round(grown["mb"], 1), "alive": alive,
        "slow_clients": dict(late), "not_installed": [] if find_spec("schemathesis") else ["schemathesis"],
    }  # fmt: skip
    rows: list[dict[str, Any]] = [{"kind": kind, **{str(s): n for s, n in sorted(found.items())}} for kind, found in sorted(fuzz.statuses.items())]
    rows += [{"finding": text} for text in (*fuzz.errors[:20], *fuzz.shown[:20], *findings[:20], *traces[:20])]
    report("fuzz", figures, rows, told.json, "bentoml", "starlette", "uvicorn", "schemathesis")


if __name__ == "__main__":
    main()
