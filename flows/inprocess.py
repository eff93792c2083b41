"""Runs the flow in this process: under the Prefect server of the home if one is up, else under a temporary one."""

import logging
import os
import warnings
from typing import Any

from deploy.record import Outcome
from pipelines.errors import MillraceError
from pipelines.home import Home


def run_flow(home: Home, pipeline: str, as_of: str | None, overrides: list[str]) -> Outcome:
    """The outcome of one `retrain`. A refusal is raised as it was inside."""
    from flows.serving import prefect_api

    api = prefect_api(home)
    if api:
        os.environ["PREFECT_API_URL"] = api
    quiet()
    from flows.retrain import retrain

    state: Any = retrain(pipeline, as_of, overrides, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    if not isinstance(result, Outcome):
        raise MillraceError(f"the flow ended {state.name}: {state.message}")
    return result


def quiet() -> None:
    """Silences library chatter; ours goes to stderr line by line."""
    warnings.filterwarnings("ignore")
    for name in ("prefect", "httpx", "great_expectations", "feast", "pytorch_lightning", "optuna", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
