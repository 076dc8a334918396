"""Layers of odd shapes and kinds with known singular values, and what other tools get wrong.

Each case at a size for a dense SVD, and at one of 1000 rows or more, with a closed form.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.closed_forms import (
    Separable,
    check,
    check_ends,
    check_singular,
    dense_values,
    descending,
    orthogonal,
    tridiagonal,
)
from helpers.kernels import kernel
from helpers.strategies import Layer, random

import convspectra as cs
from convspectra import ConvOperator
from convspectra.testing import assert_adjoint

ONE = np.ones((1, 1))
SMALL_LARGE = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])


def mixed(h: int, g: int, seed: int = 0) -> np.ndarray:
    """h x g of singular values from 2 down to 1, none of them repeated."""
    rank = min(h, g)
    left, right = orthogonal(h, seed)[:, :rank], orthogonal(g, seed + 1)[:, :rank]
    return left * np.linspace(2, 1, rank) @ right.T


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "g"), [(3, 3), (5, 3), (3, 5), (300, 300), (400, 300)])
def test_one_pixel_is_the_centre_tap(h, g):
    """N = 1: all taps but the center one read zeros."""
    weight = random(h, g, 3, 3)
    op = ConvOperator(weight, 1)
    center = weight[:, :, 1, 1].numpy()
    check_ends(op, np.linalg.svd(center, compute_uv=False), k=3)
    if h == g:
        expected = float(np.linalg.slogdet(center)[1])
        assert math.isclose(float(cs.logabsdet(op)), expected, rel_tol=1e-9)


@pytest.mark.parametrize("options", [{}, {"padding_mode": "replicate"}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize(("taps", "size"), [((7, 7), (2, 3)), ((5, 6), (1, 4)), ((9,), (3,))])
def test_inputs_smaller_than_the_reach(taps, size, options):
    layer = Layer(random(3, 3, *taps), size, options)
    check_ends(layer.operator(), dense_values(layer))


@pytest.mark.parametrize(("h", "g"), [(2, 2), (3, 2), (2, 3)])
def test_large_layers_of_inputs_smaller_than_the_reach(h, g):
    """At least 1,024 rows: 9 taps over 4 pixels on one axis, 3 over 128 on the other."""
    layer = Separable(mixed(h, g), (tuple(random(9, seed=3).tolist()), (1.0, 4.0, 0.5)), (4, 128))
    check_ends(layer.operator(), layer.values(), rtol=1e-6)


THIN = [(1, 9), (8, 2), (1, 1500), (900, 2)]


@pytest.mark.parametrize("size", THIN, ids=str)
@pytest.mark.parametrize("center", [3.0, 2.0])
def test_long_and_thin(size, center):
    layer = Separable(ONE, ((1.0, center, 1.0), (1.0, 3.0, 1.0)), size)
    values = descending(
        np.multiply.outer(*(tridiagonal(c, 1, n) for c, n in zip((center, 3), size, strict=True)))
    )
    assert np.allclose(values, layer.values(), atol=1e-12, rtol=0)
    check_ends(layer.operator(), values, rounding=1e-12, atol=0)


@pytest.mark.parametrize("channels", [1, 2])
def test_five_thousand_points(channels):
    """[1, 2, 1] of length 5000: sigma_min 4e-7, sigma_max within 4e-7 of 4, det M = N + 1."""
    weight = kernel(1, 2, 1).repeat(channels, 1, 1)
    op = ConvOperator(weight, 5000, groups=channels)
    values = descending(np.repeat(tridiagonal(2, 1, 5000), channels))
    check(op, 1 + channels, "SM", values, rounding=1e-13, rtol=1e-7, atol=0)
    check(op, 1, "LM", values, rounding=1e-13, rtol=1e-9, atol=0)
    got = float(cs.logabsdet(op))
    assert math.isclose(got, channels * math.log(5001), rel_tol=1e-7)


@SMALL_LARGE
@pytest.mark.parametrize("padding", ["same", 0, 1, 2], ids=str)
@pytest.mark.parametrize(("h", "g"), [(2, 2), (3, 2), (2, 3)])
def test_even_kernels(padding, h, g, large):
    size = (22, 25) if large else (4, 5)
    options = {"padding": padding}
    layer = Separable(mixed(h, g), ((1.0, 4.0, 1.5, 0.5), (3.0, 1.0)), size, options)
    check_ends(layer.operator(), layer.values())
    check_ends(layer.transposed(), layer.values())


@SMALL_LARGE
def test_padding_wider_than_needed_adds_zero_rows_only(large):
    """Tall M: the values of padding 2, which reads all there is. Wide M: exactly singular."""
    size = (21, 24) if large else (4, 5)
    taps = ((1.0, 4.0, 2.0), (0.5, 3.0, 1.0))
    just, wide = (Separable(mixed(2, 2), taps, size, {"padding": p}) for p in (2, 4))
    assert np.allclose(just.values(), wide.values(), atol=1e-12, rtol=0)
    check_ends(wide.operator(), just.values())
    fewer = Separable(mixed(1, 6), taps, size, {"padding": 4})
    assert fewer.values()[-1] == 0
    assert fewer.operator().shape[0] < fewer.operator().shape[1]
    check_singular(fewer.operator(), fewer.values()[0], 1e-7)


@SMALL_LARGE
def test_inputs_that_no_tap_reads(large):
    """Stride 3 over 2 taps: one pixel in three is never read, and M has columns of zeros."""
    size = (33, 33) if large else (6, 6)
    options = {"stride": 3, "padding": 0}
    regular, singular = (
        Separable(mixed(h, 1), ((1.0, 2.0), (3.0, 1.0)), size, options) for h in (1, 9)
    )
    check_ends(regular.operator(), regular.values())
    op = singular.operator()
    assert op.shape[0] == op.shape[1]
    check_singular(op, singular.values()[0], 1e-7)
    assert float(cs.logabsdet(op)) == -math.inf
    if not large:
        with pytest.raises(ArithmeticError, match="singular"):
            cs.solve(op, random(*op.output_shape))


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "g"), [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize(("groups", "size"), [(3, (3, 4)), (4, (12, 14))])
def test_the_norm_of_groups_is_that_of_the_largest(groups, size, h, g):
    """Not the product, not the sum; and sigma_min is the smallest of the groups' smallest."""
    parts = [
        Separable((1 + i) * mixed(h, g, i), ((1.0, 3.0 + i, 1.0), (0.5, 4.0, 1.0)), size)
        for i in range(groups)
    ]
    op = ConvOperator(torch.cat([part.weight for part in parts]), size, groups=groups)
    values = descending(np.concatenate([part.values() for part in parts]))
    check_ends(op, values, k=3)
    alone = [part.operator() for part in parts]
    assert math.isclose(cs.sigma_max(op), max(map(cs.sigma_max, alone)), rel_tol=1e-9)
    assert math.isclose(cs.sigma_min(op), min(map(cs.sigma_min, alone)), rel_tol=1e-7)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "size"), [(64, (4, 4)), (96, (16, 16))])
def test_depthwise(channels, size, stride):
    """64 and more small matrices: 24,576 rows in all for the larger one."""
    taps = random(channels, 2, 3, seed=5) + torch.tensor([0.0, 4.0, 0.0])
    options = {"stride": stride, "padding": 1}
    parts = [Separable(ONE, tuple(map(tuple, t)), size, options) for t in taps.tolist()]
    weight = torch.cat([part.weight for part in parts])
    op = ConvOperator(weight, size, groups=channels, **options)
    check_ends(op, descending(np.concatenate([part.values() for part in parts])), k=3)


# --- strides and padding modes --------------------------------------------------------------------

STRIDED = [
    {"stride": 2, "padding": 1},
    {"stride": 3, "padding": 1},
    {"stride": 2, "padding": 2, "dilation": 2},
    {"stride": 2, "padding": 1, "padding_mode": "circular"},
    {"stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"stride": 2, "padding": 1, "padding_mode": "replicate"},
]


@pytest.mark.parametrize("size", [(6, 8), (7, 6), (6, 1 + 6)], ids=str)
@pytest.mark.parametrize("options", STRIDED, ids=str)
def test_strides_with_even_sizes_have_an_exact_adjoint(options, size):
    """The last pixel is read by no window, or by fewer: the adjoint needs an output padding."""
    layer = Layer(random(4, 3, 3, 3), size, options)
    op, dense = layer.operator(), layer.dense().detach()
    identity = torch.eye(op.shape[0], dtype=torch.float64).reshape(-1, *op.output_shape)
    adjoint = op.rmatvec(identity).flatten(1)
    assert adjoint.shape == dense.shape
    assert torch.allclose(adjoint, dense, atol=1e-14, rtol=0)
    check_ends(op, dense_values(layer))


@pytest.mark.parametrize(("h", "g"), [(8, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("options", STRIDED, ids=str)
def test_large_strided_layers(options, h, g):
    layer = Separable(mixed(h, g), ((1.0, 4.0, 2.0), (0.5, 3.0, 1.0)), (24, 22), options)
    assert_adjoint(layer.operator())
    values = layer.values()
    if values[-1] == 0:
        check_singular(layer.operator(), values[0], 1e-7)
        check(layer.operator(), 3, "LM", values)
    else:
        check_ends(layer.operator(), values, k=3)


@pytest.mark.parametrize("size", [(5, 6), (33, 32)], ids=str)
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_modes_are_not_taken_for_zeros(mode, size, stride):
    """Each mode has its own values, at both ends."""
    taps, channels = ((1.0, 3.0, 1.0), (2.0, -5.0, 1.0)), mixed(4, 1)
    zeros, other = (
        Separable(channels, taps, size, {"padding": 1, "stride": stride, "padding_mode": m})
        for m in ("zeros", mode)
    )
    for layer in (zeros, other):
        check_ends(layer.operator(), layer.values())
    for value in (cs.sigma_max, cs.sigma_min):
        ours, theirs = value(other.operator()), value(zeros.operator())
        singular = ours == theirs == 0  # four filters on one channel, a stride of 2
        assert singular or abs(ours / theirs - 1) > 1e-4, f"{value.__name__} ignores {mode}"


@pytest.mark.parametrize("order", [12, 1000])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_the_second_difference_is_singular_in_every_mode_but_zeros(mode, order):
    check_singular(ConvOperator(kernel(1, -2, 1), order, padding_mode=mode), 4.0, 1e-7)
    assert cs.sigma_min(ConvOperator(kernel(1, -2, 1), order)) > 1e-6


# --- kernel 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "g", "size"), [(3, 4, (3, 2)), (32, 64, (56, 56)), (64, 64, (28,) * 2)]
)
def test_kernel_one_repeats_the_values_of_its_matrix(h, g, size):
    """64 -> 32 at 56 x 56 is 100,352 x 200,704, each value 3,136 times."""
    channels = mixed(h, g)
    op = Separable(channels, ((1.0,), (1.0,)), size).operator()
    values = np.repeat(np.linspace(2, 1, min(h, g)), math.prod(size))
    check_ends(op, values, k=3, rounding=1e-13)
    assert math.isclose(cs.cond(op), 2, rel_tol=1e-9)


@pytest.mark.parametrize("size", [(4, 4), (32, 32)], ids=str)
def test_kernel_one_with_stride_and_more_outputs(size):
    """h N_out rows of rank g N_out: min(rows, columns) counts exact zeros."""
    layer = Separable(mixed(16, 8), ((1.0,), (1.0,)), size, {"stride": 2, "padding": 0})
    op = layer.operator()
    assert op.shape[0] < op.shape[1]
    check(op, 3, "LM", layer.values())
    check_singular(op, 2.0, 1e-7)
    fewer = Separable(mixed(8, 16), ((1.0,), (1.0,)), size, {"stride": 2, "padding": 0})
    check_ends(fewer.operator(), fewer.values(), k=3)


# --- dilation and transposition -------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 7), (22, 25)], ids=str)
@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("padding", ["same", 2], ids=str)
@pytest.mark.parametrize("taps", [(1.0, 4.0, 2.0), (4.0, 1.0)], ids=["odd", "even"])
def test_dilation(taps, padding, dilation, size):
    options = {"dilation": dilation, "padding": padding}
    layer = Separable(mixed(2, 2), (taps, (0.5, 3.0, 1.0)), size, options)
    values = layer.values()
    if values[-1] == 0:
        check_singular(layer.operator(), values[0], 1e-7)
    else:
        check_ends(layer.operator(), values, k=3, rtol=1e-6)


@pytest.mark.parametrize("order", [10, 1000])
def test_even_kernels_with_dilation_are_singular_at_odd_sizes(order):
    """Taps at -1 and +1: 2 cos(pi i/(N+1)), regular for even N and exactly singular for odd N."""
    op = ConvOperator(kernel(1, 1), order, dilation=2)
    check(op, 2, "SM", tridiagonal(0, 1, order), rounding=1e-14, atol=0)
    assert math.isclose(math.exp(float(cs.logabsdet(op))), 1, rel_tol=1e-6)
    odd = ConvOperator(kernel(1, 1), order + 1, dilation=2)
    check_singular(odd, 2.0, 1e-7)
    assert float(cs.logabsdet(odd)) == -math.inf


@SMALL_LARGE
@pytest.mark.parametrize("options", [{}, *STRIDED[:3], {"dilation": 3}, {"padding": 0}], ids=str)
def test_transposed_layers_are_the_transposes(options, large):
    size = (22, 24) if large else (8, 6)
    layer = Separable(mixed(4, 2), ((1.0, 4.0, 2.0), (0.5, 3.0, 1.0)), size, options)
    op, transposed, values = layer.operator(), layer.transposed(), layer.values()
    assert transposed.shape == op.shape[::-1]
    x = random(2, *op.input_shape)
    assert torch.allclose(transposed.rmatvec(x), op.matvec(x), atol=1e-12)
    if values[-1] == 0:
        check_singular(transposed, values[0], 1e-7)
    else:
        check_ends(transposed, values)
