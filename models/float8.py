"""`train.precision: fp8`: products of matrices in 8-bit floats, by torchao, on GPUs that have them.

Weights stay float32, and so does what is judged and shipped; all else is bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipelines.errors import UsageError

LEAST = (8, 9)  # compute capability: Ada, Hopper, Blackwell
BY = 16  # what rows and columns of such a product divide by


def check(accelerator: str, rows: int) -> None:
    """Raises UsageError where there is no hardware for it, no package, or `rows` of a rank's batch do not divide by 16."""
    if accelerator == "cpu":
        raise UsageError(
            "train.precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and this training "
            "runs on a CPU; choose bf16-mixed"
        )
    if (found := torch.cuda.get_device_capability()) < LEAST:
        raise UsageError(f"train.precision fp8 needs a GPU of compute capability 8.9 or more, this one has "
                         f"{found[0]}.{found[1]}; choose bf16-mixed")  # fmt: skip
    if rows % BY:
        raise UsageError(f"train.precision fp8: a rank has {rows} rows of a batch, which {BY} does not divide; "
                         "choose another train.batch_size")  # fmt: skip


def convert(net: nn.Module, *, emulate: bool = False) -> nn.Module:
    """The network with its linear layers multiplying in 8 bits, where their sizes divide by 16; weights and names stay.

    `emulate`: rounded to 8 bits and multiplied in others, on any device. Raises UsageError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UsageError(f"train.precision fp8 needs torchao ({error}): type `pip install torchao`") from None
    config = Float8LinearConfig(emulate=emulate)
    found: nn.Module = convert_to_float8_training(net, config=config, module_filter_fn=_fits)
    return found


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % BY == module.out_features % BY == 0


@contextmanager
def plain(net: nn.Module) -> Iterator[None]:
    """Meanwhile the layers multiply in float32, as what is shipped will."""
    changed = [m for m in net.modules() if type(m).__name__ == "Float8Linear"]
    kinds = [type(m) for m in changed]
    try:
        for module in changed:
            module.__class__ = nn.Linear
        yield
    finally:
        for module, kind in zip(changed, kinds, strict=True):
            module.__class__ = kind
