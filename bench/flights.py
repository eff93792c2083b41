"""`python -m bench.flights`: quality on the whole year, three seeds, each a first run in a home of its own.

Figures: `champion_auc` and `lightgbm_auc`, medians over the seeds, with `champion_auc_interval` of the median's run;
`champion_log_loss`, `lightgbm_log_loss`; `run_s`, seconds of the median run; `peak_mb` of the largest process.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.demo import QUICK
from bench.record import options, report
from pipelines.manifest import ROOT, read_json


def run(seed: int, home: Path, sets: list[str]) -> dict[str, Any]:
    """Metrics on test of one seed's run, with its seconds and the memory of its largest process."""
    env = {**os.environ, "MILLRACE_HOME": str(home)}
    command = [sys.executable, "-m", "flows.cli"]
    subprocess.run([*command, "sample", "flights"], env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    told = [word for item in (f"seed={seed}", *sets) for word in ("--set", item)]
    subprocess.run([*command, "run", "flights", *told], env=env, cwd=ROOT, check=True)
    took = time.monotonic() - began
    manifest = read_json(next((home / "runs" / "flights").glob("*/manifest.json")))
    row: dict[str, Any] = {"seed": seed, "chosen": manifest["chosen"], "outcome": manifest["outcome"], "run_s": round(took, 1)}
    for name, metrics in manifest["metrics"].items():
        for metric in ("auc", "log_loss"):
            found = metrics[metric]
            row[f"{name}_{metric}"] = [found[part] for part in ("value", "low", "high")]
    row["peak_mb"] = max(stage["peak_mb"] for stage in manifest["stages"])
    return row


def main() -> None:
    """Runs the seeds one after another and reports."""
    told = options("flights")
    rows = []
    for seed in (7,) if told.quick else (7, 8, 9):
        home = Path(tempfile.mkdtemp(prefix="millrace-bench-"))
        try:
            rows.append(run(seed, home, [*QUICK, "gate.max_calibration_error=0.5"] if told.quick else []))
        finally:
            shutil.rmtree(home, ignore_errors=True)
    middle = sorted(rows, key=lambda row: row["challenger_auc"][0])[len(rows) // 2]

    def median(name: str) -> float:
        return round(statistics.median(row[name][0] for row in rows), 4)

    figures = {
        "champion_auc": median("challenger_auc"), "champion_auc_interval": [round(v, 4) for v in middle["challenger_auc"][1:]],
        "lightgbm_auc": median("gbdt_auc"), "lightgbm_auc_interval": [round(v, 4) for v in middle["gbdt_auc"][1:]],
        "champion_log_loss": median("challenger_log_loss"), "lightgbm_log_loss": median("gbdt_log_loss"),
        "run_s": middle["run_s"], "peak_mb": max(row["peak_mb"] for row in rows),
    }  # fmt: skip
    report("flights", figures, rows, told.json)


if __name__ == "__main__":
    main()
