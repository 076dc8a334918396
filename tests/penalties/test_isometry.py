"""The distance to the nearest isometric layer, against dense matrices and a search."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import Layer, layers
from hypothesis import assume, given
from torch import Tensor

import convspectra as cs
from convspectra.operator import ConvOperator
from convspectra.operator._isometric import (
    is_isometric_possible,
    isometric_taps,
    isometric_target,
    seen_operator,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def target(op: ConvOperator, gain: float = 1.0, **mirrored: bool) -> ConvOperator:
    taps = isometric_taps(op.geometry).taps
    return op.with_weight(isometric_target(op.weight[None], op.groups, taps, gain, **mirrored)[0])


ISOMETRIC = {
    "same": ((4, 4, 3, 3), (6, 7), {}),
    "more outputs": ((6, 4, 3, 3), (6, 7), {}),
    "fewer outputs": ((3, 4, 3, 3), (6, 7), {}),
    "dilated": ((4, 4, 3), (9,), {"dilation": 2}),
    "groups": ((6, 2, 3, 3), (5, 5), {"groups": 3}),
    "stride 2": ((16, 4, 3, 3), (8, 8), {"stride": 2, "padding": 1}),
    "stride 2, fewer outputs": ((8, 4, 3, 3), (8, 8), {"stride": 2, "padding": 1}),
    "stride 2, kernel 1": ((4, 4, 1, 1), (8, 8), {"stride": 2, "padding": 0}),
    "stride 4, no overlap": ((5, 3, 4), (16,), {"stride": 4, "padding": 0}),
    "circular": ((4, 4, 3, 3), (6, 6), {"padding_mode": "circular"}),
    "reflect": ((4, 4, 3, 3), (6, 6), {"padding_mode": "reflect"}),
    "valid, fewer outputs": ((3, 4, 3), (9,), {"padding": 0}),
    "three dimensions": ((2, 2, 3, 3, 3), (4, 4, 4), {}),
    "linear": ((5, 7), (), {}),
}


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("name", ISOMETRIC)
def test_the_target_has_equal_singular_values(name: str, gain: float) -> None:
    shape, size, options = ISOMETRIC[name]
    op = ConvOperator(random(*shape), size, **options)
    assert is_isometric_possible(op)
    s = torch.linalg.svdvals(target(op, gain).to_dense())
    torch.testing.assert_close(s, torch.full_like(s, gain))


@pytest.mark.parametrize("name", ISOMETRIC)
def test_the_penalty_is_the_distance_of_the_matrices(name: str) -> None:
    shape, size, options = ISOMETRIC[name]
    op = ConvOperator(random(*shape), size, **options)
    distance = torch.linalg.matrix_norm(op.to_dense() - target(op, 1.3).to_dense())
    found = cs.penalties.isometry(op, gain=1.3)
    torch.testing.assert_close(found, 0.5 * distance**2)


def test_no_isometric_layer_is_nearer() -> None:
    """With "same" zero padding all of them are delta-orthogonal: a search over their angles."""
    op = ConvOperator(random(2, 2, 3), 8)
    found = float(cs.penalties.isometry(op))
    for sign in (1.0, -1.0):
        for angle in torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64).tolist():
            c, s = math.cos(angle), math.sin(angle)
            kernel = torch.zeros(2, 2, 3, dtype=torch.float64)
            kernel[:, :, 1] = torch.tensor([[c, -sign * s], [s, sign * c]])
            apart = op.to_dense() - ConvOperator(kernel, 8).to_dense()
            assert 0.5 * float(apart.square().sum()) >= found - 1e-9


def test_a_layer_with_other_taps_is_not_isometric() -> None:
    """A tap at the side of an orthogonal center shows in the first pixel."""
    kernel = torch.zeros(2, 2, 3, dtype=torch.float64)
    kernel[:, :, 1], kernel[:, :, 2] = 0.8 * torch.eye(2), 0.6 * torch.eye(2)
    s = torch.linalg.svdvals(ConvOperator(kernel, 8).to_dense())
    assert float(s[0] - s[-1]) > 0.1


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((6, 4, 3), (9,), {"padding": 0}),  # border pixels are read by one tap each
        ((4, 4, 3), (5,), {"stride": 2, "padding": 2}),  # a block that reads the padding
    ],
)
def test_where_no_taps_tile_the_input_it_says_so(shape, size, options) -> None:
    op = ConvOperator(random(*shape), size, **options)
    assert not is_isometric_possible(op)
    s = torch.linalg.svdvals(target(op).to_dense())
    assert float(s[0] - s[-1]) > 0.5
    assert float(cs.penalties.isometry(op)) >= 0


@given(layers())
def test_possible_means_isometric(layer: Layer) -> None:
    op = layer.operator()
    op = op.T if op.transposed else op
    op = op.with_weight(random(*op.weight.shape))
    assume(min(op.shape) > 0)
    s = torch.linalg.svdvals(target(op).to_dense())
    if is_isometric_possible(op):
        torch.testing.assert_close(s, torch.ones_like(s))


@pytest.mark.parametrize("name", ["same", "more outputs", "groups", "stride 2", "circular"])
def test_gradient(name: str) -> None:
    shape, size, options = ISOMETRIC[name]
    op = ConvOperator(random(*shape), size, **options)
    weight = op.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: cs.penalties.isometry(op.with_weight(w), gain=1.2), weight
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(True, True), (False, True), (True, False)])
def test_mirrored_kernels(inputs: bool, outputs: bool) -> None:
    op = ConvOperator(random(6, 4, 3, 3), (5, 5))
    mirrored = {"mirrored_input": inputs, "mirrored_output": outputs}
    nearest = target(op, 1.0, **mirrored)
    seen = torch.linalg.svdvals(seen_operator(nearest, **mirrored).to_dense())
    torch.testing.assert_close(seen, torch.ones_like(seen))
    if outputs:
        top, bottom = nearest.weight.chunk(2, dim=0)
        torch.testing.assert_close(top, -bottom)
    if inputs:
        left, right = nearest.weight.chunk(2, dim=1)
        torch.testing.assert_close(left, -right)
    weight = op.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: cs.penalties.isometry(op.with_weight(w), **mirrored), weight
    )
    # Every other mirrored isometric layer is farther away.
    distance = float((op.weight - nearest.weight).square().sum())
    for seed in range(1, 20):
        other = target(ConvOperator(random(6, 4, 3, 3, seed=seed), (5, 5)), 1.0, **mirrored)
        assert float((op.weight - other.weight).square().sum()) >= distance


def test_mirrored_relu_networks_are_linear_at_the_start() -> None:
    """Three layers between ReLUs act on z as M(H3) M(H2) M(H1), for every input."""
    sides = [(False, True), (True, True), (True, True)]
    shapes = [(4, 2, 3), (4, 4, 3), (4, 4, 3)]
    x = random(5, 2, 7, seed=9)
    z, y = x, x
    for i, ((inputs, outputs), shape) in enumerate(zip(sides, shapes, strict=True)):
        mirrored = {"mirrored_input": inputs, "mirrored_output": outputs}
        op = target(ConvOperator(random(*shape, seed=i), 7), 1.0, **mirrored)
        y = torch.relu(op.apply(y))
        z = seen_operator(op, **mirrored).apply(z)
    torch.testing.assert_close(torch.sub(*y.chunk(2, dim=1)), z)


def test_bad_input() -> None:
    op = ConvOperator(random(3, 4, 3), 8)
    with pytest.raises(ValueError, match="expected gain to be a finite number above 0, got -1"):
        cs.penalties.isometry(op, gain=-1)
    with pytest.raises(ValueError, match=r"even number of output channels .* got 3"):
        cs.penalties.isometry(op, mirrored_output=True)
    grouped = ConvOperator(random(4, 2, 3), 8, groups=2)
    with pytest.raises(ValueError, match="expected one group for mirrored kernels, got 2"):
        cs.penalties.isometry(grouped, mirrored_input=True)
