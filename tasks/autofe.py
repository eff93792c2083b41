"""Before stage 3, where the spec says `features: auto`: features are proposed, and chosen on the training part."""

from features.ingest import read_snapshot
from models.choose import choose_into
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


@stage(tags=["data"], timeout_s=3_600)
def autofe(run: Run, checked: Artifact) -> Run:
    """The run with the chosen features as its spec; found when that was done, so it needs no cache of Prefect's."""
    home, spec = opened(run)
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    key = stage_key(run, "models", "autofe", snapshot=run.snapshot, as_of=run.as_of_us, spec=run.spec_digest)
    made = make_artifact(home.root, "autofe", key, lambda out: choose_into(spec, home, snapshot, run.as_of_us, out))
    return run.with_features(home, made)
