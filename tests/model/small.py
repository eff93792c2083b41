"""A small training set that needs no pipeline: seeded numbers and categories, a label that depends on both."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import preprocess
from features.frame import Feature
from features.rows import PARTS
from features.trainset import TOKENS, TrainingSet, load_training_set
from pipelines.manifest import write_json
from pipelines.spec import Spec, Text, load_spec

SHARES = (0.6, 0.15, 0.1, 0.15)


def small_spec(*overrides: str) -> Spec:
    """A spec whose training, tuning and gate settings are small. Its sources play no part here."""
    small = (
        "train={network: {width: 32, depth: 2, frequencies: 2, dropout: 0.2}, max_epochs: 3, batch_size: 64}",
        "gbdt={num_leaves: 7, min_data_in_leaf: 20, max_rounds: 40, patience: 5, learning_rate: 0.1}",
        "tune={generations: 2, size: 3, max_epochs: 2, rows: 1000, workers: 2}",
    )
    return load_spec("tumours", [*small, *overrides])


def write_small(folder: Path, rows: int = 4_000, seed: int = 3, categories: bool = True,
                text: bool = False) -> TrainingSet:  # fmt: skip
    """Writes a training set as `build_training_set` does, and loads it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    kind, place = rng.integers(0, 3, rows), rng.integers(0, 5, rows)
    score = 1.5 * x[:, 0] - x[:, 1] + np.sin(3 * x[:, 2]) + 0.8 * kind - 1.5
    label = (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(np.int8)
    x[rng.random(rows) < 0.1, 1] = np.nan
    frame = {f"x{i}": x[:, i] for i in range(4)}
    if categories:
        frame["kind"] = np.array([f"k{k}" for k in kind], object)
        frame["place"] = np.array([None if p == 4 else f"p{p}" for p in place], object)
    if text:  # tells in what order two words stand, and nothing by which words there are
        said, more = np.where(x[:, 0] > 0, "not good", "good not"), rng.integers(0, 12, rows)
        words = [" ".join([a, *(f"word{w}" for w in rng.integers(0, 40, n))]) for a, n in zip(said, more, strict=True)]
        frame = {"x1": x[:, 1], "kind": frame["kind"], "remark": np.array(words, object)}
    edges = np.cumsum(SHARES)[:-1] * rows
    part = np.searchsorted(edges, np.arange(rows), side="right").astype(np.int8)
    kinds = {n: "text" if n == "remark" else "category" if v.dtype == object else "number" for n, v in frame.items()}
    features = [Feature(n, kind, "row") for n, kind in kinds.items()]  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    fitted = preprocess.fit(frame, part == 0, features, text=Text(columns=("remark",), max_tokens=16) if text else None)
    fitted.save(folder / "preprocess.json")
    if fitted.reader:
        fitted.reader.read(frame).save(folder / TOKENS)
    columns = {n: pa.array(v, pa.string() if v.dtype == object else pa.float64()) for n, v in frame.items()}
    columns |= {"_label": pa.array(label), "_part": pa.array(part), "_t": pa.array(np.arange(rows)),
                "_key": pa.array([f"row{i:06d}" for i in range(rows)]),
                "_slice_place": pa.array([f"p{p}" for p in place])}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "frame.parquet")
    write_json(folder / "counts.json", {"counts": {p: int((part == i).sum()) for i, p in enumerate(PARTS)}})
    return load_training_set(folder)
