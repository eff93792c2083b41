"""Stage 5: generations of pruned, resumable trials on valid_fit."""

from features.tokens import pretrained_digest
from models.job import own_code
from models.tune import tune_into
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import bar, opened, stage, stage_key


def _key(run: Run, data: Artifact) -> str:
    _, spec = opened(run)
    return stage_key(run, "models", "tune", data=data.digest, spec=run.spec_digest, **own_code(spec.train),
                     **pretrained_digest(spec.features.text))  # fmt: skip


@stage(key=_key, tags=["model"], timeout_s=6 * 3_600)
def tune(run: Run, data: Artifact) -> Artifact:
    """The best parameters and every trial. A killed search goes on where it was."""
    home, spec = opened(run)
    study = home.root / "studies" / run.pipeline / _key(run, data)
    with bar("tune") as progress:
        return make_artifact(
            home.root, "tune", _key(run, data),
            lambda out: tune_into(spec, home.root / data.path, study, out, progress=progress),
        )  # fmt: skip
