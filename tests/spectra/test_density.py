"""The distribution of the singular values, against NumPy's SVD of the naive matrix."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from helpers.closed_forms import Separable, dense_values, orthogonal, tridiagonal
from helpers.kernels import kernel
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings
from hypothesis import strategies as st

import convspectra as cs
from convspectra import ConvOperator
from convspectra.spectra import _density as density
from convspectra.spectra._circular_padding import circular_operator

EDGES = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]


def histogram(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Part of the values in each bin; those beyond the ends in the first and the last."""
    inner = np.array(edges[1:-1])
    places = (values[:, None] >= inner).sum(1)
    return np.bincount(places, minlength=len(edges) - 1) / len(values)


def check_shape(found: cs.SpectralDensity, bins: int) -> None:
    assert len(found.edges) == bins + 1
    assert len(found.fractions) == len(found.errors) == bins
    assert all(a < b for a, b in zip(found.edges, found.edges[1:], strict=False))
    assert sum(found.fractions) == pytest.approx(1, abs=1e-12)
    assert min(found.fractions) >= 0
    assert min(found.errors) >= 0


def apart(values: np.ndarray, edges: tuple[float, ...]) -> bool:
    """Whether no edge is so near to a value that rounding decides on its bin."""
    inner = np.array(edges[1:-1])
    if not len(inner):
        return True
    return bool(np.abs(values[:, None] - inner).min() > 1e-10 * max(values[0], 1e-300))


# --- counted --------------------------------------------------------------------------------------


@given(layers(), st.integers(1, 30))
@settings(max_examples=120)
def test_small_layers_are_counted(layer, bins):
    found, values = cs.spectral_density(layer.operator(), bins), dense_values(layer)
    check_shape(found, bins)
    assert found.method == "exact"
    assert (found.probes, found.products) == (0, 0)
    assert set(found.errors) == {0.0}
    assert found.edges[0] == 0.0
    assert found.edges[-1] >= values[0]
    if apart(values, found.edges):
        assert np.abs(histogram(values, found.edges) - found.fractions).max() <= 1e-12
    assert found.mean_log_error == 0.0
    if values[-1] > 1e-10 * values[0]:
        assert found.mean_log == pytest.approx(np.log(values).mean(), abs=1e-5)
    elif values[-1] <= 1e-17 * values[0]:
        assert found.mean_log == -math.inf


@given(layers())
@settings(max_examples=40)
def test_values_beyond_the_edges_count_for_the_last_bins(layer):
    values = dense_values(layer)
    edges = [0.4 * values[0], 0.6 * values[0], 0.9 * values[0]] if values[0] else [1.0, 2.0]
    found = cs.spectral_density(layer.operator(), edges=edges)
    assert found.edges == tuple(edges)
    if apart(values, found.edges):
        assert np.abs(histogram(values, found.edges) - found.fractions).max() <= 1e-12


def test_edges_are_even_in_the_logarithm():
    found = cs.spectral_density(ConvOperator(random(4, 3, 3), 12), 20)
    ratios = np.array(found.edges[2:]) / np.array(found.edges[1:-1])
    assert np.allclose(ratios, ratios[0])
    values = np.linalg.svd(ConvOperator(random(4, 3, 3), 12).to_dense().numpy())[1]
    assert found.edges[1] == pytest.approx(values[-1])
    assert found.edges[-1] == pytest.approx(values[0])


def test_tiny_values_do_not_stretch_the_edges():
    found = cs.spectral_density(ConvOperator(kernel(1.0, 2.0, 1.0), 1000), 10)
    assert found.edges[1] == pytest.approx(1e-4 * found.edges[-1])
    values = tridiagonal(2.0, 1.0, 1000)
    assert found.fractions[0] == pytest.approx((values < found.edges[1]).mean())
    assert found.mean_log == pytest.approx(math.log(1001) / 1000)  # the determinant is N + 1


def test_layers_that_are_far_too_large_for_a_dense_matrix():
    """1 x 1 taps, a stride over gaps, and circular padding: small blocks or symbols, repeated."""
    weight = random(6, 4, 1, 1)
    found = cs.spectral_density(ConvOperator(weight, (500, 500)), edges=EDGES)
    values = np.linalg.svd(weight[:, :, 0, 0].numpy(), compute_uv=False)
    assert np.allclose(found.fractions, histogram(values, found.edges))
    assert found.method == "exact"
    ring = cs.spectral_density(
        ConvOperator(kernel(1.0, 0.0, 1.0), 10_000, padding_mode="circular"), edges=EDGES
    )
    values = np.abs(2 * np.cos(2 * np.pi * np.arange(10_000) / 10_000))
    assert np.allclose(ring.fractions, histogram(values, ring.edges), atol=5e-4)


def test_zeros_by_the_structure():
    op = ConvOperator(random(3, 2, 1, 1), (4, 4), stride=2, padding=0)
    found = cs.spectral_density(op, 5)
    assert found.fractions[0] == pytest.approx(1 / 3)
    assert (found.mean_log, found.mean_log_error) == (-math.inf, 0.0)


def test_a_weight_of_zero():
    found = cs.spectral_density(ConvOperator(torch.zeros(2, 2, 3), 5), 4)
    check_shape(found, 4)
    assert found.fractions == (1.0, 0.0, 0.0, 0.0)
    assert found.mean_log == -math.inf


@pytest.mark.parametrize("method", ["exact", "quadrature"])
@pytest.mark.parametrize("scale", [2.0**-400, 2.0**400])
def test_scales(scale, method):
    op = ConvOperator(random(3, 3, 3), 20)
    one = cs.spectral_density(op, 12, method=method)
    other = cs.spectral_density(op.with_weight(scale * op.weight), 12, method=method)
    assert np.allclose(other.fractions, one.fractions)
    assert np.allclose(np.array(other.edges) / scale, one.edges)
    assert other.mean_log == pytest.approx(one.mean_log + math.log(scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_are_widened(dtype):
    op = ConvOperator(random(3, 3, 3).to(dtype), 9)
    assert cs.spectral_density(op) == cs.spectral_density(op.with_weight(op.weight.double()))


# --- quadrature -----------------------------------------------------------------------------------

ESTIMATED = {
    "square": Layer(random(4, 4, 3, 3), (10, 10)),
    "tall": Layer(random(12, 3, 3, 3), (11, 11)),
    "wide": Layer(random(4, 12, 3, 3), (9, 9)),
    "stride": Layer(random(12, 6, 3, 3), (12, 12), {"stride": 2, "padding": 1}),
    "1 axis": Layer(random(3, 3, 5), (130,)),
    "3 axes": Layer(random(3, 3, 3, 3, 3), (5, 5, 5)),
    "groups": Layer(random(6, 2, 3, 3), (8, 8), {"groups": 3}),
    "dilation": Layer(random(4, 4, 3, 3), (10, 11), {"dilation": 2}),
    "transposed": Layer(
        random(8, 5, 4, 4), (6, 6), {"transposed": True, "stride": 2, "padding": 1}
    ),
    "reflect": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "reflect"}),
    "replicate": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "replicate"}),
    "circular": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "circular"}),
    "linear": Layer(random(200, 300), ()),
    "Laplacian": Layer(kernel([0.0, 1, 0], [1, -4, 1], [0, 1, 0]), (18, 18)),
    "smoothing": Layer(kernel(1.0, 2.0, 1.0), (400,)),
    "low rank": Layer(torch.ones(4, 4, 3, 3, dtype=torch.float64), (9, 9)),
    "half the identity": Layer(
        torch.nn.functional.pad(torch.eye(4, dtype=torch.float64)[:, :, None, None], (1, 1, 1, 1))
        + torch.nn.functional.pad(random(2, 2, 3, 3), (0, 0, 0, 0, 0, 2, 0, 2)),
        (9, 9),
    ),
}


def test_errors_hold_for_all_kinds_of_layers():
    outside = total = logs = 0
    widths = []
    for layer in ESTIMATED.values():
        op, values = layer.operator(), dense_values(layer)
        for seed in range(3):
            found = cs.spectral_density(
                op, 30, method="quadrature", generator=torch.Generator().manual_seed(seed)
            )
            check_shape(found, 30)
            assert found.method == "quadrature"
            assert found.probes == 4
            assert 0 < found.products <= 4 * 2 * 4 * 50
            truth = histogram(values, found.edges)
            gap = np.abs(truth - found.fractions)
            outside += int((gap > 3 * np.array(found.errors) + 1e-9).sum())
            total += 30
            widths.append(float(np.mean(found.errors)))
            if values[-1] > 1e-12 * values[0]:
                off = abs(found.mean_log - np.log(values).mean())
                logs += off > 3 * found.mean_log_error
    assert outside <= 0.01 * total, f"{outside} of {total} bins outside three errors"
    assert logs <= 1
    assert np.median(widths) <= 0.02


@given(layers())
@settings(max_examples=60)
def test_errors_hold_over_all_options(layer):
    op, values = layer.operator(), dense_values(layer)
    found = cs.spectral_density(op, 8, method="quadrature")
    check_shape(found, 8)
    if apart(values, found.edges):
        gap = np.abs(histogram(values, found.edges) - found.fractions)
        # One bin of a hundred may be off by more than three.
        assert (gap <= 4 * np.array(found.errors) + 1e-9).all()


def test_atoms_are_not_spread_out():
    """Singular values 1 and 2 only, in equal numbers."""
    q = torch.from_numpy(orthogonal(20) * np.repeat([1.0, 2.0], 10))
    op = ConvOperator(q[:, :, None, None], (5, 5))
    found = cs.spectral_density(op, edges=[0, 0.9, 1.1, 1.9, 2.1], method="quadrature")
    assert max(found.fractions[0], found.fractions[2]) <= 1e-15
    assert abs(found.fractions[1] - 0.5) <= 3 * found.errors[1]
    assert found.products == 2 * 4 * 2  # the Krylov spaces have two dimensions


def test_closed_form_of_a_large_layer():
    """100 x 100 points, two channels: 20,000 values that no dense matrix is formed for."""
    layer = Separable(orthogonal(2), ((1.0, 4.0, 1.0), (1.0, 3.0, 1.0)), (100, 100))
    op, values = layer.operator(), layer.values()
    found = cs.spectral_density(op, 20, probes=2, steps=30)
    assert found.method == "quadrature"
    gap = np.abs(histogram(values, found.edges) - found.fractions)
    assert (gap <= 3 * np.array(found.errors)).all()
    assert np.median(found.errors) <= 0.01
    assert abs(found.mean_log - np.log(values).mean()) <= 3 * found.mean_log_error
    assert found.mean_log_error <= 0.01


def test_a_singular_layer_has_no_mean_logarithm():
    found = cs.spectral_density(ESTIMATED["low rank"].operator(), method="quadrature", steps=200)
    assert found.mean_log == -math.inf or found.mean_log_error == math.inf
    assert found.fractions[0] == pytest.approx(0.75, abs=3 * found.errors[0])


def test_the_generator_decides():
    op = ConvOperator(random(3, 3, 3), 40)

    def run(seed: int | None) -> cs.SpectralDensity:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return cs.spectral_density(op, 10, method="quadrature", generator=generator)

    assert run(None) == run(None)
    assert run(1) == run(1) != run(2)


def test_auto_takes_dense_matrices_where_they_are_affordable(monkeypatch):
    op = ConvOperator(random(3, 3, 3), 40)
    assert cs.spectral_density(op).method == "exact"
    # The limit is no option, and a layer beyond it is no small one.
    monkeypatch.setattr(density, "AFFORDABLE_FLOPS", 1e3)
    assert cs.spectral_density(op).method == "quadrature"
    assert cs.spectral_density(op, method="exact").method == "exact"


# --- circular -------------------------------------------------------------------------------------


@given(layers(("conv", "linear")))
@settings(max_examples=60)
def test_the_circular_layer_is_that_of_torch(layer):
    op = layer.operator()
    torus = circular_operator(op)
    if isinstance(torus, str):
        with pytest.raises(ValueError, match="expected a layer that fits on a torus for method="):
            cs.spectral_density(op, method="circular")
        return
    values = np.linalg.svd(torus.to_dense().numpy(), compute_uv=False)
    found = cs.spectral_density(op, 8, method="circular")
    check_shape(found, 8)
    assert found.method == "circular: exact"
    if apart(values, found.edges):
        assert np.abs(histogram(values, found.edges) - found.fractions).max() <= 1e-12
    if values[-1] > 1e-10 * values[0]:
        assert found.mean_log == pytest.approx(np.log(values).mean(), abs=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_some_frequencies_are_drawn_from_many(monkeypatch, groups):
    weight = random(8, 8 // groups, 3, 3)
    op = ConvOperator(weight, (24, 24), groups=groups)
    torus = ConvOperator(weight, (24, 24), groups=groups, padding_mode="circular")
    true = cs.spectral_density(torus, 20, method="exact")
    # A layer so small that the reference can take all frequencies.
    monkeypatch.setattr(density, "AFFORDABLE_FLOPS", 1e4)
    monkeypatch.setattr(density, "SAMPLE_FLOPS", 3e5)
    outside = logs = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        found = cs.spectral_density(op, edges=true.edges, method="circular", generator=generator)
        check_shape(found, 20)
        assert found.method == "circular: sampled"
        gap = np.abs(np.array(found.fractions) - true.fractions)
        outside += int((gap > 3 * np.array(found.errors)).sum())
        logs += abs(found.mean_log - true.mean_log) > 3 * found.mean_log_error
        assert 0 < found.mean_log_error < 0.2
    assert outside <= 4
    assert logs <= 1
    assert cs.spectral_density(torus, 20).method == "sampled"


# --- refusals -------------------------------------------------------------------------------------

OP = ConvOperator(random(2, 2, 3), 12)


@pytest.mark.parametrize("name", ["bins", "probes", "steps"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_counts_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"expected {name} to be a positive integer, got"):
        cs.spectral_density(OP, **{name: value})


@pytest.mark.parametrize("edges", [[], [1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [0.0, math.inf]])
def test_edges_ascend(edges):
    with pytest.raises(ValueError, match="expected at least two non-negative, ascending edges"):
        cs.spectral_density(OP, edges=edges)


def test_other_refusals():
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, a Jacobian"):
        cs.spectral_density(OP.weight)
    with pytest.raises(ValueError, match="expected method to be one of"):
        cs.spectral_density(OP, method="kpm")
    with pytest.raises(ValueError, match="expected the Lanczos basis to take at most"):
        cs.spectral_density(OP, method="quadrature", max_bytes=100)
    with pytest.raises(ValueError, match="expected the dense matrix to take at most"):
        cs.spectral_density(OP, method="exact", max_bytes=100)


def test_the_result_is_frozen():
    found = cs.spectral_density(OP)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
        found.method = "other"


# --- counted at the edges -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_counts_at_the_edges_are_exact(monkeypatch, options):
    monkeypatch.setattr(density, "AFFORDABLE_FLOPS", 0.0)  # stands for a layer of hours
    groups = options.get("groups", 1)
    layer = Layer(random(12, 6 * 2 // (2 * groups), 3, 3), (18, 21), options)
    values = dense_values(layer)
    edges = [0.0, 1.0, 4.0, 9.0, 14.0]
    found = cs.spectral_density(layer.operator(), edges=edges, method="count")
    assert found.method == "count"
    assert set(found.errors) == {0.0}
    assert found.fractions == pytest.approx(histogram(values, found.edges).tolist(), abs=1e-12)
    assert abs(found.mean_log - np.log(values).mean()) <= 4 * found.mean_log_error


def test_an_edge_at_a_repeated_value_is_said_to_be_open(monkeypatch):
    monkeypatch.setattr(density, "AFFORDABLE_FLOPS", 0.0)
    op = ConvOperator(torch.eye(3, dtype=torch.float64)[:, :, None], 40)
    found = cs.spectral_density(op, edges=[0.0, 1.0, 2.0], method="count")
    assert found.fractions == (0.5, 0.5)
    assert found.errors == (0.5, 0.5)
