"""`millrace check`: does the spec fit what landed, and is there room to run?"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.tracking import require
from features.frame import feature_list, resolve
from features.ingest import landed_files
from features.landed import column_names
from features.propose import propose
from features.views import stored_views
from pipelines.clock import duration_text
from pipelines.errors import Refused, UsageError, nearest
from pipelines.home import Home, free_mb
from pipelines.spec import Source, Spec

NEEDED_MB = 2_000


@dataclass(frozen=True)
class Checked:
    """Lines for a person, and the problems among them."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


def check_pipeline(spec: Spec, home: Home, path: Path) -> Checked:
    """Looks at the spec's functions, at the schema of one landed file per source, and at the disk. Reads no rows."""
    lines, problems = [f"{path.name}: {spec.title}"], []
    explicit = propose(spec).spec if spec.features.auto else spec
    kinds = [f.kind for f in feature_list(explicit)]
    said = "auto proposes " if spec.features.auto else ""
    lines.append(
        f"features: {said}{len(kinds)} ({kinds.count('category')} categories) in {len(stored_views(explicit))} stored views"
    )
    if spec.features.auto:
        counted = Counter(_origin(explicit, f.group) for f in feature_list(explicit))
        lines.append(", ".join(f"{n} {origin}" for origin, n in counted.items()) + "; training rows choose among them")
    lines.append(f"rows: {spec.rows.source} by {', '.join(spec.row_key)}" + _asked(spec))
    for function in spec.features.functions:
        try:
            resolve(function.call)
        except UsageError as error:
            problems.append(str(error))
    if spec.train.module:
        from models.custom import load_class  # torch: seconds

        try:
            load_class(spec.train)
        except UsageError as error:
            problems.append(str(error))
    try:
        require(spec.tracking)
        if set(spec.serve.inference) - {"auto", "native"}:
            from models.inference import check_engines  # LightGBM, ONNX Runtime: seconds

            check_engines(spec.serve.inference)
    except UsageError as error:
        problems.append(str(error))
    for name, source in spec.sources.items():
        files = landed_files(home.landing(spec.pipeline) / name)
        if not files:
            hint = f"; type `millrace sample {spec.pipeline}`" if spec.sample else ""
            problems.append(f"{name}: nothing landed in {home.landing(spec.pipeline) / name}{hint}")
            continue
        try:
            rows, found = _look(files, source)
        except Refused as error:
            problems.append(f"{name}: {error}")
            continue
        lines.append(f"{name}: {len(files)} files, {rows}key {', '.join(source.key)}")
        for column in source.columns:
            if column not in found and source.nulls(column) == 0:
                problems.append(f"{name}: column {column!r} is not in {files[-1].name}{nearest(column, found)}")
    free = free_mb(home)
    lines.append(f"disk: {free:,} MB free at {home.root}")
    if free < NEEDED_MB:
        problems.append(f"disk: {free} MB free at {home.root}, a run wants {NEEDED_MB}")
    lines += [f"problem: {p}" for p in problems] or ["no problem found"]
    return Checked(tuple(lines), tuple(problems))


def _origin(spec: Spec, group: str) -> str:
    """Where a feature comes from: the shape of its view and the source, or the part of the spec."""
    view = spec.features.views.get(group)
    return f"{type(view.shape).__name__.lower()} of {view.shape.source}" if view else group


def _asked(spec: Spec) -> str:
    at = spec.predict_at
    return f", asked {duration_text(at.lead)} before {at.column}" if at else ", without time"


def _look(files: list[Path], source: Source) -> tuple[str, list[str]]:
    """Rows in all footers, where all are Parquet, and the columns of the newest file. Raises Refused when it is unreadable."""
    rows, names = 0, column_names(files[-1].name, files[-1].read_bytes(), source)
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError):
            return "", names
    return f"{rows:,} rows, ", names
