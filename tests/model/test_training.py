"""Ranks: killed and resumed bit for bit, one or two of them, hung ones, and what is left when training cannot go on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from models.arrays import epoch_shape
from models.beat import Beat
from models.elastic import Zygote, launch
from models.job import Job, Result
from pipelines.errors import MillraceError, UsageError
from pipelines.spec import Train
from tests.model.small import small_spec


def job(arrays: Path, *overrides: str, every_us: int = 20_000_000, epochs: int = 3) -> Job:
    train = small_spec(*overrides).train
    return Job(str(arrays), train.model_copy(update={"checkpoint_every": every_us}), 5, epochs)


def run(zygote: Zygote, folder: Path, wanted: Job, ranks: int = 1, **more: float) -> Result:
    wanted.prepare(folder)
    return launch(folder, ranks=ranks, max_restarts=6, zygote=zygote, **more).result


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "network.safetensors")


def strike(zygote: Zygote, folder: Path, steps: list[int], sign: signal.Signals, which: int = -1) -> threading.Thread:
    """Signals a rank each time that a checkpoint at or after one of these steps has appeared."""

    def watch() -> None:
        for step in steps:
            deadline = time.monotonic() + 60
            while newest_step(folder) < step and time.monotonic() < deadline:
                time.sleep(0.002)
            ranks = psutil.Process(zygote.process.pid).children()
            if ranks:
                os.kill(ranks[which].pid, sign)
            time.sleep(0.3)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def newest_step(folder: Path) -> int:
    found = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return int(found[-1].stem.removeprefix("step-")) if found else -1


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=atol, err_msg=name)


def test_killed_training_ends_in_the_same_weights(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays))
    steps = epoch_shape(2_400, 64, 1).steps
    # in the first epoch, at the beginning of the second, and in the last
    hit = strike(zygote, tmp_path / "hit", [5, steps + 1, 2 * steps + 9], signal.SIGKILL)
    torn = run(zygote, tmp_path / "hit", job(arrays, every_us=20_000))
    hit.join()
    restarts = (tmp_path / "hit" / "restarts.json").read_text()
    assert restarts.count("died of signal 9") >= 2
    assert torn == calm and len(calm.curve) == 3
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))
    assert (tmp_path / "hit" / "network.onnx").read_bytes() == (tmp_path / "calm" / "network.onnx").read_bytes()


def test_every_checkpoint_resumes_to_the_same_result(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, every_us=1, epochs=2)
    calm = run(zygote, tmp_path / "calm", wanted)
    kept = Path(newest(tmp_path / "calm"))
    shape = epoch_shape(2_400, 64, 1)
    assert int(kept.stem.removeprefix("step-")) > shape.steps
    assert all(int(p.stem.removeprefix("step-")) % shape.steps for p in kept.parent.iterdir())  # never at an epoch's last step
    (tmp_path / "calm" / "result.json").unlink()
    first = weights(tmp_path / "calm")
    (tmp_path / "calm" / "network.safetensors").unlink()
    assert run(zygote, tmp_path / "calm", wanted) == calm
    assert_same(weights(tmp_path / "calm"), first)


def newest(folder: Path) -> str:
    return str(sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1])


def test_two_ranks_learn_what_one_learns(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, "train.network.dropout=0.0", epochs=2)
    one = run(zygote, tmp_path / "one", wanted)
    two = run(zygote, tmp_path / "two", wanted, ranks=2)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-6)
    assert one.best_epoch == two.best_epoch
    assert one.log_loss == pytest.approx(two.log_loss, abs=1e-6)


def test_two_ranks_killed_end_in_the_same_weights(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays, epochs=2), ranks=2)
    hit = strike(zygote, tmp_path / "hit", [15], signal.SIGKILL)
    torn = run(zygote, tmp_path / "hit", job(arrays, every_us=1, epochs=2), ranks=2)
    hit.join()
    assert (tmp_path / "hit" / "restarts.json").exists()
    assert torn == calm
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


def test_a_stopped_rank_is_found(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    hit = strike(zygote, tmp_path / "hung", [5], signal.SIGSTOP)
    result = run(zygote, tmp_path / "hung", job(arrays, every_us=1, epochs=2), hang_s=2.0)
    hit.join()
    assert "rank 0 was stopped" in (tmp_path / "hung" / "restarts.json").read_text()
    assert len(result.curve) == 2


def test_a_finished_job_is_not_run_again_and_another_job_starts_afresh(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    run(zygote, tmp_path, job(arrays, epochs=1))
    stamp = (tmp_path / "network.onnx").stat().st_mtime_ns
    run(zygote, tmp_path, job(arrays, epochs=1, every_us=77))  # how often it is kept does not make another job
    assert (tmp_path / "network.onnx").stat().st_mtime_ns == stamp
    assert len(run(zygote, tmp_path, job(arrays, epochs=2)).curve) == 2


def test_training_that_fails_says_why(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = Job(str(tmp_path / "nowhere"), small_spec().train, 5, 1)
    wanted.prepare(tmp_path / "job")
    with pytest.raises(MillraceError, match=r"failed after 1 restarts: rank 0 failed: .*nowhere"):
        launch(tmp_path / "job", ranks=1, max_restarts=1, zygote=zygote)


@pytest.mark.slow
def test_a_dead_zygote_is_an_error_and_the_job_resumes(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    mortal = Zygote()
    wanted = job(arrays, every_us=1)
    wanted.prepare(tmp_path)

    def kill() -> None:
        until(lambda: newest_step(tmp_path) >= 5)
        mortal.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(MillraceError, match="run again, it resumes"):
        launch(tmp_path, ranks=1, max_restarts=0, zygote=mortal)
    killer.join()
    reached = newest_step(tmp_path)
    assert reached >= 5 and not (tmp_path / "result.json").exists()
    assert len(launch(tmp_path, ranks=1, max_restarts=3, zygote=zygote).result.curve) == 3


@pytest.mark.slow
def test_zygote_and_ranks_die_with_their_parent_and_leave_a_checkpoint(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    job(arrays).prepare(tmp_path / "hit")  # no checkpoint is due
    code = "import sys, pathlib, models.elastic as e; e.launch(pathlib.Path(sys.argv[1]), ranks=1, max_restarts=3)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "hit")])
    heart = tmp_path / "hit" / "heartbeat-0"
    until(lambda: heart.is_file() and Beat(heart).step > 3)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(family) == 2  # the zygote and its rank
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), seconds=10)
    assert not (tmp_path / "hit" / "result.json").exists()
    assert newest_step(tmp_path / "hit") == Beat(heart).step > 3  # the rank was asked for a last checkpoint
    resumed = run(zygote, tmp_path / "hit", job(arrays))
    assert resumed == run(zygote, tmp_path / "calm", job(arrays))
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_early_stopping_keeps_the_best_epoch(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    result = run(zygote, tmp_path, job(arrays, "train.learning_rate=0.05", "train.patience=1", epochs=30))
    losses = [e.log_loss for e in result.curve if e.log_loss is not None]
    assert result.best_epoch == losses.index(min(losses)) + 1
    assert len(losses) == result.best_epoch + 1 < 30


def test_pruning_stops_above_the_limit(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = Job(str(arrays), small_spec().train, 5, 3, prune_above=(0.01,), export=False)
    result = run(zygote, tmp_path, wanted)
    assert result.pruned and len(result.curve) == 1
    assert not (tmp_path / "network.onnx").exists()


def test_an_epoch_is_cut_alike_for_every_world_size() -> None:
    assert epoch_shape(100_000, 1024, 1) == epoch_shape(100_000, 1024, 8)
    assert epoch_shape(1_000, 1024, 1).steps >= 16
    assert epoch_shape(3, 1024, 1).steps >= 1
    with pytest.raises(UsageError, match="choose a number of ranks that divides 1024"):
        epoch_shape(100_000, 1024, 3)


def test_train_settings_survive_their_file(tmp_path: Path) -> None:
    wanted = Job("somewhere", Train(), 3, 4, rows=9, prune_above=(None, 0.25))
    wanted.prepare(tmp_path)
    assert Job.load(tmp_path) == wanted
