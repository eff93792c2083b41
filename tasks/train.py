"""Stage 6: the network on N ranks, LightGBM on the same rows, calibration and choice on valid_select."""

from deploy.tracking import follow
from features.tokens import pretrained_digest
from models.candidate import train_candidates
from models.job import own_code
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import bar, opened, stage, stage_key


def _key(run: Run, data: Artifact, study: Artifact) -> str:
    _, spec = opened(run)
    profiled = {"profile": run.run_id} if spec.train.profile else {}  # so that it is not found as done
    return stage_key(run, "models", "train", data=data.digest, study=study.digest, spec=run.spec_digest,
                     **own_code(spec.train), **pretrained_digest(spec.features.text), **profiled)  # fmt: skip


@stage(key=_key, tags=["model"], timeout_s=24 * 3_600)
def train(run: Run, data: Artifact, study: Artifact) -> Artifact:
    """Every candidate, calibrated, and which of them is chosen. Resumes from the newest checkpoint."""
    home, spec = opened(run)
    job = run.folder(home) / "checkpoints"
    follow(home, run)
    with bar("train") as progress:
        return make_artifact(
            home.root, "train", _key(run, data, study),
            lambda out: train_candidates(
                spec, home.root / data.path, home.root / study.path, job, out, progress=progress
            ),
        )  # fmt: skip
