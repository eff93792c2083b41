"""A run killed with -9 in any stage, before or after the pointer moved, ends with the digest of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.process import free_port
from pipelines.home import Home
from pipelines.manifest import ROOT
from pipelines.sample import land
from pipelines.spec import load_spec
from tests.command import millrace

# the demo pipeline cut to 20 days of training rows
CUT = (
    "split.train=20d", "split.valid_fit=4d", "split.valid_select=4d", "split.test=6d", "tune.rows=3000", "tune.size=2",
    "tune.workers=2", "train.max_epochs=2", "gbdt.max_rounds=40", "gate.resamples=50", "gate.min_rows=500",
    "serve.latency_budget=5s", "serve.inference=onnxruntime",  # by name: two homes that measure might choose otherwise
)  # fmt: skip
STAGES = (
    "contract", "features", "training_set", "tune", "train", "evaluate", "export", "package", "preflight", "release", "record",
)  # fmt: skip


def _command(*extra: str) -> list[str]:
    sets = [word for item in (*CUT, *extra) for word in ("--set", item)]
    return [sys.executable, "-m", "flows.cli", "run", "flights_demo", "--json", *sets]


def _env(home: Path) -> dict[str, str]:
    return {**os.environ, "MILLRACE_HOME": str(home), "TZ": "UTC"}


def _run(home: Path, *extra: str) -> dict[str, object]:
    done = subprocess.run(_command(*extra), env=_env(home), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, 3), done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of the run and of everything that it started, the Prefect server included."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()


def _stages_done(home: Path) -> list[str]:
    lines = [line for path in home.glob("runs/flights_demo/*/stages.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)["stage"] for line in lines]


@pytest.fixture(scope="module")
def landed(prefect_tables: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = prefect_tables(tmp_path_factory.mktemp("landed"))
    land(load_spec("flights_demo"), Home(home))
    return home


@pytest.fixture(scope="module")
def undisturbed_home(landed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(landed, home, dirs_exist_ok=True)
    (home / "answer.json").write_text(json.dumps(_run(home)))
    return home


@pytest.fixture(scope="module")
def undisturbed(undisturbed_home: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((undisturbed_home / "answer.json").read_text())
    return found


def _stages_of(home: Path, landed: Path, other: Path) -> None:
    """Another home with the outputs of a home's stages: its run comes to the release, or to what differs, at once."""
    shutil.copytree(landed, other, dirs_exist_ok=True)
    for name in ("objects", "snapshots", "artifacts", "bentoml"):
        shutil.copytree(home / name, other / name)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_same_digest_after_a_kill_in_every_stage(
    landed: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    """One home, one run: it is killed once in each stage, a little into it, and started again."""
    shutil.copytree(landed, tmp_path, dirs_exist_ok=True)
    killed = []
    for before, stage in zip(("ingest", *STAGES), STAGES, strict=False):
        process = subprocess.Popen(
            _command(), env=_env(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 300
        seen = _stages_done(tmp_path).count(before)
        while time.monotonic() < deadline and process.poll() is None:
            cached = before in ("contract", "training_set", "tune", "train", "evaluate", "export", "package", "preflight")
            if _stages_done(tmp_path).count(before) > (0 if cached else seen):
                time.sleep(0.7 if stage in ("tune", "train", "preflight", "features") else 0.05)
                break
            time.sleep(0.02)
        if process.poll() is None:
            _kill_tree(process)
            killed.append(stage)
    result = _run(tmp_path)
    assert len(killed) >= len(STAGES) - 2, killed
    assert result["result_digest"] == undisturbed["result_digest"]
    assert result["release"] == undisturbed["release"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_between_pointer_and_manifest(
    landed: Path, undisturbed_home: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    """The pointer has moved, the manifest is not written: the run finds its own release in place and ends well."""
    _stages_of(undisturbed_home, landed, tmp_path)
    process = subprocess.Popen(
        _command(), env=_env(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pointer = tmp_path / "releases" / "flights_demo" / "champion.json"
    while not pointer.exists() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1][-3000:]
    _kill_tree(process)
    assert not list(tmp_path.glob("runs/flights_demo/*/manifest.json"))
    result = _run(tmp_path)
    assert result["result_digest"] == undisturbed["result_digest"]
    assert result["outcome"] == "promoted"


def _kill_ranks(home: Path, over: Callable[[], bool]) -> int:
    """kill -9 of a random rank of whatever trains in a home, four times or until it is over; how many were hit."""
    rng, hit = random.Random(3), 0
    while not over():
        with suppress(psutil.Error):
            training = [p for p in psutil.process_iter(["cmdline", "environ"]) if "models.supervisor" in (p.info["cmdline"] or ())
                        and (p.info["environ"] or {}).get("MILLRACE_HOME") == str(home)]  # fmt: skip
            if hit < 4 and (ranks := [p for p in training if p.ppid() in {other.pid for other in training}]):
                time.sleep(rng.uniform(0.3, 1.5))
                rng.choice(ranks).kill()
                hit += 1
        time.sleep(0.1)
    return hit


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_worker_s_run_on_two_ranks_that_are_killed_again_and_again(
    landed: Path, undisturbed_home: Path, tmp_path: Path
) -> None:
    """The same digest as that of an undisturbed run of the command line."""
    sets = ("train.ranks=2", "train.max_epochs=5", "train.patience=5", "train.max_restarts=1000", "train.checkpoint_every=500ms")
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    for home in (calm, hit):
        _stages_of(undisturbed_home, landed, home)
    undisturbed = _run(calm, *sets)
    port = free_port()
    assert millrace(hit, "up", "--port", str(port), PREFECT_WORKER_QUERY_SECONDS="1").code == 0
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60) as api:
            deployment = api.get("/deployments/name/retrain/retrain-flights").json()["id"]
            parameters = {"pipeline": "flights_demo", "overrides": [*CUT, *sets]}
            asked = f"/deployments/{deployment}/create_flow_run"
            while (made := api.post(asked, json={"parameters": parameters})).status_code == 503:
                time.sleep(0.5)  # SQLite is locked: Prefect's own client tries again, too
            assert made.status_code == 201, made.text
            run = made.json()["id"]

            def state() -> str:
                return str(api.get(f"/flow_runs/{run}").json()["state"]["type"])

            hits = _kill_ranks(hit, lambda: state() not in ("SCHEDULED", "PENDING", "RUNNING"))
            assert state() == "COMPLETED", [log["message"] for log in api.post("/logs/filter", json={"limit": 50}).json()]
    finally:
        millrace(hit, "down")
    manifest = json.loads(next(hit.glob("runs/flights_demo/*/manifest.json")).read_text())
    assert hits >= 3 and manifest["training"]["restarts"] and not manifest["training"]["notes"]
    assert manifest["training"]["ranks"] == 2 and manifest["result_digest"] == undisturbed["result_digest"]
    assert all("died of signal 9" in reason for reason in manifest["training"]["restarts"])
