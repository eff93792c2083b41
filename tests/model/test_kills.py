"""What a kill -9 may hit: ranks until the budget is used up, the zygote, the process that tunes; and what is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from models.arrays import write_arrays
from models.candidate import train_candidates
from models.elastic import Zygote, launch, submit
from models.evaluate import evaluate
from models.tune import tune_into
from pipelines.errors import MillraceError
from pipelines.manifest import ROOT, file_digest, read_json, write_json
from pipelines.spec import Gate, Train
from tests.model.small import small_spec, write_small
from tests.model.test_training import assert_same, job, newest_step, run, strike, until, weights

SEARCH = (
    "tune={generations: 3, size: 3, max_epochs: 2, rows: 1500, workers: 2, "
    "space: {learning_rate: {low: 0.0005, high: 0.05, log: true}, network.width: {choices: [8, 16]}}}",
    "train.network.dropout=0.2",
)
TUNE = """
import sys
from pathlib import Path
from models.tune import tune_into
from tests.model.small import small_spec
tune_into(small_spec(*sys.argv[4:]), *map(Path, sys.argv[1:4]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_small(made)
    return made


@pytest.fixture(scope="module")
def arrays(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_arrays(write_small(folder), tmp_path_factory.mktemp("arrays") / "arrays", Train())


def test_a_used_up_budget_is_an_error_that_says_why_and_the_next_launch_resumes(
    zygote: Zygote, arrays: Path, tmp_path: Path
) -> None:
    wanted = job(arrays, every_us=20_000)
    wanted.prepare(tmp_path / "hit")
    hit = strike(zygote, tmp_path / "hit", [5, 6], signal.SIGKILL)
    with pytest.raises(MillraceError, match=r"failed after 1 restarts: rank 0 died of signal 9"):
        launch(tmp_path / "hit", ranks=1, max_restarts=1, zygote=zygote)
    hit.join()
    reasons = read_json(tmp_path / "hit" / "restarts.json")["reasons"]
    assert reasons == ["rank 0 died of signal 9"] * 2
    outcome = launch(tmp_path / "hit", ranks=1, max_restarts=1, zygote=zygote)  # a new launch, a new budget
    assert list(outcome.restarts) == reasons
    assert outcome.result == run(zygote, tmp_path / "calm", job(arrays))
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


def test_the_killed_rank_is_named_not_the_peer_that_it_took_along(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    hit = strike(zygote, tmp_path, [20], signal.SIGKILL, which=1)
    run(zygote, tmp_path, job(arrays, every_us=1, epochs=2), ranks=2)
    hit.join()
    assert read_json(tmp_path / "restarts.json")["reasons"] == ["rank 1 died of signal 9"]


def test_a_job_that_is_started_again_ends_what_is_still_at_work_in_its_folder(
    zygote: Zygote, arrays: Path, tmp_path: Path
) -> None:
    job(arrays, every_us=1, epochs=40).prepare(tmp_path)
    first = submit(tmp_path, ranks=1, max_restarts=0, zygote=zygote)
    until(lambda: newest_step(tmp_path) >= 3)
    job(arrays, epochs=1).prepare(tmp_path)
    assert len(launch(tmp_path, ranks=1, max_restarts=0, zygote=zygote).result.curve) == 1
    assert first.result(timeout=5)["error"] == "the job was started again"
    assert not psutil.Process(zygote.process.pid).children()


def test_training_does_not_resume_from_what_other_rows_left(folder: Path, tmp_path: Path) -> None:
    spec, other = small_spec("train.max_epochs=1", "gbdt.max_rounds=5"), tmp_path / "other"
    write_small(other, seed=4)
    write_json(tmp_path / "study" / "best.json", {})
    for data, work, out in ((other, "work", "o1"), (folder, "work", "o2"), (folder, "fresh", "o3")):
        (tmp_path / out).mkdir()
        train_candidates(spec, data, tmp_path / "study", tmp_path / work, tmp_path / out)
    digests = [file_digest(tmp_path / out / "network.safetensors") for out in ("o1", "o2", "o3")]
    assert digests[1] == digests[2] != digests[0]


@pytest.mark.slow
def test_ranks_die_with_a_killed_zygote_and_the_next_one_ends_in_the_same_weights(
    zygote: Zygote, arrays: Path, tmp_path: Path
) -> None:
    mortal = Zygote()
    job(arrays, every_us=1).prepare(tmp_path / "hit")
    future = submit(tmp_path / "hit", ranks=2, max_restarts=0, zygote=mortal)
    until(lambda: newest_step(tmp_path / "hit") >= 20)
    ranks = psutil.Process(mortal.process.pid).children()
    os.kill(mortal.process.pid, signal.SIGKILL)
    with pytest.raises(MillraceError, match="run again, it resumes"):
        future.result(timeout=10)
    assert len(ranks) == 2
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks), seconds=5)
    with pytest.raises(MillraceError, match="run again, it resumes"):  # nobody waits for one that is gone
        submit(tmp_path / "hit", ranks=2, max_restarts=3, zygote=mortal).result(timeout=10)
    resumed = run(zygote, tmp_path / "hit", job(arrays), ranks=2)
    assert resumed == run(zygote, tmp_path / "calm", job(arrays), ranks=2)
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_hung_rank_of_two_is_found_and_the_weights_are_the_same(
    zygote: Zygote, arrays: Path, tmp_path: Path, which: int
) -> None:
    hit = strike(zygote, tmp_path / "hit", [20], signal.SIGSTOP, which)
    torn = run(zygote, tmp_path / "hit", job(arrays, every_us=1), ranks=2, hang_s=3.0)
    hit.join()
    assert read_json(tmp_path / "hit" / "restarts.json")["reasons"] == [f"rank {which} was stopped"]
    assert torn == run(zygote, tmp_path / "calm", job(arrays), ranks=2)
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


@pytest.mark.slow
def test_a_tuning_process_killed_twice_ends_in_the_same_trials(folder: Path, tmp_path: Path) -> None:
    spec = small_spec(*SEARCH)
    for name in ("calm", "hit"):
        (tmp_path / f"{name}-out").mkdir()
    tune_into(spec, folder, tmp_path / "calm", tmp_path / "calm-out")
    study = tmp_path / "hit" / "network"
    for trials in (1, 5):  # in the first generation, and in the second
        command = [sys.executable, "-c", TUNE, str(folder), str(tmp_path / "hit"), str(tmp_path / "hit-out"), *SEARCH]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        until(lambda wanted=trials: len(list(study.glob("trial-*.json"))) >= wanted)  # type: ignore[misc]
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in study.glob("trial-*.json")}
    assert 5 <= len(finished) < 9
    tune_into(small_spec(*SEARCH, "tune.workers=1"), folder, tmp_path / "hit", tmp_path / "hit-out")
    for file in ("best.json", "trials.json", "page.md"):
        assert (tmp_path / "hit-out" / file).read_bytes() == (tmp_path / "calm-out" / file).read_bytes()
    assert {name: (study / name).stat().st_mtime_ns for name in finished} == finished  # none was run again
    trials = json.loads((tmp_path / "hit-out" / "trials.json").read_text())["trials"]
    assert journal(study) == [(t["slot"], t["params"], t["value"]) for t in trials]


def journal(study: Path) -> list[tuple[int, dict[str, float], float | None]]:
    """What Optuna reads from the journal."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(study / "optuna.journal")))
    found = optuna.load_study(study_name="tumours", storage=storage)
    return [(t.user_attrs["slot"], t.params, t.value) for t in found.trials]


@pytest.mark.slow
def test_a_large_evaluation_is_quick() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=50_000)
    label = (rng.random(50_000) < 1 / (1 + np.exp(-z))).astype(float)
    models = {n: 1 / (1 + np.exp(-z - s)) for n, s in (("challenger", 0.0), ("champion", 0.3), ("gbdt", 0.1))}
    slices = {"part": rng.integers(0, 30, 50_000).astype(str).astype(object)}
    began = time.thread_time()
    evaluate(label, {**models, "prior": np.full(50_000, 0.5)}, slices, Gate(resamples=300), seed=1)
    assert time.thread_time() - began < 30


def test_nobody_is_left_waiting_when_the_zygote_dies_among_many_submissions(arrays: Path, tmp_path: Path) -> None:
    """The zygote dies while it still imports: every job that was given to it, before and after, ends in an error."""
    mortal = Zygote()
    killer = threading.Timer(0.2, mortal.process.kill)
    killer.start()
    futures: list[Future[dict[str, Any]]] = []
    while len(futures) < 200 or killer.is_alive():
        futures.append(mortal.submit(tmp_path / str(len(futures)), ranks=1, max_restarts=0))
        time.sleep(0.002)
    for future in futures:
        assert isinstance(future.exception(timeout=10), MillraceError)
