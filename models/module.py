"""The network under Lightning: loss, optimiser, schedule. B rows."""

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from models.data import Batch
from models.strategy import shard
from pipelines.spec import Train


class TabularModule(pl.LightningModule):
    """Binary cross-entropy by AdamW, with a warm-up and a schedule that ends at `steps`."""

    def __init__(
        self, net: nn.Module, train: Train, steps: int, split: int = 1, say: Callable[[str], None] = print
    ) -> None:  # fmt: skip
        """`split`: parts that a rank's batch is cut into, so that it needs less memory; the step is the same.

        `say` is told why the network was not compiled.
        """
        super().__init__()
        self.net, self.hyper, self.steps, self.split, self.say = net, train, steps, split, say
        self.compiled: Callable[..., Tensor] | None = None
        if train.compile:
            self.compiled = torch.compile(lambda *inputs: net(*inputs))  # not a module: it has no weights

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning keeps the name of the running hook here, some fifty times a step; PyTorch would look for weights in it."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """On a CPU it is there; Lightning would look at each tensor."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if self.split == 1:
            return self._loss(batch)
        together = self.hyper.accumulate_grad_batches
        parts = list(zip(*(column.chunk(self.split) for column in batch), strict=True))
        shares = [len(part[-1]) / len(batch[-1]) for part in parts]
        if index % together == 0:
            self.zero_grad()
        before = 0.0
        for part, share in zip(parts[:-1], shares[:-1], strict=True):
            loss = self._loss(part) * share
            before += float(loss.detach())
            loss = self.trainer.precision_plugin.pre_backward(loss, self)
            (loss / together).backward()  # within DDP's forward it only adds up; the last part is reduced
        last = self._loss(parts[-1]) * shares[-1]
        return last + before

    def _loss(self, batch: Batch) -> Tensor:
        *inputs, label_B = batch
        return binary_cross_entropy_with_logits(self._logits(*inputs).float(), label_B)

    def _logits(self, *inputs: Tensor) -> Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(*inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no compiler, a graph that it cannot take, a disk that is full
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"train.compile was not used ({why[:300]}); training goes on without it")
                self.compiled = None
        logit: Tensor = self.net(*inputs)
        return logit

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self.split == 1:  # else Lightning would drop what the first parts have added
            optimizer.zero_grad()

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        fused = self.hyper.precision != "16-mixed"  # a fused one would undo the scaling itself, after clipping
        assert self.hyper.learning_rate != "auto"
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=self.hyper.learning_rate, weight_decay=self.hyper.weight_decay, fused=fused
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        schedule, warm = self.hyper.schedule, max(1, round(self.hyper.warmup * self.steps))
        if schedule == "onecycle":
            rise = self.hyper.warmup if self.hyper.warmup * self.steps > 1 else 0.0  # it divides by 0 where one step rises
            return OneCycleLR(optimizer, optimizer.defaults["lr"], self.steps, pct_start=rise)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            if schedule == "constant":
                return 1.0
            left = max(1, self.steps - warm)
            return 1 - (step - warm) / left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (step - warm) / left))

        return LambdaLR(optimizer, factor)
