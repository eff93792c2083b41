"""`make demo`: real flights, from the first Parquet file to an answer over HTTP."""

import json
import os
import sys
import time
from typing import Any

from deploy.process import Service, call, free_port, port_is_free, running
from deploy.record import Outcome
from flows.inprocess import recorded, run_flow
from flows.quick import nothing_new
from flows.serving import serve_champion
from pipelines.errors import MillraceError
from pipelines.home import Home, open_home, process_env
from pipelines.manifest import read_json
from pipelines.run import run_lock
from pipelines.sample import land
from pipelines.spec import Spec, load_spec


def demo(name: str, overrides: list[str]) -> None:
    """Lands the sample, runs the pipeline, serves the champion and asks it one real question."""
    home, spec = open_home(), load_spec(name, overrides)
    os.environ.update(process_env(home))
    time.tzset()
    began = time.monotonic()
    with run_lock(home, spec.pipeline):
        outcome = nothing_new(home, spec, None) if home.landing(spec.pipeline).exists() else None
    if outcome is None:
        outcome = _first(home, spec, name, overrides)
    port = None
    if running(home, spec.pipeline) is not None:
        port = 0  # the one it has
    elif not port_is_free(spec.serve.port):
        port = free_port()
        _tell(f"  port {spec.serve.port} is taken by another program: the endpoint listens on {port}")
    service = serve_champion(home, spec, port=port, background=True)
    assert service is not None
    status, answer, request = _ask(home, outcome, service)
    print(_words(home, spec, outcome, service, status, answer, request, time.monotonic() - began))


def _first(home: Home, spec: Spec, name: str, overrides: list[str]) -> Outcome:
    with recorded(home):  # its server starts while the sample is written
        _tell(spec.title)
        landed = land(spec, home)
        _tell(f"  {'sample':<13} {'':>8}  {sum(landed.rows.values()):,} rows landed in {len(landed.rows)} tables")
        return run_flow(home, name, None, overrides)


def _ask(home: Home, outcome: Outcome, service: Service) -> tuple[int, Any, dict[str, Any]]:
    manifest = read_json(home.runs(outcome.pipeline) / outcome.run_id / "manifest.json")
    path = manifest["stage_paths"].get("preflight")
    example = read_json(home.root / path / "preflight.json")["example"] if path else {}
    request = {"rows": [example]}
    status, answer = call(f"{service.url}/predict", request)
    return status, answer, request


def _words(
    home: Home, spec: Spec, outcome: Outcome, service: Service, status: int, answer: Any, request: Any, took: float
) -> str:  # fmt: skip
    name = spec.pipeline
    lines = ["", f"{outcome.outcome}: {outcome.release}", *(f"  {reason}" for reason in outcome.reasons), ""]
    lines += [f"report    {home.root / outcome.report}", f"endpoint  {service.url}  (ends with `make stop`)", ""]
    lines += [
        f"curl -s {service.url}/predict -H 'Content-Type: application/json' -d '{json.dumps(request)}'",
        json.dumps(answer["rows"][0] if status == 200 else answer),
        "",
        "next      make ui                         the Prefect UI on this run, and the schedules",
        f"          millrace sample {name} --until 2014-01-02 && millrace run {name}",
        "                                          two days later: new facts, a new challenger",
        f"          millrace releases {name}",
        f"took      {took:.1f} s",
    ]
    return "\n".join(lines)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        demo(sys.argv[1] if len(sys.argv) > 1 else "flights_demo", sys.argv[2:])
    except MillraceError as error:
        print(f"{error.word}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
