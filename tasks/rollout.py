"""Releases by hand or by a schedule: a rollout by steps, and the way back."""

from functools import partial

from deploy.canary import Rolled, roll_out
from deploy.live import roll_back
from deploy.rollout import Release, stages_of
from deploy.stages import under_way
from deploy.tracking import mirror
from pipelines.home import open_home
from pipelines.spec import load_spec
from tasks.policy import stage


@stage(tags=["release"], timeout_s=7 * 86_400)
def prove(pipeline: str) -> Rolled | None:
    """Shadow, canary, champion, or taken back; nothing where no release is on its way. Killed, it goes on where it was."""
    home, spec = open_home(), load_spec(pipeline)
    if under_way(stages_of(home, spec.pipeline)) is None:
        return None
    found = roll_out(home, spec, tell=partial(print, flush=True), replaced=True)
    mirror(home, spec.pipeline, spec.tracking)
    return found


@stage(tags=["release"], timeout_s=900)
def go_back(pipeline: str, to: str | None, why: str) -> Release:
    """The release before the champion, or a named one, answers again."""
    home, spec = open_home(), load_spec(pipeline)
    release = roll_back(home, spec.pipeline, to=to, why=why, at=spec.serve.store)
    mirror(home, spec.pipeline, spec.tracking)
    return release
