"""`python -m flows.guard` runs `python -m prefect.engine`, again in the same flow run if a signal killed it.

The process worker starts it instead of the engine (`command` in prefect.yaml). It starts in milliseconds,
because it imports the standard library only, and holds nothing that could die with the flow. Linux only.
"""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

RUN_ID_VARIABLE = "PREFECT__FLOW_RUN_ID"
UNFINISHED = ["PENDING", "RUNNING", "SCHEDULED"]
AWAY = (OSError, http.client.HTTPException)
WAKE_UPS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Api:
    """Prefect's REST API, patient while the server is away."""

    url: str
    headers: Mapping[str, str]

    @classmethod
    def from_environment(cls) -> Api:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("PREFECT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        elif password := os.environ.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
        return cls(required("PREFECT_API_URL").rstrip("/"), headers)

    def call(self, method: str, path: str, body: object = None, *, patience_s: float = 600) -> Any:
        """The decoded answer; raises when the server refuses, or stays away for `patience_s`."""
        data = None if body is None else json.dumps(body).encode()
        give_up = time.monotonic() + patience_s
        while True:
            request = urllib.request.Request(self.url + path, data, dict(self.headers), method=method)
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return json.load(answer)
            except AWAY as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if refused or time.monotonic() > give_up:
                    raise
            time.sleep(1)


@dataclass
class Guard:
    """One flow run: its engine process, and what to do when that ends."""

    api: Api
    run_id: str
    restarts: int
    parent: int = field(default_factory=os.getppid)
    cancelled: bool = False
    given_back: bool = False

    def run(self) -> int:
        """The exit code for the worker; by then the flow run is finished or handed back."""
        attempt, restarted_at = 0, ""
        while True:
            code = self.attend(start(engine_command(), engine_environment(first=attempt == 0)), attempt)
            if self.given_back:
                self.give_back()
                return 0
            if code >= 0:
                if restarted_at:
                    self.close_task_runs("left by a killed process", started_before=restarted_at)
                return code
            state = self.state()
            if state["type"] == "CANCELLING":
                self.close_task_runs("cancelled")
                self.set_state({"type": "CANCELLED", "name": "Cancelled", "message": "cancelled"})
                return 0
            if state["type"] not in ("PENDING", "RUNNING") or attempt >= self.restarts:
                say(f"flow process died by signal {-code}, run is {state['name']}, not restarted")
                return 128 - code
            time.sleep(2 * attempt)
            attempt += 1
            restarted_at = datetime.now(UTC).isoformat()
            self.reopen(state, f"process died by signal {-code}; restart {attempt} of {self.restarts}")

    def attend(self, engine: subprocess.Popen[bytes], attempt: int) -> int:
        """The engine's exit code, negative for a signal; by then nothing of its process group is left."""
        while (code := engine.poll()) is None:
            match signal.sigwaitinfo(WAKE_UPS).si_signo:
                case signal.SIGTERM | signal.SIGINT:
                    self.stop(engine, attempt)
                case signal.SIGUSR1 if os.getppid() != self.parent:
                    self.given_back = True
                    kill_group(engine)
        if code < 0 or self.given_back:
            kill_group(engine)
        return code

    def stop(self, engine: subprocess.Popen[bytes], attempt: int) -> None:
        """Ends the engine: as a cancellation if the run is being cancelled, else to be resumed."""
        if self.cancelled or self.given_back:
            return
        try:
            self.cancelled = self.state(patience_s=5)["type"] == "CANCELLING"
        except AWAY:
            say("server not reachable while stopping; the next sweep takes the run up")
        if self.cancelled and attempt == 0:
            engine.terminate()  # told of the cancellation by the worker, it runs the flow's hooks
            return
        # A restarted engine cannot be told (the worker's token is single-use) and would end as Crashed.
        self.given_back = not self.cancelled
        kill_group(engine)

    def give_back(self) -> None:
        """The worker is stopping or gone: the pool's next worker resumes the run, finished tasks cached."""
        message = "worker stopped; run handed back"
        # A worker with --limit that looks ahead, and meets a run that it still holds, dies of it.
        wait = timedelta(seconds=15 if os.getppid() == self.parent else 0)
        with suppress(*AWAY):
            if self.state(patience_s=5)["type"] in ("PENDING", "RUNNING"):
                self.close_task_runs(message, patience_s=5)
                details = {"scheduled_time": (datetime.now(UTC) + wait).isoformat()}
                retry: dict[str, object] = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": message}
                self.set_state({**retry, "state_details": details}, patience_s=5)

    def reopen(self, state: Mapping[str, Any], message: str) -> None:
        """Sets the run back to Pending: from Scheduled a worker would start a second process for it."""
        say(message)
        self.close_task_runs(message)
        # A forced state drops the lease: the deployment's slot would be free again in the middle of the run.
        lease = state["state_details"].get("deployment_concurrency_lease_id")
        details = {"deployment_concurrency_lease_id": lease}
        self.set_state({"type": "PENDING", "name": "Pending", "message": message, "state_details": details})

    def close_task_runs(self, message: str, *, started_before: str | None = None, patience_s: float = 600) -> None:
        """Ends as Crashed what the dead process had begun; the UI would show it running for good."""
        wanted: dict[str, object] = {"state": {"type": {"any_": UNFINISHED}}}
        if started_before:
            wanted["start_time"] = {"before_": started_before}
        query = {"flow_runs": {"id": {"any_": [self.run_id]}}, "task_runs": wanted}
        for task_run in self.api.call("POST", "/task_runs/filter", query, patience_s=patience_s):
            body = {"state": {"type": "CRASHED", "name": "Crashed", "message": message}, "force": True}
            self.api.call("POST", f"/task_runs/{task_run['id']}/set_state", body, patience_s=patience_s)

    def state(self, *, patience_s: float = 600) -> dict[str, Any]:
        answer = self.api.call("GET", f"/flow_runs/{self.run_id}", patience_s=patience_s)
        return dict(answer["state"])

    def set_state(self, state: Mapping[str, object], *, patience_s: float = 600) -> None:
        body = {"state": state, "force": True}
        self.api.call("POST", f"/flow_runs/{self.run_id}/set_state", body, patience_s=patience_s)


def engine_command() -> list[str]:
    return [sys.executable, "-m", "prefect.engine"]


def engine_environment(*, first: bool) -> dict[str, str]:
    """The environment without the worker's control channel, once its single-use token is spent."""
    return {k: v for k, v in os.environ.items() if first or not k.startswith("PREFECT__CONTROL_")}


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own that dies with this one; the caller awaits WAKE_UPS, blocked."""
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # died before prctl could take effect
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKE_UPS)

    return subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=before_exec)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process from `start` and what it left: orphaned ranks would write beside the new ones."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def say(message: str) -> None:
    with suppress(OSError):  # the worker that read this pipe may be gone
        print(f"guard: {message}", file=sys.stderr, flush=True)


def required(variable: str) -> str:
    if value := os.environ.get(variable):
        return value
    raise SystemExit(f"guard: {variable} is not set; a Prefect worker starts this, see prefect.yaml")


def restart_limit() -> int:
    value = os.environ.get("GUARD_RESTARTS", "3")
    if value.isdecimal():
        return int(value)
    raise SystemExit(f"guard: GUARD_RESTARTS is {value!r}; a whole number was expected")


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKE_UPS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)  # sent when the worker dies
    return Guard(Api.from_environment(), required(RUN_ID_VARIABLE), restart_limit()).run()


if __name__ == "__main__":
    sys.exit(main())
