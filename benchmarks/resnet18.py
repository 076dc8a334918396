"""ResNet-18 for images of 32 x 32 (He et al., CVPR 2016, with a 3 x 3 stem and no pooling)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and first stride of the four stages."""


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch normalization, and the input added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.skip(x)).relu()


def resnet18(classes: int = 10, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)]
        layers.append(nn.ReLU())
        channels = 64
        for width, stride in WIDTHS:
            layers += [Block(channels, width, stride), Block(width, width, 1)]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
        return nn.Sequential(*layers)


def is_three_by_three(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
