"""`python -m bench.autofe`: features that were proposed and chosen, against those made by hand, on the flights.

LightGBM at fixed defaults on the same rows: `auto` (features: auto), `handmade` (the pipeline as it is written) and `raw`
(that without its windows: no view of window or open shape). Figures: `auc_gain_vs_raw` and `auc_gap_to_handmade`
(handmade − auto) with their paired bootstrap intervals; `seconds` to propose, compute and choose, and `cpu_seconds`, which
depend less on what else runs; `proposed`, `kept` and `dropped` by reason; `views` that are stored.
"""

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np

from bench.record import options, report
from features.ingest import Snapshot, ingest
from features.store import build_features, first_needed
from features.trainset import TrainingSet, build_training_set, load_training_set
from features.views import stored_views
from models.choose import choose_into
from models.evaluate import auc, evaluate
from models.gbdt import fit_gbdt
from pipelines.flights import write_sample
from pipelines.home import Home, open_home
from pipelines.manifest import read_json
from pipelines.run import spec_from
from pipelines.spec import Spec, load_spec


def without_windows(spec: Spec) -> Spec:
    """The spec without its views of window and open shape."""
    views = {name: view for name, view in spec.features.views.items() if not (view.window or view.open)}
    return spec.model_copy(update={"features": spec.features.model_copy(update={"views": views})})


def training_set(spec: Spec, home: Home, snapshot: Snapshot, folder: Path) -> TrainingSet:
    """The rows of the year with the features of this spec."""
    folder.mkdir()
    at = snapshot.watermark_us
    built = build_features(spec, home, snapshot, since=first_needed(spec, at))
    build_training_set(spec, home, snapshot, built, at, folder)
    return load_training_set(folder)


def answers(spec: Spec, data: TrainingSet) -> np.ndarray:
    """Probabilities on the test part."""
    trees = fit_gbdt(spec.gbdt, data.batch, data.label, data.part, spec.seed)
    return np.asarray(lgb.Booster(model_str=trees.text).predict(data.batch.take(data.rows("test")).trees), np.float64)


def main() -> None:
    """Chooses, trains on the three sets, compares on the test part."""
    told = options("autofe")
    name, sets = ("flights_demo", ["split.train=30d"]) if told.quick else ("flights", [])
    folder = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
    try:
        home, spec = open_home(folder / "home"), load_spec(name, sets)
        write_sample(home.landing(name))
        snapshot = ingest(spec, home)
        out = home.root / "chosen"
        out.mkdir()
        began, spent = time.monotonic(), time.process_time()
        choose_into(load_spec(name, [*sets, "features=auto"]), home, snapshot, snapshot.watermark_us, out)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - spent
        verdicts = read_json(out / "chosen.json")["verdicts"]
        specs = {"auto": spec_from(out / "spec.json"), "handmade": spec, "raw": without_windows(spec)}
        found, rows = {}, list[dict[str, Any]]()
        for which, one in specs.items():
            data = training_set(one, home, snapshot, folder / which)
            found[which], label = answers(one, data), data.label[data.rows("test")]
            rows.append({"features": which, "count": len(data.frame), "views": len(stored_views(one)),
                         "auc": round(auc(label, found[which]), 5)})  # fmt: skip
            print(rows[-1], flush=True)
            del data
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    probabilities = {"challenger": found["auto"], "handmade": found["handmade"], "raw": found["raw"],
                     "prior": np.full(len(label), label.mean())}  # fmt: skip
    judged = evaluate(label, probabilities, {}, spec.gate, spec.seed)
    raw, hand = judged.gains["raw"]["auc"], judged.gains["handmade"]["auc"]
    assert None not in (raw.value, raw.low, raw.high, hand.value, hand.low, hand.high)
    counted = Counter(v["reason"] for v in verdicts)
    kept, dropped = counted.pop("kept"), dict(counted.most_common())
    figures = {
        "auc_gain_vs_raw": round(raw.value or 0.0, 4),
        "auc_gain_vs_raw_interval": [round(v or 0.0, 4) for v in (raw.low, raw.high)],
        "auc_gap_to_handmade": round(-(hand.value or 0.0), 4),
        "auc_gap_to_handmade_interval": [round(-(v or 0.0), 4) for v in (hand.high, hand.low)],
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
        "proposed": len(verdicts), "kept": kept, "dropped": dropped,
        "views": {row["features"]: row["views"] for row in rows},
    }  # fmt: skip
    report("autofe", figures, rows, told.json, "numpy", "pyarrow", "feast", "lightgbm")


if __name__ == "__main__":
    main()
