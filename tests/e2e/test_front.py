"""What stands around an answer: why it is so, how to ask, keys, rate, metrics, trace and log; and the page for people."""

import asyncio
import json
import logging
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from deploy.front import Front, Straight, answered, page
from deploy.keys import Keys, hashed, keys_file, make_key, read_keys, revoke_key
from deploy.lean import FEWEST, Door
from deploy.meter import INSIDE, LIMIT, PID, READY, Meter, shared_file
from deploy.process import Service, call, free_port, start, stop
from features.cells import StoreDown
from features.frame import feature_list
from pipelines.errors import MillraceError, UsageError
from pipelines.home import Home
from pipelines.manifest import read_json
from pipelines.spec import Spec
from tests.command import millrace
from tests.e2e.buses import Buses
from tests.e2e.raw_http import request
from tests.e2e.test_endpoint import NOBODY, SOON, Answer, send
from tests.e2e.test_load import ask

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def post(url: str, body: object, **headers: str) -> Answer:
    return send(url, json.dumps(body).encode(), headers={name.replace("_", "-"): value for name, value in headers.items()})


# --- why an answer is as it is ---


@pytest.mark.parametrize("route", ["/predict", "/predict_features"])
def test_an_explanation_adds_up_to_its_answer(buses_service: Service, route: str) -> None:
    rows = [SOON, NOBODY] if route == "/predict" else [{"line": "L1", "length": 4.5}, {}]
    plain = post(f"{buses_service.url}{route}", {"rows": rows}).json["rows"]
    for explain, count in ((True, 10), (3, 3), (1_000, 17)):
        found = post(f"{buses_service.url}{route}", {"rows": rows, "explain": explain}).json["rows"]
        for row, bare in zip(found, plain, strict=True):
            why = row.pop("explanation")
            assert row == bare and len(why["contributions"]) == count and why["exact"]
            total = why["base"] + sum(one["log_odds"] for one in why["contributions"]) + why["others"]
            assert total == pytest.approx(why["log_odds"], abs=1e-12)
            assert 1 / (1 + np.exp(-total)) == pytest.approx(row["probability"], abs=1e-9)
            sizes = [abs(one["log_odds"]) for one in why["contributions"]]
            assert sizes == sorted(sizes, reverse=True) and (count < 17 or why["others"] == 0)


def test_an_explanation_may_be_asked_for_in_the_address(buses_service: Service) -> None:
    def asked(query: str) -> Any:
        return call(f"{buses_service.url}/predict?{query}", {"rows": [SOON]})[1]

    assert len(asked("explain=2")["rows"][0]["explanation"]["contributions"]) == 2
    assert "explanation" not in asked("explain=false")["rows"][0]
    for query, said in {"explain=": "explain is true, false", "explain=0": "explain is true, false", "explain=-1": "explain is",
                        "explain=9999999999": "explain is", "explian=1": "'explian' is no parameter"}.items():  # fmt: skip
        assert said in asked(query)["error"]
    assert "explain is" in call(f"{buses_service.url}/predict?explain=1001", {"rows": [SOON], "explain": 1})[1]["error"]


def test_an_infinite_value_is_named(buses_service: Service) -> None:
    """The user's own function divides by the minutes until the end, which here are none."""
    row = {**NOBODY, "length": 9e18, "due": "2024-05-06T12:00:00Z", "end": "2024-05-06T12:00:00Z"}
    answer = post(f"{buses_service.url}/predict", {"rows": [row], "explain": 17})
    assert answer.status == 200
    assert {c["feature"]: c["value"] for c in answer.json["rows"][0]["explanation"]["contributions"]}["pace"] == "inf"


def test_a_client_that_cuts_the_connection_leaves_no_trace(buses_service: Service) -> None:
    """Neither in the log, which its fixture looks at, nor in what is counted as in flight."""
    body = json.dumps({"rows": [SOON]}).encode()
    for wait in [0, 0.001, 0.002, 0.004] * 40:
        with socket.create_connection(("127.0.0.1", buses_service.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(wait)
    deadline = time.monotonic() + 20
    while numbers(buses_service.url)[("millrace_requests_in_flight", ())]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("explain", ["yes", 0, 1.5, None, -3, [], 10**9])
def test_a_wrong_wish_to_explain(buses_service: Service, explain: Any) -> None:
    answer = post(f"{buses_service.url}/predict", {"rows": [SOON], "explain": explain})
    assert answer.status == 422 and answer.error.startswith("explain is true, false, or how many features")


def test_few_rows_are_explained_at_once(buses_service: Service) -> None:
    answer = post(f"{buses_service.url}/predict", {"rows": [SOON] * 21, "explain": True})
    assert answer.status == 422 and answer.error.startswith("21 rows to be explained; send at most 20")


def test_others_are_answered_while_a_network_is_explained(tumours_home: Home, tumours_url: str) -> None:
    row = read_json(next((tumours_home.root / "artifacts" / "preflight").glob("*/preflight.json")))["example"]
    whole, over = {"rows": [row] * 20, "explain": True}, threading.Event()
    plain = call(f"{tumours_url}/predict", {"rows": [row] * 20})[1]["rows"]
    explained: list[tuple[int, Any]] = []

    def explain() -> None:
        for _ in range(4):
            explained.append(call(f"{tumours_url}/predict", whole))
        over.set()

    asking, others = threading.Thread(target=explain), 0
    asking.start()
    while not over.is_set():
        status, answer = call(f"{tumours_url}/predict", {"rows": [row]})
        assert status == 200 and answer["rows"][0] == plain[0]
        others += 1
    asking.join()
    assert others > 8  # none of them would be answered before the end of the explanation under way
    for status, answer in explained:
        whys = [one.pop("explanation") for one in answer["rows"]]
        assert status == 200 and answer["rows"] == plain and all(why == whys[0] and not why["exact"] for why in whys)

    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(lambda _: call(f"{tumours_url}/predict", whole), range(12))]
    refused = [answer["error"] for status, answer in found if status == 429]
    assert {status for status, _ in found} == {200, 429} and any("requests wait to be explained" in said for said in refused)


def test_a_field_that_stands_twice_is_refused(buses_service: Service) -> None:
    for body in (b'{"rows": [], "rows": [{}]}', b'{"rows": [{"line": "L1", "line": "L2"}]}'):
        answer = send(f"{buses_service.url}/predict", body)
        assert answer.status == 422 and "stands twice in one object" in answer.error


# --- how to ask ---


@pytest.fixture(scope="module")
def document(buses_service: Service) -> dict[str, Any]:
    return dict(call(f"{buses_service.url}/openapi.json")[1])


def schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    OpenAPIV31SpecValidator(document).validate()  # raises
    assert document["openapi"] == "3.1.0"
    posts = [document["paths"][path]["post"] for path in ("/predict", "/predict_features")]
    assert {*posts[0]["responses"]} == {"200", "400", "408", "409", "413", "422", "429", "503"}
    for one in posts:
        for status, response in one["responses"].items():
            told = response["content"]["application/json"]["schema"]["$ref"]
            assert told.endswith("/Refusal") == (status != "200")
    asked = document["components"]["schemas"]["Asked"]
    assert asked["additionalProperties"] is False and asked["properties"]["rows"]["maxItems"] == 1_000


def test_its_examples_are_real_rows(buses_service: Service, document: dict[str, Any]) -> None:
    """What is shown is answered, by the key as by the features, to the bit; and the answers are as the document says."""
    found = []
    for path, asked, answer in (("/predict", "Asked", "Answer"), ("/predict_features", "AskedFeatures", "AnswerFeatures")):
        example = document["components"]["schemas"][asked]["examples"][0]
        jsonschema.validate(example, schema(document, asked))
        said = post(f"{buses_service.url}{path}", {**example, "explain": True})
        assert said.status == 200
        jsonschema.validate(said.json, schema(document, answer))
        found.append(said.json["rows"][0])
    assert found[0]["probability"] == found[1]["probability"]
    assert not found[0]["unknown_entity"] and not found[0]["outside_horizon"]
    assert call(f"{buses_service.url}/docs.json")[1] == document  # the same one again


@pytest.mark.parametrize(
    "row", [{**SOON, "trip": "x"}, {**SOON, "more": 1}, {"line": "L1"}, {**SOON, "trip": 2**63}, {**SOON, "line": None}]
)
def test_what_the_document_forbids_is_refused(buses_service: Service, document: dict[str, Any], row: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"rows": [row]}, schema(document, "Asked"))
    refused = post(f"{buses_service.url}/predict", {"rows": [row]})
    assert refused.status == 422
    jsonschema.validate(refused.json, schema(document, "Refusal"))


# --- metrics ---


def numbers(url: str, **headers: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = send(f"{url}/metrics", None, method="GET", headers=headers).body.decode()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_the_metrics_count_what_was_asked(buses: Buses, buses_service: Service) -> None:
    url, before = buses_service.url, numbers(buses_service.url)
    probability = post(f"{url}/predict", {"rows": [SOON, NOBODY]}).json["rows"][0]["probability"]
    post(f"{url}/predict", {"rows": [{"line": 1}]})
    post(f"{url}/predict_features", {"rows": [{"line": "L77"}], "explain": True})
    after = numbers(url)
    grown = {name: value - before[name] for name, value in after.items() if value != before[name]}

    def more(name: str, **labels: str) -> float:
        return grown.get((name, tuple(sorted(labels.items()))), 0.0)

    assert more("millrace_requests_total", route="predict", status="200") == 1
    assert more("millrace_requests_total", route="predict", status="422") == 1
    assert more("millrace_requests_total", route="predict_features", status="200") == 1
    assert (more("millrace_rows_total"), more("millrace_rows_explained_total"), more("millrace_rows_unknown_total")) == (3, 1, 1)
    assert more("millrace_rows_outside_horizon_total") == 1
    assert more("millrace_missing_total", feature="place__zone") == 2 and more("millrace_unseen_total", feature="line") == 2
    parts = ("read", "parse", "features", "model", "whole")
    stages = {stage: more("millrace_stage_seconds_count", stage=stage) for stage in parts}
    assert stages == {"read": 3, "parse": 2, "features": 1, "model": 2, "whole": 3}
    assert more("millrace_stage_seconds_sum", stage="whole") > more("millrace_stage_seconds_sum", stage="model") > 0
    assert more("millrace_probability_count") == 3 and more("millrace_probability_bucket", le="+Inf") == 3
    assert more("millrace_probability_bucket", le=f"{np.ceil(probability * 10) / 10:g}") >= 1
    assert after[("millrace_build_info", (("release", buses.bento.tag),))] == 1
    assert (after[("millrace_requests_in_flight", ())], after[("millrace_workers", ())]) == (0, 1)
    for stage in stages:  # buckets are cumulative
        counts = [v for (name, labels), v in after.items() if name.endswith("seconds_bucket") and ("stage", stage) in labels]
        assert counts == sorted(counts)


def test_numbers_and_limits_are_those_of_all_workers(tmp_path: Path) -> None:
    """Three processes write to one file at once; one dies with a request inside, and the next takes its row."""
    path = tmp_path / "shared"
    code = (
        "import sys, os; from pathlib import Path; from deploy.meter import INSIDE, LIMIT, Meter\n"
        "m = Meter(Path(sys.argv[1]), 2, ['a'], ['v'])\n"
        "for _ in range(5_000):\n"
        "    m.scored([0.25]); m.flagged(['a'], [], ['v']); m.took('whole', 0.001); m.answered('predict', 200)\n"
        "m.row[INSIDE] = m.row[LIMIT] = 7; print(m.total(INSIDE)); os._exit(0)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    many = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=env, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.wait() for process in many] == [0, 0, 0]
    mine = Meter(path, 2, ["a"], ["v"])
    text = list(mine.text("r", 16))
    assert "millrace_rows_total 15000" in text and 'millrace_missing_total{feature="a"} 15000' in text
    assert 'millrace_requests_total{route="predict",status="200"} 15000' in text
    assert 'millrace_stage_seconds_bucket{stage="whole",le="0.001"} 15000' in text
    assert mine.total(INSIDE) <= 14  # that of the row that was taken is gone
    door = Door(0.05, mine)
    for row in mine._rows:
        row[INSIDE] = row[LIMIT] = 0.0
    assert door.of_all() == FEWEST and not door.full()
    mine._rows[1][INSIDE] = FEWEST  # another worker has as many as all may have
    assert door.full() and door.shed == 1
    mine._rows[1][LIMIT] = 1_000.0  # but answers fast
    assert not door.full()


def test_an_endpoint_is_ready_when_all_workers_are_and_stays_so_while_one_is_replaced(tmp_path: Path) -> None:
    alone = Meter(None, 2, [], [])
    alone.row[READY] = 1.0
    assert alone.awaited() == 0  # who cannot see the others says so for itself
    one, two = (Meter(tmp_path / "shared", 2, [], []) for _ in range(2))
    assert one.awaited() == two.awaited() == 2
    one.row[READY] = 1.0
    assert one.awaited() == two.awaited() == 1
    two.row[READY], two.row[PID] = 1.0, 2.0**22 + 1  # which died at once
    assert one.awaited() == 1
    three = Meter(tmp_path / "shared", 2, [], [])
    assert three.row[READY] == 0 and one.awaited() == 1  # in its place
    three.row[READY] = 1.0
    assert one.awaited() == three.awaited() == 0
    three.row[PID] = 2.0**22 + 1
    assert one.awaited() == 0 and Meter(tmp_path / "shared", 2, [], []).awaited() == 0


def test_the_file_is_the_service_s_and_goes_with_it(tmp_path: Path) -> None:
    gone = tmp_path / "shared-999999999-17"
    gone.write_bytes(b"")
    mine = shared_file(tmp_path)
    assert not gone.exists() and mine == shared_file(tmp_path) and f"-{os.getppid()}-" in mine.name


# --- keys, rate, trace and log: the front in this process ---


def client(front: Front, answer: Any = None) -> TestClient:
    async def told(body: bytes, visit: Any) -> dict[str, Any]:
        return {"id": visit.id, "who": visit.who}

    async def post(scope: Scope, receive: Receive, send: Send) -> None:
        response = await answered(front, scope, receive, answer or told, "predict")
        await response(scope, receive, send)

    return TestClient(Straight(Starlette(), {"/predict": post}))


def front_of(buses: Buses, root: Path, **rules: Any) -> Front:
    body = buses.spec.model_dump(mode="json", by_alias=True)
    spec = Spec.model_validate({**body, "serve": {**body["serve"], **rules}})
    meter = Meter(None, 1, [], [])
    return Front(spec, root, meter, Door(0.05, meter), "buses:1")


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "buses")
    key = make_key(path, "ann")
    assert re.fullmatch(r"mr_[\w-]{43}", key) and key not in path.read_text() and hashed(key) in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = make_key(path, "bob")
    assert read_keys(path) == {hashed(key): "ann", hashed(other): "bob"}
    with pytest.raises(MillraceError, match="there is a key named ann"):
        make_key(path, "ann")
    with pytest.raises(UsageError, match="is no name of a key"):
        make_key(path, "two words")
    keys = Keys(path, "", wanted=True)
    assert keys.who({"authorization": f"Bearer {key}"}) == keys.who({"x-api-key": key}) == "ann"
    assert keys.who({"authorization": f"bearer  {other}"}) == "bob"
    for header, sent in (("none", ""), ("authorization", key), ("authorization", f"Basic {key}"), ("x-api-key", key[:-1]),
                         ("x-api-key", hashed(key)), ("x-api-key", "é" * 99), ("x-api-key", "\udc80")):  # fmt: skip
        assert keys.who({header: sent}) is None
    revoke_key(path, "ann")
    keys.looked = -1.0  # a second has passed
    assert keys.who({"x-api-key": key}) is None and keys.who({"x-api-key": other}) == "bob"
    with pytest.raises(MillraceError, match="there is no key named 'ann'"):
        revoke_key(path, "ann")


def test_keys_are_wanted_where_the_spec_or_the_environment_says_so(buses: Buses, tmp_path: Path, monkeypatch: Any) -> None:
    assert client(front_of(buses, tmp_path)).post("/predict").status_code == 200
    closed = client(front_of(buses, tmp_path, api_keys=True))  # nobody has a key yet: nobody is answered
    refused = closed.post("/predict")
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert "millrace key" in refused.json()["error"] and refused.headers["x-request-id"]
    key = make_key(keys_file(tmp_path, "buses"), "ann")
    time.sleep(1.05)
    assert closed.post("/predict", headers={"X-API-Key": key}).json()["who"] == "ann"
    monkeypatch.setenv("MILLRACE_API_KEYS", hashed("secret"))
    given = client(front_of(buses, tmp_path))
    assert given.post("/predict").status_code == 401
    assert given.post("/predict", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_rate_is_kept_by_key_or_address(buses: Buses, tmp_path: Path) -> None:
    front = front_of(buses, tmp_path, rate_limit=5)
    asked = client(front)
    statuses = [asked.post("/predict").status_code for _ in range(30)]
    assert statuses[:5] == [200] * 5 and 429 in statuses[5:]
    refused = asked.post("/predict")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json() == {"error": refused.json()["error"]} and "more than 5 requests a second" in refused.json()["error"]
    assert front.meter.delay("another", 5, 5) == 0
    one, two = (Meter(tmp_path / "shared", 2, [], []) for _ in range(2))
    assert one.delay("ann", 1, 1) == 0 < two.delay("ann", 1, 1) <= 1  # of all workers together
    assert front.meter.delay("testclient", 5, 5) > 0
    time.sleep(0.21)
    assert asked.post("/predict").status_code == 200


def test_a_trace_is_passed_on_and_a_wrong_one_is_not(buses: Buses, tmp_path: Path, capsys: Any) -> None:
    logging.getLogger("millrace.access").handlers.clear()
    front = front_of(buses, tmp_path, access_log="all")
    logging.getLogger("millrace.access").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    asked = client(front)
    told = asked.post("/predict", headers={"traceparent": TRACE})
    assert re.fullmatch(r"00-4bf92f3577b34da6a3ce929d0e0e4736-(?!00f067aa0ba902b7)[0-9a-f]{16}-01", told.headers["traceparent"])
    assert told.headers["x-request-id"] == told.json()["id"]
    none = "00-" + "0" * 32 + TRACE[35:]
    for wrong in (TRACE.replace("4bf", "4BF"), TRACE.replace("00-", "ff-", 1), none, TRACE[:-1], "x" * 500):
        assert "traceparent" not in asked.post("/predict", headers={"traceparent": wrong}).headers
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    first = lines[0]
    assert (first["trace_id"], first["request_id"], first["route"], first["status"], first["release"]) == (
        TRACE[3:35], told.json()["id"], "/predict", 200, "buses:1")  # fmt: skip
    assert first["ms"] > 0 and len(lines) == 6 and lines[1]["trace_id"] == lines[1]["request_id"]


def test_only_what_is_slow_or_fails_is_logged_unless_told(buses: Buses, tmp_path: Path, capsys: Any) -> None:
    logging.getLogger("millrace.access").handlers.clear()
    front = front_of(buses, tmp_path)
    logging.getLogger("millrace.access").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    client(front).post("/predict")
    assert not capsys.readouterr().err

    def down(body: bytes, visit: Any) -> Any:
        raise StoreDown("redis://x", OSError("gone"))

    def broken(body: bytes, visit: Any) -> Any:
        raise ZeroDivisionError("/secret/path")

    assert client(front, down).post("/predict").status_code == 503
    failed = client(front, broken).post("/predict")
    assert failed.status_code == 500 and failed.headers["x-request-id"] in failed.json()["error"] and "secret" not in failed.text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith('{"time"')]
    assert [line["status"] for line in lines] == [503, 500]
    assert front.meter.total(INSIDE) == 0


def test_the_log_of_predictions_knows_the_request(buses: Buses, buses_service: Service) -> None:
    answer = post(f"{buses_service.url}/predict", {"rows": [SOON]}, traceparent=TRACE)
    assert answer.headers["x-request-id"] == answer.json["request_id"] and answer.headers["traceparent"].startswith(TRACE[:36])
    deadline, found = time.monotonic() + 10, set[str]()
    while answer.json["request_id"] not in found and time.monotonic() < deadline:
        time.sleep(0.1)
        for path in buses.home.predictions("buses").rglob("[!.]*.parquet"):
            found |= {*pq.read_table(path, columns=["request_id"])["request_id"].to_pylist()}
    assert answer.json["request_id"] in found


# --- whole endpoints ---


@pytest.fixture(scope="module")
def two_workers(buses: Buses) -> Iterator[tuple[Service, str]]:
    """Two workers that ask for a key and keep a rate, and the key."""
    key = make_key(keys_file(buses.home.root, "buses"), "ann")
    log = buses.home.root / "two.log"
    extra = {"MILLRACE_WORKERS": "2", "MILLRACE_RULES": json.dumps({"api_keys": True, "access_log": "all", "rate_limit": 5_000})}
    found = start(buses.home, buses.folder, port=free_port(), release=buses.bento.tag, log=log, extra=extra)
    yield found, key
    stop(found)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_two_workers_count_and_let_in_together(buses: Buses, two_workers: tuple[Service, str]) -> None:
    service, key = two_workers
    names = [feature.name for feature in feature_list(buses.spec)]
    url = service.url
    assert numbers(url, **{"X-API-Key": key})[("millrace_workers", ())] == 2  # it is ready when both are
    for path in ("/info", "/metrics", "/openapi.json"):
        assert send(f"{url}{path}", None, method="GET").status == 401
        assert send(f"{url}{path}", None, method="GET", headers={"X-API-Key": key}).status == 200
    for path in ("/", "/docs", "/livez", "/readyz"):
        assert send(f"{url}{path}", None, method="GET").status == 200
    assert post(f"{url}/predict", {"rows": [SOON]}).status == 401
    statuses = [post(f"{url}/predict", {"rows": [SOON]}, X_API_Key=key).status for _ in range(60)]
    assert statuses == [200] * 60
    for _ in range(5):  # whichever worker answers says the same
        found = numbers(url, **{"X-API-Key": key})
        assert found[("millrace_requests_total", (("route", "predict"), ("status", "200")))] == 60
        assert found[("millrace_requests_total", (("route", "predict"), ("status", "401")))] == 1
        assert found[("millrace_workers", ())] == 2
    lines = [json.loads(line) for line in Path(service.log).read_text().splitlines() if line.startswith('{"time"')]
    assert len(lines) == 61 and lines[-1]["key"] == "ann" and key not in Path(service.log).read_text()
    most, statuses = 0, list[int]()

    async def flooded() -> list[tuple[int, str, float]]:
        ready = asyncio.Event()
        sent = request({"rows": [SOON]}).replace(b"Host: x", b"Host: x\r\nX-API-Key: " + key.encode())
        many = [asyncio.create_task(ask(service.port, sent, ready)) for _ in range(400)]
        await asyncio.sleep(0.5)
        ready.set()
        return await asyncio.gather(*many)

    shared = Meter(next((buses.home.services("buses")).glob(f"shared-{service.pid}-*")), 2, names, [*buses.spec.features.views])
    assert shared.total(READY) == 2 and shared.awaited() == 0
    watched = threading.Event()

    def watch() -> None:
        nonlocal most
        while not watched.is_set():
            most = max(most, int(shared.total(INSIDE)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        statuses += [status for status, _, _ in asyncio.run(flooded())]
        if 429 in statuses:
            break
    limit = Door(0.05, shared).of_all()
    watched.set()
    watcher.join()
    assert {*statuses} == {200, 429} and FEWEST <= most <= 3 * max(limit, FEWEST), (most, limit)
    assert numbers(url, **{"X-API-Key": key})[("millrace_requests_in_flight", ())] == 0


@pytest.mark.slow
def test_the_key_verb(tmp_path: Path) -> None:
    made = millrace(tmp_path, "key", "tumours", "ann", "--json")
    assert made.code == 0 and Keys(keys_file(tmp_path, "tumours"), "", wanted=True).who({"x-api-key": made.answer["key"]})
    assert millrace(tmp_path, "key", "tumours", "ann").code == 1
    assert millrace(tmp_path, "key", "tumours", "ann", "--revoke").code == 0
    assert not read_keys(keys_file(tmp_path, "tumours"))
    assert millrace(tmp_path, "key", "tumours", "a b").code == 2


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_asks_shows_and_explains(buses_service: Service, two_workers: tuple[Service, str]) -> None:
    from playwright.sync_api import sync_playwright

    locked, key = two_workers
    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(buses_service.url)
            tab.get_by_role("button", name="Predict").click()
            tab.locator(".number").wait_for()
            probability = post(f"{buses_service.url}/predict", {"rows": [SOON]}).json["rows"][0]["probability"]
            assert tab.locator(".number").inner_text() == f"{100 * probability:.1f} %"
            assert tab.locator(".bars .bar").count() >= 8
            for field in tab.locator("input, select").all():  # each has a name
                assert field.evaluate("e => e.labels.length") == 1
            tab.get_by_label("trip").fill("12.5")
            tab.get_by_role("button", name="Predict").click()
            tab.get_by_text("rows[0].trip is a number; send a whole number").wait_for()
            tab.get_by_label("Given by").select_option("/predict_features")
            tab.get_by_role("button", name="Predict").click()
            tab.locator(".number").wait_for()
            assert tab.locator(".number").inner_text() == f"{100 * probability:.1f} %"
            tab.goto(f"{buses_service.url}/docs")
            tab.get_by_text("Example: a real row").first.wait_for()
            tab.close()
        assert not [line for line in said if "422" not in line]  # which the browser notes by itself
        assert all(url.startswith((buses_service.url, "data:")) for url in asked)
        tab = browser.new_page()
        tab.goto(locked.url)
        tab.get_by_label("API key").fill("wrong")
        tab.get_by_role("button", name="Use it").click()
        tab.get_by_text("That key is not known here.").wait_for()
        tab.get_by_label("API key").fill(key)
        tab.get_by_role("button", name="Use it").click()
        tab.get_by_role("button", name="Predict").click()
        tab.locator(".number").wait_for()
        browser.close()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    answer = page()
    text = bytes(answer.body).decode()
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)
    assert "script-src 'sha256-" in answer.headers["content-security-policy"] and text.count("<script") == 1
    assert "innerHTML" not in text


def test_everything_listens_on_loopback_only(buses_service: Service) -> None:
    """Of this machine's addresses only 127.0.0.1 is answered."""
    listening = {line.split()[1].partition(":")[0] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
                 if line.split()[3] == "0A" and int(line.split()[1].partition(":")[2], 16) == buses_service.port}  # fmt: skip
    assert listening == {"0100007F"}
    for path in ("/push", "/admin", "/promote", "/rollback", "/preflight/features"):
        assert send(f"{buses_service.url}{path}", b"{}").status == 404
