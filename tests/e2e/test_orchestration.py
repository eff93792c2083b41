"""The scheduler, the guard, the sweep and the alert, on a real Prefect server with one real process worker.

The flows are toys, deployed with the job variables of the repository's prefect.yaml. A toy task that has to
be killed in mid-work waits for a file; every task appends a line to `events`: what, by which process, when.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling, Pending

from flows.sweep import is_gone
from tests.e2e.prefect_server import PrefectServer, prefect_server, running, tail, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOCK_S = 60  # now and then two writers of Prefect's server block each other on SQLite, and all others, until one gives up
WAIT_S = LOCK_S + 60

REPOSITORY = Path(__file__).parents[2]
SWEEP = [sys.executable, "-m", "flows.sweep", "--pool", "local", "--kill-after", "5", "--", "--limit", "5"]
TOYS = """
import os, signal, time
from pathlib import Path
from prefect import flow, task
from prefect.states import Failed

def note(what):
    with open("events", "a") as events:
        events.write(f"{what} {os.getpid()} {time.time()}\\n")

@task(cache_key_fn=lambda _, inputs: f"quick-{inputs['name']}", persist_result=True, result_serializer="json")
def quick(name):
    note(f"quick-{name}")

@task
def held(name):
    note(f"held-{name}")
    while not Path(f"let-{name}-go").exists():
        time.sleep(0.05)

@task(retries=2, retry_delay_seconds=0.2)
def flaky():
    note("flaky")
    if Path("events").read_text().count("flaky ") < 3:
        raise ConnectionError("twice is not enough")

@task
def tick():
    note("tick")

@flow
def crawl(name: str):
    quick(name)
    held(name)

@flow
def retry():
    flaky()

@flow
def scheduled():
    tick()

@flow
def lost():
    tick()

@flow
def broken():
    return Failed(name="Refused", message='no "data" today\\\\')

@flow
def deadly():
    note("deadly")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Worker:
    """`python -m flows.sweep` on the server, with the worker that it keeps."""

    server: PrefectServer
    folder: Path
    running: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        environment = {**self.server.environment, "PREFECT_WORKER_QUERY_SECONDS": "2"}
        self.running.enter_context(running(SWEEP, environment, self.log, cwd=self.folder))

    def stop(self) -> None:
        self.running.close()

    @property
    def log(self) -> Path:
        return self.folder / "worker.log"


@dataclass(frozen=True)
class Stage:
    """The server, its worker, and the toys deployed on them."""

    server: PrefectServer
    folder: Path
    client: SyncPrefectClient
    worker: Worker
    alerts: list[dict[str, Any]]
    holding: list[str] = field(default_factory=list)  # of a test's runs, those that may wait for their file

    def start(self, flow: str, *, state: State | None = None, **parameters: str) -> UUID:
        deployment = self.client.read_deployment_by_name(f"{flow}/toy")
        run = self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters, state=state)
        self.holding.extend(parameters.values())
        return run.id

    def run(self, run_id: UUID) -> FlowRun:
        return self.client.read_flow_run(run_id)

    def scheduled_runs(self, flow: str, deployment_name: str = "toy") -> list[FlowRun]:
        """What the deployment's schedule has made, first due first."""
        deployment = self.client.read_deployment_by_name(f"{flow}/{deployment_name}")
        of_deployment = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment.id]}})
        runs = self.client.read_flow_runs(flow_run_filter=of_deployment, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [run for run in runs if run.auto_scheduled]

    def task_runs(self, run_id: UUID) -> list[TaskRun]:
        of_run = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
        return self.client.read_task_runs(flow_run_filter=of_run)

    def events(self, what: str) -> list[tuple[int, float]]:
        """(pid, time) of each line of `events` about `what`."""
        path = self.folder / "events"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(int(pid), float(at)) for name, pid, at in lines if name == what]

    def nth_event(self, what: str, count: int, timeout_s: float = WAIT_S) -> tuple[int, float]:
        wait_for(lambda: len(self.events(what)) >= count, timeout_s, lambda: f"{what} {count}: {self.log()}")
        return self.events(what)[count - 1]

    def ended(self, run_id: UUID, state: str = "Completed", timeout_s: float = WAIT_S) -> FlowRun:
        def look() -> FlowRun | None:
            run = self.run(run_id)
            return run if run.state and run.state.is_final() else None

        run = wait_for(look, timeout_s, lambda: f"{state} run, is {self.run(run_id).state}: {self.log()}")
        assert run.state and run.state.name == state, f"{run.state}: {self.log()}"
        return run

    def alert(self, run_id: UUID) -> dict[str, Any] | None:
        return next((alert for alert in self.alerts if alert["flow_run_id"] == str(run_id)), None)

    def let_go(self, name: str) -> None:
        (self.folder / f"let-{name}-go").touch()

    def log(self) -> str:
        return tail(self.worker.log)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("toys")
    with (
        prefect_server(folder / "home") as server,
        SyncPrefectClient(server.api_url) as client,
        web_hook() as (url, alerts),
        ExitStack() as at_the_end,
    ):
        worker = Worker(server, folder)
        at_the_end.callback(worker.stop)
        worker.start()
        stage = Stage(server, folder, client, worker, alerts)
        set_alert(server, folder, f"{url}/old")
        wait_for(lambda: client.read_work_pools(), 60, lambda: f"the worker's pool: {tail(worker.log)}")
        deploy_toys(server, folder)
        set_alert(server, folder, url)  # moves the alert, adds none
        schedule_long_ago(stage, "broken")
        yield stage


@pytest.fixture(autouse=True)
def no_run_left_waiting(stage: Stage) -> Iterator[None]:
    """A run that a failed test left would hold the only slot of its deployment."""
    yield
    while stage.holding:
        stage.let_go(stage.holding.pop())


def set_alert(server: PrefectServer, folder: Path, url: str) -> None:
    with running([sys.executable, "-m", "flows.alert", url], server.environment, folder / "alert.log") as process:
        assert process.wait(60) == 0, tail(folder / "alert.log")


def deploy_toys(server: PrefectServer, folder: Path) -> None:
    """Deploys each toy as the repository's prefect.yaml deploys its own flows."""
    (folder / "toys.py").write_text(TOYS)
    ours = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    plain = {**ours["deployments"][0], "name": "toy", "parameters": {}, "schedules": []}
    pool = plain["work_pool"]
    one_restart = {**pool["job_variables"], "env": {**pool["job_variables"]["env"], "GUARD_RESTARTS": "1"}}
    soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    toys: dict[str, dict[str, object]] = {
        "crawl": {},
        "retry": {},
        "scheduled": {"schedules": [{"cron": "* * * * *", "timezone": "UTC"}]},
        "lost": {"concurrency_limit": None},
        "broken": {"schedules": [{"interval": 3600, "anchor_date": soon, "timezone": "UTC"}]},
        "deadly": {"work_pool": {**pool, "job_variables": one_restart}},
    }
    deployments = [{**plain, "entrypoint": f"toys.{name}", **own} for name, own in toys.items()]
    (folder / "prefect.yaml").write_text(yaml.safe_dump({**ours, "deployments": deployments}))
    server.prefect("--no-prompt", "deploy", "--all", cwd=folder)


def schedule_long_ago(stage: Stage, flow: str) -> None:
    """Makes a schedule's first run a day old, as it would be in daily use.

    Prefect lets a state's event wait up to 15 minutes for that of the state before, if that is less than five
    minutes old. A schedule's Scheduled is never an event, so an alert on such a run would be late.
    """
    run_id = wait_for(lambda: stage.scheduled_runs(flow), 30, "a scheduled run")[0].id
    with closing(sqlite3.connect(stage.server.home / "prefect.db", timeout=30)) as database, database:
        day_before = "strftime('%Y-%m-%d %H:%M:%f', timestamp, '-1 day')"
        update = f"UPDATE flow_run_state SET timestamp = {day_before} WHERE flow_run_id = ?"
        assert database.execute(update, [str(run_id)]).rowcount == 1


@contextmanager
def web_hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on this machine that collects what is posted to it, as (url, messages)."""
    messages: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            messages.append({"path": self.path, **json.loads(body)})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", messages
        server.shutdown()


def chain(engine: int) -> tuple[psutil.Process, psutil.Process, psutil.Process]:
    """(worker, guard, engine) for the process in which a flow runs."""
    process = psutil.Process(engine)
    guard = process.parent()
    assert guard and "flows.guard" in guard.cmdline()
    worker = guard.parent()
    assert worker and "worker" in worker.cmdline()
    return worker, guard, process


def assert_resumed(stage: Stage, run_id: UUID, name: str, *, run_count: int = 2) -> None:
    """One run, the finished task cached and not done again, nothing left open, the concurrency slot free."""
    stage.let_go(name)
    run = stage.ended(run_id)
    assert run.run_count == run_count
    assert len(stage.events(f"quick-{name}")) == 1
    assert len(stage.events(f"held-{name}")) == run_count
    wait_for(lambda: is_tidy(stage.task_runs(run_id)), WAIT_S, lambda: str(stage.task_runs(run_id)))
    limit = stage.client.read_global_concurrency_limit_by_name(f"deployment:{run.deployment_id}")
    assert limit.active_slots == 0


def is_tidy(task_runs: list[TaskRun]) -> bool:
    """All ended, as the UI shows them: the finished task's second run Cached, the killed one's Completed."""
    names = [task_run.state.name for task_run in task_runs if task_run.state and task_run.state.is_final()]
    return len(names) == len(task_runs) and "Cached" in names and "Completed" in names


def test_task_that_fails_twice_succeeds_on_the_third_try(stage: Stage) -> None:
    run_id = stage.start("retry")
    stage.ended(run_id)
    assert len(stage.events("flaky")) == 3
    (task_run,) = wait_for(lambda: [t for t in stage.task_runs(run_id) if t.run_count == 3], WAIT_S, "three tries")
    assert task_run.state and task_run.state.is_completed()


def test_killed_flow_process_resumes_in_the_same_run(stage: Stage) -> None:
    run_id = stage.start("crawl", name="a")
    engine, _ = stage.nth_event("held-a", 1)
    worker, guard, _ = chain(engine)
    lease = stage.run(run_id).state.state_details.deployment_concurrency_lease_id
    os.kill(engine, signal.SIGKILL)
    killed = time.time()
    _, resumed = stage.nth_event("held-a", 2)
    print(f"kill of the flow process -> body: {resumed - killed:.1f} s")
    assert guard.is_running() and worker.is_running()
    assert lease and stage.run(run_id).state.state_details.deployment_concurrency_lease_id == lease
    assert_resumed(stage, run_id, "a")


def test_cancel_after_a_restart_ends_cancelled(stage: Stage) -> None:
    run_id = stage.start("crawl", name="b")
    engine, _ = stage.nth_event("held-b", 1)
    os.kill(engine, signal.SIGKILL)
    engine, _ = stage.nth_event("held-b", 2)
    stage.client.set_flow_run_state(run_id, Cancelling())
    stage.ended(run_id, "Cancelled")
    wait_for(lambda: is_gone(engine), WAIT_S, "no flow process")


def test_sweep_takes_up_what_was_killed_with_the_worker(stage: Stage) -> None:
    run_id = stage.start("crawl", name="c")
    engine, _ = stage.nth_event("held-c", 1)
    never_started = stage.start("lost", state=Pending())  # as if the worker had died while submitting it
    for process in chain(engine):
        process.kill()
    killed = time.time()
    _, resumed = stage.nth_event("held-c", 2)
    print(f"kill of worker, guard and flow process -> body: {resumed - killed:.1f} s")
    assert f"took up run {run_id}" in stage.log()
    assert_resumed(stage, run_id, "c")
    stage.ended(never_started)


def test_run_outlives_its_worker(stage: Stage) -> None:
    run_id = stage.start("crawl", name="d")
    engine, _ = stage.nth_event("held-d", 1)
    worker, guard, _ = chain(engine)
    worker.kill()
    killed = time.time()
    _, resumed = stage.nth_event("held-d", 2)
    print(f"kill of the worker -> body: {resumed - killed:.1f} s")
    assert is_gone(guard.pid)
    assert_resumed(stage, run_id, "d")


def test_second_worker_of_the_pool_is_refused(stage: Stage) -> None:
    done = subprocess.run(SWEEP, env=stage.server.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "already running on this host" in done.stderr


def test_stopped_worker_hands_its_run_back(stage: Stage) -> None:
    run_id = stage.start("crawl", name="e")
    engine, _ = stage.nth_event("held-e", 1)
    processes = chain(engine)
    began = time.time()
    stage.worker.stop()
    print(f"stop: {time.time() - began:.1f} s")
    assert all(is_gone(process.pid) for process in processes)
    state = stage.run(run_id).state
    assert state and state.name == "AwaitingRetry"
    stage.worker.start()
    stage.nth_event("held-e", 2)
    assert_resumed(stage, run_id, "e")


def test_scheduled_run_starts_by_itself(stage: Stage) -> None:
    stage.nth_event("tick", 1)
    stage.ended(stage.scheduled_runs("scheduled")[0].id)


def test_run_that_dies_again_and_again_crashes_and_the_webhook_is_told(stage: Stage) -> None:
    run_id = stage.start("deadly")
    run = stage.ended(run_id, "Crashed")
    assert len(stage.events("deadly")) == 2
    alert = wait_for(lambda: stage.alert(run_id), WAIT_S, lambda: f"an alert: {tail(stage.server.log)}")
    assert alert["path"] == "/" and alert["state"] == "Crashed" and alert["scheduled"] is False
    assert alert["flow_run"] == run.name and run.name in alert["text"]
    assert alert["url"] == f"{stage.server.ui_url}/runs/flow-run/{run_id}"


def test_webhook_is_told_of_a_scheduled_run_that_failed(stage: Stage) -> None:
    run_id = stage.scheduled_runs("broken")[0].id
    run = stage.ended(run_id, "Refused")
    alert = wait_for(lambda: stage.alert(run_id), WAIT_S, lambda: f"an alert: {tail(stage.server.log)}")
    assert run.auto_scheduled and alert["scheduled"] is True and alert["state"] == "Refused"
    assert alert["message"] == 'no "data" today\\' and alert["message"] in alert["text"]
    told_of = [alert["flow_run_id"] for alert in stage.alerts]
    assert len(told_of) == len(set(told_of)) == 2  # once each, and nothing of the runs that were resumed


def test_deployments_of_the_repository(stage: Stage, tmp_path: Path) -> None:
    ours = (REPOSITORY / "prefect.yaml").read_text().replace("name: local", "name: unattended")
    (tmp_path / "prefect.yaml").write_text(ours)
    stage.client.create_work_pool(WorkPoolCreate(name="unattended", type="process"))
    stage.server.prefect("--no-prompt", "deploy", "--all", cwd=tmp_path)
    daily = stage.client.read_deployment_by_name("retrain/retrain-flights")
    by_hand = stage.client.read_deployment_by_name("retrain/retrain-flights-demo")
    assert (daily.parameters, by_hand.parameters) == ({"pipeline": "flights"}, {"pipeline": "flights_demo"})
    assert daily.global_concurrency_limit and daily.global_concurrency_limit.limit == 1
    assert daily.job_variables and daily.job_variables["command"] == "python -m flows.guard"
    assert daily.job_variables["working_dir"] == str(tmp_path)
    assert by_hand.schedules == []
    due = wait_for(lambda: stage.scheduled_runs("retrain", "retrain-flights"), 30, "a run of tomorrow")[0]
    assert due.expected_start_time and (due.expected_start_time.hour, due.expected_start_time.minute) == (5, 0)
