"""The network: embeddings of categories and periodic features of numbers into an MLP.

B rows, F numbers, M missing flags, C categories, K frequencies.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from features.preprocess import Preprocess
from pipelines.spec import Network, Train


class TabularNet(nn.Module):
    """Logits of rows. Each number x also enters as sin(2πcx) and cos(2πcx) for K learned frequencies c: an MLP
    alone learns smooth functions of its inputs only (Gorishniy et al., 2022, arXiv:2203.05556).
    """

    def __init__(self, numbers: int, flags: int, categories: tuple[int, ...], network: Network, extra: int = 0) -> None:
        """`extra`: further columns that `forward` is given."""
        super().__init__()
        self.numbers = numbers
        self.recompute = False  # hidden layers in the backward pass, so that their activations need not be kept
        self.embeddings = nn.ModuleList(nn.Embedding(size, network.embedding) for size in categories)
        periodic = numbers * network.frequencies > 0
        initial = network.sigma * torch.randn(numbers, network.frequencies)
        self.frequencies = nn.Parameter(initial) if periodic else None
        width = numbers + flags + 2 * numbers * network.frequencies + network.embedding * len(categories) + extra
        layers: list[nn.Module] = []
        for _ in range(network.depth):
            layers += [nn.Linear(width, network.width), nn.ReLU(), nn.Dropout(network.dropout)]
            width = network.width
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, scaled: Tensor, codes: Tensor, extra: Tensor | None = None) -> Tensor:
        """`scaled` float32 (B, F + M), `codes` int64 (B, C), `extra` float32 (B, E) → logit float32 (B)."""
        inputs = [scaled] if extra is None else [scaled, extra]
        if self.frequencies is not None:
            angle = self._angle(scaled[:, : self.numbers])
            inputs += [angle.sin(), angle.cos()]
        inputs += [embed(codes[:, i]) for i, embed in enumerate(self.embeddings)]
        hidden, done = torch.cat(inputs, 1), 0
        if self.recompute and self.training:
            for done in range(3, len(self.mlp), 3):
                hidden = checkpoint(self.mlp[done - 3 : done], hidden, use_reentrant=False)
        logit: Tensor = self.mlp[done:](hidden) if done else self.mlp(hidden)
        return logit.squeeze(1)

    def _angle(self, numbers: Tensor) -> Tensor:
        """2πcx of each number and frequency: (B, F) → (B, F · K). Exported, the same products as B rows of K · F: ONNX Runtime
        takes forty times as long for B · F rows of K.
        """
        assert self.frequencies is not None
        if torch.onnx.is_in_onnx_export():
            many = self.frequencies.shape[1]
            angle_BKF = torch.cat([2 * math.pi * numbers] * many, 1) * self.frequencies.T.flatten()
            return angle_BKF.reshape(-1, many, self.numbers).transpose(1, 2).reshape(-1, self.numbers * many)
        return (2 * math.pi * numbers[:, :, None] * self.frequencies).flatten(1)


def build_net(preprocess: Preprocess, train: Train, seed: int) -> TabularNet:
    """A fresh network for this preprocessing; the seed alone decides its weights."""
    torch.manual_seed(seed)
    net = TabularNet(len(preprocess.numbers), len(preprocess.may_miss), preprocess.sizes, train.network)
    net.recompute = train.gradient_checkpointing
    return net
