"""Stage 8: in what form the model is packaged. Measured here, once: a run that is taken up keeps the choice."""

from deploy.compiled import compile_into
from models.inference import hardware
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run, data: Artifact, study: Artifact, model: Artifact) -> str:
    serve = opened(run)[1].serve
    return stage_key(run, "deploy", "export", data=data.digest, study=study.digest, model=model.digest, hardware=hardware(),
                     inference=serve.inference, max_gap=serve.max_gap)  # fmt: skip


@stage(key=_key, tags=["release"], timeout_s=3_600)
def export(run: Run, data: Artifact, study: Artifact, model: Artifact) -> Artifact:
    """Candidates from each member that serves: checked, measured, one chosen."""
    home, spec = opened(run)
    return make_artifact(
        home.root, "export", _key(run, data, study, model),
        lambda out: compile_into(
            spec, home.root / model.path, home.root / data.path, home.root / study.path, out
        ),
    )  # fmt: skip
