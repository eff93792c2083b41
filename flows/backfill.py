"""Any range of the past, as it was known at a time."""

from prefect import flow

from deploy.backfill import Backfilled
from tasks.backfill import all_landed, backfill_part, feed, past_features, past_rows, pin
from tasks.contract import contract
from tasks.policy import alone


@flow(name="backfill", flow_run_name="backfill {pipeline}", persist_result=False)
@alone
def backfill(
    pipeline: str, begin: str, end: str, as_of: str | None = None, overrides: list[str] | None = None
) -> Backfilled:  # fmt: skip
    """Features and labels of the rows asked about from `begin` to `end`, from what was known at `as_of`; feeds what serves."""
    run = pin(pipeline, begin, end, as_of, overrides)
    checked = contract(all_landed(run))
    rows = past_rows(run, checked)
    store = past_features(run, rows)
    parts = [backfill_part(run, store, rows, part) for part in range(len(rows.parts))]
    return feed(run, store, parts)
