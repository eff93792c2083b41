"""`features: auto` from landed files to a served model: what was chosen is what is pinned, packed, reported and repeated."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.rollout import bento_spec, champion
from features.frame import feature_list
from models.choose import KEPT
from pipelines.home import open_home
from pipelines.manifest import ROOT, read_json
from pipelines.run import spec_from
from pipelines.spec import Spec
from tests.command import QUICK, command, environment, millrace
from tests.e2e.test_kills import _kill_tree

AUTO = (*QUICK, "features=auto")


def test_check_says_what_would_be_proposed(tmp_path: Path) -> None:
    done = millrace(tmp_path, "check", "flights_demo", sets=("features=auto",))
    assert "features: auto proposes 996 (" in done.out and " window of arrivals, " in done.out


@pytest.fixture(scope="module")
def whole(prefect_tables: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A home with an undisturbed run, and what it answered."""
    home = prefect_tables(tmp_path_factory.mktemp("auto") / "whole")
    millrace(home, "sample", "tumours")
    first = millrace(home, "run", "tumours", "--json", sets=AUTO)
    assert first.code == 0 and first.answer["outcome"] == "promoted", first.err
    return home, first.answer


@pytest.mark.slow
def test_a_run_releases_the_features_it_chose_and_is_unchanged_when_repeated(whole: tuple[Path, dict[str, Any]]) -> None:
    place, first = whole
    home = open_home(place)
    folder = home.runs("tumours") / first["run_id"]
    manifest = read_json(folder / "manifest.json")
    chosen = home.root / manifest["stage_paths"]["autofe"]
    verdicts = read_json(chosen / "chosen.json")["verdicts"]
    kept = {v["feature"] for v in verdicts if v["reason"] == KEPT}
    assert 0 < len(kept) < len(verdicts) and "autofe" in [stage["stage"] for stage in manifest["stages"]]

    spec = spec_from(chosen / "spec.json")
    release = champion(home, "tumours")
    assert release is not None and {f.name for f in feature_list(spec)} == kept
    assert bento_spec(home, release) == spec and spec.features.auto is None
    assert Spec.model_validate(json.loads((folder / "spec.json").read_text()) | {"format_version": 1}).features.auto is not None
    assert manifest["result"]["spec"]["features"]["only"] == [*spec.features.only] and manifest["preflight"]["passed"]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="proposed"' in report and all(f"<code>{v['feature']}</code>" in report for v in verdicts)

    again = millrace(place, "run", "tumours", "--json", sets=AUTO)
    assert again.answer["outcome"] == "unchanged" and again.answer["result_digest"] == first["result_digest"]


@pytest.mark.slow
def test_a_run_killed_while_it_chooses_goes_on_and_ends_with_the_same_digest(
    whole: tuple[Path, dict[str, Any]], prefect_tables: Callable[[Path], Path], tmp_path: Path
) -> None:
    home = prefect_tables(tmp_path / "killed")
    millrace(home, "sample", "tumours")
    process = subprocess.Popen(command("run", "tumours", sets=AUTO), env=environment(home), cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(home.glob("artifacts/autofe/.*.partial/.autofe-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    _kill_tree(process)
    left = [path.name for path in home.glob("artifacts/autofe/*") if not path.name.startswith(".")]
    assert left == [] and list(home.glob("runs/tumours/*/inputs.json")) and not list(home.glob("runs/tumours/*/manifest.json"))
    again = millrace(home, "run", "tumours", "--json", sets=AUTO)
    assert again.code == 0 and again.answer["outcome"] == "promoted", again.err
    assert (again.answer["result_digest"], again.answer["run_id"]) == (whole[1]["result_digest"], whole[1]["run_id"])
    assert not list(home.glob("artifacts/autofe/.*"))
