"""Stage 8a: only what serving needs becomes a bento, named by its contents."""

from deploy.bundle import package_into
from features.store import FeatureSet
from pipelines.clock import iso
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run, model: Artifact, form: Artifact, verdict: Artifact, features: FeatureSet) -> str:
    return stage_key(run, "deploy", "package", model=model.digest, form=form.digest, verdict=verdict.digest,
                     defs=features.defs_digest, spec=run.spec_digest)  # fmt: skip


def _about(run: Run, model: Artifact) -> dict[str, str]:
    return {"pipeline": run.pipeline, "snapshot": run.snapshot, "as_of": iso(run.as_of_us), "spec": run.spec_digest,
            "model": model.digest}  # fmt: skip


@stage(key=_key, tags=["release"], timeout_s=900)
def package(run: Run, model: Artifact, form: Artifact, verdict: Artifact, features: FeatureSet) -> Artifact:
    """Builds the bento, or finds the one with the same contents."""
    home, spec = opened(run)
    return make_artifact(
        home.root, "package", _key(run, model, form, verdict, features),
        lambda out: package_into(
            spec, home, home.root / model.path, home.root / form.path, home.root / verdict.path, features.defs_digest,
            _about(run, model), out,
        ),
    )  # fmt: skip
