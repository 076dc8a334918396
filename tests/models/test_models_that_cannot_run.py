"""Models that no door can take are refused by every door in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs

DOORS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "audit": cs.audit,
    "SpectralRegularizer": cs.SpectralRegularizer,
    "precondition": cs.precondition,
    "prepare": cs.prepare,
    "gradient_flow": cs.gradient_flow,
    "JacobianOperator": cs.JacobianOperator,
    "lipschitz_bound": cs.lipschitz_bound,
}
each_door = pytest.mark.parametrize("door", DOORS)


@each_door
def test_weights_without_data(door: str) -> None:
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)]
    with pytest.raises(ValueError, match=r"a model with data, got '0\.weight' on the meta device"):
        DOORS[door](nn.Sequential(*layers).to("meta"), torch.zeros(1, 1, 6, 6))


@each_door
def test_modules_nested_beyond_the_recursion_limit(door: str) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1))
    for _ in range(600):
        model = nn.Sequential(model)
    with pytest.raises(ValueError, match="nesting fits Python's recursion limit of"):
        DOORS[door](model, torch.zeros(1, 1, 6, 6))


@pytest.mark.filterwarnings("ignore")  # torch.ao is to be moved
def test_quantized_layers_are_named() -> None:
    from torch.ao.nn.quantized import Conv2d

    with pytest.raises(ValueError, match=r"got the quantized torch\.ao\..*Conv2d; give the model"):
        cs.ConvOperator.from_module(Conv2d(1, 2, 3), (8, 8))
