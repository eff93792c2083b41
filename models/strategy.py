"""What the words of a spec mean to Lightning: precision. The only place that chooses Lightning's plugins."""

from pytorch_lightning.plugins import MixedPrecision, Precision

from pipelines.errors import UsageError
from pipelines.spec import Train


def precision_plugin(train: Train, accelerator: str) -> Precision:
    """Raises UsageError for fp8: where no hardware has it, and where it is not built in."""
    if train.precision == "32-true":
        return Precision()
    if train.precision == "fp8":
        raise UsageError(
            "train.precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and this training "
            "runs on a CPU; choose bf16-mixed" if accelerator == "cpu"
            else "train.precision fp8 is not built in yet; choose bf16-mixed"
        )  # fmt: skip
    # given as a plugin: by its name Lightning would take bfloat16 for float16 on a CPU
    return MixedPrecision(train.precision, "cpu" if accelerator == "cpu" else "cuda")
