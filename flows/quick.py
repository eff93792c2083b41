"""A look before anything heavy is imported: is there anything new to run on?"""

from deploy.record import Outcome, last_outcome
from features.ingest import Snapshot, ingest
from pipelines.clock import parse_time
from pipelines.errors import Refused
from pipelines.home import Home
from pipelines.manifest import code_digest, digest_of
from pipelines.run import Run, accepted, packaged_alike, result_spec, unfinished
from pipelines.spec import Spec


def nothing_new(home: Home, spec: Spec, as_of: str | None) -> Outcome | None:
    """The last outcome, as `unchanged`, when spec, code, landing and as_of are what the last run saw; else None."""
    last = accepted(home, spec.pipeline)
    if last is None or spec.train.profile or unfinished(home, spec.pipeline):
        return None
    inputs = last["inputs"]
    if inputs["spec_digest"] != digest_of(result_spec(spec)) or inputs["code"] != code_digest("flows"):
        return None
    if not packaged_alike(home, last["run_id"], spec):
        return None
    try:
        snapshot = ingest(spec, home)
    except Refused:
        return None  # the flow refuses it too, and that is seen in the UI
    at = parse_time(as_of) if as_of else snapshot.watermark_us
    if (snapshot.digest, at) != (inputs["snapshot"], inputs["as_of_us"]):
        return None
    return last_outcome(home, _run_of(inputs, snapshot))


def _run_of(inputs: dict[str, object], snapshot: Snapshot) -> Run:
    return Run(snapshot.pipeline, str(inputs["run_id"]), 0, snapshot.digest, "", "", 0, "", "", unchanged=True)
