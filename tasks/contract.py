"""Stage 2: the snapshot must satisfy the spec's expectations, or nothing goes on."""

from features.contract_stage import contract_into
from features.ingest import read_snapshot
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run) -> str:
    return stage_key(run, "features", "contract", snapshot=run.snapshot, previous=run.previous_snapshot,
                     spec=run.spec_digest)  # fmt: skip


@stage(key=_key, tags=["data"], timeout_s=1_800)
def contract(run: Run) -> Artifact:
    """Great Expectations on every table; a refusal writes a page and publishes nothing."""
    home, spec = opened(run)
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    previous = read_snapshot(home, run.pipeline, run.previous_snapshot) if run.previous_snapshot else None
    return make_artifact(
        home.root, "contract", _key(run), lambda out: contract_into(spec, home, snapshot, previous, out)
    )
