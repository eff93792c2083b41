"""Runs the flow in this process, recorded by the home's Prefect server: the one that is up, or one for the while."""

import importlib
import logging
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deploy.process import Service, call, free_port, running, stop
from deploy.record import Outcome
from flows.serving import SERVER, spawn_server, wait_for_server
from pipelines.errors import MillraceError
from pipelines.home import Home, free_mb
from pipelines.manifest import write_atomic

LEAST_MB = 100
HEAVY = ("features.quick_feast", "great_expectations")  # seconds to import, while the server starts beside


def run_flow(home: Home, pipeline: str, as_of: str | None, overrides: list[str]) -> Outcome:
    """The outcome of one `retrain`. A refusal is raised as it was inside."""
    found: Outcome = run_story(home, "retrain", pipeline, as_of, overrides, again=f"millrace run {pipeline}")
    return found


def run_story(home: Home, name: str, pipeline: str, *arguments: Any, again: str) -> Any:
    """What the flow of this name in `flows/` returned. A refusal is raised as it was inside; `again`: the command to repeat."""
    if (free := free_mb(home)) < LEAST_MB:
        raise MillraceError(
            f"home {home.root}: {free} MB free, a run needs at least {LEAST_MB} MB; free space there, or point "
            "MILLRACE_HOME at another folder"
        )
    with recorded(home) as server:
        for module in (*HEAVY, f"flows.{name}"):
            importlib.import_module(module)
        quiet()
        wait_for_server(server)
        story = getattr(importlib.import_module(f"flows.{name}"), name)
        try:
            state: Any = story(pipeline, *arguments, return_state=True)
            result = result_of(state)
            _settle(f"{server.url}/api", str(state.state_details.flow_run_id))
        except Exception as error:  # Prefect's own: it gave up on its server
            result = error
        if isinstance(result, Exception) and not isinstance(result, MillraceError) and not server.alive():
            raise MillraceError(
                f"the Prefect server on port {server.port} ended while the run was going on (log: {server.log}); "
                f"`{again}` starts it anew and goes on where this run stopped"
            )
    if isinstance(result, BaseException):
        raise result if isinstance(result, MillraceError) else _told(home, pipeline, result, again) from None
    if state.name not in ("Completed", "Refused"):
        raise MillraceError(f"the flow ended {state.name}: {state.message}")
    return result


def result_of(state: Any) -> Any:
    """What a flow returned. A busy server may give its state back without that."""
    from prefect.exceptions import MissingResult

    from tasks.policy import ended

    try:
        return state.result(raise_on_failure=False)
    except MissingResult:
        return ended()


def _settle(api: str, flow_run: str, *, wait_s: float = 10) -> None:
    """Returns when the server has all logs and task states of the run: events that are on the way would be lost."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)
    going = {"flow_runs": {"id": {"any_": [flow_run]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        status, count = call(f"{api}/task_runs/count", going)
        if status == 200 and count == 0:
            return
        time.sleep(0.2)


def _told(home: Home, pipeline: str, error: BaseException, again: str) -> MillraceError:
    """One sentence about an unexpected error; the traceback goes to a file of the home."""
    path = home.root / "errors" / f"{pipeline.replace('/', '_')}.txt"
    where = f"traceback in {path}"
    try:
        write_atomic(path, "".join(traceback.format_exception(error)))
    except OSError as full:
        where = f"{path} could not be written: {full.strerror}"
    return MillraceError(
        f"{type(error).__name__}: {str(error)[:300]} ({where}); nothing is half-published, and "
        f"`{again}` goes on where this run stopped"
    )


@contextmanager
def recorded(home: Home) -> Iterator[Service]:
    """The home's Prefect server, which may still be starting; one that was started for this is stopped in the end."""
    server = running(home, SERVER)
    ours = None
    if server is None:
        ours = server = spawn_server(home, free_port(), tied=True)
    try:
        os.environ["PREFECT_API_URL"] = f"{server.url}/api"
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")  # with five, minutes pass until a dead server is said
        yield server
    finally:
        if ours is not None:
            stop(ours)


def quiet() -> None:
    """Silences library chatter; ours goes to stderr line by line."""
    warnings.filterwarnings("ignore")
    for name in (
        "prefect", "prefect._internal.concurrency", "httpx", "great_expectations", "feast", "pytorch_lightning", "optuna",
        "py.warnings",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.ERROR)
