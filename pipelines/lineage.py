"""Lineage in the form of OpenLineage: each run says which snapshot it read and which release and store came of it.

Events are JSON lines in `lineage/PIPELINE/events.jsonl`; where OPENLINEAGE_URL is set they are posted there too, by a thread that
no run waits for longer than a moment and whose failure nobody sees but the log.
"""

import json
import logging
import os
import threading
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from pipelines.clock import iso, wall_us
from pipelines.home import Home
from pipelines.manifest import digest_of

PRODUCER = "urn:millrace"
SPEC = "https://openlineage.io/spec"
EVENT_SCHEMA = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
TIMEOUT_S = 2.0


def dataset(name: str, version: str, rows: int | None = None, *, output: bool = False) -> dict[str, Any]:
    """A dataset as an event names it: `PIPELINE.TABLE` and the like, its version, and its rows."""
    facets: dict[str, Any] = {"version": _facet("DatasetVersionDatasetFacet", "1-0-1", datasetVersion=version)}
    found: dict[str, Any] = {"namespace": "millrace", "name": name, "facets": facets}
    if rows is not None and not output:
        found["inputFacets"] = {"inputStatistics": _facet("InputStatisticsInputDatasetFacet", "1-0-0", rowCount=rows)}
    if rows is not None and output:
        found["outputFacets"] = {"outputStatistics": _facet("OutputStatisticsOutputDatasetFacet", "1-0-2", rowCount=rows)}
    return found


def emit(
    home: Home, pipeline: str, run_id: str, kind: str, *, inputs: Sequence[Mapping[str, Any]] = (),
    outputs: Sequence[Mapping[str, Any]] = (), job: str = "retrain", error: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Appends an event of a run (START, COMPLETE or FAIL) and sends it on; what it said."""
    engine = _facet("ProcessingEngineRunFacet", "1-1-1", name="millrace", version=metadata.version("millrace"))
    run_facets: dict[str, Any] = {"processing_engine": engine, "millrace_run": _facet("RunFacet", "", runId=run_id)}
    if error:
        run_facets["errorMessage"] = _facet("ErrorMessageRunFacet", "1-0-1", message=error, programmingLanguage="Python")
    job_type = _facet("JobTypeJobFacet", "2-0-4", processingType="BATCH", integration="MILLRACE", jobType="FLOW")
    event = {
        "eventType": kind, "eventTime": iso(wall_us()), "producer": PRODUCER, "schemaURL": EVENT_SCHEMA,
        "run": {"runId": str(uuid.UUID(digest_of([pipeline, run_id])[:32], version=4)), "facets": run_facets},
        "job": {"namespace": "millrace", "name": f"{job}.{pipeline}", "facets": {"jobType": job_type}},
        "inputs": list(inputs), "outputs": list(outputs),
    }  # fmt: skip
    path = home.lineage / pipeline / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(event, sort_keys=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    if url := os.environ.get("OPENLINEAGE_URL"):
        sender = threading.Thread(target=_post, args=(url, line), daemon=True)
        sender.start()
        sender.join(0.2 if kind == "START" else TIMEOUT_S)  # the process may end soon after the last
    return event


def _facet(schema: str, at: str, /, **fields: Any) -> dict[str, Any]:
    url = f"{SPEC}/facets/{at}/{schema}.json#/$defs/{schema}" if at else f"{SPEC}/2-0-2/OpenLineage.json#/$defs/{schema}"
    return {"_producer": PRODUCER, "_schemaURL": url, **fields}


def _post(url: str, line: str) -> None:
    endpoint = url.rstrip("/") + "/" + os.environ.get("OPENLINEAGE_ENDPOINT", "api/v1/lineage")
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENLINEAGE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, line.encode(), headers), timeout=TIMEOUT_S) as answer:
            answer.read()
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("lineage was not sent to %s: %s", url, error)
