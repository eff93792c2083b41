"""The record of a run: manifest, report and model card. Written after the pointer has moved."""

from deploy.record import Outcome, write_record, write_told
from deploy.rollout import Released
from deploy.tracking import settle
from features.store import FeatureSet
from features.versions import track
from pipelines.manifest import Artifact
from pipelines.run import Run
from tasks.policy import opened, stage


@stage(tags=["release"], timeout_s=600)
def record(
    run: Run, checked: Artifact, features: FeatureSet, data: Artifact, study: Artifact, model: Artifact,
    verdict: Artifact, form: Artifact | None, bento: Artifact | None, flight: Artifact | None, released: Released,
) -> Outcome:  # fmt: skip
    """`manifest.json`, `report.html` and `model_card.md` in the run's folder."""
    home, spec = opened(run)
    stages = {"contract": checked, "training_set": data, "tune": study, "train": model, "evaluate": verdict,
              "export": form, "package": bento, "preflight": flight}  # fmt: skip
    version = track(home, run.pipeline, run.snapshot, spec.versions.remote)
    outcome = write_record(spec, home, run, features, stages, released, version)
    told = settle(home, run)
    return write_told(spec, home, run, told) if told else outcome
