"""The second pipeline, another shape altogether: from a table that a package ships to an answer, by YAML alone."""

import fcntl
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.process import call
from features.ingest import ingest
from pipelines.home import Home
from pipelines.manifest import ROOT, file_digest, read_json
from pipelines.predlog import read_log
from pipelines.spec import load_spec
from tests.command import QUICK, millrace
from tests.data.test_lineage import kept, validate

STAGES = ("ingest", "contract", "features", "training_set", "tune", "train", "evaluate", "export", "package", "preflight",
          "release", "record")  # fmt: skip


def served_key(home: Home) -> str:
    """A row that the release's preflight asked about."""
    manifest = read_json(next(home.runs("tumours").glob("*/manifest.json")))
    found: str = read_json(home.root / manifest["stage_paths"]["preflight"] / "preflight.json")["example"]["row_digest"]
    return found


def logged(home: Home, request_id: str, pipeline: str = "tumours") -> list[dict[str, Any]]:
    """The log's rows of one request, once they are written."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        rows: list[dict[str, Any]] = read_log(home.predictions(pipeline)).to_pylist()
        found = [row for row in rows if row["request_id"] == request_id]
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{request_id} is not in the prediction log")


# --- the run ---


def test_no_code_knows_the_table() -> None:
    """Not a word of it outside its YAML file."""
    for folder in ("pipelines", "features", "models", "deploy", "tasks", "flows"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"tumour|radius|breast", path.read_text(encoding="utf-8")), path


def test_the_run_is_promoted_through_all_stages(tumours: tuple[Home, dict[str, Any]]) -> None:
    home, outcome = tumours
    assert outcome["outcome"] == "promoted" and outcome["release"].startswith("millrace_tumours:")
    manifest = read_json(home.runs("tumours") / outcome["run_id"] / "manifest.json")
    ran = [stage["stage"] for stage in manifest["stages"]]
    assert [name for name in STAGES if name not in ran] in ([], ["record"])
    assert manifest["preflight"]["passed"] and manifest["preflight"]["entity_rows"] == 500
    assert manifest["preflight"]["feature_rows"] == manifest["counts"]["test"] > 50
    assert manifest["metrics"]["challenger"]["auc"]["value"] > 0.95
    assert re.fullmatch("[0-9a-f]{64}", outcome["result_digest"])
    assert sum(manifest["counts"][part] for part in ("train", "valid_fit", "valid_select", "test")) == 569


def test_a_run_leaves_a_version_of_its_data_and_its_lineage(tumours: tuple[Home, dict[str, Any]], tmp_path: Path) -> None:
    """Checked out elsewhere by the run's manifest alone."""
    home, outcome = tumours
    path = home.runs("tumours") / outcome["run_id"] / "manifest.json"
    events = kept(home, "tumours")
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] and all(map(validate, events))
    assert [output["name"] for output in events[1]["outputs"]] == ["tumours.training_set", "tumours.model", "tumours.release"]
    done = millrace(tmp_path, "checkout", "tumours", "--manifest", str(path), "--json")
    assert done.code == 0 and done.answer["landed"] == 1, done.err
    assert ingest(load_spec("tumours"), Home(tmp_path)).digest == read_json(path)["inputs"]["snapshot"]


def test_the_report_says_that_no_time_guarantee_is_made(tumours: tuple[Home, dict[str, Any]]) -> None:
    home, outcome = tumours
    manifest = read_json(home.runs("tumours") / outcome["run_id"] / "manifest.json")
    assert manifest["clock"] is None and manifest["test_window_us"] is None
    card = Path(outcome["report"]).with_name("model_card.md").read_text(encoding="utf-8")
    assert "no guarantee is made for data that come later" in card


def test_the_same_again_is_unchanged_in_seconds(tumours: tuple[Home, dict[str, Any]]) -> None:
    home, first = tumours
    before = {p for p in home.root.rglob("*") if p.is_file() and "services" not in p.parts}
    began = time.monotonic()
    done = millrace(home.root, "run", "tumours", "--json", sets=QUICK)
    assert done.code == 0 and time.monotonic() - began < 20
    assert done.answer["outcome"] == "unchanged"
    assert {k: v for k, v in done.answer.items() if k not in ("outcome", "line")} == {
        k: v for k, v in first.items() if k not in ("outcome", "line")
    }
    assert {p for p in home.root.rglob("*") if p.is_file() and "services" not in p.parts} == before
    spoken = millrace(home.root, "run", "tumours", sets=QUICK)
    assert spoken.out.startswith(f"unchanged: {first['release']} (run {first['run_id']})\n")


def test_a_setting_of_the_endpoint_is_nothing_new(tumours: tuple[Home, dict[str, Any]]) -> None:
    home, _ = tumours
    done = millrace(home.root, "run", "tumours", "--json", sets=(*QUICK, "serve.port=3999", "tune.workers=2"))
    assert done.code == 0 and done.answer["outcome"] == "unchanged"


@pytest.mark.slow
def test_another_threshold_is_released_with_the_same_model(copied_home: Home) -> None:
    """The gate compares models: an equal one need not gain to be packaged with other settings."""
    home = copied_home
    before = millrace(home.root, "releases", "tumours", "--json").answer["champion"]
    done = millrace(home.root, "run", "tumours", "--json", sets=(*QUICK, "serve.threshold=0.3"))
    assert done.code == 0 and done.answer["outcome"] == "promoted" and done.answer["release"] != before
    assert "exactly as the champion does" in done.answer["reasons"][1] and "the same model: AUC" in done.err
    page = Path(done.answer["report"]).read_text(encoding="utf-8")
    assert f"the same model as {before}, packaged anew" in page and "it is better than" not in page


@pytest.mark.slow
def test_a_profile_is_left_by_a_run_that_trains_the_same_model(tumours: tuple[Home, dict[str, Any]], copied_home: Home) -> None:
    _, first = tumours
    done = millrace(copied_home.root, "run", "tumours", "--json", sets=(*QUICK, "train.profile=true"))
    assert done.code == 0, done.err
    runs = [copied_home.runs("tumours") / run_id for run_id in (first["run_id"], done.answer["run_id"])]
    models = [copied_home.root / read_json(run / "manifest.json")["stage_paths"]["train"] for run in runs]
    assert models[0] != models[1]
    for name in ("model.json", "network.safetensors", "network.onnx"):
        assert file_digest(models[0] / name) == file_digest(models[1] / name)
    assert str(runs[1] / "profile") in done.err
    assert {p.name for p in (runs[1] / "profile").iterdir()} == {"table.txt", "trace.json.gz"}
    again = millrace(copied_home.root, "run", "tumours", "--json", sets=QUICK)
    assert again.answer["outcome"] == "unchanged"


def test_check_says_what_it_found(tumours_home: Home) -> None:
    began = time.monotonic()
    done = millrace(tumours_home.root, "check", "tumours")
    assert done.code == 0 and time.monotonic() - began < 10
    for line in ("features: 30 (0 categories)", "rows: tumours by row_digest, without time", "1 files, 569 rows",
                 "no problem found"):  # fmt: skip
        assert line in done.out


def test_releases_and_status(tumours: tuple[Home, dict[str, Any]], tumours_url: str) -> None:
    home, outcome = tumours
    found = millrace(home.root, "releases", "tumours", "--json").answer
    assert found["champion"] == outcome["release"] and [r["release"] for r in found["releases"]] == [outcome["release"]]
    assert millrace(home.root, "releases", "tumours").out.startswith(f"* {outcome['release']}  champion  as of ")
    served = millrace(home.root, "status", "--json").answer["pipelines"]["tumours"]
    assert served["champion"] == served["endpoint"]["release"] == outcome["release"]
    assert millrace(home.root, "status").out == (
        f"tumours: champion {outcome['release']}; {outcome['release']} answers on {tumours_url}\n"
    )


def test_the_first_release_cannot_be_rolled_back(tumours: tuple[Home, dict[str, Any]]) -> None:
    home, outcome = tumours
    done = millrace(home.root, "rollback", "tumours")
    assert done.code == 3
    assert done.error == f"refused: {outcome['release']} is the first release of tumours: there is none before it"
    done = millrace(home.root, "rollback", "tumours", "--to", "millrace_tumours:nothing")
    assert done.code == 1 and f"(releases: {outcome['release']})" in done.error


# --- the endpoint ---


def test_a_row_by_its_key(tumours: tuple[Home, dict[str, Any]], tumours_url: str) -> None:
    home, outcome = tumours
    key = served_key(home)
    status, answer = call(f"{tumours_url}/predict", {"rows": [{"row_digest": key}]})
    assert status == 200 and answer["release"] == outcome["release"] and answer["now"] is None
    row = answer["rows"][0]
    assert row["key"] == {"row_digest": key} and row["decision"] == (row["probability"] >= 0.5)
    assert not row["missing"] and not row["stale"] and not row["unknown_entity"] and not row["outside_horizon"]
    assert call(f"{tumours_url}/predict", {"rows": [{"row_digest": key}]})[1]["rows"] == answer["rows"]


def test_a_row_by_its_features(tumours_home: Home, tumours_url: str) -> None:
    """The row of a key, by the features that the log holds of it, has the same answer."""
    key = served_key(tumours_home)
    _, by_key = call(f"{tumours_url}/predict", {"rows": [{"row_digest": key}]})
    entry = logged(tumours_home, by_key["request_id"])[0]
    features = {n.removeprefix("feature."): v for n, v in entry.items() if n.startswith("feature.")}
    assert len(features) == 30
    status, answer = call(f"{tumours_url}/predict_features", {"rows": [features]})
    assert status == 200 and answer["rows"][0]["probability"] == by_key["rows"][0]["probability"]
    assert answer["rows"][0]["missing"] == []
    _, fewer = call(f"{tumours_url}/predict_features", {"rows": [{"mean_radius": 20}, {}]})
    assert len(fewer["rows"][0]["missing"]) == 29 and len(fewer["rows"][1]["missing"]) == 30


def test_a_row_that_nobody_knows(tumours_url: str) -> None:
    status, answer = call(f"{tumours_url}/predict", {"rows": [{"row_digest": "0" * 64}]})
    row = answer["rows"][0]
    assert status == 200 and row["unknown_entity"] and len(row["missing"]) == 30 and 0 < row["probability"] < 1
    status, answer = call(f"{tumours_url}/predict", {"rows": [{"row_digst": "0" * 64}]})
    assert status == 422 and "nearest: 'row_digest'" in answer["error"]


def test_every_answer_is_logged_with_its_features_as_served(tumours: tuple[Home, dict[str, Any]], tumours_url: str) -> None:
    home, outcome = tumours
    key = served_key(home)
    _, answer = call(f"{tumours_url}/predict", {"rows": [{"row_digest": key}, {"row_digest": "0" * 64}]})
    known, unknown = sorted(logged(home, answer["request_id"]), key=lambda row: row["row"])
    for entry, row in ((known, answer["rows"][0]), (unknown, answer["rows"][1])):
        assert entry["score"] == row["probability"] and json.loads(entry["key"]) == row["key"]
        assert entry["release"] == outcome["release"] and entry["route"] == "predict" and entry["latency_us"] > 0
        assert entry["unknown_entity"] == row["unknown_entity"] and entry["missing"] == len(row["missing"])
    landed = pq.read_table(next(home.landing("tumours").rglob("*.parquet"))).to_pylist()
    served = {n.removeprefix("feature."): v for n, v in known.items() if n.startswith("feature.")}
    assert any(all(row[name] == value for name, value in served.items()) for row in landed)
    assert all(v is None for n, v in unknown.items() if n.startswith("feature."))


def test_what_answers_says_so(tumours: tuple[Home, dict[str, Any]], tumours_url: str) -> None:
    _home, outcome = tumours
    status, info = call(f"{tumours_url}/info")
    assert status == 200 and info["release"] == outcome["release"] and info["features"] == 30
    assert info["pipeline"] == "tumours" and info["question"] == "Is this tumour malignant?" and info["clock"] is None
    assert info["predictions_dropped"] == 0


def test_serving_again_finds_the_endpoint_that_runs(tumours_home: Home, tumours_url: str) -> None:
    began = time.monotonic()
    port = tumours_url.rpartition(":")[2]
    done = millrace(tumours_home.root, "serve", "tumours", "--background", "--port", port, "--json")
    assert done.code == 0 and done.answer["url"] == tumours_url and time.monotonic() - began < 10


@pytest.mark.slow
def test_down_stops_it_and_it_can_be_served_again(copied_home: Home) -> None:
    answer = millrace(copied_home.root, "serve", "tumours", "--background", "--port", "0", "--json").answer
    try:
        assert call(f"{answer['url']}/info")[0] == 200
    finally:
        stopped = millrace(copied_home.root, "down", "tumours", "--json")
    assert stopped.answer["stopped"] == [f"tumours on port {answer['port']}"]
    assert not psutil.pid_exists(answer["pid"]) or psutil.Process(answer["pid"]).status() == psutil.STATUS_ZOMBIE
    with pytest.raises(OSError):
        call(f"{answer['url']}/info", timeout=2)
    assert millrace(copied_home.root, "down").out == "nothing was running\n"
    assert "no endpoint runs" in millrace(copied_home.root, "status").out


# --- what is refused ---


def test_a_port_that_is_taken(copied_home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = millrace(copied_home.root, "serve", "tumours", "--background", "--port", str(port))
    assert done.code == 1 and not done.out
    assert done.error == (
        f"error: port {port} is taken; stop what listens there (`millrace down`), or choose another: --set serve.port=PORT"
    )
    assert not (copied_home.services("tumours") / "endpoint.json").exists()


def test_nothing_to_serve(tmp_path: Path) -> None:
    done = millrace(tmp_path, "serve", "tumours", "--background")
    assert done.code == 1 and done.error == "error: tumours has no champion to serve: type `millrace run tumours`"
    assert millrace(tmp_path, "releases", "tumours").out == "tumours has no release: type `millrace run tumours`\n"
    assert millrace(tmp_path, "status").out == "nothing was released yet and nothing runs\n"


@pytest.mark.parametrize(
    ("file", "expected"),
    [pytest.param("bundle/preprocess.json", "bundle/preprocess.json is missing", marks=pytest.mark.slow),
     (None, "is not there: run `millrace run` to build it again")],
)  # fmt: skip
def test_a_champion_that_lacks_what_it_needs_is_not_served(copied_home: Home, file: str | None, expected: str) -> None:
    for folder in (copied_home.root / "bentoml/bentos/millrace_tumours").glob("*/src"):
        path = folder / file if file else folder.parent / "bento.yaml"
        path.unlink()
    done = millrace(copied_home.root, "serve", "tumours", "--background", "--port", "0")
    assert done.code == 1 and expected in done.error
    assert not (copied_home.services("tumours") / "endpoint.json").exists()


@pytest.mark.slow
def test_a_served_store_that_is_gone(copied_home: Home) -> None:
    for store in (copied_home.root / "online").rglob("store.sqlite"):
        store.unlink()
    done = millrace(copied_home.root, "serve", "tumours", "--background", "--port", "0")
    assert done.code == 1 and "the served store " in done.error
    assert "is not there: run `millrace run tumours` to feed it" in done.error


@pytest.mark.slow
def test_a_refused_contract_ends_with_3_and_publishes_nothing(tumours: tuple[Home, dict[str, Any]], copied_home: Home) -> None:
    """A file lands whose numbers are infinite and negative: the champion stays, a page says why."""
    spec, release = load_spec("tumours"), tumours[1]["release"]
    columns = spec.sources["tumours"].columns
    bad = {n: pa.array([-1.0, float("inf")]) if c.type == "float64" else pa.array([1, 0]) for n, c in columns.items()}
    landed = copied_home.landing("tumours") / "tumours" / "more.parquet"
    pq.write_table(pa.table(bad), landed)
    done = millrace(copied_home.root, "run", "tumours", "--json", sets=QUICK)
    assert done.code == 3 and done.answer["outcome"] == "refused" and "quarantine/" in done.answer["report"]
    assert "of 'tumours' is refused by the contract: " in done.error and "expectations failed" in done.error
    assert "tumours.mean_radius [finite]: " in done.err
    page = re.search(r"^report: (.+)$", done.err, re.MULTILINE)
    assert page and "mean_radius" in Path(page[1]).read_text(encoding="utf-8")
    assert millrace(copied_home.root, "releases", "tumours", "--json").answer["champion"] == release
    manifests = [read_json(p) for p in copied_home.runs("tumours").glob("*/manifest.json")]
    assert sorted(m["outcome"] for m in manifests) == ["promoted", "refused"]
    assert kept(copied_home, "tumours")[-1]["eventType"] == "FAIL" and all(map(validate, kept(copied_home, "tumours")))
    assert not list(copied_home.root.rglob("*.partial"))
    landed.unlink()  # the way out: no run built on it
    assert millrace(copied_home.root, "run", "tumours", "--json", sets=QUICK).answer["outcome"] == "unchanged"


def test_a_command_line_that_is_wrong(tmp_path: Path) -> None:
    for words in (["rum", "tumours"], ["run"], ["run", "tumours", "--prot", "1"], ["run", "tumours", "more"]):
        done = millrace(tmp_path, *words)
        assert done.code == 2 and not done.out and "Traceback" not in done.err and "Usage: " in done.err
    for verb, option in (("run", "--as-of"), ("sample", "--until")):
        done = millrace(tmp_path, verb, "tumours", option, "yesterday")
        assert done.code == 2 and done.error.startswith(f"error: {option}: 'yesterday' is not a time: write ISO 8601")


def test_a_run_that_is_asked_for_while_the_lock_is_held(copied_home: Home) -> None:
    """Even where nothing is new."""
    path = copied_home.lock("run-tumours")
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write("4711")
        file.flush()
        done = millrace(copied_home.root, "run", "tumours", sets=QUICK)
    assert done.code == 1 and "a run of tumours is already running (process 4711); wait until it ends" in done.error
