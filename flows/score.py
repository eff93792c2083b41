"""Scores everything that can still be asked, or Parquet files, with the champion."""

from prefect import flow

from deploy.score_parts import ScoredFiles
from deploy.scoring import Scored
from tasks.score import score_parquet, score_rows


@flow(name="score", flow_run_name="score {pipeline}", persist_result=False)
def score(pipeline: str, source: str = "", output: str = "") -> Scored | ScoredFiles:
    """One Parquet file of scores for the open rows at the clock's now; or a folder of them for the Parquet of `source`."""
    return score_parquet(pipeline, source, output) if source else score_rows(pipeline)
