"""What answers behind the proxy. One function, `reconcile`, makes what runs what the release log wants; whoever was killed at
whatever moment, the next one to call it finishes the work.

Nothing is lost on the way: an endpoint gets traffic once the proxy has seen it ready, and is stopped when it has answered
everything that it was asked.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from deploy.process import Service, free_port, running, spawn, start, stop, wait_until_ready
from deploy.proxy import SLOTS, Place, Proxy
from deploy.rollout import (
    Release,
    bento_folder,
    champion,
    feed_elsewhere,
    find_release,
    promote,
    rollback,
    rollback_target,
    settle,
    stages_of,
)
from deploy.stages import CANARY, SHADOW, under_way
from features.online import served_store
from pipelines.errors import MillraceError
from pipelines.home import Home
from pipelines.manifest import lock, read_json, write_json
from pipelines.spec import Spec

log = logging.getLogger("millrace.live")
SLOT = "MILLRACE_SLOT"  # in the environment of an endpoint: which one it is
WORKER = "_bentoml_impl.worker.service"  # the module that BentoML runs a worker by
RULES = ("access_log", "api_keys", "rate_limit")  # of `serve`: they hold from the next `millrace serve`, for any release


@dataclass(frozen=True)
class Serving:
    """How a pipeline is served, as `millrace serve` was told."""

    port: int
    offset_us: int
    workers: int
    store: str
    sticky: str
    log_port: int
    admin: bool
    admin_port: int
    rules: str


@dataclass(frozen=True)
class Role:
    """An endpoint that is wanted: its release, its share of the traffic in percent, and whether it only answers copies."""

    release: Release
    share: int
    shadow: bool = False


class NotReady(MillraceError):
    """A challenger did not come up; the champion answers on."""


def rules_of(spec: Spec) -> str:
    """By which rules requests are let in (JSON)."""
    return json.dumps({name: getattr(spec.serve, name) for name in RULES})


def slot_name(pipeline: str, slot: str) -> str:
    """Under which name the endpoint of a slot is remembered."""
    return f"{pipeline}.{slot}"


def admin_name(pipeline: str) -> str:
    """Under which name the process that takes a pipeline's events is remembered."""
    return f"{pipeline}.admin"


def store_of(home: Home, pipeline: str, release: Release, at: str) -> Path | str:
    """Where the rows that a release reads are served from."""
    return served_store(at, pipeline, home.online(pipeline, release.defs_digest))


def wanted(home: Home, pipeline: str) -> list[Role]:
    """Who is to answer, the champion first."""
    now = champion(home, pipeline)
    if now is None:
        raise MillraceError(f"{pipeline} has no champion to serve: type `millrace run {pipeline}`")
    coming = under_way(stages_of(home, pipeline))
    if coming is None or coming.state not in (SHADOW, CANARY):
        return [Role(now, 100)]
    challenger = Role(find_release(home, pipeline, coming.release), coming.share, coming.state == SHADOW)
    return [Role(now, 100 - coming.share), challenger]


def serving(home: Home, pipeline: str) -> Serving | None:
    """How a pipeline is served behind its proxy; None where it is not."""
    proxy = Proxy(home, pipeline)
    path = proxy.folder / "serving.json"
    if proxy.running() is None or not path.is_file():
        return None
    body = read_json(path)
    del body["format_version"]
    return Serving(**body)


def serve_live(home: Home, spec: Spec, port: int) -> Service:
    """The pipeline's proxy, with what the release log wants behind it."""
    assert spec.serve.rollout is not None
    proxy, pipeline = Proxy(home, spec.pipeline), spec.pipeline
    offset = spec.clock.offset if spec.clock else 0
    told = Serving(port, offset, spec.serve.workers, spec.serve.store, spec.serve.rollout.sticky or "", free_port(), spec.timed,
                   spec.serve.admin_port or free_port(), rules_of(spec))  # fmt: skip
    if spec.serve.store:
        feed_elsewhere(home, pipeline, spec.serve.store)  # nothing where a run has done it
    write_json(proxy.folder / "serving.json", asdict(told))
    proxy.write({}, port=told.port, log_port=told.log_port, sticky=told.sticky)
    service = proxy.start(told.port)
    try:
        reconcile(home, pipeline)
    except NotReady as error:  # the champion answers; who drives the rollout will take the challenger back
        log.warning("%s", error)
    except BaseException:
        stop(service, grace_s=2)
        raise
    return service


def endpoints(home: Home, pipeline: str) -> dict[str, Service]:
    """The endpoints that run, by slot."""
    found = {slot: running(home, slot_name(pipeline, slot)) for slot in SLOTS}
    return {slot: service for slot, service in found.items() if service}


def place_of(runs: dict[str, Service], role: Role, offset_us: int) -> str:
    """The slot that holds what is wanted; empty where none does."""
    told = (role.release.release, role.shadow, offset_us)
    return next((slot for slot, s in runs.items() if (s.release, s.shadow, s.offset_us) == told), "")


def reconcile(home: Home, pipeline: str) -> None:
    """Makes endpoints, proxy and admin process what the log wants. Does nothing where no proxy serves the pipeline.

    Raises NotReady when a challenger's endpoint does not come up, MillraceError when the champion's does not.
    """
    with lock(home.lock(f"live-{pipeline}"), what=f"a change of what serves {pipeline}", wait=True):
        told = serving(home, pipeline)
        if told is None:
            return
        settle(home, pipeline)
        roles = wanted(home, pipeline)
        slot, service = _hold(home, pipeline, told, roles[0])
        held, runs, failed = {slot: roles[0]}, {slot: service}, None
        for role in roles[1:]:
            try:
                slot, runs[slot] = _hold(home, pipeline, told, role)
                held[slot] = role
            except MillraceError as error:
                failed, held = NotReady(str(error)), {slot: replace(r, share=100) for slot, r in held.items()}
        _turn(home, pipeline, told, held, runs)
        _admin(home, pipeline, told, roles[0].release)
        if failed:
            raise failed


def prepare(home: Home, pipeline: str, release: Release) -> None:
    """Starts a release's endpoint beside those that answer, so that it can take over at once. Raises NotReady."""
    with lock(home.lock(f"live-{pipeline}"), what=f"a change of what serves {pipeline}", wait=True):
        told = serving(home, pipeline)
        if told is not None:
            try:
                _hold(home, pipeline, told, Role(release, 0))
            except MillraceError as error:
                raise NotReady(str(error)) from error


def promote_now(
    home: Home, pipeline: str, release: Release, *, why: str, expected: str | None = None, seen: Mapping[str, Any] | None = None
) -> bool:  # fmt: skip
    """Makes a release champion, and what it answers with takes over without a request lost. False when it was champion.

    Raises NotReady with the champion untouched, Refused when the champion has changed meanwhile.
    """
    if expected is None:
        now = champion(home, pipeline)
        expected = now.release if now else ""
    prepare(home, pipeline, release)
    moved = promote(home, pipeline, release, expected=expected, why=why, seen=seen)
    reconcile(home, pipeline)
    return moved


def roll_back(home: Home, pipeline: str, *, to: str | None, why: str, at: str = "") -> Release:
    """Makes an earlier release champion again, by its own features and their store; behind the proxy without a request lost."""
    settle(home, pipeline)
    prepare(home, pipeline, rollback_target(home, pipeline, to))
    release = rollback(home, pipeline, to=to, why=why)
    feed_elsewhere(home, pipeline, at)  # nothing where it is one of the last champions
    reconcile(home, pipeline)
    return release


def cut_off(home: Home, pipeline: str, release: str) -> None:
    """Gives the traffic of a challenger back to the champion, at once."""
    for slot, service in endpoints(home, pipeline).items():
        if service.release == release:
            Proxy(home, pipeline).tell(f"set weight b/{slot} 0")


def kill(home: Home, pipeline: str, release: str) -> None:
    """Ends a challenger's endpoints without waiting: what they were asked and had not answered, the proxy asks the champion."""
    for service in endpoints(home, pipeline).values():
        if service.release == release:
            stop(service, grace_s=0)


def _hold(home: Home, pipeline: str, told: Serving, role: Role) -> tuple[str, Service]:
    """The slot in which an endpoint for the role is ready, and that endpoint."""
    runs = endpoints(home, pipeline)
    slot = place_of(runs, role, told.offset_us)
    if slot:
        return slot, wait_until_ready(runs[slot])
    free = next((s for s in SLOTS if s not in runs), "")
    if not free:  # a champion, a canary and a shadow of before leave one
        raise MillraceError(f"all endpoints of {pipeline} are taken ({', '.join(s.release for s in runs.values())})")
    return free, _start(home, pipeline, told, role, free)


def _start(home: Home, pipeline: str, told: Serving, role: Role, slot: str) -> Service:
    name = slot_name(pipeline, slot)
    folder = home.services(name)
    shutil.rmtree(folder, ignore_errors=True)
    extra = {"MILLRACE_CLOCK_OFFSET_US": str(told.offset_us), "MILLRACE_WORKERS": str(told.workers),
             "MILLRACE_RULES": told.rules, SLOT: name}  # fmt: skip
    if told.store:
        extra["MILLRACE_ONLINE"] = str(store_of(home, pipeline, role.release, told.store))
    if role.shadow:
        extra |= {"MILLRACE_PREDICTIONS": str(folder / "shadow"), "MILLRACE_WORKERS": "1",
                  "MILLRACE_RULES": json.dumps({"api_keys": False, "rate_limit": 0.0})}  # fmt: skip
    return start(home, bento_folder(home, role.release), port=free_port(), release=role.release.release,
                 log=folder / "endpoint.log", extra=extra, name=name, shadow=role.shadow)  # fmt: skip


def _end(home: Home, pipeline: str, slot: str) -> None:
    """Stops a slot's endpoint and forgets what it logged in the shadow; its last words stay."""
    service, folder = endpoints(home, pipeline).get(slot), home.services(slot_name(pipeline, slot))
    if service:
        stop(service)
    shutil.rmtree(folder / "shadow", ignore_errors=True)


def _turn(home: Home, pipeline: str, told: Serving, held: dict[str, Role], runs: dict[str, Service]) -> None:
    """Brings the traffic to those who hold a role, and ends all others. One that has died since is the proxy's and the
    driver's to see."""
    proxy = Proxy(home, pipeline)
    asked = {slot: role for slot, role in held.items() if not role.shadow}
    places = {slot: Place(runs[slot].port, role.share) for slot, role in asked.items()}
    proxy.write(places, port=told.port, log_port=told.log_port, sticky=told.sticky)  # before: what a new proxy begins with
    for slot, place in places.items():
        proxy.open(slot, place.port)
    proxy.weigh({slot: place.weight for slot, place in places.items()})
    for slot, row in proxy.stat().items():
        if slot not in places and not row["status"].startswith("MAINT"):
            proxy.close(slot)
    for slot in SLOTS:
        if slot not in held:
            _end(home, pipeline, slot)
    for stray in _strays(home, pipeline):
        stray.terminate()


def _strays(home: Home, pipeline: str) -> list[psutil.Process]:
    """Endpoints that nobody remembers: who started them was killed before he could write them down. And workers whose endpoint
    was killed as it started them, before they were tied to it."""
    names, known, found = {slot_name(pipeline, slot) for slot in SLOTS}, {s.pid for s in endpoints(home, pipeline).values()}, []
    every = [(process, {*(process.info["cmdline"] or ())}) for process in psutil.process_iter(["cmdline", "ppid"])]
    serving = {process.pid for process, words in every if {"bentoml", "serve"} <= words}
    for process, words in every:
        if process.pid in serving - known or (WORKER in words and process.info["ppid"] not in serving):
            with suppress(psutil.Error):  # it has ended, or is somebody else's
                env = process.environ()
                if env.get(SLOT) in names and env.get("MILLRACE_HOME") == str(home.root):
                    found.append(process)
    return found


def _admin(home: Home, pipeline: str, told: Serving, release: Release) -> None:
    """The process that takes events, into the champion's store."""
    if not told.admin:
        return
    store, now = str(store_of(home, pipeline, release, told.store)), running(home, admin_name(pipeline))
    if now is not None and now.release != f"{store} {told.offset_us}":
        stop(now)
        now = None
    if now is None:
        spawn_admin(home, pipeline, store, told.admin_port, told.offset_us, told.rules)


def spawn_admin(home: Home, pipeline: str, store: str, port: int, offset_us: int, rules: str) -> Service:
    """The process that takes events into a store; it needs a second until it answers."""
    extra = {"MILLRACE_CLOCK_OFFSET_US": str(offset_us), "MILLRACE_RULES": rules}
    return spawn(home, admin_name(pipeline), ["deploy.admin", pipeline, store, str(port)], port, extra,
                 release=f"{store} {offset_us}")  # fmt: skip


def memory_mb(service: Service) -> float:
    """What an endpoint's processes hold in memory; 0 where it has died."""
    try:
        parent = psutil.Process(service.pid)
        return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 1e6
    except psutil.NoSuchProcess:
        return 0.0
