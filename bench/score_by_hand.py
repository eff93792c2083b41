"""`python -m bench.score_by_hand BUNDLE FILE OUT`: the script that one would write to score a file, and its seconds.

pyarrow, numpy, ONNX Runtime and LightGBM, one thread; no checks, digests or manifest. The bundle is a release's.
"""

import json
import sys
import time
from pathlib import Path

import lightgbm as lgb
import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 8_192  # as many as ours


def main(bundle: Path, source: Path, out: Path) -> float:
    """Seconds from the first row to the last one written."""
    pa.set_cpu_count(1)
    learned, model = json.loads((bundle / "preprocess.json").read_text()), json.loads((bundle / "model.json").read_text())
    members, weights = {m["name"]: m for m in model["members"]}, model["candidates"][model["chosen"]]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runs = {}
    for name in weights:
        path = str(bundle / members[name]["file"])
        trees = members[name]["kind"] == "gbdt"
        runs[name] = lgb.Booster(model_file=path) if trees else ort.InferenceSession(path, options)
    words = [pa.array(w, pa.string()) for w in learned["vocabulary"]]
    low, high, mean, std = (np.array(learned[n]) for n in ("low", "high", "mean", "std"))
    columns = [*learned["numbers"], *learned["categories"], "row_id"]
    began, writer = time.monotonic(), None
    for batch in pq.ParquetFile(source).iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
        numbers = np.column_stack([batch[n].to_numpy(zero_copy_only=False) for n in learned["numbers"]])
        codes = np.zeros((len(numbers), len(words)), np.int64)
        for i, name in enumerate(learned["categories"]):
            codes[:, i] = pc.fill_null(pc.index_in(batch[name], words[i], skip_nulls=True), -1).to_numpy() + 1
        total = np.zeros(len(numbers))
        for name, weight in weights.items():
            if members[name]["kind"] == "gbdt":
                logit = runs[name].predict(np.hstack([numbers, codes]), raw_score=True, num_threads=1)
            else:
                missing = np.isnan(numbers)
                scaled = np.where(missing, 0, (np.clip(numbers, low, high) - mean) / std)
                fed = {"scaled": np.hstack([scaled, missing[:, learned["may_miss"]]]).astype(np.float32), "codes": codes}
                logit = runs[name].run(None, {i.name: fed[i.name] for i in runs[name].get_inputs()})[0]
            total += weight * (members[name]["a"] * logit.astype(np.float64) + members[name]["b"])
        table = pa.table({"row_id": batch["row_id"], "probability": 1 / (1 + np.exp(-total))})
        writer = writer or pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return time.monotonic() - began


if __name__ == "__main__":
    print(main(*(Path(word) for word in sys.argv[1:])))
