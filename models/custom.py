"""A user's own network or LightningModule, named `package.module:Class` in the spec, in place of Millrace's network.

It is made of those of the keywords of `_offered` that its constructor names. `forward(scaled, codes)`, or `forward(scaled,
codes, tokens)` where there are texts, returns logits of shape (B,); a LightningModule also has `training_step` on batches of
these and the label, and its own optimiser.
"""

import inspect
from importlib import import_module
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn

from features.preprocess import Preprocess
from models.data import INPUTS, Resident
from models.net import build_net
from models.text import build_text_net
from pipelines.errors import UsageError, nearest
from pipelines.spec import Train


def load_class(train: Train) -> type[nn.Module]:
    """The class that `train.module` names. Raises UsageError where it cannot stand in for the network."""
    where = f"train.module {train.module!r}"
    module, _, name = str(train.module).partition(":")
    try:
        found = import_module(module)
    except Exception as error:  # whatever a user's file does when it is imported
        raise UsageError(
            f"{where} does not import ({type(error).__name__}: {error}); write package.module:Class of a module that "
            "Python finds, such as one in a folder of PYTHONPATH"
        ) from None
    own = getattr(found, name, None)
    if not (inspect.isclass(own) and issubclass(own, nn.Module)):
        known = [n for n, value in vars(found).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
        what = "is not there" if own is None else "is no class of torch.nn.Module or LightningModule"
        raise UsageError(f"{where}: {name!r} {what} (classes: {', '.join(known) or 'none'}{nearest(name, known)})")
    offered = _offered(None, train, 0)
    if wrong := [p for p in _parameters(own) if p.default is p.empty and p.name not in offered]:
        raise UsageError(f"{where}: its constructor needs {wrong[0].name!r}, it can have: {', '.join(offered)}")
    if issubclass(own, pl.LightningModule):
        _check_lightning(own, train, where)
    return own


def _check_lightning(own: type[pl.LightningModule], train: Train, where: str) -> None:
    if train.compile:
        raise UsageError(f"{where} is a LightningModule: call torch.compile there, and leave train.compile out")
    if train.learning_rate == "auto":
        raise UsageError(f"{where} is a LightningModule with an optimiser of its own: learning_rate: auto is for networks")
    if train.strategy == "fsdp" and not is_overridden("configure_model", own, pl.LightningModule):
        raise UsageError(f"{where} is a LightningModule: for strategy fsdp it calls fully_shard in its configure_model")


def _parameters(own: type) -> list[inspect.Parameter]:
    found = list(inspect.signature(own).parameters.values())
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _offered(preprocess: Preprocess | None, train: Train, steps: int) -> dict[str, Any]:
    """Numbers F, missing flags M, sizes of the C categories, tokens V; the spec's sections; optimiser steps to come."""
    sizes = (len(preprocess.numbers), len(preprocess.may_miss), preprocess.sizes) if preprocess else (0, 0, ())
    return {**dict(zip(("numbers", "flags", "categories"), sizes, strict=True)), "network": train.network, "train": train,
            "steps": steps, "vocabulary": preprocess.reader.size if preprocess and preprocess.reader else 0}  # fmt: skip


def build(train: Train, preprocess: Preprocess, seed: int, steps: int) -> nn.Module:
    """The network of the spec, or the user's own; the seed alone decides its weights."""
    if train.module is None:
        return (build_text_net if preprocess.reader else build_net)(preprocess, train, seed)
    own, offered = load_class(train), _offered(preprocess, train, steps)
    torch.manual_seed(seed)
    try:
        return own(**{p.name: offered[p.name] for p in _parameters(own) if p.name in offered})
    except Exception as error:
        raise UsageError(f"train.module {train.module!r} cannot be made ({type(error).__name__}: {error})") from error


def check_logits(net: nn.Module, rows: Resident, name: str) -> None:
    """Raises UsageError unless the user's network answers rows with one logit each."""
    count = len(rows.label)
    given = ", ".join(f"{n} {tuple(v.shape)}" for n, v in zip(INPUTS, rows.inputs(), strict=False))
    asked = f"train.module {name!r}: forward({given})"
    try:
        with torch.no_grad():
            found = net.eval()(*rows.inputs())
    except Exception as error:
        raise UsageError(f"{asked} failed ({type(error).__name__}: {error}); expected logits of shape ({count},)") from error
    finally:
        net.train()
    if not isinstance(found, torch.Tensor) or found.shape != (count,):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UsageError(f"{asked} returned {shape}; expected logits of shape ({count},)")
