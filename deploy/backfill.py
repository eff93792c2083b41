"""The end of a backfill: its parts become one folder, and the served stores move on to what it knew."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.rollout import feed_all
from features.backfill import Backfill
from features.ingest import inputs_of, read_snapshot
from features.store import FeatureSet
from pipelines.clock import Anchor, iso
from pipelines.home import Home
from pipelines.lineage import dataset, emit
from pipelines.manifest import Artifact, file_digest, write_json
from pipelines.spec import Spec


@dataclass(frozen=True)
class Backfilled:
    """Where the rows lie (a folder of Parquet) and the Feast repository that they came from; both home-relative.

    `fed`: releases whose served store moved on to `as_of`.
    """

    pipeline: str
    path: str
    features: str
    as_of: str
    files: tuple[str, ...]
    fed: tuple[str, ...]
    line: str


def finish_backfill(spec: Spec, home: Home, run: Backfill, features: FeatureSet, parts: Sequence[Artifact]) -> Backfilled:
    """Links the parts into `backfills/PIPELINE/ID/rows/`, and feeds; a store that is at `as_of` or later stays as it is."""
    folder = run.folder(home) / "rows"
    folder.mkdir(exist_ok=True)
    files = [path for part in parts for path in sorted((home.root / part.path).glob("*.parquet"))]
    for path in files:
        scratch = folder / f".{path.name}"
        scratch.unlink(missing_ok=True)
        os.link(path, scratch)
        scratch.replace(folder / path.name)
    digests = {f"rows/{path.name}": file_digest(path) for path in files}
    write_json(run.folder(home) / "done.json", {"files": digests, "features": features.path, "features_digest": features.digest})
    anchor, built = Anchor(run.as_of_us, run.anchor_wall_us), features if features.since_us <= run.as_of_us else None
    snapshot = read_snapshot(home, run.pipeline, run.snapshot)
    fed = feed_all(home, run.pipeline, snapshot, anchor, built, at=spec.serve.store)
    outputs = [dataset(f"{run.pipeline}.backfill", run.run_id, output=True)]
    emit(home, run.pipeline, run.run_id, "COMPLETE", inputs=inputs_of(snapshot), outputs=outputs, job="backfill")
    stores = f"{len(fed)} served store(s) fed" if fed else "served stores are as new or newer"
    return Backfilled(run.pipeline, home.relative(folder), features.path, iso(run.as_of_us), tuple(p.name for p in files),
                      tuple(fed), f"{len(files)} file(s); {stores}")  # fmt: skip
