"""Lineage events: of the shape that OpenLineage asks for, kept in the home, sent on."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipelines.home import Home
from pipelines.lineage import EVENT_SCHEMA, dataset, emit

URI = {"type": "string", "format": "uri"}
TEXT = {"type": "string"}
NAMED = {"type": "object", "required": ["namespace", "name"], "properties": {"namespace": TEXT, "name": TEXT}}
FACET = {"type": "object", "required": ["_producer", "_schemaURL"], "properties": {"_producer": URI, "_schemaURL": URI}}
EVENT = {  # what OpenLineage 2-0-2 asks of a RunEvent
    "type": "object", "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "format": "date-time"}, "producer": URI, "schemaURL": URI,
        "run": {"type": "object", "required": ["runId"], "properties": {"runId": {"type": "string", "format": "uuid"}}},
        "job": NAMED, "inputs": {"type": "array", "items": NAMED}, "outputs": {"type": "array", "items": NAMED},
    },
}  # fmt: skip


def validate(event: dict[str, Any]) -> int:
    """The event, and what each of its facets must have; how many these were."""
    check(EVENT, event)
    facets = [*event["run"]["facets"].values(), *event["job"]["facets"].values()]
    for one in (*event["inputs"], *event["outputs"]):
        facets += [facet for kind in ("facets", "inputFacets", "outputFacets") for facet in one.get(kind, {}).values()]
    for facet in facets:
        check(FACET, facet)
    return len(facets)


def check(schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)


def an_event(home: Home, kind: str = "COMPLETE", error: str = "") -> dict[str, Any]:
    inputs = [dataset("flights.schedule", "ab12", 336_076)]
    outputs = [dataset("flights.training_set", "cd34", 1_000, output=True), dataset("flights.release", "tag", output=True)]
    return emit(home, "flights", "a1b2-1", kind, inputs=inputs, outputs=outputs, error=error)


def kept(home: Home, pipeline: str = "flights") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.lineage / pipeline / "events.jsonl").read_text().splitlines()]


def test_events_are_valid_and_one_run_has_one_id(tmp_path: Path) -> None:
    home = Home(tmp_path)
    events = [an_event(home, "START"), an_event(home, "COMPLETE"), an_event(home, "FAIL", error="refused")]
    assert kept(home) == events and events[0]["schemaURL"] == EVENT_SCHEMA
    assert [validate(event) for event in events] == [8, 8, 9]
    assert len({event["run"]["runId"] for event in events}) == 1
    with pytest.raises(jsonschema.ValidationError):
        validate({**events[0], "eventType": "ENDED"})
    with pytest.raises(jsonschema.ValidationError):
        validate({**events[0], "run": {**events[0]["run"], "runId": "a1b2-1"}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, dict[str, Any]]]]:
    """What a server of OpenLineage was sent: path, authorization, event."""
    got: list[tuple[str, str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, self.headers.get("Authorization", ""), body))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{made.server_port}/")
        monkeypatch.setenv("OPENLINEAGE_API_KEY", "secret")
        yield got
        made.shutdown()


def test_events_are_sent_to_a_server(tmp_path: Path, server: list[tuple[str, str, dict[str, Any]]]) -> None:
    event = an_event(Home(tmp_path))
    assert server == [("/api/v1/lineage", "Bearer secret", event)]


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_is_dead_or_silent_neither_fails_nor_holds_a_run(
    tmp_path: Path, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that nobody listens at, and one that takes the connection and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if silent:
            taken.listen()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        begun = time.monotonic()
        an_event(Home(tmp_path), "START")
        assert time.monotonic() - begun < 10
        an_event(Home(tmp_path))
        assert time.monotonic() - begun < 20
    assert len(kept(Home(tmp_path))) == 2
    monkeypatch.setenv("OPENLINEAGE_URL", "not a url")
    an_event(Home(tmp_path))
