"""`python -m bench.text`: an encoder that learns to read names from nothing, against bags of words on the same rows.

The pipeline `names` runs whole, from its landed Parquet to a served release. The rows of its training set then go through
logistic regression of scikit-learn on tf-idf of words, of words and pairs of them, and of letters (1 to 4 within a word), each
with the penalty that is best on valid_fit, as its own bag of tokens is fitted.

Figures: `auc` and `log_loss` on test of the network, its blends, LightGBM and each bag; `beats_bag_of_words`: whether the
network's log loss is below that of every bag of words or tokens (`beats_letters`: of letters too); `padded_share` of what the
network reads, with batches of like length and with random ones, and `bucket_speedup`, the rate of steps of the first over the
second; for `MiniLM` and `BERT base`, made from their configurations: `parameters`, `step_ms` and `tokens_per_s` of training,
`answer_ms` of one row as served.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from bench.record import options, report
from features.preprocess import Batch
from features.trainset import TrainingSet, load_training_set
from models.arrays import Arrays, Shape, epoch_shape, write_arrays
from models.custom import build
from models.data import Loader, Resident, resident, shuffled
from models.evaluate import auc, log_loss
from models.export import export_onnx
from models.module import TabularModule
from models.score import NetworkScorer
from models.words import STRENGTHS
from pipelines.home import Home
from pipelines.manifest import ROOT, read_json
from pipelines.spec import Train, load_spec

BAGS: dict[str, dict[str, Any]] = {
    "words": {}, "words and pairs": {"ngram_range": (1, 2)}, "letters": {"analyzer": "char_wb", "ngram_range": (1, 4)},
}  # fmt: skip
LARGE = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1_536},
    "BERT base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072},
}


def run_names(home: Home, *, quick: bool) -> tuple[TrainingSet, dict[str, Any]]:
    """The pipeline whole: its training set, and what was measured on test."""
    sets = ["train.max_epochs=1", "gbdt.max_rounds=40", "gate.resamples=50"] if quick else []
    words = [word for item in sets for word in ("--set", item)]
    env = {**os.environ, "MILLRACE_HOME": str(home.root)}

    def millrace(*given: str) -> str:
        return subprocess.run([sys.executable, "-m", "flows.cli", *given], env=env, cwd=ROOT, check=True, capture_output=True,
                              text=True).stdout  # fmt: skip

    millrace("sample", "names")
    if quick:
        landed = home.landing("names") / "names" / "names.parquet"
        table = pq.read_table(landed)
        pq.write_table(table.take(pa.array(np.arange(0, len(table), 8))), landed)
    run = home.runs("names") / json.loads(millrace("run", "names", "--json", *words))["run_id"]
    data, judged = (home.root / read_json(run / "manifest.json")["stage_paths"][name] for name in ("training_set", "evaluate"))
    return load_training_set(data), read_json(judged / "evaluation.json")["metrics"]


def bag(data: TrainingSet, **more: Any) -> tuple[float, float]:
    """AUC and log loss on test of logistic regression on tf-idf."""
    texts = [text or "" for text in data.frame["name"].tolist()]
    parts = {name: data.rows(name) for name in ("train", "valid_fit", "test")}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **more).fit([texts[i] for i in parts["train"]])
    x = {name: vectorizer.transform([texts[i] for i in rows]) for name, rows in parts.items()}
    y = {name: data.label[rows] for name, rows in parts.items()}
    models = [LogisticRegression(C=strength, max_iter=1_000).fit(x["train"], y["train"]) for strength in STRENGTHS]
    best = min(models, key=lambda model: log_loss(y["valid_fit"], model.predict_proba(x["valid_fit"])[:, 1]))
    found = best.predict_proba(x["test"])[:, 1]
    return auc(y["test"], found), log_loss(y["test"], found)


class Mixed(Resident):
    """The same rows, whatever their length."""

    def _order(self, seed: int, shape: Shape) -> torch.Tensor:
        return shuffled(len(self), seed)


def steps(arrays: Arrays, train: Train, count: int, kind: type[Resident] = Resident) -> dict[str, float]:
    """Steps of training as plain PyTorch: median and mean ms of a step, tokens a second, share of padding in what is read."""
    rows = kind(**vars(resident(arrays, "train")))
    shape = epoch_shape(len(rows), train.batch_size, 1)
    net = build(train, arrays.preprocess, 1, count)
    module = TabularModule(net, train, max(2, count))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    seconds, read, padded = [], 0, 0
    assert rows.tokens is not None
    for index, batch in enumerate(Loader(rows, shape, 1, 0, 1)):
        if index == count + 1:
            break
        began = time.perf_counter()
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        read += batch[2].numel()
        padded += int((batch[2] == rows.tokens.pad).sum())
    mean = statistics.mean(seconds[1:])
    return {"step_ms": statistics.median(seconds[1:]) * 1e3, "mean_ms": mean * 1e3,
            "tokens_per_s": (read - padded) / len(seconds) / mean, "padded_share": padded / read}  # fmt: skip


def large(arrays: Arrays, train: Train, work: Path, count: int) -> dict[str, Any]:
    """An encoder of this size: trained for some steps, exported, and asked about one row at a time."""
    found = steps(arrays, train, count)
    net = build(train, arrays.preprocess, 1, 1)
    rows = resident(arrays, "valid_fit", 16)
    export_onnx(net, arrays.preprocess, rows, work / "network.onnx")
    scorer, seconds = NetworkScorer(work / "network.onnx"), []
    assert arrays.tokens is not None
    for i in range(30):
        one = Batch(np.empty((1, 0)), arrays.codes[i : i + 1], arrays.scaled[i : i + 1], arrays.tokens.take(slice(i, i + 1)))
        began = time.perf_counter()
        scorer.logit(one)
        seconds.append(time.perf_counter() - began)
    return {"parameters": sum(w.numel() for w in net.parameters()), "step_ms": round(found["step_ms"], 1),
            "tokens_per_s": round(found["tokens_per_s"]), "answer_ms": round(statistics.median(seconds) * 1e3, 2)}  # fmt: skip


def main() -> None:
    """Measures and reports."""
    told = options("text")
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        data, metrics = run_names(Home(work / "home"), quick=told.quick)
        found = {name: (m["auc"]["value"], m["log_loss"]["value"]) for name, m in metrics.items()
                 if name in ("network", "blend", "blend_words", "gbdt")}  # fmt: skip
        found["tokens"] = (metrics["words"]["auc"]["value"], metrics["words"]["log_loss"]["value"])
        found |= {name: bag(data, **more) for name, more in BAGS.items()}
        train = load_spec("names").train
        arrays = Arrays.load(write_arrays(data, work / "arrays", train))
        pairs = [(steps(arrays, train, 100), steps(arrays, train, 100, Mixed)) for _ in range(1 if told.quick else 5)]
        sizes = {}
        for name, size in [*LARGE.items()][: 1 if told.quick else None]:
            settings = train.model_copy(update={"encoder": {"model_type": "bert", **size}, "batch_size": 32})
            sizes[name] = large(arrays, settings, work, 2 if told.quick else 5)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    network, bags = found["network"][1], [found[name][1] for name in ("tokens", "words", "words and pairs")]
    figures = {
        "auc": {name: round(value, 4) for name, (value, _) in found.items()},
        "log_loss": {name: round(value, 4) for name, (_, value) in found.items()},
        "beats_bag_of_words": network < min(bags), "beats_letters": network < min(*bags, found["letters"][1]),
        "padded_share": {name: round(pairs[0][i]["padded_share"], 3) for i, name in enumerate(("like length", "random"))},
        "bucket_speedup": round(statistics.median(b["mean_ms"] / a["mean_ms"] for a, b in pairs), 3), **sizes,
    }  # fmt: skip
    report("text", figures, [], told.json, "torch", "transformers", "tokenizers", "scikit-learn", "onnxruntime")


if __name__ == "__main__":
    main()
