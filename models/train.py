"""What one rank runs: `main(folder)` trains the network of a job, resuming from its newest checkpoint."""

import ctypes
import json
import logging
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import registry
from safetensors.torch import load_file, save_file
from torch import nn

from models import float8
from models.arrays import SHARDS, Arrays, epoch_shape
from models.average import Average, share_of_newest
from models.beat import END, START, STEPS, Beat
from models.calibrate import sigmoid
from models.checkpoints import Writer, newest, snapshot
from models.clock import Clock
from models.custom import build, check_logits
from models.data import Batch, Loader, Resident, resident
from models.energy import Energy, meter_of
from models.evaluate import auc, log_loss
from models.find_rate import find_rate, found_rate
from models.job import LIBRARIES, PROFILE, STOPPED, Epoch, Job, Result, identity, own_code
from models.module import TabularModule
from models.power import PowerSaver
from models.profile import Profile
from models.shards import Shards
from models.strategy import finite, trainer_of, whole
from models.usage import AllReduce, usage
from pipelines.errors import MillraceError
from pipelines.manifest import code_digest, library_versions, read_json, write_atomic, write_json
from pipelines.spec import Train

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library


def main(folder: Path) -> None:
    """Trains until the last epoch, early stopping or pruning; rank 0 writes weights and, last, `result.json`.

    Raises MillraceError where another try would end in the same way.
    """
    quiet()
    torch.set_num_threads(1)  # bits must not depend on the machine's number of cores
    keep_memory()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    split = int(os.environ.get("MILLRACE_SPLIT", "1"))
    job = Job.load(folder)
    arrays = Arrays.load(Path(job.arrays))
    shards = Path(job.arrays) / SHARDS
    rows = Shards(shards) if shards.is_file() else resident(arrays, "train", job.rows)
    valid = resident(arrays, "valid_fit")
    shape = epoch_shape(len(rows), job.train.batch_size, world)
    if split > shape.batch // world:
        raise MillraceError("out of memory with one row at a time; choose a smaller train.network, or a larger device")
    steps = shape.updates(job.train.accumulate_grad_batches) * job.max_epochs
    loader = Loader(rows, shape, job.seed, rank, world, pinned=job.accelerator == "gpu")
    net = build(job.train, arrays.preprocess, job.seed, steps)
    if job.train.precision == "fp8":
        float8.check(job.accelerator, shape.batch // world)
        net = float8.convert(net)
    keeper = Keeper(job, folder, valid, loader, steps, net)
    if job.train.module is not None:
        check_logits(net, resident(arrays, "valid_fit", 4), job.train.module)
    module = _module(net, _with_rate(job, folder, arrays, loader, keeper), steps, split, keeper)
    profiles = [Profile(folder / PROFILE, steps, job.accelerator, keeper.clock)] if job.train.profile and rank == 0 else []
    savers = [PowerSaver(job.train.power, keeper, world)] if job.train.power.wanted() else []
    trainer = trainer_of(job, world, [keeper, *profiles, *savers])
    _no_lightning_signals(trainer)
    signal.signal(signal.SIGTERM, keeper.ask if rank == 0 else signal.SIG_IGN)  # the others end with rank 0
    # a user's own module may keep hyper-parameters of any type in the checkpoint
    trainer.fit(module, loader, ckpt_path=keeper.resume(), weights_only=job.train.module is None)
    keeper.beat(END)
    keeper.energy.look()
    if rank == 0:
        if not keeper.mine():
            raise MillraceError("another job was prepared in this folder")
        keeper.leave()
        _leave(job, folder, keeper, arrays)


def _with_rate(job: Job, folder: Path, arrays: Arrays, loader: Loader, keeper: "Keeper") -> Train:
    """The training settings with a number as learning rate."""
    train = job.train
    if train.learning_rate != "auto":
        return train

    def find() -> float:
        alone = Loader(loader.data, loader.shape, job.seed, 0, 1)  # what all ranks read together
        return find_rate(build(train, arrays.preprocess, job.seed, keeper.steps), alone, train.weight_decay, keeper.beat)

    rate, now = found_rate(folder, find)
    if now:
        keeper.say(f"train.learning_rate auto: {rate:g}, a tenth of that up to which the loss falls")
    return train.model_copy(update={"learning_rate": rate})


def _module(net: nn.Module, train: Train, steps: int, split: int, keeper: "Keeper") -> pl.LightningModule:
    if not isinstance(net, pl.LightningModule):
        return TabularModule(net, train, steps, split, keeper.say)
    if split > 1:
        raise MillraceError("out of memory; choose a smaller train.batch_size and a larger train.accumulate_grad_batches")
    return net


def quiet() -> None:
    """Library chatter off."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # what was asked for by train.trainer


def _no_lightning_signals(trainer: pl.Trainer) -> None:
    """SIGTERM is the keeper's: Lightning's handler calls a collective, and asks all ranks about it at every step."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def origin(job: Job) -> dict[str, Any]:
    """What a checkpoint must share with who reads it."""
    return {"job": identity(job.to_dict()), "code": code_digest("models"),
            "libraries": library_versions(*LIBRARIES), **own_code(job.train)}  # fmt: skip


def keep_memory() -> None:
    """What a step frees stays with the process; else, by where other blocks happen to lie, the pages of its activations are
    given back and found and cleared anew at every step, which cost a sixth of the loop's time."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        tune(M_TRIM_THRESHOLD, 2**30)


def warm_up() -> None:
    """What every rank would compute anew, for those that are forked from here."""
    found: Any = cache(entry_points)  # else every Trainer reads the files of all installed packages
    found(group="pytorch_lightning.callbacks_factory")
    registry.entry_points = found
    code_digest("models")  # of the code that was imported, whatever is edited later
    library_versions(*LIBRARIES)


class Keeper(pl.Callback):
    """Judges each epoch on valid_fit, keeps the best weights, writes checkpoints, and beats for its rank.

    Every rank judges by itself: equal weights give equal figures, so all stop at the same epoch. Rank 0 alone writes:
    what it holds is what all hold, or has been gathered from them, and the order of rows is no rank's own.
    """

    def __init__(self, job: Job, folder: Path, valid: Resident, loader: Loader, steps: int, net: nn.Module) -> None:
        self.job, self.folder, self.valid, self.loader, self.rank = job, folder, valid, loader, loader.rank
        self.net = net
        self.steps, self.together = steps, job.train.accumulate_grad_batches
        self.sharded = job.train.strategy == "fsdp" and loader.world > 1
        self.curve: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch: int | None = None
        self.pruned = self.asked = self.bad = False
        self.losses: list[float] = []
        self.skipped, self.stopped = 0, ""
        self.last_finite: tuple[int, float] | None = None  # step and its loss on rank 0
        self.scaled: list[torch.Tensor] = []  # losses of this step, where a scaler has multiplied them
        self.average: Average | None = None
        self.averaged: list[torch.Tensor] | None = None  # as the checkpoint has it
        self.notes: list[str] = []
        self.saved = time.monotonic()
        self.weights: list[torch.nn.Parameter] = []
        self.clock = Clock()
        self.reduce: AllReduce | None = None
        self.energy = Energy(meter_of(job.train.power, job.accelerator, self.rank, loader.world), folder / f"energy-{self.rank}")
        self.farewell, self.code = "", STOPPED  # why training ends where it was not asked from outside
        self.writer = Writer(folder, origin(job), self.say, self.mine)
        heart = folder / f"heartbeat-{self.rank}"
        self.beat = Beat(heart) if heart.is_file() else Beat.make(heart)
        self.between: Callable[[], Any] = self.beat  # two chunks that are judged
        self.beat(START)

    def mine(self) -> bool:
        """Whether the folder is still that of this job: its parent may be gone, and another have prepared one there."""
        try:
            return identity(read_json(self.folder / "job.json")) == self.writer.about["job"]
        except MillraceError:
            return False

    def ask(self, *_: object) -> None:
        """Handler of SIGTERM: after this step a checkpoint is written, and the rank ends."""
        self.asked = True

    def say(self, line: str) -> None:
        """A line for the run's record; where the disk is full it waits."""
        self.notes.append(line)
        with suppress(OSError):
            self._tell()

    def _tell(self) -> None:
        path = self.folder / "notes.json"
        if self.rank == 0 and self.notes:
            told = list(read_json(path)["notes"]) if path.is_file() else []
            write_json(path, {"notes": [*told, *self.notes]})
            self.notes = []

    def resume(self) -> Path | None:
        """The checkpoint to go on from. Those that are broken are set aside."""
        path, broken, said = newest(self.folder, self.writer.about)
        if self.rank == 0:
            for file in broken:
                file.replace(file.with_suffix(".corrupt"))
            for line in said:
                self.say(line)
        return path

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [asdict(e) for e in self.curve], "best": self.best, "best_epoch": self.best_epoch,
                "losses": self.losses, "skipped": self.skipped, "last_finite": self.last_finite,
                "average": self.average.state() if self.average else None}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [Epoch(**e) for e in state_dict["curve"]]
        self.best, self.best_epoch, self.losses, self.skipped, self.last_finite, self.averaged = (
            state_dict[k] for k in ("best", "best_epoch", "losses", "skipped", "last_finite", "average")
        )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1 or not module.automatic_optimization:
            raise MillraceError(
                f"train.module {self.job.train.module!r}: training resumes exactly with one optimiser that Lightning steps; "
                "return one from configure_optimizers, and the loss from training_step"
            )
        self.clock.start()
        self.weights = list(module.parameters())
        if self.loader.world > 1 and not self.sharded and self.job.accelerator == "cpu":
            self.reduce = AllReduce(self.weights)
        if self.job.train.ema is not None or self.job.train.swa is not None:
            self.average = Average(self.weights)
            if self.averaged is not None:
                self.average.load(self.averaged)
        self.beat(step=trainer.global_step, steps=self.steps)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.clock.skip()  # what lies between two epochs is no step's time

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Dropout is a function of (seed, step, rank), so that a resumed step draws what the killed one drew."""
        self.clock.end_of("data")
        draw = trainer.global_step * self.together + batch_idx % self.together
        seed = (self.job.seed * 1_000_003 + draw) * 1_009 + trainer.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack for each device that is not there
        if self.job.accelerator == "gpu":
            torch.cuda.manual_seed(seed)
        if self.job.train.module is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
        self.clock.end_of("other")

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.clock.end_of("forward")
        if self.job.train.precision == "16-mixed":
            self.scaled.append(loss.detach())

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.clock.end_of("backward")
        if self.reduce is not None:
            self.reduce.done(self.clock.mark)

    def _too_large_for_float16(self, trainer: pl.Trainer) -> bool:
        """Whether a gradient is infinite only because of the scaler: it leaves the step out, and scales less from then on."""
        if not self.scaled or trainer.precision_plugin.scaler.get_scale() < 1:  # type: ignore[attr-defined]
            return False
        loss_finite = torch.stack(self.scaled).isfinite().all().float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss_finite, torch.distributed.ReduceOp.MIN)
        return bool(loss_finite)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """A gradient that is not finite is dropped: it is the sum over all ranks, so all see it."""
        if finite(p.grad for p in self.weights if p.grad is not None) or self._too_large_for_float16(trainer):
            self.clock.end_of("other")
            return
        self.bad, before = True, (self.loader.position - 1) % self.together  # batches before it in the same step
        del self.losses[len(self.losses) - before :]
        where = f"step {trainer.global_step + 1} (epoch {self.loader.epoch + 1}, batch {self.loader.position})"
        where += f": {self._bad_rows(before + 1)}"
        for p in self.weights:
            p.grad = None  # the optimiser leaves these as they are
        self.skipped += 1
        if self.skipped <= self.job.train.skip_bad_batches:
            self.say(f"loss not finite, batch left out at {where}")
            return
        last = f"step {self.last_finite[0]}, loss {self.last_finite[1]:.6g}" if self.last_finite else "none"
        self.stopped = f"loss not finite at {where}; last finite: {last}"
        trainer.should_stop = True

    def _bad_rows(self, batches: int) -> str:
        rows, batch = self.loader.last(batches)
        bad = ~_answers(self.net, batch[:-1]).isfinite()
        found = sorted(rows[bad].tolist())
        if len(found) in (0, len(rows)):
            return "no row by itself, the weights have run away"
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        return f"training rows {', '.join(map(str, found[:10]))}{more}"

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        step, whole = trainer.global_step, trainer.is_last_batch or not self.loader.position % self.together
        self.clock.end_of("optimizer" if whole else "other")
        if not self.bad and outputs:  # a user's own training_step may return no loss, to leave a batch out
            self.losses.append(float(outputs["loss"]))
            self.last_finite = (step, self.losses[-1])
        self.bad = False
        self.beat(STEPS, step)
        self.clock.step(writing=self.writer.busy)
        if self.clock.last > self.energy.due:
            self.energy.look()
        if not whole:
            return  # the gradients of a step that is not whole are in no checkpoint
        self.scaled.clear()
        if self.average is not None:
            self.average.update(share_of_newest(self.job.train, step, self.steps))
        # a run resumed from an epoch's last batch would not judge the epoch: Lightning counts it done
        if (self.rank == 0 or self.sharded) and not trainer.is_last_batch and not self.stopped:
            self._keep(trainer)
        self.clock.end_of("other")

    def _keep(self, trainer: pl.Trainer) -> None:
        now = time.monotonic()
        due = now - self.saved >= self.job.train.checkpoint_every / 1e6
        wanted = self.asked or (due and not self.writer.busy)
        if self.sharded:  # all ranks take part in it when rank 0 wants one
            told = torch.tensor(float(wanted), device=trainer.strategy.root_device)
            torch.distributed.broadcast(told, 0)
            wanted = bool(told)
        if not wanted:
            return
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if self.rank != 0:
            return
        self.writer.begin(trainer.global_step, snapshot(state))
        self.saved = time.monotonic()
        self.clock.stalled(self.saved - now)
        if self.asked:
            self.writer.wait()
            if self.farewell:
                raise MillraceError(self.farewell)
            os._exit(self.code)

    def leave(self) -> None:
        """What rank 0 tells when training is over."""
        self.writer.wait()
        self._tell()
        write_json(self.folder / "timing.json", self.clock.figures())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.stopped:
            return
        with self.average.applied() if self.average else nullcontext():
            epoch = self._learned()
        if self.rank == 0:
            lines = [json.dumps(asdict(e)) + "\n" for e in self.curve]
            with suppress(OSError):  # a disk that is full; the curve is also in the checkpoint
                write_atomic(self.folder / "progress.jsonl", "".join(lines))
        self.pruned = epoch.epoch < self.job.max_epochs and self._above(epoch)
        tired = epoch.epoch - (self.best_epoch or 0) >= self.job.train.patience
        trainer.should_stop = self.pruned or tired

    def _learned(self) -> Epoch:
        """The epoch judged; its weights are kept when they are the best so far."""
        if self.loader.world > 1:
            for buffer in self.net.buffers():  # such as means of a BatchNorm: each rank has those of its rows
                torch.distributed.broadcast(buffer, 0)
        epoch = self._judge()
        self.curve.append(epoch)
        better = self.best_epoch is None or (
            epoch.log_loss is not None and epoch.log_loss < (self.curve[self.best_epoch - 1].log_loss or float("inf"))
        )
        if epoch.log_loss is not None and better:
            self.best_epoch = epoch.epoch
            self.best = {k: whole(v.detach()).cpu().clone() for k, v in self.net.state_dict().items()}
        return epoch

    def _above(self, epoch: Epoch) -> bool:
        limits = self.job.prune_above
        limit = limits[epoch.epoch - 1] if epoch.epoch <= len(limits) else None
        return epoch.log_loss is None or (limit is not None and epoch.log_loss > limit)

    def _judge(self) -> Epoch:
        logit = logits(self.net, self.valid, self.between)
        self.beat()
        label = self.valid.label.numpy().astype(np.float64)
        loss, self.losses = float(np.mean(self.losses)) if self.losses else float("nan"), []
        mean = round(loss, 9) if math.isfinite(loss) else None
        if not np.isfinite(logit).all():
            return Epoch(len(self.curve) + 1, mean, None, None)
        p = sigmoid(logit)
        return Epoch(len(self.curve) + 1, mean, log_loss(label, p), auc(label, p))


def logits(net: nn.Module, rows: Resident, beat: Callable[[], Any]) -> np.ndarray:
    """Logits of rows without dropout, float64; `beat` is told of every chunk."""
    found: np.ndarray = np.empty(len(rows))
    for some, inputs in rows.judged():
        found[some.numpy()] = _answers(net, inputs).numpy()
        beat()
    return found


def _answers(net: nn.Module, inputs: Batch) -> torch.Tensor:
    was, device = net.training, next(net.parameters()).device
    net.eval()
    with torch.no_grad(), float8.plain(net):
        found: torch.Tensor = net(*(column.to(device) for column in inputs)).cpu()
    net.train(was)
    return found


def _leave(job: Job, folder: Path, keeper: Keeper, arrays: Arrays) -> None:
    net = build(job.train, arrays.preprocess, job.seed, keeper.steps)
    if job.export and keeper.best and not keeper.stopped:
        write_json(folder / "usage.json", usage(keeper, net, resident(arrays, "valid_fit", 8)))
        from models.export import export_onnx  # ONNX Runtime: the supervisor imports it once the ranks are at work

        save_weights(keeper.best, folder / "network.safetensors")
        net.load_state_dict(load_file(folder / "network.safetensors"))
        try:
            export_onnx(net, arrays.preprocess, resident(arrays, "valid_fit", 512), folder / "network.onnx")
        except Exception as error:
            if job.train.module is None:
                raise
            raise MillraceError(f"train.module {job.train.module!r} cannot be exported to ONNX: {error}") from error
    parameters = sum(p.numel() for p in net.parameters())
    Result(tuple(keeper.curve), keeper.best_epoch, keeper.pruned, parameters, keeper.stopped).save(folder)


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Weights as safetensors, in the order of their names."""
    save_file({k: weights[k].contiguous() for k in sorted(weights)}, path)
