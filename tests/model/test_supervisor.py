"""What the supervisor and the ranks do when something is wrong that is no kill."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from models.arrays import epoch_shape
from models.beat import STEPS, Beat
from models.checkpoints import Writer, newest, snapshot, write
from models.elastic import Zygote, finish, launch, submit
from models.supervisor import START_S, _Group, _Rank
from pipelines.errors import MillraceError
from pipelines.manifest import read_json
from tests.model.test_training import assert_same, job, newest_step, run, until, weights


def record(folder: Path) -> tuple[list[str], list[str]]:
    """Reasons of restarts and all notes of a job."""
    notes = read_json(folder / "notes.json")["notes"] if (folder / "notes.json").exists() else []
    if not (folder / "restarts.json").exists():
        return [], notes
    body = read_json(folder / "restarts.json")
    return body["reasons"], body["notes"] + notes


def reached(folder: Path) -> int:
    """Steps that the first rank has done, -1 when there is none."""
    path = folder / "heartbeat-0"
    return Beat(path).step if path.is_file() and path.stat().st_size else -1


# --- checkpoints ---


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-7], "of .* bytes"), (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], "not those that were written"),
        (lambda b: b"", "first line"), (lambda b: b[500:], "first line"),
        (lambda b: b.replace(b'"format_version": 1', b'"format_version": 9', 1), "format_version 9"),
    ],
)  # fmt: skip
def test_a_corrupt_checkpoint_is_passed_over(tmp_path: Path, damage: object, said: str) -> None:
    for step in (3, 5):
        write(tmp_path / "checkpoints" / f"step-{step:09d}.ckpt", {"w": torch.ones(999)}, {"code": "c"})
    path = tmp_path / "checkpoints" / "step-000000005.ckpt"
    assert newest(tmp_path, {"code": "c"})[0] == path
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    found, broken, lines = newest(tmp_path, {"code": "c"})
    assert found is not None and found.name == "step-000000003.ckpt" and broken == [path]
    assert len(lines) == 1 and re.search(rf"step-000000005.ckpt is corrupt \(.*{said}", lines[0])


@pytest.mark.slow
def test_training_resumes_from_the_checkpoint_before_a_corrupt_one(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, every_us=1, epochs=1)
    calm = run(zygote, tmp_path, wanted)
    first, kept = weights(tmp_path), sorted((tmp_path / "checkpoints").glob("step-*"))
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:-1])
    (tmp_path / "result.json").unlink()
    assert run(zygote, tmp_path, wanted) == calm
    assert_same(weights(tmp_path), first)
    _, notes = record(tmp_path)
    assert len(notes) == 1 and f"{kept[1].name} is corrupt" in notes[0]
    assert kept[1].with_suffix(".corrupt").exists()


def test_a_checkpoint_of_another_spec_is_refused_with_the_difference(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    run(zygote, tmp_path / "one", job(arrays, every_us=1, epochs=1))
    job(arrays, "train.learning_rate=0.01", epochs=1).prepare(tmp_path / "two")
    (tmp_path / "one" / "checkpoints").rename(tmp_path / "two" / "checkpoints")
    with pytest.raises(MillraceError, match=r"0 restarts: .*another training: job\.train\.learning_rate 0\.003, now 0\.01; rem"):
        launch(tmp_path / "two", ranks=1, max_restarts=5, zygote=zygote)


def test_a_checkpoint_of_other_code_or_libraries_is_refused(tmp_path: Path) -> None:
    about = {"code": "a" * 64, "libraries": {"torch": "2.13.0"}}
    write(tmp_path / "checkpoints" / "step-000000003.ckpt", {}, about)
    assert newest(tmp_path, about)[0] is not None
    with pytest.raises(MillraceError, match=r"libraries\.torch 2\.13\.0, now 2\.14\.0"):
        newest(tmp_path, {**about, "libraries": {"torch": "2.14.0"}})
    with pytest.raises(MillraceError, match="code aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        newest(tmp_path, {**about, "code": "b" * 64})


def test_a_snapshot_shares_nothing_that_changes() -> None:
    state = {"w": torch.zeros(3), "losses": [1.0], "deep": [{"t": (torch.zeros(2), 4)}]}
    copied = snapshot(state)
    state["w"] += 1
    state["losses"].append(2.0)  # type: ignore[attr-defined]
    state["deep"][0]["t"][0].add_(1)  # type: ignore[index]
    assert copied["w"].sum() == 0 and copied["losses"] == [1.0] and copied["deep"][0]["t"][0].sum() == 0


@pytest.mark.slow
def test_a_disk_that_is_full_costs_an_alarm_not_the_training(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, every_us=1, epochs=6)
    wanted.prepare(tmp_path / "full")
    future = submit(tmp_path / "full", ranks=1, max_restarts=0, zygote=zygote)
    until(lambda: newest_step(tmp_path / "full") > 3)
    rank = psutil.Process(zygote.process.pid).children()[0]
    rank.rlimit(psutil.RLIMIT_FSIZE, (2_000, psutil.RLIM_INFINITY))
    until(lambda: (tmp_path / "full" / "notes.json").exists())
    before = reached(tmp_path / "full")
    until(lambda: reached(tmp_path / "full") > before + 5)
    assert newest_step(tmp_path / "full") < before
    rank.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    full = finish(future, tmp_path / "full", 1)
    assert len(full.notes) == 1 and "was not written (File too large); training goes on" in full.notes[0]
    assert newest_step(tmp_path / "full") > before
    assert full.result == run(zygote, tmp_path / "calm", job(arrays, epochs=6))


def test_nothing_is_written_into_the_folder_of_another_job(tmp_path: Path) -> None:
    answers = iter([True, False])
    writer = Writer(tmp_path, {}, pytest.fail, lambda: next(answers))
    for step in (3, 4):
        writer.begin(step, {"w": torch.ones(3)})
    writer.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003.ckpt"]


# --- a loss that is not finite ---


def poisoned(arrays: Path, folder: Path, row: int) -> Path:
    """The arrays with a NaN in one training row."""
    folder.mkdir()
    for path in arrays.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    scaled = np.load(folder / "scaled.npy")
    scaled[row, 0] = np.nan
    np.save(folder / "scaled.npy", scaled)
    return folder


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_with_its_rows_and_may_be_left_out(
    zygote: Zygote, arrays: Path, tmp_path: Path, ranks: int
) -> None:
    bad = poisoned(arrays, tmp_path / "arrays", 1_234)
    stopped = run(zygote, tmp_path / "stop", job(bad), ranks=ranks).stopped
    assert "loss not finite at step" in stopped and "training rows 1234; last finite: step" in stopped
    steps = epoch_shape(2_400, 64, 1).steps
    step = int(stopped.partition("step ")[2].split()[0])
    assert f"(epoch 1, batch {step})" in stopped and 1 < step <= steps and f"step {step - 1}, loss 0." in stopped
    wanted = job(bad, "train.skip_bad_batches=1", epochs=1)
    result = run(zygote, tmp_path / "skip", wanted, ranks=ranks)
    assert not result.stopped and result.best_epoch == 1
    where = f"step {step} (epoch 1, batch {step}): training rows 1234"
    assert record(tmp_path / "skip")[1] == [f"loss not finite, batch left out at {where}"]
    assert "(epoch 1" not in run(zygote, tmp_path / "again", job(bad, "train.skip_bad_batches=1"), ranks=ranks).stopped


def test_weights_that_run_away_are_told_from_bad_rows(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    stopped = run(zygote, tmp_path, job(arrays, "train.learning_rate=1e30")).stopped
    assert "weights have run away" in stopped


# --- ranks ---


def group(folder: Path, **more: float) -> _Group:
    return _Group.told({"id": 1, "folder": str(folder), "ranks": 1, "allowed": 9, "hang_s": 10.0, **more})


def test_patience_grows_with_the_time_of_a_step_and_a_pause_of_the_supervisor_is_no_silence(tmp_path: Path) -> None:
    some = group(tmp_path)
    member = _Rank(0, 0, 0, Beat.make(tmp_path / "heartbeat-0"))
    assert some.patience(member) == START_S
    member.beat(STEPS, 1)
    some._listen(member, 0.5)
    assert some.patience(member) == 10.0
    for _ in range(9):
        some._listen(member, 0.5)
    member.beat(STEPS, 2)
    some._listen(member, 0.5)
    assert member.silent_s == 0 and some.patience(member) == 50.0
    for step in range(3, 500):  # quick again: the slow one is forgotten
        member.beat(STEPS, step)
        some._listen(member, 0.05)
    assert some.patience(member) == 10.0
    some.members, some.looked = [], time.monotonic() - 3_600
    assert some.look() is None and time.monotonic() - some.looked < 1


def test_restarts_without_a_new_step_wait_longer_and_longer(tmp_path: Path) -> None:
    some, waits = group(tmp_path), []
    for _ in range(5):
        now = time.monotonic()
        assert some._again("rank 0 failed") is None and some.due is not None
        waits.append(round(some.due - now, 1))
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_from_the_same_step(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, "train.network.dropout=0.0", epochs=6)
    wanted.prepare(tmp_path / "moved")
    future = submit(tmp_path / "moved", ranks=2, max_restarts=0, zygote=zygote)
    for slots, step in (([0], 10), ([0, 1], 60)):
        until(lambda beyond=step: reached(tmp_path / "moved") > beyond)  # type: ignore[misc]
        zygote.resize(tmp_path / "moved", slots)
        until(lambda now=slots: len(psutil.Process(zygote.process.pid).children()) == len(now))  # type: ignore[misc]
    moved = finish(future, tmp_path / "moved", 2)
    assert not moved.restarts
    assert [note.partition(" from")[0] for note in moved.notes] == ["told so: 1 rank(s)", "told so: 2 rank(s)"]
    calm = run(zygote, tmp_path / "calm", wanted)
    assert moved.result.best_epoch == calm.best_epoch
    assert_same(weights(tmp_path / "moved"), weights(tmp_path / "calm"), atol=1e-5)


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_its_silence(unruly: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, every_us=1, epochs=2)
    for name, code in (("calm", ""), ("hung", "if generation == 0 and rank == 1 and step == 20: time.sleep(1e6)")):
        wanted.prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(code)
    calm = launch(tmp_path / "calm", ranks=2, max_restarts=0, zygote=unruly)
    hung = launch(tmp_path / "hung", ranks=2, max_restarts=1, zygote=unruly, hang_s=2.0)
    assert "made no progress for" in hung.restarts[0] and hung.result == calm.result
    assert_same(weights(tmp_path / "hung"), weights(tmp_path / "calm"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_halves_what_is_worked_through_at_once(
    unruly: Zygote, arrays: Path, tmp_path: Path, ranks: int
) -> None:
    wanted = job(arrays, "train.network.dropout=0.0", epochs=2)
    full = "if trainer.lightning_module.split < 4 and step == 9: raise torch.OutOfMemoryError('CUDA out of memory')"
    for name, code in (("calm", ""), ("full", full)):
        wanted.prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(code)
    calm = launch(tmp_path / "calm", ranks=ranks, max_restarts=0, zygote=unruly)
    full_up = launch(tmp_path / "full", ranks=ranks, max_restarts=3, zygote=unruly)
    assert [reason.partition(": ")[2] for reason in full_up.restarts] == [
        "from here on its batch is worked through in 2 parts", "from here on its batch is worked through in 4 parts",
    ]  # fmt: skip
    assert full_up.result.best_epoch == calm.result.best_epoch
    assert_same(weights(tmp_path / "full"), weights(tmp_path / "calm"), atol=1e-5)


@pytest.mark.slow
def test_a_rank_that_keeps_failing_is_given_up_and_tried_again(unruly: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, "train.network.dropout=0.0", epochs=40)
    lost = "if rank == 1 and generation < 2: os._exit(1)\nif world == 1: time.sleep(0.02)"
    for name, code in (("calm", ""), ("lost", lost)):
        wanted.prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(code)
    calm = launch(tmp_path / "calm", ranks=1, max_restarts=0, zygote=unruly)
    outcome = launch(tmp_path / "lost", ranks=2, max_restarts=3, zygote=unruly)
    assert len(outcome.restarts) == 2 and all("rank 1 failed" in reason for reason in outcome.restarts)
    assert "rank 1 failed twice without a step: 1 rank(s)" in outcome.notes[0]
    assert "the lost ranks are tried again: 2 rank(s)" in outcome.notes[1]
    assert outcome.result.best_epoch == calm.result.best_epoch
    assert_same(weights(tmp_path / "lost"), weights(tmp_path / "calm"), atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_is_killed_again_and_again_is_not_given_up(unruly: Zygote, arrays: Path, tmp_path: Path) -> None:
    """Who kills a rank from outside changes neither the number of ranks nor a bit."""
    killed = "import signal\nif rank == 1 and generation < 3: os.kill(os.getpid(), signal.SIGKILL)"
    for name, code in (("calm", ""), ("hit", killed)):
        job(arrays).prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(code)
    calm, hit = (launch(tmp_path / name, ranks=2, max_restarts=3, zygote=unruly) for name in ("calm", "hit"))
    assert hit.restarts == ("rank 1 died of signal 9",) * 3 and not hit.notes
    assert hit.result == calm.result
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


TAKEN = """
import os, models.supervisor
was = models.supervisor._environment
def environment(rank, slots, ranks, port, generation, *rest):
    return was(rank, slots, ranks, int(os.environ["TAKEN"]) if generation == 0 else port, generation, *rest)
models.supervisor._environment = environment
models.supervisor.serve()
"""


@pytest.mark.slow
def test_a_port_that_somebody_takes_first_costs_a_restart(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("TAKEN", str(taken.getsockname()[1]))
        unlucky = Zygote(("-c", TAKEN))
        job(arrays, epochs=1).prepare(tmp_path)
        outcome = launch(tmp_path, ranks=2, max_restarts=2, zygote=unlucky)
    unlucky.close()
    assert outcome.restarts == ("rank 0 failed",) and outcome.ranks == 2 and outcome.result.best_epoch == 1
    assert "EADDRINUSE" in (tmp_path / "rank-0.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_supervisor_that_dies_is_replaced(arrays: Path, zygote: Zygote, tmp_path: Path) -> None:
    mortal = Zygote()
    wanted = job(arrays, every_us=1)
    wanted.prepare(tmp_path / "hit")
    future = submit(tmp_path / "hit", ranks=2, max_restarts=1, zygote=mortal)
    until(lambda: newest_step(tmp_path / "hit") > 10)
    os.kill(mortal.process.pid, signal.SIGKILL)
    outcome = finish(future, tmp_path / "hit", 2)
    assert outcome.restarts == ("the supervisor died of signal 9",)
    assert outcome.result == run(zygote, tmp_path / "calm", job(arrays), ranks=2)
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_ends(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    """The supervisor itself is asked to end, in good order: ranks write where they are, and the parent is told."""
    mortal = Zygote()
    job(arrays, epochs=60).prepare(tmp_path)
    future = submit(tmp_path, ranks=2, max_restarts=3, zygote=mortal)
    until(lambda: reached(tmp_path) > 10)
    ranks = psutil.Process(mortal.process.pid).children()
    began = time.monotonic()
    mortal.process.terminate()
    assert future.result(timeout=10)["error"] == "training was stopped; run again, it resumes"
    assert mortal.process.wait(10) == 0 and time.monotonic() - began < 10 and not any(p.is_running() for p in ranks)
    assert newest_step(tmp_path) == reached(tmp_path) > 10
    outcome = launch(tmp_path, ranks=2, max_restarts=0, zygote=zygote)
    assert not outcome.restarts and not outcome.result.stopped


@pytest.mark.slow
def test_the_supervisor_never_asks_for_a_gpu(arrays: Path, tmp_path: Path) -> None:
    """Whatever of torch.cuda would start the driver is counted in the supervisor itself, while it runs a job to its end."""
    job(arrays, epochs=1).prepare(tmp_path / "job")
    code = """
import json, os, sys, threading
seen, me = [], os.getpid()
names = {"is_available", "device_count", "_lazy_init", "init", "current_device", "get_device_properties", "_device_count_nvml"}
def look(frame, event, argument):
    code = frame.f_code
    if event == "call" and os.getpid() == me and "torch/cuda" in code.co_filename and code.co_name in names:
        seen.append(code.co_name)
sys.setprofile(look)
import torch
torch.cuda.is_available()
assert seen == ["is_available"]  # it is seen
seen.clear()
import models.supervisor
leave = os._exit
def end(code):
    if os.getpid() == me:
        open(sys.argv[1], "w").write(json.dumps(seen))
    leave(code)
os._exit = end
models.supervisor.serve()
"""
    told = {"id": 1, "folder": str(tmp_path / "job"), "ranks": 1, "allowed": 0, "hang_s": 10.0}
    command = [sys.executable, "-c", code, str(tmp_path / "seen")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(told).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["ok"]
    process.stdin.close()
    process.wait(30)
    assert json.loads((tmp_path / "seen").read_text()) == []
