"""Weights of layers with something special, as tensors in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers.strategies import random
from torch import Tensor


def kernel(*taps: float | Sequence[float]) -> Tensor:
    """The weight of one channel: a number a tap, or a row a tap."""
    return torch.tensor(taps, dtype=torch.float64)[None, None]


def identity(channels: int) -> Tensor:
    """The 3 x 3 weight whose M is the identity."""
    weight = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    weight[range(channels), range(channels), 1, 1] = 1
    return weight


def dead_channel(channels: int, axis: int, copy: bool) -> Tensor:
    """A random 3 x 3 weight with one output (axis 0) or input (1) zero or a copy of the next."""
    weight = random(channels, channels, 3, 3)
    rows = weight.movedim(axis, 0)
    rows[1] = rows[2] if copy else 0
    return weight


LAPLACIAN = kernel([0, 1, 0], [1, -4, 1], [0, 1, 0])
SOBEL = kernel([1, 2, 1], [0, 0, 0], [-1, -2, -1])
