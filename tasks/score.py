"""Batch scoring with the champion."""

from deploy.scoring import Scored, score_open
from pipelines.home import open_home
from pipelines.spec import load_spec
from tasks.policy import stage


@stage(tags=["release"], timeout_s=1_800)
def score_rows(pipeline: str) -> Scored:
    """Every open row of the served store."""
    spec = load_spec(pipeline)
    return score_open(open_home(), spec.pipeline, at=spec.serve.store)
