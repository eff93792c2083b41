"""Watches what the champion answered."""

from prefect import flow

from deploy.monitor import Monitored
from tasks.monitor import watch


@flow(name="monitor", flow_run_name="monitor {pipeline}", persist_result=False)
def monitor(pipeline: str) -> Monitored:
    """Quality on labels that arrived since, drift, and skew; an alarm starts retraining."""
    return watch(pipeline)
