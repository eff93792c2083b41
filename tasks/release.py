"""Stage 9: on both verdicts the pointer moves; on either the served store is fed. Idempotent, never cached."""

from prefect.events import emit_event

from deploy.rollout import Released, release_run
from deploy.stages import CHALLENGER
from features.store import FeatureSet
from pipelines.manifest import Artifact
from pipelines.run import Run
from tasks.policy import opened, stage


@stage(tags=["release"], timeout_s=900)
def release(
    run: Run, features: FeatureSet, verdict: Artifact, bento: Artifact | None, checked: Artifact | None
) -> Released:
    """Promotes by compare-and-set against the pinned parent, or says why not, and feeds every kept release."""
    home, spec = opened(run)
    found = release_run(spec, home, run, features, verdict, bento, checked)
    if found.outcome == CHALLENGER:  # the rollout deployment waits for it
        emit_event("millrace.challenger", resource={"prefect.resource.id": f"millrace.model.{run.pipeline}"})
    return found
