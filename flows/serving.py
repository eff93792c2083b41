"""What runs on this machine: the endpoint of each pipeline, the Prefect server and its worker."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.process import Service, free_port, port_is_free, reason, remember, running, start, stop
from deploy.rollout import Release, bento_folder, champion, feed_elsewhere
from features.online import served_store
from pipelines.errors import MillraceError
from pipelines.home import Home, process_env
from pipelines.manifest import ROOT
from pipelines.spec import Spec

RULES = ("access_log", "api_keys", "rate_limit")  # of `serve`: they hold from the next `millrace serve`, for any release
SERVER, WORKER = "prefect-server", "prefect-worker"


def serve_champion(home: Home, spec: Spec, *, port: int | None, background: bool) -> Service | None:
    """The endpoint of the champion: the one that runs, if it serves that release, else a new one.

    In the foreground it returns None when the endpoint was stopped.
    """
    release = champion(home, spec.pipeline)
    if release is None:
        raise MillraceError(f"{spec.pipeline} has no champion to serve: type `millrace run {spec.pipeline}`")
    offset = spec.clock.offset if spec.clock else 0
    now = running(home, spec.pipeline)
    wanted = port if port is not None else spec.serve.port
    if wanted == 0:  # any
        wanted = now.port if now is not None and background else free_port()
    rules = _rules(spec)
    if now is not None:
        same = now.release == release.release and now.port == wanted and now.offset_us == offset and now.rules == rules
        if background and same:
            if spec.timed and running(home, admin_name(spec.pipeline)) is None:
                _start_admin(home, spec, release, offset)
            return now
        stop_all(home, spec.pipeline)
    extra = {"MILLRACE_CLOCK_OFFSET_US": str(offset), "MILLRACE_WORKERS": str(spec.serve.workers),
             "MILLRACE_RULES": rules}  # fmt: skip
    if spec.serve.store:
        feed_elsewhere(home, spec.pipeline, spec.serve.store)  # nothing where a run has done it
        extra["MILLRACE_ONLINE"] = str(_store(home, spec, release))
    if spec.timed:
        _start_admin(home, spec, release, offset)
    log = home.services(spec.pipeline) / "endpoint.log"
    service = start(home, bento_folder(home, release), port=wanted, release=release.release, log=log, extra=extra)
    remember(home, spec.pipeline, service)
    if background:
        return service
    taking = running(home, admin_name(spec.pipeline))
    print(f"{release.release} answers on {service.url} (Ctrl-C stops it)" +
          (f"; it takes events on {taking.url}/push" if taking else ""), file=sys.stderr, flush=True)  # fmt: skip
    try:
        while service.alive():
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        stop_all(home, spec.pipeline)
    return None


def _rules(spec: Spec) -> str:
    return json.dumps({name: getattr(spec.serve, name) for name in RULES})


def _store(home: Home, spec: Spec, release: Release) -> Path | str:
    return served_store(spec.serve.store, spec.pipeline, home.online(spec.pipeline, release.defs_digest))


def _start_admin(home: Home, spec: Spec, release: Release, offset_us: int) -> None:
    """The process that takes events into the store of the endpoint; it needs a second until it answers."""
    port = spec.serve.admin_port or free_port()
    _spawn(home, admin_name(spec.pipeline), ["deploy.admin", spec.pipeline, str(_store(home, spec, release)), str(port)], port,
           {"MILLRACE_CLOCK_OFFSET_US": str(offset_us), "MILLRACE_RULES": _rules(spec)})  # fmt: skip


def admin_name(pipeline: str) -> str:
    """Under which name the admin process of a pipeline's endpoint is remembered."""
    return f"{pipeline}.admin"


def stop_all(home: Home, pipeline: str | None) -> list[str]:
    """Stops the endpoint of one pipeline, or every process of the home; names what was stopped."""
    every = sorted(p.name for p in (home.root / "services").glob("*") if p.is_dir())
    names = [pipeline, admin_name(pipeline)] if pipeline else every
    stopped = []
    for name in names:
        service = running(home, name)
        if service is not None:
            stop(service)
            stopped.append(f"{name} on port {service.port}")
    return stopped


def status_of(home: Home) -> dict[str, Any]:
    """Champion and endpoint of every pipeline, and the Prefect server."""
    pipelines = sorted({p.name for kind in ("releases", "runs", "services") for p in (home.root / kind).glob("*")})
    found: dict[str, Any] = {}
    lines = []
    for name in pipelines:
        release, service = champion(home, name), running(home, name)
        if release is None and service is None:
            continue
        found[name] = {"champion": release.release if release else "", "endpoint": asdict(service) if service else None}
        where = f"{service.release} answers on {service.url}" if service else "no endpoint runs"
        lines.append(f"{name}: champion {release.release}; {where}" if release else f"{name}: {where}")
    return {"text": "\n".join(lines) or "nothing was released yet and nothing runs", "pipelines": found}


@dataclass(frozen=True)
class Started:
    """What `up` started: lines for a person, and the address of the UI."""

    lines: tuple[str, ...]
    ui: str


def start_prefect(home: Home, *, port: int, worker: bool) -> Started:
    """The home's Prefect server, and a worker over the deployments of prefect.yaml; both stay running."""
    server = running(home, SERVER) or spawn_server(home, port)
    wait_for_server(server)
    lines = [f"Prefect UI: {server.url}"]
    if worker and running(home, WORKER) is None:
        lines.append(_start_worker(home, f"{server.url}/api"))
    return Started(tuple(lines), server.url)


def spawn_server(home: Home, port: int, *, tied: bool = False) -> Service:
    """Starts the home's Prefect server with its UI; it needs seconds until it answers. `tied`: it dies with us."""
    if not port_is_free(port):
        raise MillraceError(f"port {port} is taken; stop what listens there, or type `millrace up --port PORT`")
    url = f"http://127.0.0.1:{port}"
    env = {
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_API_URL": f"{url}/api",
        # slots that runs hold outlive the server; in memory they would be lost with it, and the runs cancelled
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    return _spawn(home, SERVER, ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], port, env, tied=tied)


def wait_for_server(server: Service, *, wait_s: float = 120) -> None:
    """Returns when the Prefect server answers. Raises MillraceError with its last words if it does not."""
    deadline = time.monotonic() + wait_s
    while server.alive() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.url}/api/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    stop(server)
    log = Path(server.log)
    raise MillraceError(f"the Prefect server on port {server.port} does not answer: {reason(log)} (log: {log})")


def _start_worker(home: Home, api: str) -> str:
    env = {**os.environ, **process_env(home), "PREFECT_API_URL": api, "PWD": str(ROOT)}
    for command in (
        ["prefect", "work-pool", "create", "local", "--type", "process", "--overwrite"],
        ["prefect", "--no-prompt", "deploy", "--all"],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise MillraceError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
    _spawn(home, WORKER, ["flows.sweep", "--pool", "local"], 0, {"PREFECT_API_URL": api})
    return "worker: takes the schedules of prefect.yaml"


def _die_with_parent() -> None:
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _spawn(
    home: Home, name: str, command: list[str], port: int, extra: dict[str, str], *, tied: bool = False
) -> Service:  # fmt: skip
    log = home.services(name) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **process_env(home), **extra}
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True,
            preexec_fn=_die_with_parent if tied else None,
        )  # fmt: skip
    service = Service(process.pid, psutil.Process(process.pid).create_time(), port, name, str(log))
    remember(home, name, service)
    return service
