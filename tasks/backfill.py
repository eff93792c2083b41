"""The stages of a backfill: pin, rows, features, parts, feed. A killed one goes on with the part that it was at."""

from dataclasses import dataclass, replace

from deploy.backfill import Backfilled, finish_backfill
from deploy.rollout import land_events
from features.backfill import Backfill, pin_backfill, write_part, write_rows
from features.ingest import inputs_of, read_snapshot
from features.store import FeatureSet, features_from
from pipelines.clock import parse_time
from pipelines.home import open_home
from pipelines.lineage import emit
from pipelines.manifest import Artifact, make_artifact, read_json
from pipelines.run import Run
from pipelines.spec import load_spec
from tasks.policy import opened, stage, stage_key


@dataclass(frozen=True)
class Rows:
    """The rows of a backfill, by position: home-relative folder, its digest, and where each part begins and ends."""

    path: str
    digest: str
    parts: tuple[tuple[int, int], ...]
    line: str


@stage(tags=["data"], timeout_s=1_800)
def pin(pipeline: str, begin: str, end: str, as_of: str | None = None, overrides: list[str] | None = None) -> Backfill:
    """Landing → objects → snapshot, as it was known at `as_of`."""
    at = parse_time(as_of) if as_of is not None else None
    spec, home = load_spec(pipeline, overrides or []), open_home()
    land_events(spec, home)
    run = pin_backfill(spec, home, parse_time(begin), parse_time(end), at)
    inputs = inputs_of(read_snapshot(home, run.pipeline, run.snapshot))
    emit(home, run.pipeline, run.run_id, "START", inputs=inputs, job="backfill")
    return run


def all_landed(run: Backfill) -> Run:
    """The run whose snapshot the contract judges: everything that landed, not what was known of it."""
    return replace(run, snapshot=run.landed)


@stage(tags=["data"], timeout_s=1_800)
def past_rows(run: Backfill, checked: Artifact) -> Rows:
    """The rows that were asked about in the range."""
    home, spec = opened(run)
    key = stage_key(run, "features", "past_rows", backfill=run.run_id)
    made = make_artifact(home.root, "past_rows", key, lambda out: write_rows(spec, home, run, out))
    parts = read_json(home.root / made.path / "parts.json")["parts"]
    return Rows(made.path, made.digest, tuple((begin, end) for begin, end in parts), made.line)


@stage(tags=["data"], timeout_s=3_600)
def past_features(run: Backfill, rows: Rows) -> FeatureSet:
    """The feature folder of what was known, right from the first row on."""
    home, spec = opened(run)
    return features_from(spec, home, read_snapshot(home, run.pipeline, run.snapshot), run.begin_us)


def _key(run: Backfill, features: FeatureSet, rows: Rows, part: int) -> str:
    return stage_key(run, "features", "backfill_part", features=features.digest, rows=rows.digest, part=part,
                     spec=run.spec_digest)  # fmt: skip


@stage(key=_key, tags=["data"], timeout_s=3_600)
def backfill_part(run: Backfill, features: FeatureSet, rows: Rows, part: int) -> Artifact:
    """One Parquet file: some days of rows with what was known of each."""
    home, spec = opened(run)
    return make_artifact(
        home.root, "backfill_part", _key(run, features, rows, part),
        lambda out: write_part(spec, home, features, home.root / rows.path, part, out),
    )  # fmt: skip


@stage(tags=["release"], timeout_s=1_800)
def feed(run: Backfill, features: FeatureSet, parts: list[Artifact]) -> Backfilled:
    """The parts as one folder; the served stores move on, and only on."""
    home, spec = opened(run)
    return finish_backfill(spec, home, run, features, parts)
