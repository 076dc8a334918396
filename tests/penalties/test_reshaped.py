"""Penalties on the reshaped weight, by its dense singular values."""

from __future__ import annotations

import pytest
import torch
from helpers.operators import each_layer
from helpers.strategies import Layer, random

import convspectra as cs
from convspectra import penalties


@each_layer
def test_they_are_those_of_the_singular_values_of_the_weight(layer: Layer) -> None:
    op = layer.operator()
    s = torch.linalg.svdvals(op.weight.detach().flatten(1))
    soft = (s.square() - 1).square().sum()
    torch.testing.assert_close(penalties.soft_orthogonality(op).detach(), soft)
    torch.testing.assert_close(penalties.reshaped_norm(op).detach(), 0.5 * s[0].square())
    most = (s.square() - 1).abs().max()
    generator = torch.Generator().manual_seed(0)
    many = penalties.srip(op, 300, generator).detach()
    assert 0.99 * most <= many <= most * (1 + 1e-9)


@pytest.mark.parametrize("name", ["soft_orthogonality", "srip", "reshaped_norm"])
def test_gradients_types_and_trainers(name: str) -> None:
    penalty = getattr(penalties, name)

    def value(weight: torch.Tensor) -> torch.Tensor:
        op = cs.ConvOperator(weight, (5, 5))
        if name == "srip":
            return penalty(op, generator=torch.Generator().manual_seed(0))
        return penalty(op)

    weight = random(2, 3, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(value, weight)
    half = value(weight.detach().bfloat16())
    assert half.dtype == torch.float64
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    reg = cs.SpectralRegularizer(conv, torch.zeros(1, 2, 5, 5), penalty=penalty)
    reg().backward()
    assert bool(conv.weight.grad.any())


def test_bad_input_is_refused() -> None:
    op = cs.ConvOperator(random(2, 3, 3), 5)
    with pytest.raises(ValueError, match="expected iterations to be a positive integer, got 0"):
        penalties.srip(op, 0)
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got Tensor"):
        penalties.soft_orthogonality(op.weight)  # type: ignore[arg-type]
