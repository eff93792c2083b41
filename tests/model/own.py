"""Networks and LightningModules as a user writes them, named `tests.model.own:Class` in specs."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class Wide(nn.Module):
    """One layer on numbers and one weight per category."""

    def __init__(self, numbers: int, flags: int, categories: tuple[int, ...], width: int = 16) -> None:
        super().__init__()
        self.numbers = nn.Sequential(
            nn.Linear(numbers + flags, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.categories = nn.ModuleList(nn.Embedding(size, 1) for size in categories)

    def forward(self, scaled: Tensor, codes: Tensor) -> Tensor:
        found: Tensor = self.numbers(scaled) + sum(table(codes[:, i]) for i, table in enumerate(self.categories))
        return found.squeeze(1)


class Whole(pl.LightningModule):
    """Everything by itself: loss, noise, optimiser, schedule."""

    def __init__(self, numbers: int, flags: int, categories: tuple[int, ...], train: Any, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Wide(numbers, flags, categories)
        self.steps = steps

    def forward(self, scaled: Tensor, codes: Tensor) -> Tensor:
        return self.net(scaled, codes)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        scaled, codes, label = batch
        loss = binary_cross_entropy_with_logits(self(scaled + 0.1 * torch.randn_like(scaled), codes), label)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps), "interval": "step"}]


class Greedy(Wide):
    """Asks for what it cannot have."""

    def __init__(self, numbers: int, colour: str) -> None:
        super().__init__(numbers, 0, ())


class Flat(Wide):
    """Answers a column."""

    def forward(self, scaled: Tensor, codes: Tensor) -> Tensor:
        return super().forward(scaled, codes)[:, None]


class Two(Whole):
    """Two optimisers."""

    def configure_optimizers(self) -> Any:
        self.automatic_optimization = False
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.net.children()]
