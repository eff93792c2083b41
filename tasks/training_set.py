"""Stage 4: prediction rows, point-in-time join on known-at, label, split."""

from features.ingest import read_snapshot
from features.store import FeatureSet
from features.tokens import pretrained_digest
from features.trainset import build_training_set
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run, features: FeatureSet) -> str:
    _, spec = opened(run)
    return stage_key(run, "features", "training_set", features=features.digest, as_of=run.as_of_us,
                     spec=run.spec_digest, **pretrained_digest(spec.features.text))  # fmt: skip


@stage(key=_key, tags=["data"], timeout_s=3_600)
def training_set(run: Run, features: FeatureSet) -> Artifact:
    """One Parquet file of labelled rows with what was known of each."""
    home, spec = opened(run)
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    return make_artifact(
        home.root, "training_set", _key(run, features),
        lambda out: build_training_set(spec, home, snapshot, features, run.as_of_us, out),
    )  # fmt: skip
