"""Stage 8b: the bento is started and must answer as we compute offline. The second verdict."""

from deploy.preflight import preflight_into
from features.store import FeatureSet
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run, bento: Artifact, data: Artifact, features: FeatureSet) -> str:
    return stage_key(run, "deploy", "preflight", bento=bento.digest, data=data.digest, features=features.digest)


@stage(key=_key, tags=["release"], timeout_s=900)
def preflight(run: Run, bento: Artifact, data: Artifact, features: FeatureSet) -> Artifact:
    """Features and answers compared cell by cell, then latency and size against the budget."""
    home, spec = opened(run)
    return make_artifact(
        home.root, "preflight", _key(run, bento, data, features),
        lambda out: preflight_into(spec, home, run, home.root / bento.path, home.root / data.path, features, out),
    )  # fmt: skip
