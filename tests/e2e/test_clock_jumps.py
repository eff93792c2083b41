"""The wall clock of a serving machine is set an hour forwards and back: nothing that lasts is measured by it, nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.canary import compare
from deploy.guard import Seen
from deploy.lean import FEWEST
from deploy.meter import shared_file
from deploy.monitor import _tidy, monitor
from deploy.predictions import PredictionLog
from deploy.process import Service, call, remember, running
from deploy.rollout import champion, events, promote, rollback, stages_of
from deploy.rollout_page import write_rollout_page
from deploy.runs import list_runs
from deploy.stages import under_way
from features.online import OnlineStore, serve_features
from flows.serving import status_of
from pipelines.clock import begin_s, iso, parse_time, wall_us
from pipelines.home import Home
from pipelines.manifest import write_json
from pipelines.predlog import HOUR_US, complete, read_log
from pipelines.run import accepted, ended_us
from pipelines.spec import ClockSpec, Guard, load_spec
from tests.data.test_predlog import answered, numbers
from tests.e2e.buses import NOW, Buses
from tests.e2e.releases import challenged_by, make_release
from tests.e2e.test_endpoint import SOON
from tests.e2e.test_front import client, front_of
from tests.e2e.test_rollout import named

HOUR_S = 3_600
Jump = Callable[[float], None]


@pytest.mark.parametrize("by", [HOUR_S, -HOUR_S])
def test_a_process_is_known_again(tmp_path: Path, jump: Jump, by: int) -> None:
    """An endpoint that is not would be taken for dead: a rollout would take it back, and `down` leave it there."""
    home, service = Home(tmp_path), Service(os.getpid(), begin_s(os.getpid()), 1, "r", "")
    remember(home, "buses", service)
    shared, created = shared_file(tmp_path), psutil.Process().create_time()
    jump(by)
    assert abs(psutil.Process().create_time() - created) > 1_000  # which was looked at before
    assert running(home, "buses") == service and shared_file(tmp_path) == shared
    other = Service(os.getpid(), service.started - 0.01, 1, "r", "")  # one that had this number before
    assert not other.alive() and not Service(2**22 + 1, 1.0, 1, "r", "").alive()


@pytest.mark.parametrize("by", [HOUR_S, -HOUR_S])
def test_a_rate_and_the_time_of_an_answer_are_not_measured_by_it(buses: Buses, tmp_path: Path, jump: Jump, by: int) -> None:
    asked = client(front_of(buses, tmp_path, rate_limit=2))
    assert [asked.post("/predict").status_code for _ in range(3)] == [200, 200, 429]
    jump(by)
    assert asked.post("/predict").status_code == 429  # an hour's worth is not given at once
    deadline = time.monotonic() + 10
    while asked.post("/predict").status_code != 200:  # nor waited for
        assert time.monotonic() < deadline
        time.sleep(0.05)

    async def answer(body: bytes, visit: Any) -> dict[str, Any]:
        jump(by)
        return {}

    front = front_of(buses, tmp_path)
    assert client(front, answer).post("/predict").status_code == 200
    assert 0 < front.door.mean_s < 1 and front.door.limit >= FEWEST


def test_the_log_of_predictions_loses_and_doubles_nothing(buses: Buses, tmp_path: Path, jump: Jump) -> None:
    """An hour that was over, and is one part by now, comes again; and what is from the future is left alone until then."""
    home = Home(tmp_path)
    root, spec = home.predictions("buses"), buses.spec.model_copy(update={"clock": None})
    log = PredictionLog(root, ["x"], ["word"], 50_000)
    jump((parse_time("2030-01-01T12:58:00Z") - wall_us()) / 1e6)
    count = 0
    for by in (0, 300, HOUR_S, -HOUR_S - 300, -HOUR_S, HOUR_S, 300, HOUR_S):
        jump(by)
        for _ in range(3):
            log.put(answered(count := count + 1, wall_us()))
        deadline = time.monotonic() + 2
        while log.written < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert numbers(root) == list(range(1, count + 1))
        _tidy(home, spec)
        assert numbers(root) == list(range(1, count + 1))
    log.close()
    jump(HOUR_S)
    _tidy(home, spec)
    assert [len(complete(hour)) for hour in sorted(root.glob("hour=*"))] == [1, 1, 1, 1] and log.dropped == 0
    hours = {c // HOUR_US for c in read_log(root)["clock"].cast("int64").to_pylist()}
    assert {iso(h * HOUR_US)[11:13] for h in hours} == {"11", "12", "13", "14"} and numbers(root) == list(range(1, count + 1))
    jump(-20 * HOUR_S)  # all of it is from the future
    _tidy(home, spec.model_copy(update={"serve": spec.serve.model_copy(update={"log_keep": HOUR_US})}))
    assert numbers(root) == list(range(1, count + 1))


def test_the_last_run_stays_the_last(tmp_path: Path, jump: Jump) -> None:
    """Its snapshot is what the next one adds to, and what stores are fed."""
    home = Home(tmp_path)
    for name, by in (("a", 0), ("b", HOUR_S), ("c", -HOUR_S), ("d", -HOUR_S)):
        jump(by)
        write_json(home.runs("buses") / name / "manifest.json",
                   {"run_id": name, "result_digest": name, "finished_wall_us": ended_us(home, "buses")})  # fmt: skip
        last = accepted(home, "buses")
        assert last is not None and last["run_id"] == name


def test_a_challenge_of_the_future_is_said_and_nothing_compared(buses: Buses, tmp_path: Path, jump: Jump) -> None:
    home, seen = Home(tmp_path), Seen()
    promote(home, "buses", named("a"), expected="", why="first")
    challenged_by(home, named("b"))
    stage = under_way(stages_of(home, "buses"))
    assert stage is not None
    compare(home, buses.spec, Guard(), stage, seen)
    assert seen.quality == ""  # nothing is logged yet
    jump(-HOUR_S)
    compare(home, buses.spec, Guard(), stage, seen)
    assert seen.quality == "quality was not compared: the clock was set back behind the challenge" and seen.worse == 1


ASKED = """
import asyncio, json, sys, time
begun, by, real = time.monotonic_ns(), 0, int(sys.argv[1])
time.time_ns = lambda: real + by + time.monotonic_ns() - begun
import deploy.service as service
from deploy.front import Visit

service._worker.make()
endpoint, body, told = service._worker.get(), sys.argv[2].encode(), []
for hours in (0, 1, 0, -1, 0):
    by = hours * 3_600 * 10**9
    answer = asyncio.run(endpoint.predict(body, Visit(str(len(told)))))
    told.append([answer["now"], answer["rows"][0], asyncio.run(endpoint.features_at(body, Visit("")))])
endpoint.log.close()
print(json.dumps(told))
"""


@pytest.mark.slow
def test_an_answer_is_that_of_the_hour_whatever_the_hour_was_before(buses: Buses, tmp_path: Path) -> None:
    """By the wall clock: set forwards it is another hour; set back behind the feed it is the feed's, not one before all facts."""
    spec = buses.spec.model_copy(update={"clock": ClockSpec(kind="wall")})
    release, log = make_release(buses, spec=spec), tmp_path / "log"
    src = buses.home.root / release.bento / "src"
    env = {**os.environ, "PYTHONPATH": str(src), "MILLRACE_HOME": str(buses.home.root), "MILLRACE_PREDICTIONS": str(log),
           "BENTOML_DO_NOT_TRACK": "True"}  # fmt: skip
    begin = int(NOW.timestamp()) + 30
    args = [sys.executable, "-c", ASKED, str(begin * 10**9), json.dumps({"rows": [SOON]})]
    done = subprocess.run(args, cwd=src, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert [now[:16] for now, _, _ in told] == [f"2024-05-06T{at}" for at in ("12:00", "13:00", "12:00", "12:00", "12:00")]
    assert told[3][0] == "2024-05-06T12:00:00Z" < told[4][0]
    rows = [row for _, row, _ in told]
    assert rows[0] == rows[2] == rows[3] == rows[4] != rows[1] and rows[1]["outside_horizon"] and not rows[0]["missing"]
    store = OnlineStore(spec, buses.home.online("buses", release.defs_digest))
    asked = {**SOON, "day": parse_time(str(SOON["day"]))}
    for _, _, seen in told:
        frame = serve_features(store, [asked], seen["now_us"]).frame
        assert {n: [None if v != v else v for v in values.tolist()] for n, values in frame.items()} == seen["features"]
    logged = read_log(log)
    assert Counter(logged["request_id"].to_pylist()) == {str(i): 1 for i in range(5)}
    at = dict(zip(logged["request_id"].to_pylist(), logged["wall"].cast("int64").to_pylist(), strict=True))
    assert [round(at[str(i)] / 1e6 - begin) // HOUR_S for i in range(5)] == [0, 1, 0, -1, 0]


@pytest.mark.slow
def test_what_is_on_record_from_the_future_is_read(tumours_home: Home, tumours_url: str, tmp_path: Path, jump: Jump) -> None:
    """Release, run and answers of an hour that the clock took back are seen, and what is done now stands behind them."""
    row = json.loads(next((tumours_home.root / "artifacts" / "preflight").glob("*/preflight.json")).read_text())["example"]
    before = read_log(tumours_home.predictions("tumours")).num_rows
    assert call(f"{tumours_url}/predict", {"rows": [row] * 2})[0] == 200
    deadline = time.monotonic() + 10
    while read_log(tumours_home.predictions("tumours")).num_rows < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    home = Home(Path(shutil.copytree(tumours_home.root, tmp_path / "home", ignore=shutil.ignore_patterns("services"))))
    jump(-HOUR_S)
    now, last = champion(home, "tumours"), accepted(home, "tumours")
    assert now is not None and last is not None
    assert last["finished_wall_us"] > wall_us() and parse_time(next(events(home, "tumours"))["when"]) > wall_us()
    (listed,) = list_runs(home, "tumours")
    assert listed.champion and now.release in json.dumps(status_of(home))
    found = monitor(home, "tumours")
    assert found.answers >= 2 and found.skew is not None and found.skew.skewed_cells == 0
    other = replace(now, release="millrace_tumours:other")
    assert promote(home, "tumours", other, expected=now.release, why="test")
    assert [e["event"] for e in events(home, "tumours")][-1] == "promote"
    assert rollback(home, "tumours", to=now.release, why="test") == now
    assert [s.words for s in stages_of(home, "tumours").values()] == ["champion", "retired"]
    assert write_rollout_page(home, load_spec("tumours")).exists()
