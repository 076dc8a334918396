"""The networks of Section 4.2 of "Deep residual learning", with and without their shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from common.networks import ShiftedReLU

ARMS = (
    "PyTorch",
    "He",
    "batch normalization",
    "residual",
    "ISONet",
    "isometry",
    "prepare",
    "prepare, then isometry",
    "prepare, then conditioning",
)
"""Starts, with what stands beside them in training."""


class Block(nn.Module):
    """Two convolutions with batch normalization; the input is added without parameters."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """relu(input + body): every second pixel and zero channels where the shape changes."""
        kept = x[..., :: self.stride, :: self.stride]
        shortcut = pad(kept, (0, 0, 0, 0, 0, self.more)) if self.more else kept
        return torch.relu(shortcut + self.body(x))


def network(arm: str, depth: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """`depth` weighted layers: 6 n convolutions of three widths, one before them, and the head.

    Parameters
    ----------
    arm : str
        One of `ARMS`.
    depth : int
        6 n + 2.
    width : int
        Channels of the first third; twice and four times as many in the others, each of which
        begins with stride 2. 16 in the paper.
    classes, seed : int

    Raises
    ------
    ValueError
        For another depth.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"expected a depth of 6 n + 2, got {depth}")
    torch.manual_seed(seed)
    pairs = (depth - 2) // 6
    modules = _layer(arm, 3, width, 1)
    channels = width
    for third in range(3):
        for pair in range(pairs):
            stride, wider = (2 if third and not pair else 1), width << third
            if arm == "residual":
                modules.append(Block(channels, wider, stride))
            else:
                modules += [*_layer(arm, channels, wider, stride), *_layer(arm, wider, wider, 1)]
            channels = wider
    model = nn.Sequential(
        *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )
    _start(model, arm)
    return model


def _layer(arm: str, channels: int, width: int, stride: int) -> list[nn.Module]:
    normalized = arm in ("batch normalization", "residual")
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=not normalized)
    if normalized:
        return [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return [convolution, ShiftedReLU(width) if arm == "ISONet" else nn.ReLU()]


def _start(model: nn.Module, arm: str) -> None:
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or arm == "PyTorch":
            continue
        if arm in ("He", "batch normalization", "residual"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif arm == "ISONet":
            nn.init.dirac_(module.weight)
        if arm in ("He", "ISONet") and module.bias is not None:
            nn.init.zeros_(module.bias)
