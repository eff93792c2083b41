"""Releases as flows: a challenger proves itself on live traffic; the champion goes back."""

from prefect import flow

from deploy.canary import Rolled
from deploy.rollout import Release
from tasks.rollout import go_back, prove


@flow(name="rollout", flow_run_name="rollout {pipeline}", persist_result=False)
def rollout(pipeline: str) -> Rolled | None:
    """The release that is on its way: copies of the traffic, a growing share of it, all of it; or none any more."""
    return prove(pipeline)


@flow(name="rollback", flow_run_name="rollback {pipeline}", persist_result=False)
def rollback(pipeline: str, to: str | None = None, why: str = "by a flow") -> Release:
    """An earlier release becomes champion again, by its own features and their store."""
    return go_back(pipeline, to, why)
