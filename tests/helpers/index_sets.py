"""The index sets Omega of the theorems, by the naive matrices of one-hot weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from helpers.strategies import Layer
from torch import Tensor


def one_hot(layer: Layer, index: int) -> Tensor:
    """dM / dw of one weight: its ones are the index set Omega of the theorems."""
    weight = torch.zeros(layer.weight.numel(), dtype=torch.float64)
    weight[index] = 1
    return layer.dense(weight.reshape(layer.weight.shape)).detach()


def one_hot_matrices(layer: Layer, indices: Iterable[int] | None = None) -> Tensor:
    """dM / dw of some or all weights, (weights, rows, columns)."""
    chosen = range(layer.weight.numel()) if indices is None else indices
    return torch.stack([one_hot(layer, index) for index in chosen])


def some_indices(layer: Layer, most: int) -> list[int]:
    """At most so many weights, drawn at random, the same ones every time."""
    count = layer.weight.numel()
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].tolist()
