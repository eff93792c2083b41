"""An endpoint whose rows lie in Redis: it answers by them, without them while Redis is down, and by them again."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import redis

from deploy.process import call, free_port, start, stop
from features.cells import open_cells
from features.feed import feed
from pipelines.clock import Anchor
from pipelines.errors import MillraceError
from pipelines.home import Home
from tests.command import QUICK, millrace
from tests.e2e.buses import Buses
from tests.e2e.test_endpoint import SOON
from tests.servers import postgres_server, redis_server, valve


@pytest.mark.slow
@pytest.mark.redis
def test_the_endpoint_answers_while_redis_is_down(copied_home: Home) -> None:
    with redis_server() as server:
        sets = (f"serve.store={server.url}",)
        served = millrace(copied_home.root, "serve", "tumours", "--background", "--port", "0", "--json", sets=sets)
        assert served.code == 0, served.err
        try:
            url = served.answer["url"]
            release = next((copied_home.root / "artifacts" / "preflight").glob("*/preflight.json"))
            body = {"rows": [json.loads(release.read_text())["example"]]}
            status, before = call(f"{url}/predict", body)
            assert status == 200 and "store_down" not in before and not before["rows"][0]["unknown_entity"]
            server.kill()
            status, down = call(f"{url}/predict", body)
            assert status == 200 and f"127.0.0.1:{server.port}" in down["store_down"]
            assert down["rows"][0]["unknown_entity"] and 0 < down["rows"][0]["probability"] < 1
            assert call(f"{url}/info")[0] == 200
            server.start()
            status, again = call(f"{url}/predict", body)
            assert status == 200 and again["rows"] == before["rows"] and "store_down" not in again
            redis.Redis.from_url(server.url).client_pause(4_000)  # it answers nobody for so long
            took = []
            for _ in range(5):  # the first waits for it, and the others not
                began = time.monotonic()
                status, slow = call(f"{url}/predict", body)
                took.append(time.monotonic() - began)
                assert status == 200 and "does not answer" in slow["store_down"]
            assert took[0] > 0.9 and max(took) < 3 and max(took[1:]) < took[0] / 2
            deadline = time.monotonic() + 15
            while "store_down" in again or again["rows"] != before["rows"] or time.monotonic() - began < 4:
                status, again = call(f"{url}/predict", body)
                assert status == 200 and time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            millrace(copied_home.root, "down", "tumours")


@pytest.mark.slow
@pytest.mark.redis
def test_a_run_feeds_the_server_that_the_spec_names(copied_home: Home) -> None:
    with redis_server() as server:
        sets = (*QUICK, f"serve.store={server.url}", "serve.threshold=0.3")
        done = millrace(copied_home.root, "run", "tumours", "--json", sets=sets)
        assert done.code == 0 and done.answer["outcome"] == "promoted", done.err
        name = next((copied_home.root / "online" / "tumours").iterdir()).name
        cells = open_cells(f"{server.url}#tumours/{name}")
        assert len(cells.keys("rows")) == 569 and cells.meta()["data_us"] == "0"
        scored = millrace(copied_home.root, "run", "tumours", "--json", sets=sets)
        assert scored.answer["outcome"] == "unchanged"


@pytest.mark.slow
@pytest.mark.redis
def test_an_endpoint_whose_store_is_down_is_not_ready_and_says_why(buses: Buses, tmp_path: Path) -> None:
    """It lives, refuses what it cannot answer, and is ready by itself when the store is there."""
    with redis_server() as server:
        store = f"{server.url}#buses/{buses.features.defs_digest[:16]}"
        anchor = Anchor(buses.snapshot.watermark_us, 0)
        assert feed(buses.spec, buses.home.root / buses.features.path, store, anchor, buses.snapshot.digest)
        server.kill()
        extra = {"MILLRACE_ONLINE": store, "MILLRACE_PREDICTIONS": str(tmp_path / "log")}
        with pytest.raises(MillraceError, match=f"not ready: the served store at redis://127.0.0.1:{server.port}/0 does not"):
            start(buses.home, buses.folder, port=free_port(), release="x", log=tmp_path / "one.log", extra=extra, wait_s=12)
        port = free_port()
        with ThreadPoolExecutor() as pool:
            coming = pool.submit(start, buses.home, buses.folder, port=port, release="x", log=tmp_path / "two.log", extra=extra)
            url, said = f"http://127.0.0.1:{port}", ""
            while "not ready" not in said:
                with suppress(OSError):
                    status, answer = call(f"{url}/readyz")
                    said = answer["error"]
            assert status == 503 and "does not answer" in said and not coming.done()
            assert call(f"{url}/predict", {"rows": [SOON]})[0] == 503 and urlopen(f"{url}/livez").status == 200
            server.start()
            service = coming.result()
        try:
            assert call(f"{url}/predict", {"rows": [SOON]})[0] == 200
        finally:
            stop(service)


WORKER = """
import asyncio, json, sys, threading, time
import deploy.service as service
from deploy.front import Visit

def told(*what):
    print(json.dumps(what), flush=True)
    sys.stdin.readline()

def asked():
    began = time.monotonic()
    answer = asyncio.run(endpoint.predict(sys.argv[1].encode(), Visit("x")))
    return [time.monotonic() - began, answer.get("store_down", ""), answer["rows"][0]["unknown_entity"]]

worker, warm, turns = service._worker, service.Endpoint.warm, []

def hung(endpoint):
    if not turns:
        told("made")  # and then its store says no more
    turns.append(endpoint)
    warm(endpoint)

service.Endpoint.warm = hung
for _ in range(2):
    worker.make()
logs = [t for t in threading.enumerate() if t.name == "prediction-log"]
told(worker.endpoint is None, worker.why, len({id(e) for e in turns}), len(logs), turns[0].meter.workers())
worker.make()
endpoint = worker.get()
told(endpoint is turns[0], endpoint.meter.awaited(), asked())
answers, endpoint.warmed, began = [asked() for _ in range(4)], -1e9, time.monotonic()
pages = [endpoint.openapi()["openapi"] for _ in range(10)]
told(answers, pages, time.monotonic() - began)
time.sleep(2.1)  # for so long it is left alone
told([asked() for _ in range(2)])
endpoint.log.close()
"""


@pytest.mark.slow
@pytest.mark.postgres
def test_a_worker_whose_store_hangs_is_made_once_and_answers_without_it(buses: Buses, tmp_path: Path) -> None:
    """A Postgres that takes connections and says nothing: before the first row, and later in the midst of answers."""
    with postgres_server() as server, valve(server.port) as line:
        store = f"{server.url.replace(str(server.port), str(line.port))}#buses/{buses.features.defs_digest[:16]}"
        anchor = Anchor(buses.snapshot.watermark_us, 0)
        assert feed(buses.spec, buses.home.root / buses.features.path, store, anchor, buses.snapshot.digest)
        src = buses.folder / "src"
        env = {**os.environ, "PYTHONPATH": str(src), "MILLRACE_HOME": str(buses.home.root), "BENTOML_DO_NOT_TRACK": "True",
               "MILLRACE_ONLINE": store, "MILLRACE_PREDICTIONS": str(tmp_path / "log")}  # fmt: skip
        child = subprocess.Popen([sys.executable, "-c", WORKER, json.dumps({"rows": [SOON]})], cwd=src, env=env, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert child.stdin is not None and child.stdout is not None

        def told() -> list[Any]:
            return list(json.loads(child.stdout.readline()))  # type: ignore[union-attr]

        def go_on() -> None:
            child.stdin.write("\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]

        assert told() == ["made"]
        line.open.clear()
        go_on()
        down, why, made, logs, rows = told()
        assert down and f"127.0.0.1:{line.port}" in why and "does not answer" in why and (made, logs, rows) == (1, 1, 1)
        line.open.set()
        go_on()
        same, awaited, (took, said, unknown) = told()
        assert same and awaited == 0 and took < 1 and (said, unknown) == ("", False)
        line.open.clear()
        go_on()
        answers, pages, described = told()
        assert pages == ["3.1.0"] * 10 and described < 3  # nor for an example, each time anew
        assert all("does not answer" in said and unknown for _, said, unknown in answers)
        assert 0.9 < answers[0][0] < 1.9 and max(took for took, _, _ in answers[1:]) < 0.5  # the others do not wait for it
        line.open.set()
        go_on()
        (answers,) = told()
        assert [(said, unknown) for _, said, unknown in answers] == [("", False)] * 2
        go_on()
        assert child.wait(20) == 0
