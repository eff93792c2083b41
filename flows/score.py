"""Scores everything that can still be asked, with the champion."""

from prefect import flow

from deploy.scoring import Scored
from tasks.score import score_rows


@flow(name="score", flow_run_name="score {pipeline}", persist_result=False)
def score(pipeline: str) -> Scored:
    """One Parquet file of scores for the open rows at the clock's now."""
    return score_rows(pipeline)
