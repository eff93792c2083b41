"""`python -m bench.fuzz`: what an endpoint makes of requests that no client of good will sends.

A live endpoint of the buses of the tests, over real sockets: schemathesis by its OpenAPI document, and a grammar of our own that
knows HTTP as well: broken and doubled JSON, numbers beyond all, deep and huge values, bytes that are no UTF-8, odd methods, paths
and headers, wrong lengths and chunks, pipelines, connections that are half closed, cut or slow, and thousands of keys at once.

Figures: `requests`; `server_errors` (a status from 500 on; 503 with a sentence is documented); `leaks` (a body that shows a
trace, path or address; a file, thread or 20 MB of memory more than after the first half); `no_answer` (the connection ended
without one, where the request was whole); `schema_findings` (what schemathesis says of answers that are not as documented);
`rss_growth_mb`; `alive`: a good request gets the same answer as before. `statuses` by kind are in the rows.
"""

import asyncio
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from bench.fuzz_grammar import GOOD, KINDS, WHOLE, right
from bench.record import options, report
from deploy.process import Service, call, free_port, start, stop
from tests.e2e.buses import make_buses

SHOWN = re.compile(rb"Traceback|File \"|site-packages|\.py\b|line \d+, in |0x[0-9a-f]{6,}|/(tmp|work|home|usr|root)/")
AT_ONCE, MOST = 8, 2**24  # connections, and bytes of an answer


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
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MOST)
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
                body = await asyncio.wait_for(reader.read(MOST), 1)
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
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-n", str(examples), "--seed", "7",
               "--no-color", "-c", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure",
               "--suppress-health-check", "all"]  # fmt: skip
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
            fuzz, row = Fuzz(service.port, 7), {"rows": [GOOD["/predict"]]}
            document = call(f"{service.url}/openapi.json")[1]["components"]["schemas"]
            GOOD["/predict_features"] = document["AskedFeatures"]["examples"][0]["rows"][0]
            before = call(f"{service.url}/predict", row)[1]["rows"]
            asyncio.run(fuzz.run(count // 2))
            first = held(service)
            asyncio.run(fuzz.run(count - count // 2))
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
        "requests": fuzz.sent + tested, "server_errors": len(fuzz.errors) + sum("erver error" in f for f in findings),
        "leaks": leaks, "by_schemathesis": tested, "schema_findings": len(findings), "no_answer": fuzz.unanswered,
        "exceptions_logged": len(traces), "files_growth": grown["files"], "threads_growth": grown["threads"],
        "rss_growth_mb": round(grown["mb"], 1), "alive": alive, "slow_clients": dict(late),
        "not_installed": [] if find_spec("schemathesis") else ["schemathesis"],
    }  # fmt: skip
    rows: list[dict[str, Any]] = [{"kind": kind, **{str(status): n for status, n in sorted(found.items())}}
                                  for kind, found in sorted(fuzz.statuses.items())]  # fmt: skip
    rows += [{"finding": text} for text in (*fuzz.errors[:20], *fuzz.shown[:20], *findings[:20], *traces[:20])]
    report("fuzz", figures, rows, told.json, "bentoml", "starlette", "uvicorn", "schemathesis")


if __name__ == "__main__":
    main()
