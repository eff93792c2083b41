"""The training set: prediction rows with their features, label and part, and the preprocessing fitted on train."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import preprocess
from features.facts import Columns
from features.frame import arrow_columns, as_array, feature_list, local_parts, own_columns
from features.ingest import Snapshot, read_table
from features.preprocess import Batch, Preprocess
from features.rows import PARTS, Rows, prediction_rows
from features.store import FeatureSet, historical_features
from features.tokens import Tokens
from pipelines.home import Home
from pipelines.manifest import Note, read_json, write_json, write_page
from pipelines.spec import Calendar, Spec

TOKENS = "tokens.arrow"


@dataclass(frozen=True)
class TrainingSet:
    """N labelled rows, sorted by (t, key). `part` indexes features.rows.PARTS; `t` is µs UTC."""

    frame: Columns
    batch: Batch
    label: np.ndarray
    part: np.ndarray
    t: np.ndarray
    key: np.ndarray
    slices: Columns
    preprocess: Preprocess
    counts: dict[str, int]

    def rows(self, part: str) -> np.ndarray:
        """Positions of the rows of a part."""
        return np.flatnonzero(self.part == PARTS.index(part))


def build_training_set(spec: Spec, home: Home, snapshot: Snapshot, features: FeatureSet, as_of: int, out: Path) -> Note:
    """Writes `frame.parquet`, `preprocess.json`, `counts.json` and the tokens of texts into `out`."""
    needed = {spec.rows.source, spec.label.source, *spec.closed_by}
    tables = {name: read_table(spec, home, snapshot, name) for name in needed}
    rows = prediction_rows(spec, tables, as_of)
    del tables
    kept = np.flatnonzero(rows.part >= 0)
    table, t = rows.table.take(pa.array(kept)).combine_chunks(), rows.t[kept]
    frame = historical_features(spec, home, features, table, t)
    fitted = preprocess.fit(frame, rows.part[kept] == 0, feature_list(spec), text=spec.features.text)
    fitted.save(out / "preprocess.json")
    if fitted.reader:
        fitted.reader.read(frame).save(out / TOKENS)
    columns = arrow_columns(frame)
    columns |= {"_label": pa.array(rows.label[kept]), "_part": pa.array(rows.part[kept]), "_t": pa.array(t),
                "_key": rows.key.take(pa.array(kept))}  # fmt: skip
    columns |= {f"_slice_{name}": pa.array(v, pa.string()) for name, v in _slices(spec, table).items()}
    pq.write_table(pa.table(columns), out / "frame.parquet", compression="zstd", compression_level=1)
    pq.write_table(table, out / "rows.parquet", compression="zstd", compression_level=1)
    write_json(out / "counts.json", {"counts": rows.counts, "positive_share": _balance(rows)})
    counted = " · ".join(f"{p} {rows.counts[p]:,}" for p in PARTS)
    write_page(out / "page.md", f"{spec.pipeline}: training set", [
        ("Rows", [(n.replace("_", " "), f"{c:,}") for n, c in rows.counts.items()]),
        ("Share of positive labels", [(p, f"{s:.1%}") for p, s in _balance(rows).items()]),
    ])  # fmt: skip
    return Note(f"{counted}; {len(frame)} features, {rows.counts['unlabelled']:,} rows without a label")


def _balance(rows: Rows) -> dict[str, float]:
    """Share of positive labels in each part."""
    return {p: round(float(rows.label[rows.part == i].mean()), 6) for i, p in enumerate(PARTS)}


def _slices(spec: Spec, table: pa.Table) -> dict[str, list[str]]:
    own, found = own_columns(spec, table), {}
    calendar = spec.features.calendar
    for name in spec.gate.slices:
        if name in own:
            found[name] = [str(v) for v in own[name].tolist()]
        elif calendar is not None:
            part = Calendar.model_validate({**calendar.model_dump(), "parts": (name,)})
            values = local_parts(part, own[calendar.column])[f"local_{name}"]
            found[name] = [f"{v:02.0f}" for v in values.tolist()]
    return found


def load_training_set(folder: Path) -> TrainingSet:
    """The training set that `build_training_set` left in a folder."""
    table = pq.read_table(folder / "frame.parquet")
    fitted = Preprocess.load(folder / "preprocess.json")
    frame = {
        name: as_array(table[name], "string" if pa.types.is_string(table[name].type) else "float64")
        for name in table.column_names
        if not name.startswith("_")
    }
    slices = {
        name.removeprefix("_slice_"): np.array(table[name].to_pylist(), object)
        for name in table.column_names
        if name.startswith("_slice_")
    }
    tokens = Tokens.load(folder / TOKENS) if fitted.reader else None
    return TrainingSet(
        frame, fitted.transform(frame, tokens), table["_label"].to_numpy().astype(np.float64), table["_part"].to_numpy(),
        table["_t"].to_numpy(), np.array(table["_key"].to_pylist(), object), slices, fitted,
        read_json(folder / "counts.json")["counts"],
    )  # fmt: skip
