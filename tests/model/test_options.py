"""Options of `train:`: each does what PyTorch by hand does, survives kills bit for bit, and stands in no file when unused."""

import gzip
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from flows.check import check_pipeline
from models import float8
from models.arrays import Arrays, epoch_shape
from models.calibrate import sigmoid
from models.custom import build, load_class
from models.data import Loader, resident
from models.elastic import Zygote, launch, submit
from models.evaluate import log_loss
from models.find_rate import find_rate, found_rate
from models.job import Job
from models.module import TabularModule
from models.net import build_net
from models.score import NetworkScorer
from pipelines.errors import MillraceError, UsageError
from pipelines.home import open_home
from pipelines.manifest import ROOT, read_json, write_json
from pipelines.spec import Train, find_pipeline
from pipelines.trainer import OWNED, PASSED
from tests.model.small import small_spec, write_small
from tests.model.test_supervisor import poisoned, reached, record
from tests.model.test_training import assert_same, job, newest_step, run, strike, until, weights

AGAIN = "train.gradient_checkpointing=true"
QUIET = "train.network.dropout=0.0"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One that finds modules of the tests, as a user's PYTHONPATH would have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        made = Zygote()
    yield made
    made.close()


def by_hand(wanted: Job) -> dict[str, np.ndarray]:
    """One epoch of a job as plain PyTorch."""
    train, data = wanted.train, Arrays.load(Path(wanted.arrays))
    rows = resident(data, "train")
    shape = epoch_shape(len(rows.label), train.batch_size, 1)
    together = train.accumulate_grad_batches
    steps = math.ceil(shape.steps / together)
    net = build_net(data.preprocess, train, wanted.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    warm = max(1, round(train.warmup * steps))
    falls = {"cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)), "linear": lambda x: 1 - x, "constant": lambda x: 1.0}
    schedule: Any = (
        OneCycleLR(optimizer, train.learning_rate, total_steps=steps, pct_start=train.warmup if train.warmup * steps > 1 else 0.0)
        if train.schedule == "onecycle"
        else LambdaLR(optimizer, lambda s: (s + 1) / warm if s < warm else falls[train.schedule]((s - warm) / (steps - warm)))
    )
    means = [w.detach().clone() for w in net.parameters()]
    for index, (scaled, codes, label) in enumerate(Loader(rows, shape, wanted.seed, 0, 1)):
        (binary_cross_entropy_with_logits(net(scaled, codes), label) / together).backward()
        if (index + 1) % together and index + 1 < shape.steps:
            continue
        if train.gradient_clip_val and train.gradient_clip_algorithm == "norm":
            torch.nn.utils.clip_grad_norm_(net.parameters(), train.gradient_clip_val)
        elif train.gradient_clip_val:
            torch.nn.utils.clip_grad_value_(net.parameters(), train.gradient_clip_val)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step = index // together + 1
        share = 1.0
        if train.ema:
            share = 1 - min(train.ema, (1 + step) / (10 + step))
        elif train.swa:
            share = 1 / max(1, step - (steps - round(train.swa * steps)))
        means = [m + share * (w.detach() - m) for m, w in zip(means, net.parameters(), strict=True)]
    return {name: m.numpy() for (name, _), m in zip(net.named_parameters(), means, strict=True)}


@pytest.mark.parametrize(
    "options",
    [
        ("train.accumulate_grad_batches=4", "train.gradient_clip_val=0.3", "train.schedule=onecycle", "train.ema=0.9"),
        pytest.param(("train.schedule=linear", "train.warmup=0"), marks=pytest.mark.slow),
        pytest.param(("train.schedule=constant", "train.gradient_clip_val=0.01", "train.gradient_clip_algorithm=value",
                      "train.swa=0.5"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_options_do_what_pytorch_by_hand_does(zygote: Zygote, arrays: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    wanted = job(arrays, QUIET, *options, epochs=1)
    run(zygote, tmp_path / "job", wanted)
    assert_same(weights(tmp_path / "job"), by_hand(wanted), atol=2e-6)
    plain = by_hand(job(arrays, QUIET, epochs=1))
    assert max(np.abs(plain[n] - w).max() for n, w in weights(tmp_path / "job").items()) > 1e-3  # they do something


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_small_batches_together_are_one_large_batch(
    zygote: Zygote, arrays: Path, tmp_path: Path, ranks: int, strategy: str
) -> None:
    options = ("train.batch_size=24", "train.accumulate_grad_batches=4", f"train.strategy={strategy}")
    few = run(zygote, tmp_path / "small", job(arrays, QUIET, *options, epochs=2), ranks=ranks)
    one = run(zygote, tmp_path / "large", job(arrays, QUIET, "train.batch_size=96", epochs=2))
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "large"), atol=2e-6)
    assert few.log_loss == pytest.approx(one.log_loss, abs=1e-6)


@pytest.mark.slow
def test_a_batch_worked_through_in_parts_is_added_up_too(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, QUIET, "train.batch_size=96", "train.accumulate_grad_batches=3", epochs=2)
    run(zygote, tmp_path / "whole", wanted)
    wanted.prepare(tmp_path / "parts")
    write_json(tmp_path / "parts" / "restarts.json", {"reasons": [], "notes": [], "split": 4})  # as after "out of memory"
    run(zygote, tmp_path / "parts", wanted)
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=2e-6)


@pytest.mark.slow
def test_a_bad_batch_takes_the_others_of_its_step_along(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    bad = poisoned(arrays, tmp_path / "bad", 7)
    options = ("train.accumulate_grad_batches=5", "train.skip_bad_batches=1")
    result = run(zygote, tmp_path / "job", job(bad, *options, epochs=1))
    (note,) = record(tmp_path / "job")[1]
    assert re.fullmatch(r"loss not finite, batch left out at step \d+ \(epoch 1, batch \d+\): training rows 7", note)
    assert result.curve[0].train_loss is not None


ALL = ("train.schedule=onecycle", "train.accumulate_grad_batches=3", "train.gradient_clip_val=0.5", "train.ema=0.98",
       "train.precision=bf16-mixed")  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ALL),
        pytest.param(2, ALL, marks=pytest.mark.slow),
        pytest.param(2, (*ALL, "train.strategy=fsdp", "train.network.width=128"), marks=pytest.mark.slow),
        pytest.param(2, ("train.precision=16-mixed", "train.gradient_clip_val=0.5"), marks=pytest.mark.slow),
        pytest.param(1, ("train.compile=true",), marks=pytest.mark.slow),
        pytest.param(1, ("train.schedule=linear", "train.swa=0.6", "train.batch_size=32"), marks=pytest.mark.slow),
    ],
)
def test_killed_training_with_options_ends_in_the_same_weights(
    zygote: Zygote, arrays: Path, tmp_path: Path, ranks: int, options: tuple[str, ...]
) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays, *options), ranks=ranks)
    hit = strike(zygote, tmp_path / "hit", [4, 20], signal.SIGKILL)
    torn = run(zygote, tmp_path / "hit", job(arrays, *options, every_us=1), ranks=ranks)
    hit.join()
    assert (tmp_path / "hit" / "restarts.json").read_text().count("died of signal 9") == 2
    assert torn == calm and len(calm.curve) == 3
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


# --- precision and compile ---


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_low_precision_multiplies_in_it_and_learns_the_same(
    zygote: Zygote, arrays: Path, tmp_path: Path, precision: str
) -> None:
    low = run(zygote, tmp_path / "low", job(arrays, QUIET, f"train.precision={precision}"))
    full = run(zygote, tmp_path / "full", job(arrays, QUIET))
    assert low.log_loss == pytest.approx(full.log_loss, abs=0.02) and low.curve != full.curve
    assert {w.dtype for w in weights(tmp_path / "low").values()} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scale_that_is_too_large_for_float16_is_no_bad_batch(
    unruly: Zygote, arrays: Path, tmp_path: Path, ranks: int
) -> None:
    """The scaler finds infinities, leaves these steps out and scales less; a loss that is not finite still stops it."""
    large = """
scaler = trainer.precision_plugin.scaler
if step == 5: scaler._scale.fill_(2.0**30)
(keeper.folder / f"scale-{step:03d}").write_text(str(scaler.get_scale()))
"""
    for name, data in (("good", arrays), ("bad", poisoned(arrays, tmp_path / "poisoned", 1_100))):
        job(data, "train.precision=16-mixed", epochs=1).prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(large)
    good = launch(tmp_path / "good", ranks=ranks, max_restarts=0, zygote=unruly)
    scales = [float(path.read_text()) for path in sorted((tmp_path / "good").glob("scale-*"))]
    assert scales[4] == 2.0**30 and scales[-1] < 2.0**24  # more than six steps were left out
    assert not good.result.stopped and not good.notes and good.result.curve[0].train_loss is not None
    bad = launch(tmp_path / "bad", ranks=ranks, max_restarts=0, zygote=unruly).result
    assert "training rows 1100; last finite: step" in bad.stopped


EMULATED = """
import models.float8, models.supervisor
was = models.float8.convert
models.float8.check = lambda accelerator, rows: None
models.float8.convert = lambda net: was(net, emulate=True)
models.supervisor.serve()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fp8_emulated_learns_what_bfloat16_does_and_survives_kills(arrays: Path, tmp_path: Path) -> None:
    """Rounded to 8 bits on a CPU: other weights than bfloat16's, as good, exported as float32, the same after kills."""
    emulated, wide = Zygote(("-c", EMULATED)), "train.network.width=64"
    fp8, plain = (job(arrays, wide, f"train.precision={kind}") for kind in ("fp8", "bf16-mixed"))
    eight, sixteen = run(emulated, tmp_path / "eight", fp8), run(emulated, tmp_path / "sixteen", plain)
    assert eight.log_loss is not None and sixteen.log_loss is not None and abs(eight.log_loss - sixteen.log_loss) < 0.02
    ours, theirs = weights(tmp_path / "eight"), weights(tmp_path / "sixteen")
    assert ours.keys() == theirs.keys() and max(np.abs(ours[n] - theirs[n]).max() for n in ours) > 1e-4
    hit = strike(emulated, tmp_path / "hit", [9, 50], signal.SIGKILL)
    run(emulated, tmp_path / "hit", job(arrays, wide, "train.precision=fp8", every_us=20_000))
    hit.join()
    assert_same(weights(tmp_path / "hit"), ours)
    emulated.close()


def test_fp8_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UsageError, match=r"compute capability 8\.9 or more, this one has 8\.0; choose bf16-mixed"):
        float8.check("gpu", 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    float8.check("gpu", 64)
    with pytest.raises(UsageError, match="a rank has 60 rows of a batch, which 16 does not divide"):
        float8.check("gpu", 60)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match=r"train.precision fp8 needs torchao \(.*\): type `pip install torchao`"):
        float8.convert(torch.nn.Linear(16, 16))


def test_fp8_is_refused_where_no_hardware_has_it(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, "train.precision=fp8")
    with pytest.raises(MillraceError, match=r"0 restarts: .*fp8 needs a GPU of compute capability 8\.9 .*; choose bf16-mixed$"):
        run(zygote, tmp_path, wanted)


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(arrays: Path) -> None:
    said: list[str] = []
    data = Arrays.load(arrays)
    net = build_net(data.preprocess, small_spec(QUIET).train, 1)
    module = TabularModule(net, Train(), 10, 1, say=said.append)

    def broken(scaled: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand a long tail")

    module.compiled = broken
    rows = resident(data, "train", 16)
    for _ in range(2):
        assert torch.equal(module._logits(rows.scaled, rows.codes), net(rows.scaled, rows.codes))
    assert said == ["train.compile was not used (no C++ compiler); training goes on without it"]
    assert sorted(module.state_dict()) == sorted(f"net.{name}" for name in net.state_dict())


@pytest.mark.slow
def test_compiled_training_learns_the_same_and_says_when_there_is_no_compiler(
    zygote: Zygote, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, plain = job(arrays, QUIET, "train.compile=true", epochs=1), job(arrays, QUIET, epochs=1)
    wanted.prepare(tmp_path / "fast")
    fast = launch(tmp_path / "fast", ranks=1, max_restarts=0, zygote=zygote)
    slow = run(zygote, tmp_path / "slow", plain)
    assert not fast.notes and fast.result.log_loss == pytest.approx(slow.log_loss, abs=1e-5)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    wanted.prepare(tmp_path / "none")
    none = launch(tmp_path / "none", ranks=1, max_restarts=0, zygote=Zygote())
    assert len(none.notes) == 1 and none.notes[0].startswith("train.compile was not used (")
    assert_same(weights(tmp_path / "none"), weights(tmp_path / "slow"))


# --- learning rate and memory ---


@pytest.mark.slow
def test_a_learning_rate_is_found_once_and_is_the_same_everywhere(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    """Two ranks find what one finds; a resumed job reads it, and what was found is what would have been written."""
    wanted = job(arrays, QUIET, "train.learning_rate=auto", epochs=1)
    for name, ranks in (("one", 1), ("two", 2)):
        wanted.prepare(tmp_path / name)
        outcome = launch(tmp_path / name, ranks=ranks, max_restarts=0, zygote=zygote)
        rate = read_json(tmp_path / name / "learning_rate.json")["learning_rate"]
        assert 5e-4 < rate < 0.05
        assert outcome.notes == (f"train.learning_rate auto: {rate:g}, a tenth of that up to which the loss falls",)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-6)
    run(zygote, tmp_path / "said", job(arrays, QUIET, f"train.learning_rate={rate}", epochs=1))
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "said"))
    assert found_rate(tmp_path / "two", lambda: pytest.fail("searched again")) == (rate, False)


def test_a_loss_that_no_rate_lowers_is_one_clear_error(arrays: Path) -> None:
    data = Arrays.load(arrays)
    rows = resident(data, "train", 320)
    rows.scaled[:] = float("nan")
    loader = Loader(rows, epoch_shape(320, 64, 1), 1, 0, 1)
    with pytest.raises(UsageError, match=r"^train.learning_rate auto: no rate .* lowers the loss; give a number$"):
        find_rate(build_net(data.preprocess, small_spec().train, 1), loader, 0.0, lambda: None)


def test_layers_that_are_computed_again_keep_less_and_learn_the_same_bits(arrays: Path) -> None:
    data = Arrays.load(arrays)
    scaled, codes, label = resident(data, "train", 500).take(torch.arange(500))
    network = small_spec("train.network.depth=6", "train.network.width=64").train.network
    kept, gradients = [], []
    for again in (False, True):
        net = build(Train(network=network, gradient_checkpointing=again), data.preprocess, 1, 10)
        sizes: list[int] = []
        torch.manual_seed(3)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):  # type: ignore[misc]
            loss = binary_cross_entropy_with_logits(net(scaled, codes), label)
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad for p in net.parameters()])
    assert kept[1] < 0.4 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_training_that_computes_layers_again_ends_in_the_same_weights(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wide = "train.network.width=128"
    for name, options, ranks in (("plain", (), 1), ("again", (AGAIN,), 1), ("two", (), 2), ("fsdp", (AGAIN, *FSDP[:1]), 2)):
        run(zygote, tmp_path / name, job(arrays, wide, *options, epochs=2), ranks=ranks)
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "plain"))
    assert_same(weights(tmp_path / "fsdp"), weights(tmp_path / "two"), atol=2e-6)


# --- Lightning's own options ---


def test_a_profile_is_a_trace_and_a_table_and_changes_no_weight(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays, epochs=1))
    assert run(zygote, tmp_path / "seen", job(arrays, "train.profile=true", epochs=1)) == calm
    assert_same(weights(tmp_path / "seen"), weights(tmp_path / "calm"))
    trace = json.loads(gzip.decompress((tmp_path / "seen" / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::binary_cross_entropy_with_logits") == 20  # steps
    table = (tmp_path / "seen" / "profile" / "table.txt").read_text()
    shares = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in table.splitlines()[1:6]}
    assert shares.keys() == {"data", "forward", "backward", "optimizer", "other"} and 99 < sum(shares.values()) < 101
    assert min(shares.values()) > 0 and "aten::addmm" in table


def test_every_option_of_lightnings_trainer_is_passed_or_owned() -> None:
    """A new version of Lightning with another option is noticed here."""
    known = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    assert sorted(known) == sorted([*PASSED, *OWNED])


def test_trainer_options_reach_lightning_and_bad_values_are_said_once(
    zygote: Zygote, arrays: Path, tmp_path: Path
) -> None:
    said = job(arrays, "train.trainer={profiler: simple, deterministic: true}", epochs=1)
    run(zygote, tmp_path / "said", said)
    assert "run_training_batch" in (tmp_path / "said" / "rank-0.log").read_text()  # what the profiler found
    bad = job(arrays, "train.trainer={profiler: quick}", epochs=1)
    with pytest.raises(MillraceError, match=r"0 restarts: train\.trainer: Lightning does not take {profiler: 'quick'}: When"):
        run(zygote, tmp_path / "bad", bad)


# --- a user's own module ---

WHOLE, WIDE = "train.module=tests.model.own:Whole", "train.module=tests.model.own:Wide"


def test_an_own_module_is_judged_and_exported(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    own = run(zygote, tmp_path / "own", job(arrays, WHOLE, "train.ema=0.9", epochs=1))
    batch = write_small(tmp_path / "set").batch.take(np.arange(2_400, 3_000))  # valid_fit
    p = sigmoid(NetworkScorer(tmp_path / "own" / "network.onnx").logit(batch))
    label = Arrays.load(arrays).label[2_400:3_000].astype(np.float64)
    assert log_loss(label, p) == pytest.approx(own.log_loss, abs=1e-5) and own.log_loss < 0.65


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ((WHOLE, "train.ema=0.9", "train.accumulate_grad_batches=2"), 1), ((WHOLE, "train.precision=bf16-mixed"), 2),
        ((WIDE, "train.schedule=onecycle"), 1),
    ],
)  # fmt: skip
def test_an_own_module_is_killed_and_ends_in_the_same_weights(
    zygote: Zygote, arrays: Path, tmp_path: Path, options: tuple[str, ...], ranks: int
) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays, *options, epochs=2), ranks=ranks)
    hit = strike(zygote, tmp_path / "hit", [12], signal.SIGKILL)
    torn = run(zygote, tmp_path / "hit", job(arrays, *options, epochs=2, every_us=1), ranks=ranks)
    hit.join()
    assert (tmp_path / "hit" / "restarts.json").exists() and torn == calm
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))


@pytest.mark.slow
def test_an_own_network_is_spread_and_compiled_too(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("fsdp", ("train.strategy=fsdp", "train.compile=true"))):
        run(zygote, tmp_path / name, job(arrays, WIDE, *options, epochs=1), ranks=2)
    assert_same(weights(tmp_path / "fsdp"), weights(tmp_path / "plain"), atol=1e-5)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("tests.model.nowhere:Net", r"'tests.model.nowhere:Net' does not import \(ModuleNotFoundError: .*PYTHONPATH"),
        ("tests.model.own:Wid", r": 'Wid' is not there \(classes: .*; nearest: 'Wide'\)"),
        ("tests.model.small:small_spec", r": 'small_spec' is no class of torch.nn.Module or LightningModule"),
        ("tests.model.own:Greedy", "its constructor needs 'colour', it can have: numbers, flags, categories, network, train, st"),
    ],
)
def test_a_module_that_cannot_stand_in_is_one_clear_error(own: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^train.module {said if own in said else repr(own) + '.*' + said}[^\n]*$"):
        load_class(Train(module=own))


def test_check_names_a_module_that_does_not_import(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    spec = small_spec("train.module=tests.model.nowhere:Net")
    problems = check_pipeline(spec, home, find_pipeline("tumours")).problems
    assert sum("train.module 'tests.model.nowhere:Net' does not import" in problem for problem in problems) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("train.module=tests.model.own:Flat",), r"forward\(scaled .* returned \(4, 1\); expected logits of shape \(4,\)$"),
        (("train.module=tests.model.own:Two",), "resumes exactly with one optimiser"),
        ((WHOLE, "train.compile=true"), "call torch.compile there"), ((WHOLE, "train.strategy=fsdp"), "calls fully_shard in"),
        ((WHOLE, "train.learning_rate=auto"), "an optimiser of its own: learning_rate: auto is for networks"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_trained_is_not_tried_again(
    zygote: Zygote, arrays: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(MillraceError, match=f"0 restarts: train.module 'tests.model.own:.*{said}"):
        run(zygote, tmp_path, job(arrays, *options))


@pytest.mark.slow
def test_a_checkpoint_of_a_module_that_was_changed_is_refused(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.model.own import Wide as Mine\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    zygote = Zygote()
    wanted = job(arrays, "train.module=mine:Mine", every_us=1, epochs=1)
    run(zygote, tmp_path / "job", wanted)
    (tmp_path / "job" / "result.json").unlink()
    file.write_text("from tests.model.own import Wide as Mine  # another\n")
    with pytest.raises(MillraceError, match=r"was written for another training: module [0-9a-f]{12}, now [0-9a-f]{12};"):
        run(zygote, tmp_path / "job", wanted)


# --- FSDP2 ---

FSDP = ("train.strategy=fsdp", "train.network.width=128", "train.ema=0.9", "train.gradient_clip_val=0.5", QUIET)


def test_weights_spread_over_two_ranks_learn_what_one_learns(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    wanted = job(arrays, *FSDP, epochs=1)
    two, one = (run(zygote, tmp_path / name, wanted, ranks=ranks) for name, ranks in (("two", 2), ("one", 1)))
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=2e-6)
    assert two.parameters == one.parameters and two.log_loss == pytest.approx(one.log_loss, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_resumes_what_fsdp_has_left(
    unruly: Zygote, arrays: Path, tmp_path: Path, first: int, then: int
) -> None:
    """Each rank writes how much it holds of the largest layer."""
    code = "held = max(getattr(p, '_local_tensor', p).numel() for p in keeper.weights)\n"
    code += "(keeper.folder / f'held-{world}-{rank}').write_text(f'{held} {step}')"
    wanted = job(arrays, *FSDP, every_us=1, epochs=2)
    for name in ("calm", "moved"):
        wanted.prepare(tmp_path / name)
        (tmp_path / name / "unruly.py").write_text(code)
    calm = run(unruly, tmp_path / "calm", wanted)
    run(unruly, tmp_path / "moved", wanted, ranks=first)
    left = newest_step(tmp_path / "moved")
    for name in ("result.json", "network.safetensors"):
        (tmp_path / "moved" / name).unlink()
    moved = run(unruly, tmp_path / "moved", wanted, ranks=then)
    assert_same(weights(tmp_path / "moved"), weights(tmp_path / "calm"), atol=2e-6)
    assert moved.best_epoch == calm.best_epoch
    seen = {path.name: list(map(int, path.read_text().split())) for path in (tmp_path / "moved").glob("held-*")}
    assert seen["held-2-0"][0] == seen["held-2-1"][0] == seen["held-1-0"][0] // 2
    steps = epoch_shape(2_400, 64, 1).steps
    assert seen[f"held-{then}-0"][1] == 2 * steps > left > steps


@pytest.mark.slow
def test_sigterm_gathers_what_fsdp_has_spread(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    mortal, wanted = Zygote(), job(arrays, *FSDP, epochs=30)
    wanted.prepare(tmp_path)
    future = submit(tmp_path, ranks=2, max_restarts=3, zygote=mortal)
    until(lambda: reached(tmp_path) > 10)
    began = time.monotonic()
    mortal.process.terminate()
    assert future.result(timeout=10)["error"] == "training was stopped; run again, it resumes"
    assert mortal.process.wait(10) == 0 and time.monotonic() - began < 10
    assert newest_step(tmp_path) == reached(tmp_path) > 10
    assert not launch(tmp_path, ranks=1, max_restarts=0, zygote=zygote).restarts


@pytest.mark.slow
def test_a_bad_batch_and_a_batch_in_parts_under_fsdp(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    bad = job(poisoned(arrays, tmp_path / "poisoned", 1_100), *FSDP, epochs=1)
    assert "training rows 1100; last finite: step" in run(zygote, tmp_path / "bad", bad, ranks=2).stopped
    wanted = job(arrays, *FSDP, epochs=1)
    wanted.prepare(tmp_path / "parts")
    write_json(tmp_path / "parts" / "restarts.json", {"reasons": [], "notes": [], "split": 4})
    for name, ranks in (("parts", 2), ("whole", 1)):
        run(zygote, tmp_path / name, wanted, ranks=ranks)
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=2e-6)


# --- the spec ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("train.ema=0.9", "train.swa=0.5"), "train: ema and swa both average the weights: give one of them"),
        (("train.gradient_clip_algorithm=value",), "train: gradient_clip_algorithm clips nothing by itself: give grad"),
        (("train.schedule=cosin",), r"train.schedule: Input should be 'cosine', 'linear', .*, found 'cosin'"),
        (("train.accumulate_grad_batches=0",), "train.accumulate_grad_batches: .* greater than or equal to 1, found 0"),
        (("train.strategy=deepspeed_stage_3",), "train.strategy: deepspeed is not built in; fsdp spreads .* as its stage 3 does"),
        (("train.strategy=fsdp", "train.precision=fp8"), "train: strategy fsdp does not gather weights for precision fp8"),
        (("train.module=a:B", "train.precision=fp8"), "train: precision fp8 is for Millrace's networks: convert your own"),
        (("train.strategy=fsdp", "train.precision=16-mixed"), "train: strategy fsdp has no scaler .*: choose bf16-mixed or"),
        (("train.trainer={devices: 4}",), "train.trainer: devices is Millrace's own: say how many processes by train.ranks"),
        (("train.trainer={precision: 16, benchmrk: true}",), "train.trainer: precision is .*: give it as train.precision; "
         "benchmrk is no option of Lightning's Trainer; nearest: 'benchmark'"),
        (("train.module=my_net",), "train.module: 'my_net' names no class: write package.module:Class"),
        (("train.learning_rate=-1",), "train.learning_rate: -1 is no learning rate: write a number above 0, or auto"),
        (("train.learning_rate=fast",), "train.learning_rate: 'fast' is no learning rate: write a number above 0, or auto"),
        (("train.module=a:B", AGAIN), "train: gradient_checkpointing is for Millrace's network: call torch.utils.checkpoint in"),
        (("train.ema=1",), "train.ema: Input should be less than 1, found 1"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=f"^tumours.yaml: {said}[^\n]*$"):
        small_spec(*options)


def test_an_option_that_is_not_used_stands_in_no_file() -> None:
    """Digests of specs and jobs from before an option existed stay as they were."""
    assert sorted(Train().model_dump()) == sorted((
        "network", "ranks", "max_epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "patience",
        "checkpoint_every", "max_restarts", "hang_after", "skip_bad_batches",
    ))  # fmt: skip
    assert Train(learning_rate="1e-3") == Train(learning_rate=0.001) and Train().model_dump()["learning_rate"] == 0.003
    used = Train(ema=0.9, accumulate_grad_batches=2)
    assert Train.model_validate(used.model_dump(mode="json")) == used
    assert {"ema", "accumulate_grad_batches"} < set(used.model_dump(exclude={"ranks"}))
