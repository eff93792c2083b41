"""A Hugging Face encoder that reads the texts of a row, beside the network that reads its numbers and categories.

B rows, L tokens, H numbers that the encoder makes of a text.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from features.preprocess import Preprocess
from features.tokens import Reader
from models.net import TabularNet
from pipelines.errors import UsageError, nearest
from pipelines.spec import Train

PRETRAINED = "pretrained"  # the field of train.encoder that names the folder of a pretrained one


class TextNet(nn.Module):
    """Logits of rows: the mean of what the encoder makes of their tokens goes into the hidden layers with all else."""

    def __init__(self, encoder: nn.Module, tabular: TabularNet, pad: int) -> None:
        super().__init__()
        self.encoder, self.tabular, self.pad = encoder, tabular, pad

    def forward(self, scaled: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
        """`scaled` float32 (B, F + M), `codes` int64 (B, C), `tokens` int64 (B, L) with `pad` behind → logit float32 (B)."""
        there = tokens != self.pad
        there = torch.cat([torch.ones_like(there[:, :1]), there[:, 1:]], 1)  # of a row without tokens the first counts
        read_BLH = self.encoder(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        weight = there[:, :, None].to(read_BLH.dtype)
        logit: Tensor = self.tabular(scaled, codes, (read_BLH * weight).sum(1) / weight.sum(1))
        return logit


def build_text_net(preprocess: Preprocess, train: Train, seed: int) -> TextNet:
    """A fresh network for texts, or one that begins with pretrained weights; the seed alone decides what is drawn.

    Raises UsageError where the encoder cannot be made, or not for texts of this length.
    """
    reader = preprocess.reader
    assert reader is not None
    torch.manual_seed(seed)
    try:
        with _hidden("torchao"):
            encoder = _encoder(train, reader)
        if train.gradient_checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        _without_the_unused(encoder, reader)
    except UsageError:
        raise
    except Exception as error:  # whatever a model of somebody else does
        raise UsageError(
            f"train.encoder {train.encoder} cannot be made, or does not read tokens ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}); give model_type and sizes of an encoder such as bert"
        ) from error
    torch.manual_seed(seed)
    sizes = (len(preprocess.numbers), len(preprocess.may_miss), preprocess.sizes)
    return TextNet(encoder, TabularNet(*sizes, train.network, extra=encoder.config.hidden_size), reader.pad)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Meanwhile a package counts as not installed: transformers would import it, in seconds, for what it is not asked for."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _encoder(train: Train, reader: Reader) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, whatever a configuration names
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    if folder := train.encoder.get(PRETRAINED):
        encoder = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
        reads = getattr(encoder.config, "max_position_embeddings", reader.max_tokens)
        if reads < reader.max_tokens:
            raise UsageError(f"features.text.max_tokens {reader.max_tokens}: the encoder in {folder} reads {reads} at most")
        return encoder
    given: dict[str, Any] = dict(train.encoder)
    kind, known = str(given.pop("model_type", "")), sorted(transformers.CONFIG_MAPPING)
    if kind not in known:
        raise UsageError(f"train.encoder.model_type {kind!r} is none of Hugging Face{nearest(kind, known)}: write such as bert")
    plain = transformers.AutoConfig.for_model(kind)
    fields = {*plain.to_dict(), *plain.attribute_map}
    if wrong := sorted(given.keys() - fields):
        raise UsageError(f"train.encoder.{wrong[0]} is no setting of {kind}{nearest(wrong[0], sorted(fields))}")
    given |= {name: None for part in ("bos", "eos", "cls", "sep") if (name := f"{part}_token_id") in fields}
    given |= {"vocab_size": reader.size, "pad_token_id": reader.pad}
    places = "max_position_embeddings"
    if places in fields and given.setdefault(places, reader.max_tokens + 2) < reader.max_tokens:
        raise UsageError(f"train.encoder.{places} is below features.text.max_tokens {reader.max_tokens}")
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **given))


def _without_the_unused(encoder: Any, reader: Reader) -> None:
    """Weights that the last layer does not come from, such as those of a pooler, are not trained: ranks would wait for them."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    tokens = torch.full((1, 4), min(reader.size - 1, reader.pad + 1))
    encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.sum().backward()
    for weight in encoder.parameters():
        weight.requires_grad_(weight.grad is not None)
        weight.grad = None
