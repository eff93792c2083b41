"""Batch scoring with the champion."""

from pathlib import Path

from deploy.score_parts import ScoredFiles, score_files
from deploy.scoring import Scored, score_open
from pipelines.home import open_home
from pipelines.spec import load_spec
from tasks.policy import stage


@stage(tags=["release"], timeout_s=1_800)
def score_rows(pipeline: str) -> Scored:
    """Every open row of the served store."""
    spec = load_spec(pipeline)
    return score_open(open_home(), spec.pipeline, at=spec.serve.store)


@stage(tags=["release"], timeout_s=86_400)
def score_parquet(pipeline: str, source: str, output: str) -> ScoredFiles:
    """The rows of Parquet files that have no scores in the output folder yet."""
    spec = load_spec(pipeline)
    return score_files(open_home(), spec.pipeline, source, Path(output), at=spec.serve.store)
