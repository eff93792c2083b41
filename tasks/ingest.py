"""Stage 1: what landed becomes a snapshot, and the run's inputs are pinned."""

from deploy.rollout import champion, take_in
from deploy.tracking import require
from features.ingest import cut, inputs_of, read_snapshot, write_arrivals
from models.inference import check_engines
from pipelines.clock import iso, parse_time
from pipelines.home import open_home
from pipelines.lineage import emit
from pipelines.manifest import code_digest, digest_of
from pipelines.run import Run, accepted, pin, result_spec, take_up, unfinished
from pipelines.spec import load_spec
from tasks.policy import stage


@stage(tags=["data"], timeout_s=1_800)
def ingest(pipeline: str, as_of: str | None = None, overrides: list[str] | None = None) -> Run:
    """Landing → objects → snapshot; takes up an unfinished run of the same spec, else pins a new one."""
    home, spec = open_home(), load_spec(pipeline, overrides or [])
    require(spec.tracking)
    check_engines(spec.serve.inference)
    left = unfinished(home, spec.pipeline)
    if left and left.spec_digest == digest_of(result_spec(spec)) and as_of in (None, iso(left.as_of_us)):
        return take_up(home, left, spec)
    snapshot = take_in(spec, home)
    at = parse_time(as_of) if as_of else snapshot.watermark_us
    snapshot = cut(spec, home, snapshot, at)
    before, now = accepted(home, spec.pipeline), champion(home, spec.pipeline)
    previous = before["inputs"]["snapshot"] if before else ""
    run = pin(home, spec, as_of_us=at, snapshot=snapshot.digest, previous=previous,
              parent=now.release if now else "", code=code_digest("flows"))  # fmt: skip
    emit(home, spec.pipeline, run.run_id, "START", inputs=inputs_of(snapshot))
    write_arrivals(snapshot, read_snapshot(home, spec.pipeline, previous) if previous else None, home.root / run.page)
    rows = f"{sum(snapshot.rows.values()):,} rows in {len(snapshot.rows)} tables, {snapshot.new_files} new files"
    return run.says(rows + (f", known up to {iso(at)}" if spec.timed else ""))
