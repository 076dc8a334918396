"""The stable rank against dense matrices, exactly and by chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import assume, given, settings
from torch import nn

import convspectra as cs


def dense_value(matrix: torch.Tensor) -> float:
    s = np.linalg.svd(matrix.detach().numpy(), compute_uv=False)
    return float(((s / s[0]) ** 2).sum())


@given(layers())
@settings(max_examples=60)
def test_of_layers(layer: Layer) -> None:
    op = layer.operator()
    assume(float(op.to_dense().abs().max()) > 0)
    found = cs.stable_rank(op)
    true = dense_value(op.to_dense().double())
    assert abs(found.value - true) <= found.error + 1e-6 * true


def jacobian(channels: int) -> tuple[cs.JacobianOperator, torch.Tensor]:
    torch.manual_seed(channels)
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), nn.Tanh(), nn.Conv2d(channels, 3, 3, padding=1)
    ).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    matrix = torch.func.jacrev(model)(x).reshape(192, 128)
    return cs.JacobianOperator(model, x), matrix


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_of_jacobians_by_unit_vectors(channels: int) -> None:
    operator, matrix = jacobian(channels)
    found = cs.stable_rank(operator, probes=128)
    assert found.value == pytest.approx(dense_value(matrix), abs=found.error + 1e-6)
    assert found.error < 0.05 * found.value


def test_the_standard_error_holds_by_chance() -> None:
    operator, matrix = jacobian(4)
    true = dense_value(matrix)
    gaps = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        found = cs.stable_rank(operator, probes=16, generator=generator)
        assert found.error >= (2 * found.value / 16) ** 0.5
        gaps.append(abs(found.value - true) / found.error)
    assert max(gaps) <= 3.5
    assert sum(gap > 2 for gap in gaps) <= 4
    assert max(gaps) > 0.2, "nor is the error just a large number"


def test_nothing_has_the_stable_rank_0() -> None:
    op = cs.ConvOperator(torch.zeros(2, 2, 3), 5)
    assert cs.stable_rank(op) == cs.stable_rank(op, probes=1)
    assert cs.stable_rank(op).value == 0.0


def test_probes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected probes to be a positive integer"):
        cs.stable_rank(cs.ConvOperator(random(2, 2, 3), 5), probes=0)
