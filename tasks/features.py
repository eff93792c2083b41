"""Stage 3: window state, Feast views and one feature service."""

from features.ingest import read_snapshot
from features.store import FeatureSet, build_features, first_needed
from features.versions import start_tracking
from pipelines.manifest import Artifact
from pipelines.run import Run
from tasks.policy import opened, stage


@stage(tags=["data"], timeout_s=3_600)
def features(run: Run, checked: Artifact) -> FeatureSet:
    """The feature folder of the snapshot; found when it is whole, so it needs no cache of Prefect's."""
    home, spec = opened(run)
    start_tracking(home, run.pipeline, run.snapshot, spec.versions.remote)
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    return build_features(spec, home, snapshot, since=first_needed(spec, run.as_of_us))
