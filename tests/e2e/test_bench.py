"""Every benchmark runs, with --quick, and writes the figures that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.manifest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    command = [sys.executable, "-m", "bench.demo", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    body = json.loads(out.read_text())
    assert {"name", "commit", "hardware", "versions", "rows", "figures"} <= set(body)
    assert {"first_s", "second_s", "setup_s", "stages", "peak_rss_mb"} <= set(body["figures"])
    assert body["figures"]["stages"]["train"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pit_join(tmp_path: Path) -> None:
    out = tmp_path / "pit_join.json"
    command = [sys.executable, "-m", "bench.pit_join", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    body = json.loads(out.read_text())
    figures = body["figures"]
    assert figures["oracle_mismatches"] == 0 and figures["oracle_cases"] == 20
    assert len(figures["mutants_caught"]) == 6
    assert figures["stock_leaked_cells"] > 0 and figures["stock_dropped_rows"] > 0
    assert figures["speedup_vs_feast_dask"] > 1 and figures["speedup_vs_feast_duckdb"] > 1
    assert figures["ratio_to_handwritten"] > 0 and figures["peak_rss_ratio_vs_dask"] > 0
    for row in (r for r in body["rows"] if r.get("peer") in ("millrace", "duckdb", "polars")):
        assert row["differing_cells"] == row["lost_rows"] == 0, row
