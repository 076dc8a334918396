"""The capacitance method where the circulant or the layer is singular."""

from __future__ import annotations

import pytest
import torch
from helpers.index_sets import one_hot_matrices
from helpers.kernels import LAPLACIAN, dead_channel, kernel
from helpers.strategies import Layer, random

from convspectra import ConvOperator
from convspectra.torus._capacitance import CapacitanceFactorization

# --- embeddings that are singular -----------------------------------------------------------------


# Kernels whose symbol vanishes at a frequency of the smallest torus, but not of M.
VANISHING = {
    "second difference": (kernel(1, -2, 1), (9,)),
    "sum, vanishes at pi": (kernel(1, 2, 1), (9,)),
    "1 0 1, even": (kernel(1, 0, 1), (10,)),
    "1 1 1": (kernel(1, 1, 1), (9,)),
    "Laplacian": (LAPLACIAN, (6, 5)),
    "Sobel, even": (kernel([1, 2, 1], [0, 0, 0], [-1, -2, -1]), (6, 4)),
    "fourth difference": (kernel(1, -4, 6, -4, 1), (8,)),
}


@pytest.mark.parametrize(("weight", "size"), VANISHING.values(), ids=VANISHING.keys())
def test_another_torus_is_taken_where_the_first_one_is_singular(weight, size):
    op = ConvOperator(weight, size)
    dense = Layer(weight, size).dense().detach()
    factorization = CapacitanceFactorization(op)
    condition = float(torch.linalg.cond(dense))
    y = random(1, 1, *size, seed=1)
    expected = torch.linalg.solve(dense, y.flatten())
    error = (factorization.solve(y).flatten() - expected).norm() / expected.norm()
    assert error <= 1e-12 * condition
    log_det = factorization.logabsdet()
    assert torch.isclose(log_det, torch.linalg.slogdet(dense).logabsdet, atol=1e-9)


def test_the_tori_that_failed_leave_no_trace_in_the_gradient():
    weight = kernel(1, -2, 1).requires_grad_()
    CapacitanceFactorization(ConvOperator(weight, 9)).logabsdet().backward()
    layer = Layer(weight.detach(), (9,))
    expected = torch.einsum("kij,ji->k", one_hot_matrices(layer), torch.linalg.inv(layer.dense()))
    assert torch.allclose(weight.grad.flatten(), expected.detach(), atol=1e-10)


def test_a_poor_embedding_is_tried_last():
    """Symbols of condition over 1e6 on the first tori: the others come before them."""
    weight = kernel(1, -2 - 1e-9, 1)
    layer = Layer(weight, (30,))
    factorization = CapacitanceFactorization(layer.operator())
    y = random(1, 1, 30)
    expected = torch.linalg.solve(layer.dense().detach(), y.flatten())
    assert (factorization.solve(y).flatten() - expected).norm() <= 1e-10 * expected.norm()
    assert factorization.error_bound <= 1e-8


# --- singular layers ------------------------------------------------------------------------------


def is_found_singular(op: ConvOperator) -> bool:
    """Whether the factorization is refused for it, or says so when asked."""
    try:
        return CapacitanceFactorization(op).is_singular()
    except ArithmeticError as error:
        return "singular" in str(error)


@pytest.mark.parametrize("axis", [0, 1], ids=["output", "input"])
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "zero"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dead_channels_are_refused_or_seen(axis, copy, transposed):
    op = ConvOperator(dead_channel(4, axis, copy), 5, transposed=transposed)
    assert is_found_singular(op)


def test_a_zero_weight_is_refused():
    with pytest.raises(ArithmeticError, match="singular or nearly so on every torus"):
        CapacitanceFactorization(ConvOperator(torch.zeros(2, 2, 3, 3).double(), 4))


SINGULAR = {
    "1 0 1, odd": (kernel(1, 0, 1), (9,)),
    "1 0 1, odd and long": (kernel(1, 0, 1), (101,)),
    "Sobel, odd": (kernel([1, 2, 1], [0, 0, 0], [-1, -2, -1]), (5, 4)),
    "shift": (kernel(0, 0, 1), (8,)),
    "nearly a shift": (kernel(0, 1e-3, 1), (8,)),
    "difference": (kernel(-1, 0, 1), (7,)),
}


@pytest.mark.parametrize(("weight", "size"), SINGULAR.values(), ids=SINGULAR.keys())
def test_singular_by_its_border_alone(weight, size):
    """C is regular here, and M is not: Note [Border modes]."""
    op = ConvOperator(weight, size)
    assert torch.linalg.svdvals(Layer(weight, size).dense())[-1] < 1e-15
    assert is_found_singular(op)


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-7])
def test_nearly_singular_is_not_singular(smallest):
    weight = dead_channel(4, 0, copy=True)
    weight[1] += smallest * random(4, 3, 3, seed=5)
    layer = Layer(weight, (5, 5))
    dense = layer.dense().detach()
    factorization = CapacitanceFactorization(layer.operator())
    assert not factorization.is_singular()
    expected = torch.linalg.slogdet(dense).logabsdet
    assert torch.isclose(factorization.logabsdet(), expected, atol=1e-13 / smallest)
    assert factorization.error_bound <= 3e-4  # 1.1e-4 on an Intel Xeon, below 1e-4 on an AMD EPYC


def test_an_embedding_that_solves_nothing_is_refused():
    weight = dead_channel(4, 0, copy=True)
    weight[1] += 1e-13 * random(4, 3, 3, seed=5)
    with pytest.raises(ArithmeticError, match="nearly so on every torus tried"):
        CapacitanceFactorization(ConvOperator(weight, 5))


def test_a_block_of_layers_is_singular_if_one_of_them_is():
    weights = torch.cat([kernel(1, 3, 1), kernel(1, 0, 1), kernel(1, 4, 1)])
    assert CapacitanceFactorization(ConvOperator(weights, 9, groups=3)).is_singular()
    assert not CapacitanceFactorization(ConvOperator(weights, 8, groups=3)).is_singular()
