"""The endpoint: a BentoML service around one raw ASGI application.

`/predict` takes row keys and computes the features at the clock's now from the served store; `/predict_features`
takes raw features. One code path after the look-up. `/info` says what answers, `/openapi.json` how to ask; `/` is for people.
"""

import os
from pathlib import Path

import deploy.imports

SRC = Path(__file__).resolve().parents[1]
deploy.imports.install(SRC)
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # read once, by pyarrow: its own keeps 40 MB after a flood

import asyncio  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Awaitable, Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, TypeVar  # noqa: E402

import bentoml  # noqa: E402
import numpy as np  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402
from starlette.routing import Route  # noqa: E402
from starlette.types import Receive, Scope, Send  # noqa: E402

from deploy.contents import unlike  # noqa: E402
from deploy.front import Front, Straight, Visit, answered, http_error, page, refusal  # noqa: E402
from deploy.lean import Door, eager, hurry, joined, trim  # noqa: E402
from deploy.loaded import Loaded, outside_horizon  # noqa: E402
from deploy.meter import DROPPED, EXPLAINED, OUTSIDE, READY, UNKNOWN, Meter, head, shared_file  # noqa: E402
from deploy.openapi import document  # noqa: E402
from deploy.predictions import Answered, PredictionLog, Private, as_json  # noqa: E402
from deploy.requests import Asked, BadRequest, Field, asked, feature_fields, key_fields  # noqa: E402
from deploy.together import Together  # noqa: E402
from deploy.warm import example, stand_in  # noqa: E402
from features.cells import PUSHED, StoreDown  # noqa: E402
from features.facts import Columns  # noqa: E402
from features.online import OnlineStore, Served, anchor_of, serve_features  # noqa: E402
from features.preprocess import Batch  # noqa: E402
from models.explain import Explainer  # noqa: E402
from pipelines.clock import MISSING, Anchor, Clock, iso, wall_us  # noqa: E402
from pipelines.errors import MillraceError  # noqa: E402
from pipelines.home import Home  # noqa: E402

log = logging.getLogger("millrace.service")
T = TypeVar("T")
STORE_S, ALONE_S = 1.0, 2.0  # how long a store's server is waited for, and left alone after that
EXPLAINING = 4  # requests of a worker that wait to be explained
EXAMPLE_S = 60.0  # how long a row is shown as the example, until another is looked for


@dataclass(frozen=True)
class _Scored:
    """Of some rows: what the model reads, probabilities, features without a value, and categories that training did not know."""

    batch: Batch
    scores: list[float]
    missing: list[list[str]]
    unseen: list[list[str]]


class Endpoint:
    """Everything that one worker needs to answer: model, preprocessing, served store, clock and log."""

    def __init__(self, bundle: Path, home: Path) -> None:
        loaded = Loaded.of(bundle)
        self.spec, self.release, self.defs = loaded.spec, loaded.release, loaded.defs
        self.preprocess, self.model, self.features = loaded.preprocess, loaded.model, loaded.features
        self.key_fields, self.feature_fields = key_fields(self.spec), feature_fields(self.features)
        folder = home / "online" / self.spec.pipeline / self.defs[:16]
        self.store = OnlineStore(self.spec, os.environ.get("MILLRACE_ONLINE") or folder, wait_s=STORE_S)
        self.without_until = 0.0  # the store is not asked before (monotonic)
        self.said = ""
        log_root = Path(os.environ.get("MILLRACE_PREDICTIONS") or home / "predictions" / self.spec.pipeline)
        self.words = (*self.preprocess.categories, *self.preprocess.texts)
        services = Home(home).services(self.spec.pipeline)
        self.private = Private.of(self.spec, services / "log.key")
        self.log = PredictionLog(log_root, self.preprocess.numbers, self.words, self.spec.serve.log_flush, self.private)
        self.explainer = Explainer(self.model, self.preprocess)
        self.beside, self.unexplained = ThreadPoolExecutor(1, "explain"), 0
        workers = int(os.environ.get("MILLRACE_WORKERS", "1"))
        self.meter = Meter(shared_file(services), workers, [f.name for f in self.features], [*self.spec.features.views])
        self.door = Door(self.spec.serve.latency_budget / 1e6, self.meter)
        self.together = Together(self._served)
        self.front = Front(self.spec, home, self.meter, self.door, self.release)
        self.offset_us = int(os.environ.get("MILLRACE_CLOCK_OFFSET_US", "0"))

    def now_us(self) -> int:
        """The clock's now; its anchor is in the served store, and stays while that does not answer."""
        return self._now_by(self._anchor)

    def _now_by(self, read: Callable[[], Anchor]) -> int:
        clock = self.spec.clock
        if clock is None:
            return 0
        anchor = read() if clock.kind == "data" else anchor_of(self.store.last)
        return Clock(clock.kind, clock.speed, clock.offset + self.offset_us, anchor).now_us()

    async def predict(self, body: bytes, visit: Visit) -> dict[str, Any]:
        """Answers for rows named by their keys."""
        took, began, at = self.meter.took, time.monotonic_ns(), time.perf_counter()
        request = self._asked(body, self.key_fields, visit)
        took("parse", parsing := time.perf_counter() - at)
        served, down, looking = await self.together.served(request.rows)
        took("features", looking)
        at = time.perf_counter()
        found, batch = self._predicted(request, served, down, visit, began)
        visit.seconds = parsing + looking + time.perf_counter() - at
        if request.explain:
            await self._explain(found["rows"], batch, request.explain, served.frame)
        return found

    def _asked(self, body: bytes, fields: dict[str, Field], visit: Visit) -> Asked:
        request = asked(body, fields, visit.query)
        if request.explain and self.unexplained >= EXPLAINING:
            said = f"{self.unexplained} requests wait to be explained; come again in a second, or ask without `explain`"
            raise BadRequest(429, said)
        return request

    def _predicted(self, request: Asked, served: Served, down: str, visit: Visit, began: int) -> tuple[dict[str, Any], Batch]:
        rows, now, at = request.rows, served.now, time.perf_counter()
        self._refuse_closed(rows, served)
        self._refuse_conflicts(rows, served)
        scored = self._scored(served.frame, at)
        stale_after, outside = self.spec.serve.stale_after, outside_horizon(self.spec, served.looked.own, now)
        answers: list[dict[str, Any]] = []
        entries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for i, row in enumerate(rows):
            answer = {
                "key": self._key(row),
                **self._answer(scored, i),
                "stale": served.stale(i, stale_after),
                "unknown_entity": bool(served.looked.unknown[i]),
                "outside_horizon": outside[i],
            }
            answers.append(answer)
            given = {k: v for k, v in row.items() if k not in self.spec.row_key}
            extra = {"request": as_json(self.private.given(given)), "event_times": as_json(served.event_times(i)),
                     "snapshot": None if down or self.private.hides(given) else served.looked.snapshot,
                     "pushed": served.looked.pushed}  # fmt: skip
            entries.append((answer, extra))
        self._log("predict", visit.id, now, began, scored.batch, served.frame, entries)
        self._count(answers)
        return {**self._head(visit.id, now), **({"store_down": down} if down else {}), "rows": answers}, scored.batch

    def _scored(self, frame: Columns, at: float) -> _Scored:
        """`at`: when it begins, for the metrics."""
        batch = self.preprocess.transform(frame)
        self.meter.took("preprocess", -at + (at := time.perf_counter()))
        scores = self.model.predict(batch).tolist()
        self.meter.took("model", time.perf_counter() - at)
        return _Scored(batch, scores, *self.preprocess.unknown(frame, batch))

    def _count(self, answers: list[dict[str, Any]]) -> None:
        meter = self.meter
        meter.scored(answer["probability"] for answer in answers)
        for answer in answers:
            meter.flagged(answer["missing"], answer["unseen"], answer.get("stale", ()))
        meter.row[UNKNOWN] += sum(answer.get("unknown_entity", False) for answer in answers)
        meter.row[OUTSIDE] += sum(answer.get("outside_horizon", False) for answer in answers)
        meter.row[DROPPED] = self.log.dropped

    async def _explain(self, answers: list[dict[str, Any]], batch: Batch, count: int, frame: Columns) -> None:
        """Puts into each answer why it is so; the prediction log does without. It takes up to 30 ms a row, in which others are
        answered: a thread does it, one request at a time."""
        self.unexplained += 1
        try:
            if self.explainer.beside:
                shares = await asyncio.get_running_loop().run_in_executor(self.beside, self.explainer.explain, batch)
            else:
                shares = self.explainer.explain(batch)
        finally:
            self.unexplained -= 1
        self.meter.row[EXPLAINED] += len(answers)
        for i, answer in enumerate(answers):
            named, others = shares.top(i, count)
            base = float(shares.base[i])
            contributions = [{"feature": name, "value": self._value(frame, name, i), "log_odds": share} for name, share in named]
            answer["explanation"] = {"log_odds": base + sum(share for _, share in named) + others, "base": base,
                                     "contributions": contributions, "others": others, "exact": shares.exact}  # fmt: skip

    def _value(self, frame: Columns, name: str, row: int) -> Any:
        value = _plain(frame[name][row]) if name in frame else None  # several texts are one name
        return str(value) if value in (float("inf"), float("-inf")) else value  # which JSON lacks, and a user's function may give

    def _served(self, rows: list[dict[str, Any]]) -> tuple[Served, str]:
        """Features by the clock's now; while the store's server does not answer, without it, and what it said."""
        return self._of_store(lambda store: serve_features(store, rows, lambda: self._now_by(store.anchor)))

    def _anchor(self) -> Anchor:
        return self._of_store(OnlineStore.anchor)[0]

    def _of_store(self, read: Callable[[OnlineStore], T]) -> tuple[T, str]:
        """What is read of the store; while its server does not answer, of it without cells, and what it said. One that let us
        wait is left alone for a while: nobody else is to wait for it."""
        if (began := time.monotonic()) >= self.without_until:
            try:
                return read(self.store), ""
            except StoreDown as error:
                log.warning("%s", error)
                self.said, now = str(error), time.monotonic()
                if now - began > STORE_S / 2:
                    self.without_until = now + ALONE_S
        return read(self.store.without_cells()), self.said

    async def predict_features(self, body: bytes, visit: Visit) -> dict[str, Any]:
        """Answers for rows given as features; one that is left out is missing."""
        await asyncio.sleep(0)
        began, at = time.monotonic_ns(), time.perf_counter()
        request = self._asked(body, self.feature_fields, visit)
        found, batch, frame = self._predicted_features(request, visit, began, at)
        visit.seconds = time.perf_counter() - at
        if request.explain:
            await self._explain(found["rows"], batch, request.explain, frame)
        return found

    def _predicted_features(
        self, request: Asked, visit: Visit, began: int, at: float
    ) -> tuple[dict[str, Any], Batch, Columns]:  # fmt: skip
        self.meter.took("parse", -at + (at := time.perf_counter()))
        frame: Columns = {}
        for feature in self.features:
            values = [row.get(feature.name) for row in request.rows]
            if feature.kind == "number":
                frame[feature.name] = np.array([np.nan if v is None else v for v in values], np.float64)
            else:
                frame[feature.name] = np.array(values, object)
        scored = self._scored(frame, at)
        now = self.now_us()
        answers = [self._answer(scored, i) for i in range(len(request.rows))]
        entries: list[tuple[dict[str, Any], dict[str, Any]]] = [({**a, "key": {}}, {}) for a in answers]
        self._log("predict_features", visit.id, now, began, scored.batch, frame, entries)
        self._count(answers)
        return {**self._head(visit.id, now), "rows": answers}, scored.batch, frame

    async def features_at(self, body: bytes, visit: Visit) -> dict[str, Any]:
        """The features that `/predict` would use, without an answer (preflight only)."""
        rows = asked(body, self.key_fields).rows
        served, _ = self._served(rows)
        now = served.now
        scores = self.model.predict(self.preprocess.transform(served.frame))
        return {
            "now_us": now,
            "scores": [float(s) for s in scores],
            "features": {n: [_plain(v) for v in values] for n, values in served.frame.items()},
        }

    def info(self) -> dict[str, Any]:
        """What answers here."""
        self._anchor()
        meta = self.store.last
        return {
            "pipeline": self.spec.pipeline, "question": self.spec.title, "release": self.release,
            "model": self.model.chosen, "engines": self.model.served, "threshold": self.spec.serve.threshold,
            "features": len(self.features), "defs_digest": self.defs,
            "fed": {"snapshot": meta["snapshot"], "until": iso(int(meta["data_us"]))},
            "clock": iso(self.now_us()) if self.spec.timed else None, "freshness_s": self.freshness(),
            "predictions_dropped": self.log.dropped,
        }  # fmt: skip

    def freshness(self) -> dict[str, float]:
        """Seconds from when the newest fact of each view became known until now."""
        newest = json.loads(self.store.last.get("newest", "{}"))
        now, views = self.now_us(), self.spec.features.views.items()
        return {name: (now - newest[view.shape.source]) / 1e6 for name, view in views if view.shape.source in newest}

    def metrics(self) -> str:
        """Numbers for Prometheus, over all workers."""
        self._anchor()
        self.meter.row[DROPPED] = self.log.dropped
        lines = [*self.meter.text(self.release, self.door.of_all()),
                 *head("millrace_view_freshness_seconds", "gauge", "Age of the newest fact that a view knows.")]  # fmt: skip
        lines += [f'millrace_view_freshness_seconds{{view="{view}"}} {age}' for view, age in self.freshness().items()]
        lines += [*head("millrace_pushed_events", "counter", "Pushed events that the served store has taken."),
                  f"millrace_pushed_events {self.store.last.get(PUSHED, 0)}"]  # fmt: skip
        return "\n".join(lines) + "\n"

    def warm(self) -> None:
        """Answers one row by every part, without a trace in log and metrics. Raises what a request would."""
        now = self._now_by(self.store.anchor)
        self.example = example(self.store, self.key_fields, now)
        row = self.example or stand_in(self.key_fields, now)
        served = serve_features(self.store, [row], lambda: self._now_by(self.store.anchor))
        batch = self.preprocess.transform(served.frame)
        score = float(self.model.predict(batch)[0])
        if not 0 <= score <= 1:
            raise MillraceError(f"the model answers {score} to a row of the served store: it cannot serve")
        self.values = {name: _plain(value[0]) for name, value in served.frame.items()}
        self.warmed, self.without_until = time.monotonic(), 0.0  # the store has answered

    def openapi(self) -> dict[str, Any]:
        """How to ask, with a row that the served store has now."""
        if time.monotonic() - self.warmed > EXAMPLE_S:
            self.warmed = time.monotonic()  # one that hangs is not waited for each time
            with suppress(StoreDown):
                self.warm()
        shown = {n: _shown(v, self.key_fields[n].type) for n, v in self.example.items()} if self.example else None
        fields = {"predict": self.key_fields, "predict_features": self.feature_fields}
        return document(self.spec, self.release, fields, self.features, row=shown, values=self.values if shown else None,
                        keys=self.front.keys.wanted)  # fmt: skip

    def _head(self, request_id: str, now: int) -> dict[str, Any]:
        return {"request_id": request_id, "release": self.release, "now": iso(now) if self.spec.timed else None}

    def _answer(self, scored: _Scored, row: int) -> dict[str, Any]:
        score = scored.scores[row]
        return {"probability": score, "decision": score >= self.spec.serve.threshold, "missing": scored.missing[row],
                "unseen": scored.unseen[row]}  # fmt: skip

    def _key(self, row: dict[str, Any]) -> dict[str, Any]:
        return {n: _shown(row[n], self.key_fields[n].type) for n in self.spec.row_key}

    def _refuse_closed(self, rows: list[dict[str, Any]], served: Served) -> None:
        if (due := served.looked.closed_at <= served.now).any():
            closed = np.flatnonzero(due)
            keys = [self._key(rows[i]) for i in closed[:5].tolist()]
            raise BadRequest(409, "already_closed: " + "; ".join(
                f"{as_json(k)} was closed at {iso(int(served.looked.closed_at[i]))}"
                for k, i in zip(keys, closed[:5].tolist(), strict=True)
            ), code="already_closed", rows=closed.tolist())  # fmt: skip

    def _refuse_conflicts(self, rows: list[dict[str, Any]], served: Served) -> None:
        for i, row in enumerate(rows):
            if served.looked.unknown[i]:
                continue
            for name, given in row.items():
                field = self.key_fields[name]
                if field.required or given is None:
                    continue
                stored = served.looked.own[name][i]
                same = stored == given if field.type != "float64" else float(stored) == float(given)
                if not same:
                    shown = as_json(_shown(_plain(stored), field.type))
                    raise BadRequest(422, f"rows[{i}].{name} is not what is stored ({shown}); leave it out")

    def _log(self, route: str, request_id: str, now: int, began: int, batch: Batch, frame: Columns,
             entries: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:  # fmt: skip
        wall, took = wall_us(), (time.monotonic_ns() - began) // 1_000
        logged = []
        for i, (answer, extra) in enumerate(entries):
            values = {
                "request_id": request_id, "row": i, "clock": now if self.spec.timed else wall, "wall": wall,
                "release": self.release, "snapshot": None, "pushed": 0,
                "route": route, "key": as_json(answer["key"]), "request": "{}", "event_times": "{}",
                "unknown_entity": answer.get("unknown_entity", False),
                "outside_horizon": answer.get("outside_horizon", False), "missing": len(answer["missing"]),
                "unseen": len(answer["unseen"]),
                "stale": as_json(answer.get("stale", [])), "score": answer["probability"], "latency_us": took, **extra,
            }  # fmt: skip
            logged.append(values)
        self.log.put(Answered(logged[0]["clock"], logged, batch.numbers, {name: frame[name] for name in self.words}))


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and value != value else value


def _shown(value: Any, kind: str) -> Any:
    """A value of the row as a request writes it."""
    if value is None or (kind == "timestamp" and value == MISSING):
        return None
    if kind == "timestamp":
        return iso(int(value))
    return bool(value) if kind == "bool" else int(value) if kind == "int64" else value


class _Worker:
    """The endpoint of this process, or why there is none yet."""

    endpoint: Endpoint | None = None
    made: Endpoint | None = None  # which may not be ready yet
    why, tried = "it is starting", 0.0

    def get(self) -> Endpoint:
        """Raises MillraceError while the endpoint cannot be had; it is tried again, once a second."""
        if self.endpoint is None and time.monotonic() - self.tried > 1:
            self.make()
        if self.endpoint is None:
            raise MillraceError(f"not ready: {self.why}")
        return self.endpoint

    def make(self) -> None:
        """Raises MillraceError for what will not pass by itself; a store that does not answer does."""
        self.tried = time.monotonic()
        try:
            self.made = self.made or Endpoint(SRC / "bundle", Path(os.environ["MILLRACE_HOME"]))
            self.made.warm()
            self.made.meter.row[READY] = 1.0
            self.endpoint = self.made
            gc.collect()
            gc.freeze()  # what is here to stay: to look through it costs a tenth of a second, now and then
        except StoreDown as down:
            self.why = str(down)
            log.warning("not ready: %s", down)


_worker = _Worker()


class _Post:
    """A route that answers bodies, as an ASGI application."""

    def __init__(self, answer: Callable[[Endpoint, bytes, Visit], Awaitable[dict[str, Any]]], name: str) -> None:
        self.answer, self.name = answer, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            endpoint = _worker.get()
            response = await answered(endpoint.front, scope, receive, partial(self.answer, endpoint), self.name)
        except MillraceError as error:
            response = refusal(BadRequest(503, str(error)), {})
        await response(scope, receive, send)


def _told(tell: Callable[[Endpoint], Response]) -> Callable[[Request], Any]:
    """A route that says something of the endpoint, to those who may ask it."""

    async def handle(request: Request) -> Response:
        try:
            endpoint = _worker.get()
            endpoint.front.admit(request.scope, Visit.of(request.scope))
            return tell(endpoint)
        except BadRequest as error:
            return refusal(error, {})
        except MillraceError as error:
            return refusal(BadRequest(503, str(error)), {})

    return handle


POSTS = {f"/{name}": _Post(answer, name) for name, answer in (("predict", Endpoint.predict),
                                                              ("predict_features", Endpoint.predict_features))}  # fmt: skip


def _app() -> Starlette:
    async def shown(request: Request) -> Response:
        return page()

    async def modules(request: Request) -> JSONResponse:
        return JSONResponse(deploy.imports.proof(SRC))

    openapi = _told(lambda endpoint: JSONResponse(endpoint.openapi()))
    routes = [
        *(Route(path, post, methods=["POST"]) for path, post in POSTS.items()),  # for what is no POST
        Route("/info", _told(lambda endpoint: JSONResponse(endpoint.info()))),
        Route("/metrics", _told(lambda endpoint: Response(endpoint.metrics(), media_type="text/plain; version=0.0.4"))),
        *(Route(path, openapi) for path in ("/openapi.json", "/docs.json")),
        *(Route(path, shown) for path in ("/", "/docs")),
    ]
    if os.environ.get("MILLRACE_PREFLIGHT"):
        routes += [
            Route("/preflight/features", _Post(Endpoint.features_at, "preflight"), methods=["POST"]),
            Route("/preflight/modules", modules),
        ]
    return Starlette(routes=routes, exception_handlers={HTTPException: http_error})


sys.setswitchinterval(0.001)  # s: within which the log's thread lets an answer go on
trim()
hurry()
joined()
eager()


@bentoml.asgi_app(_app(), path="/")
@bentoml.service(
    name="millrace", workers=int(os.environ.get("MILLRACE_WORKERS", "1")), traffic={"timeout": 30},
    metrics={"enabled": False}, logging={"access": {"enabled": False}}, monitoring={"enabled": False},
)  # fmt: skip
class Millrace:
    def __init__(self) -> None:
        if wrong := unlike(SRC):
            raise MillraceError(wrong)
        _worker.make()

    async def __is_ready__(self) -> bool:
        """What BentoML's /readyz asks."""
        try:
            meter = _worker.get().meter
            if left := meter.awaited():
                raise MillraceError(f"not ready: {left} of {meter.wanted} workers are starting")
        except MillraceError as error:
            raise HTTPException(503, str(error)) from None
        return True

    @bentoml.on_shutdown
    def stop(self) -> None:
        if _worker.made is not None:
            _worker.made.log.close()


Millrace.add_asgi_middleware(Straight, posts=POSTS)  # type: ignore[attr-defined]  # of what `service` makes of it
