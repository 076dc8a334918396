"""Models whose forward pass is known, and the layers that are found in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convspectra.models import (
    find_layers,
)


def sizes(model: nn.Module, example: object, **options) -> list[tuple[str, tuple[int, ...]]]:
    return [(layer.name, layer.input_size) for layer in find_layers(model, example, **options)]


class Branches(nn.Module):
    """A stem, two branches at different sizes, a layer used twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.shared(x)
        y = self.drop(self.shared(self.up(x)))
        x = self.shared(x)
        return self.head(x.mean((2, 3)) + y.mean((2, 3)))


X = torch.zeros(2, 3, 8, 6)
