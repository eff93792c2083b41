"""Stage 7: challenger against champion, baseline and prior on the same rows. The quality verdict."""

from deploy.judge import judge_into
from pipelines.manifest import Artifact, make_artifact
from pipelines.run import Run
from tasks.policy import opened, stage, stage_key


def _key(run: Run, data: Artifact, model: Artifact) -> str:
    return stage_key(run, "deploy", "evaluate", data=data.digest, model=model.digest, parent=run.parent,
                     spec=run.spec_digest)  # fmt: skip


@stage(key=_key, tags=["model"], timeout_s=3_600)
def evaluate(run: Run, data: Artifact, model: Artifact) -> Artifact:
    """Metrics with paired intervals, slices, calibration; `ok` is the verdict."""
    home, spec = opened(run)
    return make_artifact(
        home.root, "evaluate", _key(run, data, model),
        lambda out: judge_into(spec, home, run, home.root / data.path, home.root / model.path, out),
    )  # fmt: skip
