"""The endpoint: a BentoML service around one raw ASGI application.

`/predict` takes row keys and computes the features at the clock's now from the served store; `/predict_features`
takes raw features. One code path after the look-up. `/info` says what answers.
"""

from pathlib import Path

import deploy.imports

SRC = Path(__file__).resolve().parents[1]
deploy.imports.install(SRC)

import asyncio  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

import bentoml  # noqa: E402
import numpy as np  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402
from starlette.routing import Route  # noqa: E402

from deploy.contents import unlike  # noqa: E402
from deploy.lean import READ_S, Door, trim  # noqa: E402
from deploy.loaded import Loaded, outside_horizon  # noqa: E402
from deploy.predictions import Entry, PredictionLog, as_json  # noqa: E402
from deploy.requests import MAX_BYTES, BadRequest, feature_fields, key_fields, parse  # noqa: E402
from features.cells import PUSHED, StoreDown  # noqa: E402
from features.facts import Columns  # noqa: E402
from features.frame import is_missing  # noqa: E402
from features.online import OnlineStore, Served, serve_features  # noqa: E402
from pipelines.clock import MISSING, Anchor, Clock, iso, wall_us  # noqa: E402
from pipelines.errors import MillraceError  # noqa: E402

log = logging.getLogger("millrace.service")


class Endpoint:
    """Everything that one worker needs to answer: model, preprocessing, served store, clock and log."""

    def __init__(self, bundle: Path, home: Path) -> None:
        loaded = Loaded.of(bundle)
        self.spec, self.release, self.defs = loaded.spec, loaded.release, loaded.defs
        self.preprocess, self.model, self.features = loaded.preprocess, loaded.model, loaded.features
        self.key_fields, self.feature_fields = key_fields(self.spec), feature_fields(self.features)
        folder = home / "online" / self.spec.pipeline / self.defs[:16]
        self.store = OnlineStore(self.spec, os.environ.get("MILLRACE_ONLINE") or folder)
        log_root = Path(os.environ.get("MILLRACE_PREDICTIONS") or home / "predictions" / self.spec.pipeline)
        words = [*self.preprocess.categories, *self.preprocess.texts]
        self.log = PredictionLog(log_root, list(self.preprocess.numbers), words, self.spec.serve.log_flush)
        self.door = Door(self.spec.serve.latency_budget / 1e6)
        self.offset_us = int(os.environ.get("MILLRACE_CLOCK_OFFSET_US", "0"))

    def now_us(self) -> int:
        """The clock's now; its anchor is in the served store, and stays while that does not answer."""
        clock = self.spec.clock
        if clock is None:
            return 0
        anchor = self._anchor() if clock.kind == "data" else None
        return Clock(clock.kind, clock.speed, clock.offset + self.offset_us, anchor).now_us()

    def predict(self, body: bytes) -> dict[str, Any]:
        """Answers for rows named by their keys."""
        began, rows = time.monotonic_ns(), parse(body, self.key_fields)
        served, down = self._served(rows)
        now = served.now
        self._refuse_closed(rows, served)
        self._refuse_conflicts(rows, served)
        batch = self.preprocess.transform(served.frame)
        scores, unseen = self.model.predict(batch), self.preprocess.unseen(served.frame, batch)
        stale_after, outside = self.spec.serve.stale_after, outside_horizon(self.spec, served.looked.own, now)
        answers: list[dict[str, Any]] = []
        entries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        request_id = uuid.uuid4().hex
        for i, row in enumerate(rows):
            answer = {
                "key": self._key(row),
                **self._answer(float(scores[i])),
                "missing": served.missing(i),
                "unseen": unseen[i],
                "stale": served.stale(i, stale_after),
                "unknown_entity": bool(served.looked.unknown[i]),
                "outside_horizon": bool(outside[i]),
            }
            answers.append(answer)
            given = {k: v for k, v in row.items() if k not in self.spec.row_key}
            extra = {"request": as_json(given), "event_times": as_json(served.event_times(i)),
                     "snapshot": None if down else served.looked.snapshot,
                     "pushed": served.looked.pushed}  # fmt: skip
            entries.append((answer, extra))
        self._log("predict", request_id, now, began, served.frame, entries)
        return {**self._head(request_id, now), **({"store_down": down} if down else {}), "rows": answers}

    def _served(self, rows: list[dict[str, Any]]) -> tuple[Served, str]:
        """Features by the clock's now; while the store's server does not answer, without it, and what it said."""
        try:
            return serve_features(self.store, rows, self.now_us), ""
        except StoreDown as down:
            log.warning("%s", down)
            return serve_features(self.store.without_cells(), rows, self.now_us()), str(down)

    def _anchor(self) -> Anchor:
        try:
            return self.store.anchor()
        except StoreDown:
            return self.store.without_cells().anchor()

    def predict_features(self, body: bytes) -> dict[str, Any]:
        """Answers for rows given as features; one that is left out is missing."""
        began, rows = time.monotonic_ns(), parse(body, self.feature_fields)
        frame: Columns = {}
        for feature in self.features:
            values = [row.get(feature.name) for row in rows]
            if feature.kind == "number":
                frame[feature.name] = np.array([np.nan if v is None else v for v in values], np.float64)
            else:
                frame[feature.name] = np.array(values, object)
        batch = self.preprocess.transform(frame)
        scores, unseen = self.model.predict(batch), self.preprocess.unseen(frame, batch)
        now, request_id = self.now_us(), uuid.uuid4().hex
        answers = [
            {**self._answer(float(s)), "missing": [n for n, v in frame.items() if is_missing(v[i : i + 1])[0]],
             "unseen": unseen[i]}
            for i, s in enumerate(scores)
        ]  # fmt: skip
        entries: list[tuple[dict[str, Any], dict[str, Any]]] = [({**a, "key": {}}, {}) for a in answers]
        self._log("predict_features", request_id, now, began, frame, entries)
        return {**self._head(request_id, now), "rows": answers}

    def features_at(self, body: bytes) -> dict[str, Any]:
        """The features that `/predict` would use, without an answer (preflight only)."""
        rows = parse(body, self.key_fields)
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
            "model": self.model.chosen, "engines": self.model.served, "features": len(self.features), "defs_digest": self.defs,
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
        """Numbers for Prometheus."""
        self._anchor()
        lines = ["# HELP millrace_view_freshness_seconds Age of the newest fact that a view knows.",
                 "# TYPE millrace_view_freshness_seconds gauge"]  # fmt: skip
        lines += [f'millrace_view_freshness_seconds{{view="{view}"}} {age}' for view, age in self.freshness().items()]
        lines += ["# HELP millrace_pushed_events Pushed events that the served store has taken.",
                  "# TYPE millrace_pushed_events counter", f"millrace_pushed_events {self.store.last.get(PUSHED, 0)}",
                  "# HELP millrace_predictions_dropped Answers that could not be logged.",
                  "# TYPE millrace_predictions_dropped counter", f"millrace_predictions_dropped {self.log.dropped}",
                  "# HELP millrace_requests_answered Requests that this worker has answered.",
                  "# TYPE millrace_requests_answered counter", f"millrace_requests_answered {self.door.answered}",
                  "# HELP millrace_requests_shed Requests that this worker has sent away, since they would have waited too long.",
                  "# TYPE millrace_requests_shed counter", f"millrace_requests_shed {self.door.shed}",
                  "# HELP millrace_request_seconds Mean time of an answer, newer ones counting more.",
                  "# TYPE millrace_request_seconds gauge", f"millrace_request_seconds {self.door.mean_s:.6f}"]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _head(self, request_id: str, now: int) -> dict[str, Any]:
        return {"request_id": request_id, "release": self.release, "now": iso(now) if self.spec.timed else None}

    def _answer(self, score: float) -> dict[str, Any]:
        return {"probability": score, "decision": score >= self.spec.serve.threshold}

    def _key(self, row: dict[str, Any]) -> dict[str, Any]:
        return {n: _shown(row[n], self.key_fields[n].type) for n in self.spec.row_key}

    def _refuse_closed(self, rows: list[dict[str, Any]], served: Served) -> None:
        closed = np.flatnonzero(served.looked.closed_at <= served.now)
        if len(closed):
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

    def _log(self, route: str, request_id: str, now: int, began: int, frame: Columns,
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
            logged.append(Entry(values["clock"], values, {n: _plain(v[i]) for n, v in frame.items()}))
        self.log.put(logged)


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


_endpoint: dict[str, Endpoint] = {}


def _route(answer: Callable[[Endpoint, bytes], dict[str, Any]]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        endpoint = _endpoint["it"]
        door = endpoint.door
        try:
            body = await _body(request)
            if door.full():
                said = f"{door.inside} requests are waiting, which is all that are answered in time; come again in a second"
                return _refusal(429, said, headers={"Retry-After": "1"})
            with door.entered():
                await asyncio.sleep(0)  # all who have come are counted before the first is answered
                began = time.perf_counter()
                found = answer(endpoint, body)
                door.took(time.perf_counter() - began)
            return JSONResponse(found)
        except BadRequest as error:
            return _refusal(error.status, error.message, **error.details)
        except MillraceError as error:  # such as a served store that another version has fed
            return _refusal(503, str(error))

    return handle


async def _body(request: Request) -> bytes:
    """Raises BadRequest for one that is too large, or does not come."""
    length = int(request.headers.get("content-length") or 0)
    if length > MAX_BYTES:
        raise BadRequest(413, f"the body has {length:,} bytes; at most {MAX_BYTES:,} are taken")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise BadRequest(413, f"the body is larger than {MAX_BYTES:,} bytes: send fewer rows")
    except TimeoutError:
        raise BadRequest(408, f"{len(body):,} bytes of the body came within {READ_S:g} s; send it at once") from None
    return bytes(body)


async def _http_error(request: Request, error: Exception) -> Response:
    """A wrong method, as a sentence too."""
    assert isinstance(error, HTTPException)
    allowed = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "")
    wanted = " or ".join(sorted(set(allowed.split(", ")) - {"HEAD"}))
    message = f"{request.method} is not answered here; send {wanted} {request.url.path}"
    return _refusal(error.status_code, message, headers=error.headers)


def _refusal(status: int, message: str, *, headers: Mapping[str, str] | None = None, **details: Any) -> Response:
    """JSON in ASCII: a message may quote what is not valid text."""
    return Response(json.dumps({"error": message, **details}), status, headers, "application/json")


def _app() -> Starlette:
    async def info(request: Request) -> JSONResponse:
        return JSONResponse(_endpoint["it"].info())

    async def metrics(request: Request) -> Response:
        return Response(_endpoint["it"].metrics(), media_type="text/plain; version=0.0.4")

    async def modules(request: Request) -> JSONResponse:
        return JSONResponse(deploy.imports.proof(SRC))

    routes = [
        Route("/predict", _route(Endpoint.predict), methods=["POST"]),
        Route("/predict_features", _route(Endpoint.predict_features), methods=["POST"]),
        Route("/info", info),
        Route("/metrics", metrics),
    ]
    if os.environ.get("MILLRACE_PREFLIGHT"):
        routes += [
            Route("/preflight/features", _route(Endpoint.features_at), methods=["POST"]),
            Route("/preflight/modules", modules),
        ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


trim()


@bentoml.asgi_app(_app(), path="/")
@bentoml.service(
    name="millrace", workers=int(os.environ.get("MILLRACE_WORKERS", "1")), traffic={"timeout": 30},
    metrics={"enabled": False}, logging={"access": {"enabled": False}}, monitoring={"enabled": False},
)  # fmt: skip
class Millrace:
    def __init__(self) -> None:
        if wrong := unlike(SRC):
            raise MillraceError(wrong)
        _endpoint["it"] = Endpoint(SRC / "bundle", Path(os.environ["MILLRACE_HOME"]))

    @bentoml.on_shutdown
    def stop(self) -> None:
        _endpoint["it"].log.close()
