"""Causal and masked layers: determinants and systems that a factorization of M cannot give."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import random
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator


def strong(weight: Tensor, tap: tuple[int, ...]) -> Tensor:
    """A weight whose tap of offset 0 outweighs the others, so that M has an inverse."""
    weight = 0.3 * weight
    weight[(..., *tap)] += 2 * torch.eye(len(weight), weight.shape[1], dtype=weight.dtype)
    return weight


def masked(weight: Tensor) -> Tensor:
    """Rows above, and of the output's own row what stands before it and its own point."""
    mask = torch.ones(3, 3, dtype=weight.dtype)
    mask[2] = 0
    mask[1, 2] = 0
    return weight * mask


LAYERS = {
    "causal": ConvOperator(strong(random(3, 3, 3), (2,)), 20, padding=[(2, 0)]),
    "dilated": ConvOperator(strong(random(3, 3, 3), (2,)), 20, padding=[(6, 0)], dilation=3),
    "anticausal": ConvOperator(strong(random(3, 3, 3), (0,)), 20, padding=[(0, 2)]),
    "groups": ConvOperator(strong(random(4, 2, 3), (2,)), 20, padding=[(2, 0)], groups=2),
    "masked": ConvOperator(masked(strong(random(3, 3, 3, 3), (1, 1))), (6, 5), padding=1),
    "masked along the other axis": ConvOperator(
        masked(strong(random(3, 3, 3, 3), (1, 1))).mT.contiguous(), (6, 5), padding=1
    ),
    "transposed": ConvOperator(
        strong(random(3, 3, 3), (0,)), 20, transposed=True, padding=[(0, 2)]
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_log_determinants_and_solutions_are_those_of_dense_matrices(name: str) -> None:
    op = LAYERS[name]
    assert cs.explain(op, "logabsdet").blocks[0].order[0][0] == "triangular"
    dense = op.to_dense()
    expected = torch.linalg.slogdet(dense).logabsdet
    torch.testing.assert_close(cs.logabsdet(op), expected, rtol=1e-12, atol=1e-12)
    y = random(4, *op.output_shape)
    for adjoint, matrix in ((False, dense), (True, dense.T)):
        x = cs.solve(op, y, adjoint)
        true = torch.linalg.solve(matrix, y.flatten(1).T).T.reshape(x.shape)
        torch.testing.assert_close(x, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_dense_matrices(name: str) -> None:
    """Of taps that are 0 and would look ahead, too: another way is taken for these."""
    op = LAYERS[name]
    variable = op.weight.clone().requires_grad_()
    ours, dense = (
        torch.autograd.grad(value, variable)[0]
        for value in (
            cs.logabsdet(op.with_weight(variable)),
            torch.linalg.slogdet(op.with_weight(variable).to_dense()).logabsdet,
        )
    )
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("points", [64, 256])
def test_an_inverse_that_grows_from_point_to_point(points: int, seed: int) -> None:
    """Its smallest singular value is below 1e-60, its determinant 1."""
    q = torch.linalg.qr(random(4, 4, seed=seed + 9)).Q
    taps = [0.5 * random(4, 4, seed=seed), 0.5 * random(4, 4, seed=seed + 3), q]
    op = ConvOperator(torch.stack(taps, 2), points, padding=[(2, 0)])
    assert abs(float(cs.logabsdet(op))) < 1e-11


def test_a_causal_layer_without_its_own_point_is_singular() -> None:
    weight = torch.cat([random(3, 3, 1), torch.zeros(3, 3, 1, dtype=torch.float64)], 2)
    op = ConvOperator(weight, 10, padding=[(1, 0)])
    assert float(cs.logabsdet(op)) == -math.inf
    with pytest.raises(ArithmeticError, match="singular to working precision"):
        cs.solve(op, random(3, 10))


def test_taps_on_both_sides_are_in_no_order() -> None:
    op = ConvOperator(random(3, 3, 3), 10)
    ways = {way.name: way.admitted for way in cs.explain(op, "logabsdet").blocks[0].ways}
    assert ways["triangular"] is False


def test_it_gives_no_singular_values() -> None:
    with pytest.raises(ValueError, match="method"):
        cs.svds(LAYERS["causal"], method="triangular")  # type: ignore[arg-type]
