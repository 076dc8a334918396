"""Projections: bounds that hold on dense matrices, and distances that nothing undercuts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.operators import LAYERS, each_layer
from helpers.strategies import Layer, random
from torch import Tensor, nn

import convspectra as cs
from convspectra.training import _clipped_kernels as kernels


def norm(op: cs.ConvOperator) -> float:
    return float(torch.linalg.matrix_norm(op.to_dense().double(), 2))


def plain(channels: int, size: int, dtype: torch.dtype = torch.float64) -> cs.ConvOperator:
    return cs.ConvOperator(random(channels, channels, 3, 3, dtype=dtype), (size, size), padding=1)


@each_layer
def test_the_norm_of_any_layer_is_cut(layer: Layer) -> None:
    part = 0.6
    op, whole = layer.operator(), float(torch.linalg.matrix_norm(layer.dense().detach(), 2))
    if whole == 0:
        assert cs.project(op, max_norm=1.0) is op
        return
    found, report = cs.project(op, part * whole, return_report=True)
    assert found.geometry == op.geometry
    assert (found.groups, found.transposed) == (op.groups, op.transposed)
    assert (1 - 1e-3) * part * whole <= norm(found) <= part * whole * (1 + 1e-12)
    assert report.sigma_max <= part * whole
    assert report.distance == pytest.approx(float((found.weight - op.weight).norm()))
    assert report.method == "dense"
    assert 0 <= report.gap < 2e-3


def test_no_kernel_that_is_nearer_meets_the_bound() -> None:
    op = cs.ConvOperator(random(2, 1, 3, seed=3), 7)
    limit = 0.6 * norm(op)
    _, report = cs.project(op, limit, return_report=True)
    generator = torch.Generator().manual_seed(0)
    ways = torch.randn(4000, *op.weight.shape, generator=generator, dtype=torch.float64)
    units = ways / torch.linalg.vector_norm(ways.flatten(1), dim=1)[:, None, None, None]
    near = op.weight + 0.999 * report.least_distance * units
    assert min(norm(op.with_weight(kernel)) for kernel in near) > limit


@pytest.mark.parametrize("part", [0.9, 0.5])
def test_clipping_all_of_m_is_no_nearer_but_the_same_for_a_linear_layer(part: float) -> None:
    op = cs.ConvOperator(random(5, 4), ())
    limit = part * norm(op)
    u, s, vh = torch.linalg.svd(op.weight, full_matrices=False)
    expected = (u * s.clamp(max=limit)) @ vh
    torch.testing.assert_close(cs.project(op, limit).weight, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((2, 2, 3, 3), (5, 4), {"padding": 1}),
        ((3, 2, 3), (9,), {"stride": 2, "padding": 1}),
        ((2, 2, 3), (11,), {"dilation": 2, "padding": 2}),
        ((2, 2, 3), (8,), {"padding_mode": "circular", "padding": 1}),
        ((2, 2, 3), (8,), {"padding_mode": "reflect", "padding": 1}),
        ((4, 1, 3), (8,), {"groups": 2, "padding": 1}),
        ((2, 2, 2), (6,), {"padding": 0}),
    ],
)
def test_windowed_waves_bound_the_distance_from_below(
    shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, object]
) -> None:
    op = cs.ConvOperator(random(*shape), size, **options)
    limit = 0.5 * norm(op)
    model, dense = kernels.wave_model(op), kernels.dense_model(op, 1 << 30)
    assert model is not None
    waves = kernels.nearest(model, op.weight, limit)
    exact = kernels.nearest(dense, op.weight, limit)
    assert 0.2 * exact.bound < waves.bound <= exact.bound * (1 + 3e-3)
    assert float(kernels._norms(model.apply(op.weight)).amax()) <= norm(op) * (1 + 1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 3, "padding": 3}])
def test_maps_and_adjoints_agree(options: dict[str, int]) -> None:
    op = cs.ConvOperator(random(4, 2, 3, 3), (7, 6), groups=2, **{"padding": 1, **options})
    for model in (kernels.dense_model(op, 1 << 30), kernels.wave_model(op)):
        assert model is not None
        image = model.apply(op.weight)
        other = random(*image.shape, seed=1).to(image.dtype)
        product = ((other.conj() * image).real.sum((1, 2)) @ model.weights).item()
        adjoint = model.adjoint(other, op.weight)
        assert product == pytest.approx(float((adjoint * op.weight).sum()))
        squares = (image.abs().square().sum((1, 2)) @ model.weights).item()
        assert squares <= model.lipschitz * float(op.weight.square().sum()) * (1 + 1e-12)


def test_layers_that_are_not_formed() -> None:
    op = plain(3, 12)
    limit = 0.7 * norm(op)
    found, report = cs.project(op, limit, return_report=True)
    assert report.method == "waves"
    assert 0.995 * limit < norm(found) <= limit
    assert report.gap < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds_for_the_rounded_weight(dtype: torch.dtype) -> None:
    found = cs.project(plain(2, 6, dtype), 1.0)
    assert found.dtype == dtype
    assert 0.9 < norm(found) <= 1.0


def test_nothing_is_done_where_nothing_has_to_be() -> None:
    op = plain(2, 5)
    found, report = cs.project(op, 1.001 * norm(op), return_report=True)
    assert found is op
    assert (report.distance, report.gap, report.steps, report.method) == (0.0, 0.0, 0, "none")


@pytest.mark.parametrize("name", ["paper", "even kernel", "strided", "grouped", "transposed, same"])
def test_small_singular_values_are_lifted(name: str) -> None:
    op = LAYERS[name].operator()
    floor = 0.5 * float(cs.svdvals(op).mean())
    found, report = cs.project(op, min_singular=floor, return_report=True)
    values = torch.linalg.svdvals(found.to_dense())
    assert floor <= float(values.min()) < 1.1 * floor
    assert report.sigma_min is not None
    assert floor <= report.sigma_min <= float(values.min()) * (1 + 1e-9)
    assert report.distance < float(op.weight.norm())


def test_both_bounds_hold_together() -> None:
    op = plain(3, 5, torch.float32)
    found, report = cs.project(op, 2.0, 0.7, return_report=True)
    values = torch.linalg.svdvals(found.to_dense().double())
    assert float(values.min()) >= 0.7
    assert float(values.max()) <= 2.0
    assert report.method == "dense + isometry"
    assert report.least_distance <= report.distance


def test_a_floor_that_is_out_of_reach_is_named() -> None:
    op = cs.ConvOperator(random(2, 1, 3, seed=1), 7, dilation=3, padding=2)
    with pytest.raises(ValueError, match=r"got 100; the largest that was found is 0: with its pad"):
        cs.project(op, min_singular=100)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((), "expected max_norm, min_singular or both, got neither"),
        ((0.0,), "expected max_norm to be a finite number above 0"),
        ((None, -1.0), "expected min_singular to be a finite number above 0"),
        ((math.inf,), "expected max_norm to be a finite number above 0"),
        ((1.0, 2.0), "expected min_singular <= max_norm, got 2.0 and 1.0"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cs.project(plain(1, 4), *bounds)
    with pytest.raises(ValueError, match="expected op to be a ConvOperator"):
        cs.project(random(3, 3), 1.0)  # type: ignore[call-overload]


def test_layers_are_projected_in_place() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    weight, expected = conv.weight, cs.ConvOperator.from_module(conv, (5, 5))
    expected = cs.project(expected, 0.3).weight
    report = cs.project_(conv, (5, 5), max_norm=0.3)
    assert conv.weight is weight
    assert torch.equal(weight.detach(), expected)
    assert weight.requires_grad
    assert report.sigma_max <= 0.3
    cs.parametrizations.spectral_norm(conv, (5, 5))
    with pytest.raises(ValueError, match="whose weight is its own parameter"):
        cs.project_(conv, (5, 5), max_norm=0.3)


def test_projections_are_detached_and_repeatable() -> None:
    weight: Tensor = random(2, 2, 3).requires_grad_()
    op = cs.ConvOperator(weight, 9)
    once, again = (cs.project(op, 0.5).weight for _ in range(2))
    assert torch.equal(once, again)
    assert not once.requires_grad
    assert norm(cs.project(op.with_weight(once), 0.5)) <= 0.5
