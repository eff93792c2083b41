"""What one rank runs: `main(folder)` trains the network of a job, resuming from its newest checkpoint."""

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file, save_file

from models.arrays import Arrays, epoch_shape
from models.calibrate import sigmoid
from models.data import Loader, Resident, resident
from models.evaluate import auc, log_loss
from models.export import export_onnx
from models.job import Epoch, Job, Result
from models.module import TabularModule
from models.net import TabularNet, build_net
from pipelines.manifest import write_atomic

KEPT = 2  # checkpoints
ASK_EVERY = 20  # steps between two looks at rank 0's watch, where there are several ranks
HANG = timedelta(seconds=60)  # a collective that waits longer has lost a rank


def main(folder: Path) -> None:
    """Trains until the last epoch, early stopping or pruning; rank 0 writes weights and, last, `result.json`."""
    quiet()
    torch.set_num_threads(1)  # bits must not depend on the machine's number of cores
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    job = Job.load(folder)
    arrays = Arrays.load(Path(job.arrays))
    rows, valid = resident(arrays, "train", job.rows), resident(arrays, "valid_fit")
    shape = epoch_shape(len(rows.label), job.train.batch_size, world)
    net = build_net(arrays.preprocess, job.network, job.seed)
    module = TabularModule(net, job.train, shape.steps * job.max_epochs, job.seed)
    keeper = Keeper(job, folder, valid, rank, world)
    trainer = pl.Trainer(
        accelerator=job.accelerator, devices=world if world > 1 else 1, strategy=_strategy(world, job.accelerator),
        max_epochs=job.max_epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[keeper],
        log_every_n_steps=10**6,
    )  # fmt: skip
    trainer.fit(module, Loader(rows, shape, job.seed, rank, world), ckpt_path=newest(folder), weights_only=True)
    if rank == 0:
        _leave(job, folder, keeper, net, arrays)


def quiet() -> None:
    """Library chatter off."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def _strategy(world: int, accelerator: str) -> Any:
    if world == 1:
        return "auto" if accelerator != "cpu" else SingleDeviceStrategy(device="cpu")
    return DDPStrategy(process_group_backend="nccl" if accelerator == "gpu" else "gloo", timeout=HANG)


def newest(folder: Path) -> str | None:
    """Path of the newest complete checkpoint."""
    found = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return str(found[-1]) if found else None


class Keeper(pl.Callback):
    """Judges each epoch on valid_fit, keeps the best weights, writes checkpoints and the rank's heartbeat.

    Every rank judges by itself: equal weights give equal figures, so all stop at the same epoch.
    """

    def __init__(self, job: Job, folder: Path, valid: Resident, rank: int, world: int) -> None:
        self.job, self.folder, self.valid, self.rank, self.world = job, folder, valid, rank, world
        self.curve: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch: int | None = None
        self.pruned = False
        self.losses: list[float] = []
        self.saved = self.beat = time.monotonic()
        self.fresh_epoch = False
        self.heart = folder / f"heartbeat-{rank}"
        self.heart.touch()

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [asdict(e) for e in self.curve], "best": self.best, "best_epoch": self.best_epoch,
                "losses": self.losses}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [Epoch(**e) for e in state_dict["curve"]]
        self.best, self.best_epoch, self.losses = (state_dict[k] for k in ("best", "best_epoch", "losses"))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        now = time.monotonic()
        if now - self.beat > 0.5:
            self.heart.write_text(f"{trainer.global_step} {trainer.estimated_stepping_batches}")
            self.beat = now
        if self._due(trainer, now):
            self._save(trainer)
            self.saved, self.fresh_epoch = time.monotonic(), False

    def _due(self, trainer: pl.Trainer, now: float) -> bool:
        if trainer.is_last_batch:  # a run resumed from here would not judge the epoch again: Lightning counts it done
            return False
        due = self.fresh_epoch or now - self.saved >= self.job.train.checkpoint_every / 1e6
        if self.world == 1 or self.fresh_epoch:
            return due
        return trainer.global_step % ASK_EVERY == 0 and bool(trainer.strategy.broadcast(due))

    def _save(self, trainer: pl.Trainer) -> None:
        path = self.folder / "checkpoints" / f"step-{trainer.global_step:09d}.ckpt"
        scratch = path.with_name(f".{path.name}")
        path.parent.mkdir(exist_ok=True)
        trainer.save_checkpoint(scratch)
        if self.rank == 0:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
            for old in sorted(path.parent.glob("step-*.ckpt"))[:-KEPT]:
                old.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TabularModule)
        epoch = self._judge(module.net)
        self.curve.append(epoch)
        better = self.best_epoch is None or (
            epoch.log_loss is not None and epoch.log_loss < (self.curve[self.best_epoch - 1].log_loss or float("inf"))
        )
        if epoch.log_loss is not None and better:
            self.best_epoch = epoch.epoch
            self.best = {k: v.detach().cpu().clone() for k, v in module.net.state_dict().items()}
        if self.rank == 0:
            lines = [json.dumps(asdict(e)) + "\n" for e in self.curve]
            write_atomic(self.folder / "progress.jsonl", "".join(lines))
        self.pruned = epoch.epoch < self.job.max_epochs and self._above(epoch)
        tired = epoch.epoch - (self.best_epoch or 0) >= self.job.train.patience
        trainer.should_stop = self.pruned or tired
        self.fresh_epoch = True  # the first step of the next epoch writes a checkpoint

    def _above(self, epoch: Epoch) -> bool:
        limits = self.job.prune_above
        limit = limits[epoch.epoch - 1] if epoch.epoch <= len(limits) else None
        return epoch.log_loss is None or (limit is not None and epoch.log_loss > limit)

    def _judge(self, net: TabularNet) -> Epoch:
        self.heart.touch()
        logit = logits(net, self.valid)
        label = self.valid.label.numpy().astype(np.float64)
        loss, self.losses = float(np.mean(self.losses)), []
        if not np.isfinite(logit).all():
            return Epoch(len(self.curve) + 1, None, None, None)
        p = sigmoid(logit)
        return Epoch(len(self.curve) + 1, round(loss, 9), log_loss(label, p), auc(label, p))


def logits(net: TabularNet, rows: Resident, chunk: int = 8_192) -> np.ndarray:
    """Logits of rows without dropout, float64."""
    was, device = net.training, next(net.parameters()).device
    net.eval()
    with torch.no_grad():
        parts = [
            net(rows.scaled[i : i + chunk].to(device), rows.codes[i : i + chunk].to(device)).cpu()
            for i in range(0, len(rows.label), chunk)
        ]
    net.train(was)
    return torch.cat(parts).numpy().astype(np.float64)


def _leave(job: Job, folder: Path, keeper: Keeper, net: TabularNet, arrays: Arrays) -> None:
    if job.export and keeper.best:
        save_weights(keeper.best, folder / "network.safetensors")
        net = net.cpu()
        net.load_state_dict(load_file(folder / "network.safetensors"))
        export_onnx(net, arrays.preprocess, resident(arrays, "valid_fit", 512), folder / "network.onnx")
    parameters = sum(p.numel() for p in net.parameters())
    Result(tuple(keeper.curve), keeper.best_epoch, keeper.pruned, parameters).save(folder)


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Weights as safetensors, in the order of their names."""
    save_file({k: weights[k].contiguous() for k in sorted(weights)}, path)
