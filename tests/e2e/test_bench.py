"""Every benchmark runs, with --quick, and writes the figures that it promises."""

import json
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
