"""Supervisors and rows for the tests of training."""

from pathlib import Path

import pytest

from models.arrays import write_arrays
from models.elastic import Zygote, start_zygote
from pipelines.spec import Train
from tests.model.small import write_small

# a supervisor whose ranks run `unruly.py` of their folder after every step, as a user's own callback would
UNRULY = """
import os, time
from pathlib import Path
import torch
import models.supervisor, models.train
models.supervisor.WIDER_S = 1.0
was = models.train.Keeper.on_train_batch_end
def end(keeper, trainer, *rest):
    was(keeper, trainer, *rest)
    rank, world, generation = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    exec((keeper.folder / "unruly.py").read_text(), {**globals(), **locals(), "step": trainer.global_step})
models.train.Keeper.on_train_batch_end = end
models.supervisor.serve()
"""


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    return start_zygote()  # the one that tuning and training use: imports cost seconds


@pytest.fixture(scope="module")
def unruly() -> Zygote:
    return Zygote(("-c", UNRULY))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_arrays(write_small(folder / "set"), folder / "arrays", Train())
