"""Options of Lightning's Trainer that a spec may give under `train.trainer`, and those that Millrace owns."""

from collections.abc import Iterable

from pipelines.errors import nearest

PASSED = ("benchmark", "detect_anomaly", "deterministic", "enable_autolog_hparams", "inference_mode", "log_every_n_steps",
          "profiler", "sync_batchnorm")  # fmt: skip
_SAME = ("precision", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_LONG = "say how long it goes on by train.max_epochs and train.patience"
_JUDGED = "each epoch is judged on all of valid_fit, by no loader"
_KEPT = "checkpoints are written every train.checkpoint_every, beside the run"
_CUT = "batches are cut and ordered so that any number of ranks resumes; set train.batch_size"
_SHOWN = "progress and figures stand on the run's report"
OWNED = {
    **{name: f"give it as train.{name}" for name in _SAME},
    **dict.fromkeys(("min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run"), _LONG),
    **dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval",
                     "check_val_every_n_epoch", "num_sanity_val_steps"), _JUDGED),
    **dict.fromkeys(("enable_checkpointing", "default_root_dir"), _KEPT),
    **dict.fromkeys(("limit_train_batches", "overfit_batches", "use_distributed_sampler",
                     "reload_dataloaders_every_n_epochs"), _CUT),
    **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "barebones", "model_registry"), _SHOWN),
    "strategy": "give it as train.strategy", "devices": "say how many processes by train.ranks",
    "num_nodes": "ranks run on one machine; say how many by train.ranks",
    "accelerator": "ranks run on GPUs where there are enough, else on the CPU",
    "callbacks": "give them in configure_callbacks of your own train.module",
    "plugins": "choose train.precision and train.strategy",
}  # fmt: skip


def refused(options: Iterable[str]) -> list[str]:
    """A sentence for each option that cannot be given."""
    return [
        f"{name} is Millrace's own: {OWNED[name]}" if name in OWNED
        else f"{name} is no option of Lightning's Trainer{nearest(name, [*PASSED, *OWNED])}"
        for name in options if name not in PASSED
    ]  # fmt: skip
