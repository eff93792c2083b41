"""What the words of a spec mean to Lightning: its Trainer, how ranks share the work, in what numbers they multiply."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.strategies.model_parallel import _rekey_optimizer_state_if_needed
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.checkpoints import CheckpointIO
from models.job import Job
from pipelines.errors import UsageError
from pipelines.spec import Train

HANG = timedelta(minutes=10)  # a collective that waits longer has lost a rank, if the supervisor has not seen it
UNIT = 10_000  # numbers from which a layer is gathered by itself; smaller ones together


def trainer_of(job: Job, world: int, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer for one of `world` ranks. Raises UsageError where it does not take what the spec passes on."""
    train = job.train
    ours = {
        "profiler": Unprofiled(),
        "accelerator": job.accelerator, "devices": world, "strategy": strategy(train, world, job.accelerator),
        "max_epochs": job.max_epochs, "callbacks": [*callbacks], "num_sanity_val_steps": 0, "log_every_n_steps": 10**6,
        "accumulate_grad_batches": train.accumulate_grad_batches, "gradient_clip_val": train.gradient_clip_val,
        "gradient_clip_algorithm": train.gradient_clip_algorithm, "use_distributed_sampler": False,
        "plugins": [CheckpointIO(), precision_plugin(train, job.accelerator)],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    }  # fmt: skip
    try:
        return pl.Trainer(**{**ours, **train.trainer})
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = ", ".join(f"{name}: {value!r}" for name, value in train.trainer.items())
        raise UsageError(f"train.trainer: Lightning does not take {{{given}}}: {' '.join(str(error).split())}") from error


class Unprofiled(PassThroughProfiler):
    """Lightning's own makes a context anew for each of some thirty calls in a step."""

    nothing = nullcontext("")

    def profile(self, action_name: str) -> Any:
        return self.nothing


def precision_plugin(train: Train, accelerator: str) -> Precision:
    """In what numbers Lightning has the network multiply; 8-bit floats are the network's own matter."""
    if train.precision == "32-true":
        return Precision()
    # given as a plugin: by its name Lightning would take bfloat16 for float16 on a CPU
    device = "cpu" if accelerator == "cpu" else "cuda"
    return MixedPrecision("16-mixed", device) if train.precision == "16-mixed" else Bfloat16("bf16-mixed", device)


class Bfloat16(MixedPrecision):
    """Clips under fused optimisers too: Lightning refuses them, for the sake of a scaler that bfloat16 has not."""

    def clip_gradients(self, optimizer: Any, *limits: Any, **more: Any) -> None:
        Precision.clip_gradients(self, optimizer, *limits, **more)


def strategy(train: Train, world: int, accelerator: str) -> Any:
    """What Lightning's Trainer is given as `strategy`."""
    if world == 1:
        return "auto" if accelerator != "cpu" else SingleDeviceStrategy(device="cpu")
    backend = "nccl" if accelerator == "gpu" else "gloo"
    if train.strategy == "fsdp":
        return Sharded(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False,
                       process_group_backend=backend, timeout=HANG)  # fmt: skip
    return DDPStrategy(process_group_backend=backend, timeout=HANG)


class Sharded(ModelParallelStrategy):
    """FSDP2. Its checkpoints are those of every strategy, whole tensors in one file, so that any number of ranks resumes."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        found = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        module, whole = self.lightning_module, StateDictOptions(full_state_dict=True)
        assert module is not None
        set_model_state_dict(module, found.pop("state_dict"), options=whole)
        for optimizer, state in zip(self.optimizers, found["optimizer_states"], strict=True):
            set_optimizer_state_dict(module, optimizer, _rekey_optimizer_state_if_needed(state, module), options=whole)
        return found


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads the weights over the ranks, each large layer by itself, once."""
    if any(isinstance(p, DTensor) for p in net.parameters()):
        return
    for part in net.modules():
        if part is not net and not list(part.children()) and sum(p.numel() for p in part.parameters()) >= UNIT:
            fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with what the other ranks hold; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies whole tensors into what may be spread over the ranks; all ranks must have them."""
    for ours, theirs in zip(tensors, values, strict=True):
        if isinstance(ours, DTensor):
            theirs = local(distribute_tensor(theirs.to(ours.device), ours.device_mesh, ours.placements))
        local(ours).copy_(theirs)


def finite(gradients: Iterable[Tensor]) -> bool:
    """Whether all are finite on all ranks; where they are whole, each rank has the sum over all already."""
    found = list(gradients)
    if not found:
        return True
    total = torch.stack([local(g).sum() for g in found]).sum()  # a norm would cost five times as much
    if any(isinstance(g, DTensor) for g in found):
        torch.distributed.all_reduce(total)
    return math.isfinite(float(total))
