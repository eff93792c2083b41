"""Releases on live traffic: none is lost, the bad ones go by themselves with a reason, whoever is killed at whatever moment."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import deploy.live
from deploy.canary import Rolled, compare, roll_out
from deploy.guard import Seen, reasons
from deploy.live import endpoints, promote_now, roll_back
from deploy.process import Service, call
from deploy.proxy import MISSING, installed
from deploy.rollout import (
    Release,
    challenge,
    champion,
    events,
    feed_all,
    find_release,
    kept_releases,
    promote,
    rollback,
    settle,
    stages_of,
    step,
)
from deploy.stages import under_way
from flows.serving import serve_champion, stop_all, take_over
from pipelines.clock import MISSING as NO_TIME
from pipelines.clock import Anchor
from pipelines.errors import MillraceError, Refused
from pipelines.home import Home
from pipelines.manifest import ROOT, write_json
from pipelines.spec import Guard, Spec, View
from tasks.rollout import go_back
from tests.command import millrace
from tests.e2e.buses import EVERY, NOW, Buses, trip_at
from tests.e2e.prefect_server import wait_for
from tests.e2e.releases import Asked, Load, by_steps, challenged_by, make_release
from tests.servers import NotInstalled

FAST: dict[str, Any] = {"shadow": "1s", "canary": [10, 50], "step": "1s",
                        "guard": Guard(min_requests=10, max_rss_growth_mb=40)}  # fmt: skip


def named(name: str) -> Release:
    return Release(f"millrace_buses:{name}", f"bentos/{name}", "made", "s", 0, "d", "", (), NO_TIME)


# --- the log and the pointer ---


def test_the_log_is_put_right_where_a_promotion_was_killed_after_the_pointer(tmp_path: Path) -> None:
    home = Home(tmp_path)
    promote(home, "buses", named("a"), expected="", why="first")
    coming = challenged_by(home, named("b"))
    write_json(home.releases("buses") / "champion.json", {"release": coming.release})  # and there it was killed
    assert under_way(stages_of(home, "buses")) is None
    assert rollback(home, "buses", why="test").release == "millrace_buses:a"
    moves = [(e["event"], e["body"]["release"][-1], e["body"]["from"][-1:]) for e in events(home, "buses") if "from" in e["body"]]
    assert moves == [("promote", "a", ""), ("challenger", "b", "a"), ("promote", "b", "a"), ("rollback", "a", "b")]
    count = len(list(events(home, "buses")))
    settle(home, "buses")
    assert len(list(events(home, "buses"))) == count


def test_one_release_is_on_its_way_and_only_against_the_champion_that_it_was_judged_by(tmp_path: Path) -> None:
    home = Home(tmp_path)
    promote(home, "buses", named("a"), expected="", why="first")
    challenged_by(home, named("b"))
    old = under_way(stages_of(home, "buses"))
    assert old is not None
    challenged_by(home, named("c"))
    assert [s.words for s in stages_of(home, "buses").values()] == ["champion", "retired", "challenger"]
    assert not step(home, "buses", old, "canary", why="late", share=5)  # it is no longer where it was left
    promote(home, "buses", named("d"), expected="millrace_buses:a", why="by hand")
    assert [s.words for s in stages_of(home, "buses").values()] == ["retired", "retired", "retired", "champion"]
    with pytest.raises(Refused, match="the champion of buses is millrace_buses:d and not millrace_buses:a"):
        challenge(home, "buses", named("e"), expected="millrace_buses:a", why="test")


def test_the_last_champions_stay_fed_whatever_was_released_since(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for before, name in zip(["", *"abcd"], "abcde", strict=True):
        promote(home, "buses", named(name), expected=f"millrace_buses:{before}" if before else "", why="test")
    assert [r.release[-1] for r in kept_releases(home, "buses")] == ["c", "d", "e"]
    rollback(home, "buses", to="millrace_buses:b", why="test")
    assert [r.release[-1] for r in kept_releases(home, "buses")] == ["b", "d", "e"]
    challenged_by(home, named("f"))
    assert [r.release[-1] for r in kept_releases(home, "buses")] == ["b", "d", "e", "f"]


def test_the_command_line_shows_and_steers_what_is_on_its_way(buses: Buses, tmp_path: Path) -> None:
    home, yaml = Home(tmp_path), str(buses.home.root.parent / "buses.yaml")
    promote(home, "buses", named("a"), expected="", why="first")
    challenged_by(home, named("b"))
    held = millrace(home.root, "rollout", yaml, "--hold", "--why", "lunch")
    assert held.out == "millrace_buses:b: challenger (held)\n", held.err
    lines = millrace(home.root, "releases", yaml).out.splitlines()
    assert [" ".join(line.split()[:3]) for line in lines] == ["* millrace_buses:a champion", "millrace_buses:b challenger (held)"]
    assert lines[1].endswith("run made  test")
    with pytest.raises(MillraceError, match="no proxy serves buses: type `millrace serve buses"):
        roll_out(home, by_steps(buses.spec), tell=print)
    with pytest.raises(MillraceError, match="buses has no rollout: write serve: "):
        roll_out(home, buses.spec, tell=print)


# --- live ---


@dataclass
class Live:
    """The buses behind their proxy."""

    buses: Buses
    spec: Spec
    port: int = 0

    @property
    def home(self) -> Home:
        return self.buses.home

    def roll(self, **rules: Any) -> Rolled:
        return roll_out(self.home, by_steps(self.buses.spec, **FAST | rules), tell=print)

    def told(self, **rules: Any) -> Path:
        """A file with the spec of a rollout, for another process."""
        path = self.home.root.parent / "spec.json"
        path.write_text(by_steps(self.buses.spec, **FAST | rules).model_dump_json(by_alias=True))
        return path

    def asks(self) -> str:
        """The release that answers now."""
        status, answer = call(f"http://127.0.0.1:{self.port}/predict", {"rows": [trip_at(NOW + 2 * EVERY)]})
        assert status == 200, answer
        return str(answer["release"])


@pytest.fixture(scope="module")
def live(buses: Buses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    if not installed():
        raise NotInstalled(MISSING)
    folder = tmp_path_factory.mktemp("rollout") / "buses"
    shutil.copytree(buses.home.root.parent, folder, ignore=shutil.ignore_patterns("predictions", "releases", "services", "*.log"))
    made = replace(buses, home=Home(folder / "home"))
    one = Live(made, by_steps(buses.spec, **FAST))
    promote(one.home, "buses", make_release(made), expected="", why="first")
    one.port = serve_champion(one.home, one.spec, port=0, background=True).port  # type: ignore[union-attr]
    yield one
    stop_all(one.home, "buses")


def with_views(spec: Spec, views: dict[str, Any]) -> Spec:
    """The spec with other views."""
    return spec.model_copy(update={"features": spec.features.model_copy(update={"views": dict(sorted(views.items()))})})


def wrong(asked: list[Asked], *allowed: str, since: float = 0.0) -> list[Asked]:
    """Requests sent since then that were lost, or answered by another release."""
    return [a for a in asked if a.sent >= since and (a.lost or a.release not in allowed)]


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_good_challenger_goes_all_the_way_and_back_and_no_request_is_lost(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    old = champion(live.home, "buses")
    assert old is not None
    new = challenged_by(live.home, make_release(live.buses, shift=0.001))
    with Load(live.port, 40) as load:
        done = live.roll()
        promoted = time.monotonic()
        assert done.outcome == "promoted" and live.asks() == new.release
        time.sleep(1)
        monkeypatch.setenv("MILLRACE_HOME", str(live.home.root))
        assert go_back.fn(str(live.home.root.parent / "buses.yaml"), None, "test") == old  # the body of the Prefect task
        back = time.monotonic()
        time.sleep(1)
    assert not wrong(load.asked, old.release, new.release)
    between = [a for a in load.asked if promoted <= a.sent and a.done <= promoted + 1]
    assert len(between) > 20 and not wrong(between, new.release)
    assert not wrong(load.asked, old.release, since=back) and live.asks() == old.release
    steps = [(e["event"], e["body"].get("share")) for e in events(live.home, "buses") if e["body"].get("release") == new.release]
    assert steps == [("release", None), ("challenger", None), ("shadow", None), ("canary", 10), ("canary", 50), ("promote", None)]
    shown = [e["body"]["seen"] for e in events(live.home, "buses") if "seen" in e["body"]]
    assert shown[0]["pairs"] >= 10 and shown[0]["max_abs_gap"] < 0.001 and shown[0]["challenger"]["failed"] == 0
    assert all(s["challenger"]["answers"] >= 10 and s["champion"]["answers"] for s in shown)
    page = (live.home.releases("buses") / "rollout.html").read_text()
    assert "canary 50 % passed" in page and "Same requests" in page and "http" not in page


@pytest.mark.slow
@pytest.mark.haproxy
@pytest.mark.parametrize(("made", "rules", "why"), [
    ({"function": "hangs"}, {"shadow": "0s"}, "latency: "),
    ({"function": "fails"}, {"shadow": "0s"}, "errors: [0-9]+ of [0-9]+ answers failed, 1.0% is accepted .RuntimeError: no pace"),
    ({"shift": float("nan")}, {"shadow": "0s"}, "start: .*the model answers nan to a row of the served store"),
    ({"shift": 0.3, "without": "gbdt.txt"}, {}, "start: .*gbdt.txt: not found, but model.json needs it"),
    ({"spec": "without place"}, {}, "start: .*KeyError: 'place__zone'"),
    ({"function": "slow"}, {"shadow": "0s"}, "latency: [0-9]+ of [0-9]+ answers took more than [0-9]+ ms"),
    ({"function": "leaks"}, {"shadow": "0s"}, "memory: [0-9]+ MB grew to [0-9]+ MB, 40 MB more is accepted"),
], ids=["hangs", "fails", "NaN", "crashes on start", "an unknown feature", "is slow", "leaks memory"])  # fmt: skip
def test_a_bad_challenger_is_taken_back_with_a_reason(live: Live, made: dict[str, Any], rules: dict[str, Any], why: str) -> None:
    old = champion(live.home, "buses")
    assert old is not None
    if "spec" in made:
        views = {n: v for n, v in live.buses.spec.features.views.items() if n != "place"}
        made = {"spec": with_views(live.buses.spec, views)}
    bad = challenged_by(live.home, make_release(live.buses, **made))
    with Load(live.port, 40) as load:
        done = live.roll(**rules)
        gone = time.monotonic()
        time.sleep(0.5)
    assert done.outcome == "retired", done
    assert re.search(why, done.why), done.why
    assert not wrong(load.asked, old.release, since=gone)
    hit = [a for a in load.asked if a.lost or a.release != old.release]
    assert len(hit) <= 0.1 * len(load.asked) and (rules.get("shadow") or not hit)
    assert champion(live.home, "buses") == old and stages_of(live.home, "buses")[bad.release].state == "retired"
    assert [s.release for s in endpoints(live.home, "buses").values()] == [old.release]


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_controller_whose_clock_is_set_back_and_forth_goes_on(live: Live, jump: Callable[[float], None]) -> None:
    """No endpoint is taken for dead, and no step ends early or late; and a client's one connection stays, and changes release."""
    old, over = champion(live.home, "buses"), threading.Event()
    assert old is not None
    new = challenged_by(live.home, make_release(live.buses, shift=0.005))

    def unsteady() -> None:
        while not over.wait(0.3):
            jump(3_600)
            over.wait(0.3)
            jump(-3_600)

    def one_connection() -> None:
        line = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
        line.connect()
        kept = line.sock
        while not over.wait(0.025):
            line.request("POST", "/predict", json.dumps({"rows": [trip_at(NOW + (1 + len(told) % 200) * EVERY)]}))
            answer = line.getresponse()
            told.append((answer.status, json.load(answer).get("release", ""), line.sock is kept))

    told: list[tuple[int, str, bool]] = []
    threads = [threading.Thread(target=unsteady), threading.Thread(target=one_connection)]
    for thread in threads:
        thread.start()
    with Load(live.port, 40) as load:
        began = time.monotonic()
        done = live.roll(shadow="0s", canary=[50], step="2s")
        took = time.monotonic() - began
        time.sleep(0.5)
        over.set()
        for thread in threads:
            thread.join()
    assert {(status, kept) for status, _, kept in told} == {(200, True)}
    assert (told[0][1], told[-1][1]) == (old.release, new.release) and len(told) > 50
    assert done.outcome == "promoted" and 2 < took < 30, (done, took)
    assert not wrong(load.asked, old.release, new.release)
    steps = [e["event"] for e in events(live.home, "buses") if e["body"].get("release") == new.release]
    assert steps == ["release", "challenger", "canary", "promote"]
    assert [s.release for s in endpoints(live.home, "buses").values()] == [new.release]
    homes = [p for p in psutil.process_iter(["cmdline"]) if f"{live.home.root}/bentoml/" in " ".join(p.info["cmdline"] or [])]
    assert all(new.release.partition(":")[2] in " ".join(p.info["cmdline"]) for p in homes)  # nobody was left behind


KILLED = """
import os, signal, sys
from deploy import live, proxy, rollout
from deploy.canary import roll_out
from pipelines.home import Home
from pipelines.spec import Spec
from pathlib import Path

def counted(owner, name):
    real = getattr(owner, name)
    def run(*args, **kwargs):
        done(); result = real(*args, **kwargs); done(); return result
    setattr(owner, name, run)

def done():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for owner, names in ((rollout, ("_append", "write_json")), (live, ("start", "_end")),
                     (proxy.Proxy, ("write", "open", "weigh", "close"))):
    for name in names:
        counted(owner, name)
home, spec = Home(Path(sys.argv[1])), Spec.model_validate_json(Path(sys.argv[2]).read_text())
for left in range(1, 100):
    child = os.fork()
    if not child:
        print(roll_out(home, spec, tell=print).line, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        sys.exit(print("killed", left - 1))
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_controller_that_is_killed_at_every_turn_still_comes_to_the_end(live: Live) -> None:
    old = champion(live.home, "buses")
    assert old is not None
    new = challenged_by(live.home, make_release(live.buses, shift=0.002))
    told = live.told(shadow="0s", canary=[20], step="500ms", guard=Guard(min_requests=2))
    with Load(live.port, 40) as load:
        done = subprocess.run([sys.executable, "-c", KILLED, str(live.home.root), str(told)], cwd=ROOT, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=150)  # fmt: skip
        ended = time.monotonic()
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout.split("killed ")[1]) >= 8, done.stdout
    assert not wrong(load.asked, old.release, new.release) and not wrong(load.asked, new.release, since=ended)
    assert champion(live.home, "buses") == find_release(live.home, "buses", new.release)
    moved = [e["event"] for e in events(live.home, "buses") if e["body"].get("release") == new.release]
    assert sorted(moved) == ["canary", "challenger", "promote", "release"]
    (left,) = endpoints(live.home, "buses").values()
    homes = [p for p in psutil.process_iter(["cmdline"]) if f"{live.home.root}/bentoml/" in " ".join(p.info["cmdline"] or [])]
    assert left.release == new.release and left.pid in {p.pid for p in homes}
    assert {p.pid for p in homes} <= {left.pid, *(p.pid for p in psutil.Process(left.pid).children(recursive=True))}


@pytest.mark.slow
@pytest.mark.haproxy
@pytest.mark.parametrize("words", [("bentoml", "serve"), (deploy.live.WORKER,)])
def test_an_endpoint_that_nobody_remembers_is_ended(live: Live, words: tuple[str, ...]) -> None:
    """Who started it was killed before he could write it down; or it was, as it started this worker."""
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)", *words]
    env = {**os.environ, "MILLRACE_HOME": str(live.home.root)}
    stray, other = (subprocess.Popen(command, env={**env, "MILLRACE_SLOT": name}, stdout=subprocess.PIPE)
                    for name in ("buses.c", "trams.c"))  # fmt: skip
    try:
        assert all(process.stdout and process.stdout.readline() == b"up\n" for process in (stray, other))
        known, (kept,) = live.asks(), endpoints(live.home, "buses").values()
        assert any(deploy.live.WORKER in p.cmdline() for p in psutil.Process(kept.pid).children(recursive=True))
        deploy.live.reconcile(live.home, "buses")
        assert stray.wait(10) == -signal.SIGTERM and other.poll() is None and live.asks() == known
    finally:
        stray.kill()
        other.kill()


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_challenger_that_dies_as_soon_as_it_is_ready_is_taken_back(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = champion(live.home, "buses"), challenged_by(live.home, make_release(live.buses, shift=0.005))
    begin = deploy.live.start

    def start_and_kill(*args: Any, **told: Any) -> Service:
        service = begin(*args, **told)
        if service.release == new.release:
            os.kill(service.pid, signal.SIGKILL)
            wait_for(lambda: not service.alive(), 10, "its end")
        return service

    monkeypatch.setattr(deploy.live, "start", start_and_kill)
    done = live.roll(shadow="0s")
    assert done.outcome == "retired" and done.why == f"start: no endpoint of {new.release} runs"
    assert champion(live.home, "buses") == old and old is not None and live.asks() == old.release


DRIVES = """
import sys
from deploy.canary import roll_out
from pipelines.home import Home
from pipelines.spec import Spec
from pathlib import Path

home, spec = Home(Path(sys.argv[1])), Spec.model_validate_json(Path(sys.argv[2]).read_text())
print(roll_out(home, spec, tell=print, replaced=True).line)
"""


def ready(service: Service) -> bool:
    try:
        with urllib.request.urlopen(f"{service.url}/readyz", timeout=1):
            return True
    except OSError:
        return False


def deputies(home: Home) -> list[psutil.Process]:
    """Those that wait in a home, or drive."""
    every = psutil.process_iter(["cmdline", "environ"])  # None of one that has ended meanwhile
    return [p for p in every if "deploy.deputy" in (p.info["cmdline"] or [])
            and (p.info["environ"] or {}).get("MILLRACE_HOME") == str(home.root)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_challenger_whose_controller_was_killed_is_still_watched(live: Live) -> None:
    """The deputy takes it back when it dies, and those who type the command again are told so."""
    old = champion(live.home, "buses")
    assert old is not None
    new = challenged_by(live.home, make_release(live.buses, shift=0.004))
    told = live.told(shadow="0s", canary=[20], step="5m")
    with Load(live.port, 20) as load:
        driver = subprocess.Popen([sys.executable, "-c", DRIVES, str(live.home.root), str(told)], cwd=ROOT,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        wait_for(lambda: stages_of(live.home, "buses")[new.release].state == "canary", 60, "a canary")
        first = deputies(live.home)
        driver.kill()
        driver.wait()
        now = wait_for(lambda: two if len(two := deputies(live.home)) == 2 else [], 30, "a deputy that drives, and its own")
        assert {*first} < {*now} and stages_of(live.home, "buses")[new.release].state == "canary"
        killed = set[int]()
        while stages_of(live.home, "buses")[new.release].state == "canary":  # a driver that begins starts what is missing
            for one in endpoints(live.home, "buses").values():
                if one.release == new.release and one.alive() and ready(one):
                    with suppress(ProcessLookupError):  # it has been taken back
                        os.kill(one.pid, signal.SIGKILL)
                        killed.add(one.pid)
            time.sleep(0.1)
        done = live.roll()
    assert done.outcome == "retired" and killed
    assert re.match("crash: its endpoint died|start: (the endpoint of .* did not become|no endpoint of)", done.why), done.why
    bad = f"{live.home.root}/bentoml/bentos/{new.release.replace(':', '/')}"
    wait_for(lambda: not [p for p in psutil.process_iter(["cmdline"]) if bad in (p.info["cmdline"] or [])], 15, "no worker left")
    assert champion(live.home, "buses") == old and live.asks() == old.release
    wait_for(lambda: not deputies(live.home), 30, "none that is left over")
    assert sum(a.lost or a.release != old.release for a in load.asked) <= 0.3 * len(load.asked)


@pytest.mark.slow
@pytest.mark.haproxy
def test_the_way_back_leads_to_other_features_that_stayed_fed(live: Live) -> None:
    old = champion(live.home, "buses")
    assert old is not None
    views = live.buses.spec.features.views
    late = View.model_validate({"window": {"from": "departures", "key": ["line"], "last": ["2h"], "mean": ["late"]}})
    other = make_release(live.buses, spec=with_views(live.buses.spec, {**views, "line_later": late}))
    assert other.defs_digest != old.defs_digest
    with Load(live.port, 40) as load:
        promote_now(live.home, "buses", other, why="test")
        assert live.asks() == other.release
        later = Anchor(live.buses.snapshot.watermark_us + 60_000_000, 0)
        assert len(feed_all(live.home, "buses", live.buses.snapshot, later, None)) == 2  # stores: some releases share one
        roll_back(live.home, "buses", to=None, why="test")
        back = time.monotonic()
        status, answer = call(f"http://127.0.0.1:{live.port}/info")
        time.sleep(0.5)
    assert status == 200 and answer["release"] == old.release and answer["fed"]["until"] == "2024-05-06T12:01:00Z"
    assert not wrong(load.asked, old.release, other.release) and not wrong(load.asked, old.release, since=back)


@pytest.mark.slow
@pytest.mark.haproxy
def test_a_challenger_that_is_worse_goes_when_labels_come(live: Live) -> None:
    asked = [trip_at(NOW + i * EVERY) for i in (1, 2)]
    challenged_by(live.home, make_release(live.buses, shift=3.0))
    for _ in range(40):
        call(f"http://127.0.0.1:{live.port}/predict", {"rows": asked})
    time.sleep(1.5)  # until it is logged
    utc = pa.timestamp("us", "UTC")
    kinds = pa.schema([("line", pa.string()), ("day", utc), ("trip", pa.int64()), ("at", utc), ("late", pa.float64())])
    left = [{**trip, "day": datetime(2024, 5, 6, tzinfo=UTC), "at": NOW + timedelta(minutes=20), "late": 0.0} for trip in asked]
    pq.write_table(pa.Table.from_pylist(left, kinds), live.home.landing("buses") / "departures" / "left.parquet")

    def why() -> list[str]:
        seen, stage = Seen(), under_way(stages_of(live.home, "buses"))
        assert stage is not None
        compare(live.home, live.buses.spec, Guard(), stage, seen)
        assert re.match("log loss [0-9.]+ on 80 rows with a label by now, the champion's [0-9.]+", seen.quality), seen.quality
        return reasons(Guard(), seen, 50)

    assert [said.partition(":")[0] for said in why()] == ["quality"]
    challenged_by(live.home, make_release(live.buses, shift=0.004))
    for _ in range(40):
        call(f"http://127.0.0.1:{live.port}/predict", {"rows": asked})
    time.sleep(1.5)
    assert why() == []


@pytest.mark.slow
@pytest.mark.haproxy
def test_without_a_proxy_it_is_said_and_a_restart_promotes(live: Live, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    now = champion(live.home, "buses")
    assert now is not None
    stop_all(live.home, "buses")
    other = make_release(live.buses, shift=0.003)
    monkeypatch.setattr("deploy.proxy.shutil.which", lambda name: None)
    service = serve_champion(live.home, live.spec, port=0, background=True)
    assert service is not None and "apt-get install haproxy" in caplog.text
    live.port = service.port
    assert live.asks() == now.release
    with pytest.raises(MillraceError, match="no proxy serves buses"):
        live.roll()
    promote_now(live.home, "buses", other, why="test")
    assert "after a restart: haproxy is not installed" in take_over(live.home, live.spec, other)
    assert live.asks() == other.release
