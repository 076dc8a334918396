"""The augmented matrix against dense pseudo-inverses, and what singular values it makes known."""

import itertools
import math

import pytest
import torch

import convspectra as cs
from benchmarks.layers import smoothed
from convspectra.operator._conv_operator import ConvOperator
from convspectra.operator._structure import has_augmented
from convspectra.spectra import _auto as auto
from convspectra.torus._augmented import AugmentedFactorization, augmented_bytes, augmented_flops

ROOM = 2**30


def weight(*shape: int, seed: int = 0, smooth: float = 0.0) -> torch.Tensor:
    """Gaussian; `smooth` damps high frequencies as training does."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return smoothed(w, smooth) if smooth else w


LAYERS = {
    "tall": ConvOperator(weight(4, 2, 3, 3), (4, 5)),
    "wide": ConvOperator(weight(2, 4, 3, 3), (5, 4)),
    "one axis": ConvOperator(weight(3, 2, 5), 7),
    "three axes": ConvOperator(weight(3, 1, 3, 2, 3), (3, 3, 4), padding=[(1, 1), (1, 0), (1, 1)]),
    "groups": ConvOperator(weight(6, 1, 3, 3), (4, 4), groups=2),
    "wide groups": ConvOperator(weight(2, 3, 3, 3), (4, 4), groups=2),
    "one-sided taps": ConvOperator(weight(3, 2, 3), 6, padding=[(2, 0)]),
    "valid": ConvOperator(weight(4, 2, 3, 3), (7, 8), padding=0),
    "valid and wide": ConvOperator(weight(2, 4, 3, 3), (6, 5), padding=0),
    "full": ConvOperator(weight(2, 3, 3), 5, padding=2),
    "full and wide": ConvOperator(weight(2, 5, 3, 3), (4, 5), padding=2),
    "three axes, valid": ConvOperator(weight(6, 1, 3, 2, 3), (4, 3, 5), padding=0),
    "strided, odd": ConvOperator(weight(9, 2, 3, 3), (7, 5), stride=2, padding=1),
    "strided, odd and wide": ConvOperator(weight(2, 2, 3, 3), (7, 6), stride=2, padding=1),
    "stride 3": ConvOperator(weight(4, 2, 5), 10, stride=3, padding=1),
    "valid groups": ConvOperator(weight(6, 1, 3, 3), (7, 7), padding=0, groups=2),
    "dilated": ConvOperator(weight(3, 1, 3), 9, padding=0, dilation=2),
    "strided": ConvOperator(weight(3, 1, 3, 3), (6, 8), stride=2, padding=1),
    "strided and tall": ConvOperator(weight(9, 1, 5, 5), (6, 8), stride=2, padding=2),
}
each = pytest.mark.parametrize("op", LAYERS.values(), ids=LAYERS)


def tall(op: ConvOperator) -> ConvOperator:
    return op.T if op.shape[0] < op.shape[1] else op


def near(one: torch.Tensor, other: torch.Tensor, error: float = 1e-11) -> bool:
    return bool((one - other).abs().amax() <= error * other.abs().amax())


@each
def test_it_is_the_pseudo_inverse_and_its_adjoint(op):
    factors = AugmentedFactorization(op, ROOM)
    layer = tall(op)
    inverse = torch.linalg.pinv(layer.to_dense())
    every_output, every_input = (torch.eye(n, dtype=torch.float64) for n in layer.shape)
    outputs = every_output.reshape(-1, *layer.output_shape)
    inputs = every_input.reshape(-1, *layer.input_shape)
    for solve in (factors.solve, factors.apply_inverse):
        assert near(solve(outputs).flatten(1).T, inverse)
    for solve in (factors.solve_adjoint, factors.apply_inverse_adjoint):
        assert near(solve(inputs).flatten(1), inverse)


@each
def test_the_error_bound_holds(op):
    factors = AugmentedFactorization(op, ROOM)
    layer = tall(op)
    inputs = torch.eye(layer.shape[1], dtype=torch.float64).reshape(-1, *layer.input_shape)
    error = factors.apply_inverse(layer.apply(inputs)) - inputs
    assert torch.linalg.matrix_norm(error.flatten(1), 2) <= factors.error_bound < 1e-6


@each
def test_the_adjoint_is_that_of_the_inverse_to_rounding(op):
    factors = AugmentedFactorization(op, ROOM)
    layer = tall(op)
    outputs, inputs = (
        torch.eye(n, dtype=torch.float64).reshape(-1, *shape)
        for n, shape in zip(layer.shape, (layer.output_shape, layer.input_shape), strict=True)
    )
    inverse = factors.apply_inverse(outputs).flatten(1).T
    # Rounding of what is cut out, which is larger than the inverse.
    assert near(factors.apply_inverse_adjoint(inputs).flatten(1), inverse, 1e-12)


@each
def test_the_sum_of_logarithms_and_its_gradient(op):
    variable = op.weight.clone().requires_grad_()
    value = AugmentedFactorization(op.with_weight(variable), ROOM).logabsdet()
    expected = torch.linalg.svdvals(op.with_weight(variable).to_dense()).log().sum()
    assert math.isclose(float(value.detach()), float(expected.detach()), rel_tol=1e-12)
    ours, dense = (torch.autograd.grad(x, variable)[0] for x in (value, expected))
    assert near(ours, dense, 1e-10)


@pytest.mark.parametrize(
    "op",
    [
        ConvOperator(weight(4, 2, 3, 3), (6, 7), padding=0),  # wide, with more outputs
        ConvOperator(weight(3, 2, 3), 6, padding=1, padding_mode="circular"),
        ConvOperator(weight(3, 2), ()),
    ],
)
def test_layers_that_it_cannot_be_of(op):
    assert not has_augmented(op)
    assert all(has_augmented(layer) for layer in LAYERS.values())
    with pytest.raises(ValueError, match="method='augmented'"):
        cs.svds(op, 1, "SM", method="augmented")


def test_rank_deficient_layers_are_refused():
    w = weight(4, 2, 3, 3)
    w[:, 1] = w[:, 0]
    with pytest.raises(ArithmeticError, match="singular"):
        AugmentedFactorization(ConvOperator(w, (5, 5)), ROOM)


def test_too_little_room_is_said_in_bytes():
    op = LAYERS["tall"]
    needed = augmented_bytes(op)
    with pytest.raises(ValueError, match=f"augmented matrix to take at most .* take {needed:,};"):
        AugmentedFactorization(op, needed - 1)
    assert AugmentedFactorization(op, needed).error_bound < 1e-6


@pytest.mark.parametrize("size", [(40, 1), (1, 40), (40,)])
def test_what_a_long_kernel_on_a_line_costs_is_the_border_of_its_line(size):
    taps, stride, padding = (
        tuple(along if n > 1 else across for n in size)
        for along, across in ((17, 1), (2, 1), (8, 0))
    )
    op = ConvOperator(weight(5, 2, *taps), size, stride=stride, padding=padding)
    factorization = AugmentedFactorization(op, ROOM)
    order = factorization._factorization._torus._factors[0].shape[-1]
    assert order >= 20
    assert augmented_bytes(op) >= 8 * order**2
    assert augmented_flops(op) >= 8 / 3 * order**3


# --- singular values of smooth kernels, as trained layers have ------------------------------------

SMOOTH = {
    "tall": ((12, 4, 3, 3), (12, 12), {}),
    "wide": ((4, 12, 3, 3), (12, 12), {}),
    "strided": ((12, 6, 3, 3), (24, 24), {"stride": 2, "padding": 1}),
    "valid": ((16, 4, 3, 3), (14, 14), {"padding": 0}),
    "odd": ((12, 6, 3, 3), (23, 23), {"stride": 2, "padding": 1}),
    "first layer": ((16, 3, 7, 7), (24, 24), {"stride": 2, "padding": 3}),
    "transposed": ((4, 12, 4, 4), (12, 12), {"stride": 2, "padding": 1, "transposed": True}),
}


@pytest.mark.parametrize("smooth", [6.0, 14.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_smallest_values_of_smooth_kernels(name, smooth):
    shape, sizes, options = SMOOTH[name]
    op = ConvOperator(weight(*shape, smooth=smooth), sizes, **options)
    dense = op.to_dense()
    true = torch.linalg.svdvals(dense).flip(0)
    for k, vectors in itertools.product((1, 3), (True, False)):
        result = cs.svds(op, k, "SM", method="augmented", return_singular_vectors=vectors)
        assert result.converged
        assert torch.allclose(result.s, true[:k], rtol=1e-8, atol=0)
        assert (result.lower <= true[:k] * (1 + 1e-12)).all()
        assert (true[:k] <= result.upper * (1 + 1e-12)).all()
        assert (result.lower >= 0.9 * true[:k]).all()
        if vectors:
            u, v = result.u.flatten(1), result.v.flatten(1)
            assert near(v @ dense.T, result.s[:, None] * u, 1e-5)
            assert near(u @ dense, result.s[:, None] * v, 1e-5)


@pytest.mark.parametrize("name", ["tall", "wide", "valid", "first layer"])
def test_auto_finds_what_iterations_with_products_do_not_reach(name, monkeypatch):
    shape, sizes, options = SMOOTH[name]
    op = ConvOperator(weight(*shape, smooth=14.0), sizes, **options)
    # As for a layer too large for dense matrices, of which there would be no reference.
    monkeypatch.setattr(auto, "GRAM_AT_ONCE", {"LM": 0.0, "SM": 0.0})
    monkeypatch.setattr(auto, "DENSE_AT_ONCE", {"square": 0.0, "other": 0.0})
    result = cs.svds(op, 1, "SM", maxiter=300)
    assert result.method in ("augmented", "qr")  # whichever has the cheaper factors
    assert result.converged
    true = torch.linalg.svdvals(op.to_dense())[-1]
    assert torch.allclose(result.s, true, rtol=1e-8, atol=0)
    assert not cs.svds(op, 1, "SM", method="lanczos", maxiter=300).converged


def test_large_rectangular_layers_have_a_log_determinant():
    op = ConvOperator(weight(8, 4, 3, 3), (24, 24), stride=2, padding=1)
    variable = op.weight.clone().requires_grad_()
    dense_bytes = 8 * op.shape[0] * op.shape[1]
    value = cs.logabsdet(op.with_weight(variable), max_bytes=dense_bytes // 2)
    expected = torch.linalg.svdvals(op.with_weight(variable).to_dense()).log().sum()
    assert math.isclose(float(value.detach()), float(expected.detach()), rel_tol=1e-12)
    ours, dense = (torch.autograd.grad(x, variable)[0] for x in (value, expected))
    assert near(ours, dense, 1e-10)
