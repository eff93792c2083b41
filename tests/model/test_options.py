"""Options of `train:`: each does what PyTorch by hand does, survives kills bit for bit, and stands in no file when unused."""

import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from models.arrays import Arrays, epoch_shape, write_arrays
from models.data import Loader, resident
from models.elastic import Zygote, start_zygote
from models.job import Job
from models.net import build_net
from pipelines.errors import UsageError
from pipelines.manifest import write_json
from pipelines.spec import Train
from tests.model.small import small_spec, write_small
from tests.model.test_supervisor import poisoned, record
from tests.model.test_training import assert_same, job, run, strike, weights

QUIET = "train.network.dropout=0.0"


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    return start_zygote()


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_arrays(write_small(folder / "set"), folder / "arrays")


def by_hand(wanted: Job) -> dict[str, np.ndarray]:
    """One epoch of a job as plain PyTorch."""
    train, data = wanted.train, Arrays.load(Path(wanted.arrays))
    rows = resident(data, "train")
    shape = epoch_shape(len(rows.label), train.batch_size, 1)
    together = train.accumulate_grad_batches
    steps = math.ceil(shape.steps / together)
    net = build_net(data.preprocess, train.network, wanted.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    warm = max(1, round(train.warmup * steps))
    falls = {"cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)), "linear": lambda x: 1 - x, "constant": lambda x: 1.0}
    schedule: Any = (
        OneCycleLR(optimizer, train.learning_rate, total_steps=steps, pct_start=train.warmup)
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
def test_small_batches_together_are_one_large_batch(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    small = job(arrays, QUIET, "train.batch_size=24", "train.accumulate_grad_batches=4", epochs=2)
    few = run(zygote, tmp_path / "small", small)
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


ALL = ("train.schedule=onecycle", "train.accumulate_grad_batches=3", "train.gradient_clip_val=0.5", "train.ema=0.98")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ALL),
        pytest.param(2, ALL, marks=pytest.mark.slow),
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


# --- the spec ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("train.ema=0.9", "train.swa=0.5"), "train: ema and swa both average the weights: give one of them"),
        (("train.gradient_clip_algorithm=value",), "train: gradient_clip_algorithm clips nothing by itself: give grad"),
        (("train.schedule=cosin",), r"train.schedule: Input should be 'cosine', 'linear', .*, found 'cosin'"),
        (("train.accumulate_grad_batches=0",), "train.accumulate_grad_batches: .* greater than or equal to 1, found 0"),
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
    used = Train(ema=0.9, accumulate_grad_batches=2)
    assert Train.model_validate(used.model_dump(mode="json")) == used
    assert {"ema", "accumulate_grad_batches"} < set(used.model_dump(exclude={"ranks"}))
