"""`python -m flows.sweep --pool local [-- worker arguments]` keeps one process worker running for the pool.

Before each start of the worker, `sweep` takes up what the last one left: a worker that was killed together
with its flow processes leaves runs that claim to be running, hold their concurrency slot, and never end.
One process pool belongs to one host: a run counts as dead when no process of *this* host works on it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
import psutil

from flows.guard import RUN_ID_VARIABLE, UNFINISHED, WAKE_UPS, start

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import Settings

STOP = (signal.SIGTERM, signal.SIGINT)
STEADY_S = 10  # a worker that lived this long is restarted at once


def sweep(pool: str) -> list[UUID]:
    """The runs of the pool that were taken up; no worker of the pool may be running meanwhile."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import AwaitingRetry, Cancelled

    begun = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}})
    of_pool = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    time.sleep(0.3)  # what dies with its parent may still be dying
    with get_client(sync_client=True) as client:
        alive = attended_runs()  # before the states: a run that completes in between must not count as dead
        runs = client.read_flow_runs(flow_run_filter=begun, work_pool_filter=of_pool)
        dead = [run for run in runs if run.id not in alive]
        for run in dead:
            kill_leftovers(run.id)
            close_task_runs(client, run.id)
            cancelling = run.state is not None and run.state.is_cancelling()
            message = "the worker and the flow process were gone"
            end = Cancelled if cancelling else AwaitingRetry
            client.set_flow_run_state(run.id, end(message=message), force=True)
    return [run.id for run in dead]


def attended_runs() -> set[UUID]:
    """Flow runs that a guard or an engine of this host works on; the environment tells, PIDs are reused."""
    return {run_id for process, run_id in flow_processes() if is_engine(process.info["cmdline"] or [])}


def flow_processes() -> Iterator[tuple[psutil.Process, UUID]]:
    """Every process that inherited the id of a flow run: guard, engine, and whatever the flow started."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        with suppress(ValueError):
            if run_id := (process.info["environ"] or {}).get(RUN_ID_VARIABLE):
                yield process, UUID(run_id)


def is_engine(command: Sequence[str]) -> bool:
    return "flows.guard" in command or "prefect.engine" in command


def kill_leftovers(run_id: UUID) -> None:
    """Ends what a dead flow process left running; services in a session of their own stay."""
    for process, owner in flow_processes():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if owner == run_id and is_gone(os.getsid(process.pid)):
                process.kill()


def is_gone(pid: int) -> bool:
    """True for a zombie too: a container's first process may not bury what it inherits."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def close_task_runs(client: SyncPrefectClient, run_id: UUID) -> None:
    """Ends as Crashed what the dead process had begun; the UI would show it running for good."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    of_run = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
    unfinished = TaskRunFilter.model_validate({"state": {"type": {"any_": UNFINISHED}}})
    for task_run in client.read_task_runs(flow_run_filter=of_run, task_run_filter=unfinished):
        client.set_task_run_state(task_run.id, Crashed(message="the flow process was gone"), force=True)


def supervise(pool: str, worker_arguments: Sequence[str], *, kill_after_s: float) -> int:
    """Sweeps and runs the worker, again and again, until SIGTERM or SIGINT; 0 when the worker has ended."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    delay = 0.0
    while sweep_when_reachable(pool):
        began = time.monotonic()
        worker = start([*command, *worker_arguments], worker_environment())
        stopped = attend(worker, kill_after_s)
        steady = time.monotonic() - began > STEADY_S
        delay = 0.0 if steady or stopped else min(max(1.0, delay * 2), 30.0)
        say(f"worker ended with {worker.returncode}" + ("" if stopped else f"; next one in {delay:.0f} s"))
        if stopped or stop_requested(delay):
            with suppress(httpx.HTTPError):
                sweep(pool)  # an ending worker kills its flow processes, and their runs would look alive
            break
    return 0


def sweep_when_reachable(pool: str) -> bool:
    """False if asked to stop before the server answered."""
    while True:
        try:
            for run_id in sweep(pool):
                say(f"took up run {run_id}")
            return True
        except httpx.HTTPError as error:
            say(f"server not reachable ({error!r}), trying again")
        if stop_requested(2):
            return False


def attend(worker: subprocess.Popen[bytes], kill_after_s: float) -> bool:
    """Waits for the worker's end; True if it was asked for. A worker that ignores SIGTERM is killed."""
    deadline: float | None = None
    while worker.poll() is None:
        left = 3600.0 if deadline is None else deadline - time.monotonic()
        if left <= 0:
            worker.kill()  # its guards hand their runs back
            worker.wait()
            break
        arrived = signal.sigtimedwait(WAKE_UPS, left)
        if arrived and arrived.si_signo in STOP and deadline is None:
            deadline = time.monotonic() + kill_after_s
            worker.terminate()
    return deadline is not None


def stop_requested(within_s: float) -> bool:
    return signal.sigtimedwait(STOP, within_s) is not None


def worker_environment() -> dict[str, str]:
    """This environment, in which `python` (the deployments' command) is the interpreter that runs here."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])  # noqa: PTH120
    return {**os.environ, "PATH": path}


@contextmanager
def only_one(pool: str) -> Iterator[None]:
    """Held while this host's worker of the pool runs; raises BlockingIOError if another holds it."""
    home = prefect_settings().home
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"worker-{pool}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def prefect_settings() -> Settings:
    from prefect.settings import get_current_settings

    return get_current_settings()


def say(message: str) -> None:
    print(f"sweep: {message}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="Keep one process worker running.")
    parser.add_argument("--pool", default="local", help="work pool (default: %(default)s)")
    parser.add_argument("--kill-after", type=float, default=20, metavar="SECONDS", help="after SIGTERM")
    parser.add_argument("worker_arguments", nargs="*", help="after --, for `prefect worker start`")
    options = parser.parse_args()
    if not prefect_settings().api.url:
        parser.error("no Prefect server: set PREFECT_API_URL, e.g. http://127.0.0.1:4200/api")
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKE_UPS)
    try:
        with only_one(options.pool):
            return supervise(options.pool, options.worker_arguments, kill_after_s=options.kill_after)
    except BlockingIOError:
        say(f"a worker for pool {options.pool!r} is already running on this host: stop it first")
        return 1


if __name__ == "__main__":
    sys.exit(main())
