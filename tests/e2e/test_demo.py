"""The README, as a new person would follow it: the demo twice, the Prefect UI in a real browser, the other commands."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from deploy.process import free_port
from pipelines.manifest import ROOT, read_json
from tests.e2e.test_bench import run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
STAGES = ("ingest", "contract", "features", "training set", "tune", "train", "evaluate", "export", "package", "preflight",
          "release", "record")  # fmt: skip


def _bash(script: str, home: Path) -> str:
    """Output of a script in the checkout, with this interpreter's environment first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "MILLRACE_HOME": str(home), "PATH": path}
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_every_command_of_the_readme_is_run_here() -> None:
    """A new block in the README needs a test: these are the ones that the tests below, and CI itself, run."""
    commands = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
    assert commands == [
        "make demo", "make test",
        "source .venv/bin/activate", "millrace sample tumours", "millrace check tumours", "millrace run tumours",
        "millrace serve tumours --background", "millrace down tumours",
        "millrace up", "millrace status", "millrace down",
    ]  # fmt: skip


def test_the_yaml_of_the_readme_is_a_valid_pipeline(tmp_path: Path) -> None:
    from pipelines.spec import load_spec

    path = tmp_path / "orders.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)[0])
    assert load_spec(str(path)).pipeline == "orders"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("demo")
    return home, _bash("make -s demo", home)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_demo_ends_with_an_answer(demo: tuple[Path, str]) -> None:
    home, out = demo
    assert "promoted: millrace_flights_demo:" in out
    line = next(line for line in out.splitlines() if line.startswith("curl "))
    answer = json.loads(_bash(line, home))
    row = answer["rows"][0]
    assert 0 < row["probability"] < 1
    assert not row["unknown_entity"] and not row["outside_horizon"]
    manifest = read_json(next((home / "runs" / "flights_demo").glob("*/manifest.json")))
    assert manifest["counts"]["train"] > 50_000
    assert manifest["preflight"]["entity_rows"] == 500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_demo_redoes_nothing(demo: tuple[Path, str]) -> None:
    home, _ = demo
    before = read_json(home / "services" / "flights_demo" / "endpoint.json")["pid"]
    out = _bash("make -s demo", home)
    assert "unchanged: millrace_flights_demo:" in out
    assert read_json(home / "services" / "flights_demo" / "endpoint.json")["pid"] == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_times_are_measured(demo: tuple[Path, str], tmp_path: Path) -> None:
    body = run("demo", tmp_path, demo[0])
    assert {"name", "commit", "hardware", "versions", "rows", "figures"} <= set(body)
    assert {"first_s", "second_s", "setup_s", "stages", "peak_rss_mb"} <= set(body["figures"])
    assert body["figures"]["stages"]["train"] > 0


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(600)
def test_the_prefect_ui_shows_the_run_with_all_its_tasks(demo: tuple[Path, str]) -> None:
    from playwright.sync_api import sync_playwright

    home, _ = demo
    port = free_port()
    _bash(f"millrace up --port {port} --no-worker", home)
    try:
        api = f"http://127.0.0.1:{port}/api"
        run = _post(f"{api}/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})[0]
        assert run["state"]["type"] == "COMPLETED"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
            page = browser.new_page(viewport={"width": 1400, "height": 1400})
            page.goto(f"http://127.0.0.1:{port}/runs/flow-run/{run['id']}")
            page.get_by_text("retrain flights_demo").first.wait_for(timeout=60_000)
            page.get_by_text("Task Runs", exact=True).first.click()
            for stage in STAGES:
                page.get_by_text(f"{stage} · flights_demo").first.wait_for(timeout=60_000)
            browser.close()
    finally:
        _bash("millrace down", home)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_days_later(demo: tuple[Path, str]) -> None:
    """New facts: the champion answers the new test rows through its own bento, and the store is fed on either verdict."""
    home, _ = demo
    before = read_json(home / "releases" / "flights_demo" / "champion.json")["release"]
    _bash("millrace sample flights_demo --until 2014-01-02", home)
    script = "millrace run flights_demo --json --set tune.generations=1 --set tune.size=2 --set train.max_epochs=1"
    found = json.loads(_bash(f"{script} || test $? = 3", home).splitlines()[-1])
    assert found["outcome"] in ("promoted", "refused")
    manifest = read_json(home / "runs" / "flights_demo" / found["run_id"] / "manifest.json")
    assert manifest["bar"] == "champion" and manifest["inputs"]["parent"] == before
    feeds = [json.loads(line) for line in (home / "releases/flights_demo/log.jsonl").read_text().splitlines() if line]
    last = [e for e in feeds if e["event"] == "feed"][-1]["body"]
    assert last["snapshot"] == manifest["inputs"]["snapshot"] and before in last["releases"]
    assert json.loads(_bash(script, home).splitlines()[-1])["outcome"] == "unchanged"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_without_time(tmp_path: Path) -> None:
    block = next(b for b in BLOCKS if "tumours" in b).replace("source .venv/bin/activate\n", "")
    port = free_port()
    out = _bash(block.replace("--background", f"--background --port {port}"), tmp_path)
    assert "no problem found" in out and f"answers on http://127.0.0.1:{port}" in out
