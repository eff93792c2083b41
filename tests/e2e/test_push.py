"""Events pushed to a live endpoint: served at once, once each, also after a kill; training and the skew check see them."""

import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from deploy.admin import Intake, app
from deploy.keys import keys_file, make_key
from deploy.predictions import as_json
from deploy.process import call, running
from deploy.rollout import Release, feed_all, promote, served_stores, take_in
from deploy.skew import check_skew
from features.cells import open_cells
from flows.serving import admin_name
from pipelines.clock import MISSING, Anchor
from pipelines.home import Home
from pipelines.predlog import read_log
from tests.command import millrace
from tests.e2e.buses import EVERY, NOW, Buses, trip_at

HOUR_US = 3_600_000_000
COUNT = "line_late_1h__count"


@dataclass
class Live:
    """An endpoint that is served by the command line, an hour after its store was fed."""

    home: Home
    yaml: str
    url: str = ""
    admin: str = ""

    def serve(self) -> None:
        sets = ("clock.offset=1h",)
        done = millrace(self.home.root, "serve", self.yaml, "--background", "--port", "0", "--json", sets=sets)
        assert done.code == 0, done.err
        self.url, self.admin = done.answer["url"], done.answer["admin"]

    def push(self, *events: dict[str, Any]) -> tuple[int, Any]:
        deadline = time.monotonic() + 60
        while True:
            try:
                return call(f"{self.admin}/push", {"events": list(events)})
            except OSError:  # it is starting up
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def ask(self, *trips: int) -> Any:
        rows = [trip_at(NOW + i * EVERY) for i in trips]
        status, answer = call(f"{self.url}/predict", {"rows": rows})
        assert status == 200, answer
        return answer["rows"]


def departure(minute: int, trip: int) -> dict[str, Any]:
    """A departure of a trip that nobody announced."""
    row = {"line": f"L{trip % 4}", "day": f"{NOW:%Y-%m-%d}T00:00:00Z", "trip": 90_000 + trip,
           "at": f"{NOW + timedelta(minutes=minute):%Y-%m-%dT%H:%M:%SZ}", "late": float(trip % 9)}  # fmt: skip
    return {"id": f"left-{minute}-{trip}", "source": "departures", "row": row}


@contextmanager
def served(buses: Buses, root: Path) -> Iterator[Live]:
    home = Home(root / "home")
    shutil.copytree(buses.home.root, home.root, ignore=shutil.ignore_patterns("predictions", "releases", "runs", "copies"))
    release = Release(buses.bento.tag, buses.bento.path, "made", buses.snapshot.digest, buses.snapshot.watermark_us,
                      buses.features.defs_digest, "", (), MISSING)  # fmt: skip
    promote(home, "buses", release, expected="", why="test")
    one = Live(home, str(buses.home.root.parent / "buses.yaml"))
    one.serve()
    yield one
    assert f"buses on port {one.url.rpartition(':')[2]}" in millrace(home.root, "down", "buses", "--json").answer["stopped"]
    with pytest.raises(OSError):
        call(f"{one.url}/info", timeout=2)


@pytest.fixture
def live(buses: Buses, tmp_path: Path) -> Iterator[Live]:
    with served(buses, tmp_path) as one:
        yield one


@pytest.fixture(scope="module")
def shared(buses: Buses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """For tests that look at no event of another."""
    with served(buses, tmp_path_factory.mktemp("shared")) as one:
        yield one


def test_events_are_served_at_once_each_once_and_the_skew_check_holds(live: Live, buses: Buses) -> None:
    soon = list(range(11, 20))
    before = live.ask(*soon)
    events = [departure(minute, trip) for minute in (5, 20, 50) for trip in range(8)]
    status, receipt = live.push(*events[:16])
    assert (status, receipt) == (200, {"taken": 16, "again": 0, "last": 16})
    after = live.ask(*soon)
    assert [row["probability"] for row in after] != [row["probability"] for row in before]
    status, receipt = live.push(*events)
    assert (status, receipt) == (200, {"taken": 8, "again": 16, "last": 24})
    live.ask(*soon)
    info = call(f"{live.url}/info")[1]
    assert info["freshness_s"]["line_late"] == 600  # known at ten to one

    admin = running(live.home, admin_name("buses"))
    assert admin is not None
    os.kill(admin.pid, signal.SIGKILL)
    live.serve()  # the endpoint goes on, the admin process is started again
    assert live.push(*events) == (200, {"taken": 0, "again": 24, "last": 24})

    found = check_skew(live.home, "buses")
    assert (found.skewed_cells, found.unchecked, found.answers) == (0, {}, 3 * len(soon))
    assert found.late_cells  # what was answered before a push knew less than is known of that instant now

    snapshot = take_in(buses.spec, live.home)
    assert snapshot.rows["departures"] == buses.snapshot.rows["departures"] + len(events)
    same = live.ask(*soon)
    with urllib.request.urlopen(f"{live.url}/metrics", timeout=10) as answer:
        numbers = answer.read().decode()
    assert 'millrace_view_freshness_seconds{view="line_late"} 600.0\n' in numbers and "millrace_pushed_events 24\n" in numbers
    assert feed_all(live.home, "buses", snapshot, Anchor(buses.snapshot.watermark_us + HOUR_US // 2, 0), None)
    ((_, _, store),) = served_stores(live.home, "buses", "")
    assert open_cells(store).meta()["snapshot"] == snapshot.digest
    assert take_in(buses.spec, live.home).digest == snapshot.digest
    assert live.ask(*soon)[0].keys() == same[0].keys()
    assert live.push(*events)[1] == {"taken": 0, "again": 24, "last": 24}
    found = check_skew(live.home, "buses")
    assert (found.skewed_cells, found.unchecked) == (0, {})


def test_what_is_not_an_event_is_refused(shared: Live) -> None:
    good = departure(5, 1)
    wrong = {
        "is from the future": departure(61, 1),
        "source is not one of": {**good, "source": "arrivals"},
        "is not an event": {"id": "x"},
        "row.late is text": {**good, "row": {**good["row"], "late": "much"}},
        "unknown field": {**good, "row": {**good["row"], "colour": 1}},
        "breaks a rule of its source (nulls: line)": {**good, "row": {**good["row"], "line": None}},
    }
    for words, event in wrong.items():
        status, answer = shared.push(good, event)
        assert status == 422 and words in answer["error"], answer
    assert call(f"{shared.admin}/push", {"rows": []})[0] == 422
    assert shared.push(good)[1]["taken"] == 1
    status, answer = shared.push({**good, "id": "other", "row": {**good["row"], "late": 99.0}})
    assert status == 422 and "a correction needs a later known-at" in answer["error"]


def test_what_a_running_endpoint_has_not_written_yet_is_erased_too(shared: Live, buses: Buses) -> None:
    keys = {**trip_at(NOW + 12 * EVERY)}
    asked = [argument for name, value in keys.items() for argument in ("--key", f"{name}={value}")]
    answers = shared.ask(11, 12, 13)
    done = millrace(shared.home.root, "erase", shared.yaml, *asked, "--json")
    assert done.code == 0, done.err
    assert read_log(shared.home.predictions("buses"))["key"].to_pylist() == [as_json(answers[i]["key"]) for i in (0, 2)]
    assert shared.ask(11)[0]["probability"] == answers[0]["probability"]
    assert shared.ask(12)[0]["unknown_entity"]
    assert shared.push(departure(5, 2))[1]["taken"] == 1
    assert shared.ask(12)[0]["unknown_entity"]


def test_neither_a_web_page_nor_one_without_a_key_may_push(buses: Buses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of any site can send to a port of this machine; a browser says from where, and by which name it was found."""
    home = Home(tmp_path)
    key = make_key(keys_file(home.root, "buses"), "ann")
    monkeypatch.setenv("MILLRACE_RULES", '{"api_keys": true}')
    asked = TestClient(app(Intake(home, buses.spec, str(tmp_path / "store"), 0)), "http://127.0.0.1:1")
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        refused = asked.post("/push", json={"events": []}, headers={**headers, "X-API-Key": key})
        assert refused.status_code == 403 and "not taken from web pages" in refused.json()["error"]
    assert asked.post("/push", json={"events": []}).status_code == 401
    assert asked.post("/push", json={"events": []}, headers={"X-API-Key": "mr_guess"}).status_code == 401
    assert asked.post("/push", json={"events": []}, headers={"X-API-Key": key}).json()["error"].startswith("0 events; send 1 to")
