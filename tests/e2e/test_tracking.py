"""Trackers: what they are told of a run, and that none of them can hold one up. Runs, listed and compared without any."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy import tracking
from deploy.compare import compare_runs, words
from deploy.runs import list_runs
from flows.check import check_pipeline
from pipelines.errors import UsageError
from pipelines.home import Home
from pipelines.manifest import digest_of, read_json, write_json
from pipelines.run import Run, result_spec
from pipelines.spec import Spec, find_pipeline, json_schema, load_spec
from tests.command import QUICK, command, environment, millrace
from tests.e2e.test_report import Page

EPOCHS = 8  # of QUICK
DIES = """
import os
from dataclasses import fields
from pathlib import Path
from deploy.tracking import _working, follow
from pipelines.home import Home
from pipelines.manifest import read_json
from pipelines.run import Run
home = Home(Path({root!r}))
pins = read_json(home.runs("tumours") / {run_id!r} / "inputs.json")
follow(home, Run(**{{f.name: pins[f.name] for f in fields(Run) if f.name in pins}}))
print(*(process.pid for process in _working.values()), flush=True)
os.kill(os.getpid(), 9)
"""


def manifest_of(home: Home) -> dict[str, Any]:
    return read_json(next(home.runs("tumours").glob("*/manifest.json")))


def rewrite(path: Path, **changes: Any) -> None:
    body = {**read_json(path), **changes}
    del body["format_version"]
    write_json(path, body)


def tracked(home: Home, *trackers: str, run_id: str = "") -> Run:
    """The run of this home, as if its spec had named these."""
    folder = home.runs("tumours") / (run_id or manifest_of(home)["run_id"])
    rewrite(folder / "spec.json", tracking=list(trackers))
    pins = read_json(folder / "inputs.json")
    return Run(**{f.name: pins[f.name] for f in fields(Run) if f.name in pins})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


# --- one word ---


@pytest.mark.parametrize(("value", "named"), [
    ("mlflow", ("mlflow",)), ("[tensorboard, wandb]", ("tensorboard", "wandb")), ("none", ()), ("", ()),
    ("[mlflow, mlflow]", ("mlflow",)),
])  # fmt: skip
def test_who_is_told_stands_in_no_digest(value: str, named: tuple[str, ...]) -> None:
    plain, spec = load_spec("tumours"), load_spec("tumours", [f"tracking={value}"])
    assert spec.tracking == named and Spec.model_validate(spec.model_dump(by_alias=True)).tracking == named
    assert digest_of(result_spec(spec)) == digest_of(result_spec(plain))
    assert ("tracking" in spec.model_dump()) == bool(named)  # a spec without it is as it was before there was tracking


def test_a_tracker_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"tracking.1: Input should be 'mlflow', 'tensorboard' or 'wandb', found 'neptune'"):
        load_spec("tumours", ["tracking=[mlflow, neptune]"])
    assert json_schema()["properties"]["tracking"]["anyOf"][0] == {"enum": ["none", "mlflow", "tensorboard", "wandb"]}


def test_a_package_that_is_not_installed_is_said_before_anything_starts(
    copied_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else object())
    tracking.require(("mlflow", "tensorboard"))
    with pytest.raises(UsageError, match=r"wandb is not installed; type `pip install 'wandb>=0.31'`"):
        tracking.require(("mlflow", "wandb"))
    found = check_pipeline(load_spec("tumours", ["tracking=wandb"]), copied_home, find_pipeline("tumours"))
    assert any("pip install 'wandb" in problem for problem in found.problems)


def test_a_password_stands_in_no_record(copied_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracker.example")
    assert tracking.ui(copied_home, "mlflow") == "https://tracker.example"


# --- what they are told ---


def test_tensorboard_is_told_of_curves_and_figures_once(copied_home: Home) -> None:
    run, manifest = tracked(copied_home, "tensorboard"), manifest_of(copied_home)
    folder = copied_home.root / "tensorboard" / "tumours" / run.run_id
    tracking.follow(copied_home, run)
    deadline = time.monotonic() + 60
    while len(scalars(folder).get("network/auc", ())) < EPOCHS:  # from what the ranks write, before the run has ended
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "test/auc" not in scalars(folder)
    for _ in range(2):  # a run that was taken up tells it again
        (told,) = tracking.settle(copied_home, run)
        assert told.ok and told.words == f"tensorboard: tensorboard --logdir {copied_home.root / 'tensorboard'}"
    found = scalars(folder)
    curve = read_json(copied_home.root / manifest["stage_paths"]["train"] / "curves.json")["network"]
    assert found["network/log_loss"] == [(e["epoch"], pytest.approx(e["log_loss"])) for e in curve] and len(curve) == EPOCHS
    assert found["test/auc"] == [(0, pytest.approx(manifest["metrics"]["challenger"]["auc"]["value"]))]
    assert found["seconds/train"][0][1] > 0 and found["timing/steps"][0][1] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_mirrors_runs_and_releases_and_the_result_is_the_same(
    tumours: tuple[Home, dict[str, Any]], prefect_tables: Callable[[Path], Path], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    home = prefect_tables(tmp_path / "home")
    assert millrace(home, "sample", "tumours").code == 0
    sets = (*QUICK, "tracking=[mlflow, tensorboard]")
    done = millrace(home, "run", "tumours", sets=sets)
    assert done.code == 0, done.err
    (manifest,) = [read_json(p) for p in home.glob("runs/tumours/*/manifest.json")]
    plain = tumours[1]
    assert (manifest["result_digest"], manifest["release"]) == (plain["result_digest"], plain["release"])
    assert manifest["run_id"] == plain["run_id"] and all(one["ok"] for one in manifest["tracking"])
    assert f"mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///{home}/mlflow/mlflow.db" in done.out
    assert f"tensorboard --logdir {home}/tensorboard" in done.out
    assert len(scalars(home / "tensorboard" / "tumours" / manifest["run_id"])["network/auc"]) == EPOCHS

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("tumours")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["result_digest"] == manifest["result_digest"]
    assert run.data.params["train.max_epochs"] == str(EPOCHS) and run.data.params["seed"] == "7"
    best = manifest["hyper_parameters"]["network"]["params"]["learning_rate"]
    assert float(run.data.params["best.network.params.learning_rate"]) == best
    assert run.data.metrics["test/log_loss"] == manifest["metrics"]["challenger"]["log_loss"]["value"]
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    history = client.get_metric_history(run.info.run_id, "network/log_loss")
    assert [m.step for m in history] == list(range(1, EPOCHS + 1))
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"manifest.json", "report.html", "model_card.md", "model"}
    weights = Path(client.download_artifacts(run.info.run_id, "model/network.safetensors"))
    assert weights.read_bytes() == (home / manifest["stage_paths"]["train"] / "network.safetensors").read_bytes()

    def champion() -> str:
        return str(client.get_model_version_by_alias("millrace_tumours", "champion").tags["release"])

    assert champion() == manifest["release"]
    again = millrace(home, "run", "tumours", "--json", sets=(*sets, "serve.threshold=0.3"))
    assert again.answer["outcome"] == "promoted" and champion() == again.answer["release"] != manifest["release"]
    path = tmp_path / "tracked.yaml"
    path.write_text(f"extends: {os.path.relpath(find_pipeline('tumours'), tmp_path)}\npipeline: tumours\ntracking: mlflow\n")
    back = millrace(home, "rollback", str(path), "--json")
    assert back.code == 0 and back.answer["note"] == "" and champion() == manifest["release"], back.err

    moved = Home(home.rename(tmp_path / "moved"))
    (told,) = tracking.settle(moved, tracked(moved, "mlflow", run_id=manifest["run_id"]))
    assert told.ok, told.line
    there = MlflowClient(f"sqlite:///{moved.root}/mlflow/mlflow.db")
    assert len(there.search_runs([experiment.experiment_id])) == 2  # told again, it is there once
    version = there.get_model_version_by_alias("millrace_tumours", "champion")
    assert version.source == f"{(moved.root / 'mlflow/artifacts/tumours').as_uri()}/{run.info.run_id}/artifacts/model"
    assert Path(there.download_artifacts(run.info.run_id, "model/network.safetensors")).read_bytes() == weights.read_bytes()


@pytest.mark.slow
def test_wandb_is_told_offline(copied_home: Home) -> None:
    pytest.importorskip("wandb", reason="too large for the lock file: pip install wandb")
    run, manifest = tracked(copied_home, "wandb"), manifest_of(copied_home)
    (told,) = tracking.settle(copied_home, run)
    assert told.ok, told.line
    (file,) = (copied_home.root / "wandb" / "wandb").glob(f"offline-run-*-{run.run_id}/run-{run.run_id}.wandb")
    show = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(file)]
    shown = subprocess.run(show, capture_output=True, text=True, timeout=60).stdout
    (auc,) = re.findall(r"test/auc +(\S+)", shown)
    assert float(auc) == pytest.approx(manifest["metrics"]["challenger"]["auc"]["value"]) and "exit code 0" in shown


# --- what they cannot do ---


@contextmanager
def dead_server(kind: str) -> Iterator[str]:
    """The address of a server that is not there, or of one that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_tracker_that_refuses_is_told_of_in_a_line(copied_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with dead_server("refusing") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        (told,) = tracking.settle(copied_home, tracked(copied_home, "mlflow"))
    assert not told.ok and "Connection refused" in told.line and url in told.line and "this run is not there" in told.line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tracker_that_is_dead_costs_the_run_a_line(copied_home: Home) -> None:
    with dead_server("silent") as url:
        sets = (*QUICK, "serve.threshold=0.4", "tracking=[mlflow, tensorboard]")
        done = millrace(copied_home.root, "run", "tumours", "--json", sets=sets, MLFLOW_TRACKING_URI=url)
    assert done.code == 0 and done.answer["outcome"] == "promoted", done.err
    lines = done.answer["tracking"]
    assert [line.partition(":")[0] for line in lines] == ["mlflow", "tensorboard"] and "timed out" in lines[0] and url in lines[0]
    assert "this run is not there" in lines[0] and "--logdir" in lines[1]
    assert lines[0].removeprefix("mlflow: ") in Page(Path(done.answer["report"]).read_text(encoding="utf-8"), "").text
    stages = (copied_home.runs("tumours") / done.answer["run_id"] / "stages.jsonl").read_text().splitlines()
    took = {line["stage"]: line["seconds"] for line in map(json.loads, stages)}
    assert took["record"] < tracking.LIMIT_S + 15  # its own pages included, on a busy machine


def test_a_follower_that_says_nothing_is_ended(copied_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limit, whatever it does: this one has no time to import anything."""
    run = tracked(copied_home, "tensorboard")
    monkeypatch.setattr(tracking, "LIMIT_S", 0.0)
    tracking.follow(copied_home, run)
    (follower,) = [p for (folder, _), p in tracking._working.items() if folder == str(run.folder(copied_home))]
    began = time.monotonic()
    (told,) = tracking.settle(copied_home, run)
    assert not told.ok and "did not take everything within 0 s" in told.line and time.monotonic() - began < 2
    assert follower.returncode == -9 and not psutil.pid_exists(follower.pid)


@pytest.mark.slow
def test_a_follower_ends_with_its_run(copied_home: Home) -> None:
    """The process of the run dies without a word."""
    run = tracked(copied_home, "tensorboard")
    code = DIES.format(root=str(copied_home.root), run_id=run.run_id)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment(copied_home.root), timeout=60)  # fmt: skip
    follower = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(follower) and psutil.Process(follower).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- runs ---


@pytest.fixture
def two_runs(copied_home: Home) -> Home:
    """The run of the home, and one after it with another spec, answers that are less sure, and a refusal."""
    first = manifest_of(copied_home)
    folder = copied_home.runs("tumours")
    shutil.copytree(folder / first["run_id"], folder / "feed-2")
    evaluate = copied_home.root / first["stage_paths"]["evaluate"]
    shutil.copytree(evaluate, evaluate.with_name("other"))
    table = pq.read_table(evaluate / "test.parquet")
    unsure = pa.array(0.5 + 0.4 * (table["challenger"].to_numpy() - 0.5))
    table = table.set_column(table.schema.get_field_index("challenger"), "challenger", unsure)
    pq.write_table(table.take(np.arange(len(table))[::-1]), evaluate.with_name("other") / "test.parquet")
    paths = {**first["stage_paths"], "evaluate": copied_home.relative(evaluate.with_name("other"))}
    rewrite(folder / "feed-2" / "manifest.json", run_id="feed-2", outcome="refused", result_digest="f" * 64, stage_paths=paths,
            finished_wall_us=first["finished_wall_us"] + 60_000_000)  # fmt: skip
    train = read_json(folder / "feed-2" / "spec.json")["train"]
    rewrite(folder / "feed-2" / "spec.json", train={**train, "patience": 3})
    (folder / "open-1").mkdir()
    shutil.copy(folder / first["run_id"] / "inputs.json", folder / "open-1")
    return copied_home


def test_runs_are_listed_with_what_came_of_them(two_runs: Home) -> None:
    first = read_json(two_runs.runs("tumours") / list_runs(two_runs, "tumours")[0].run_id / "manifest.json")
    done = millrace(two_runs.root, "runs", "tumours", "--json")
    assert [(r["run_id"], r["outcome"], r["champion"]) for r in done.answer["runs"]] == [
        (first["run_id"], "promoted", True), ("feed-2", "refused", False), ("open-1", "unfinished", False)]  # fmt: skip
    assert done.answer["runs"][0]["auc"] == first["metrics"]["challenger"]["auc"]["value"]
    lines = [run.line for run in list_runs(two_runs, "tumours")]
    assert re.fullmatch(rf"\* {first['run_id']} +\d{{4}}-\d\d-\d\d \d\d:\d\d promoted +\w+ +0\.9\d+ +0\.\d+ +\d+\.\d  "
                        rf"{first['result_digest'][:12]}", lines[0])  # fmt: skip
    assert lines[2].split() == ["open-1", "unfinished", "–", "–", "0.0"]
    assert Home(two_runs.root / "none").root.exists() is False and list_runs(Home(two_runs.root / "none"), "tumours") == []


def test_two_runs_side_by_side(two_runs: Home) -> None:
    found, path = compare_runs(two_runs, "tumours", ["champion", "fee"])
    assert found.rows == manifest_of(two_runs)["counts"]["test"] and not found.same
    assert found.gains["auc"].value == 0 and (found.gains["log_loss"].high or 0) < 0
    assert [(d.name, d.a, d.b) for d in found.differences["spec"]] == [("train.patience", "10", "3")]
    said = words(found)
    assert "spec: train.patience: 10 → 3" in said and said[-1].startswith("A is better on the ")
    page = Page(path.read_text(encoding="utf-8"), "").check()
    assert "train.patience" in page.text and said[-1] in page.text and page.tags.count("svg") == 4
    itself, _ = compare_runs(two_runs, "tumours", ["champion", "champion"])
    assert itself.same and words(itself)[-1] == "Both runs have the same result, to the last bit."


def test_a_run_that_cannot_be_compared_is_said(two_runs: Home) -> None:
    for names, why in ((("champion", "nope"), "'nope' is no run of tumours that has ended"),
                       (("open-1", "champion"), "'open-1' is no run of tumours that has ended"),
                       (("champion", ""), "'' begins 2 runs")):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(why)):
            compare_runs(two_runs, "tumours", names)
    rewrite(two_runs.runs("tumours") / "feed-2" / "manifest.json", result_digest="", reasons=["orders: no rows"])
    with pytest.raises(UsageError, match="refused by its contract and left nothing to compare: orders: no rows"):
        compare_runs(two_runs, "tumours", ["feed-2", "champion"])
    done = subprocess.run(command("runs", "tumours", "one"), env=environment(two_runs.root), capture_output=True, text=True)
    assert done.returncode == 2 and "give two runs to compare" in done.stderr
