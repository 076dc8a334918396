"""The layer on a torus, against a dense matrix whose taps wrap around."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.kernels import kernel
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings

from convspectra import ConvOperator
from convspectra.operator._structure import is_circulant
from convspectra.spectra import _circular_padding as circular
from convspectra.spectra._circular_padding import circular_extremes, circular_operator, is_circular


def wrapped(op: ConvOperator) -> np.ndarray | None:
    """Output r reads input r * stride + p * dilation, modulo the size; by loops, in NumPy."""
    g = op.geometry
    if any(n % s for n, s in zip(g.input_size, g.stride, strict=True)):
        return None
    weight = op.weight.double().numpy()
    outputs = tuple(n // s for n, s in zip(g.input_size, g.stride, strict=True))
    channels = weight.shape[0] // op.groups
    matrix = np.zeros((weight.shape[0], *outputs, weight.shape[1] * op.groups, *g.input_size))
    for h in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            for point in np.ndindex(*outputs):
                for tap in np.ndindex(*g.kernel_size):
                    axes = zip(point, g.stride, tap, g.dilation, g.input_size, strict=True)
                    where = tuple((r * s + p * d) % n for r, s, p, d, n in axes)
                    group = h // channels
                    matrix[(h, *point, group * weight.shape[1] + c, *where)] += weight[(h, c, *tap)]
    return matrix.reshape(weight.shape[0] * math.prod(outputs), -1)


@given(layers())
@settings(max_examples=60)
def test_the_circular_layer_wraps_around(layer):
    op = layer.operator()
    torus, true = circular_operator(op), wrapped(op)
    if isinstance(torus, str):
        assert "does not divide" in torus if true is None else "more than twice" in torus
        with pytest.raises(ValueError, match="expected a layer that fits on a torus"):
            circular_extremes(op)
        return
    assert torus.transposed == op.transposed
    assert not op.geometry.ndim or is_circulant(torus.T if op.transposed else torus)
    values = np.linalg.svd(true, compute_uv=False)
    found = np.linalg.svd(torus.to_dense().numpy(), compute_uv=False)
    assert np.abs(found - values).max() <= 1e-12 * values[0]
    if is_circular(op):
        itself = np.linalg.svd(op.to_dense().numpy(), compute_uv=False)
        assert np.abs(itself - values).max() <= 1e-12 * values[0]
    check_extremes(op, values)


def check_extremes(op: ConvOperator, values: np.ndarray) -> None:
    found = circular_extremes(op)
    assert found.sigma_max == pytest.approx(values[0], rel=1e-5)
    assert found.sigma_min == pytest.approx(values[-1], rel=1e-5, abs=1e-12 * values[0])
    if values[-1] > 1e-8 * values[0]:
        assert found.mean_log == pytest.approx(np.log(values).mean(), abs=1e-8)


LARGE = {
    "square": Layer(random(24, 24, 3, 3), (6, 7)),
    "wide": Layer(random(10, 24, 3, 3), (6, 7)),
    "tall, 1 axis": Layer(random(24, 10, 5), (31,)),
    "stride": Layer(random(20, 10, 3, 3), (8, 8), {"stride": 2, "padding": 1}),
    "square by its stride": Layer(random(40, 10, 3, 3), (8, 8), {"stride": 2, "padding": 1}),
    "groups": Layer(random(24, 12, 3), (12,), {"groups": 2}),
    "valid": Layer(random(12, 12, 3, 3), (6, 6), {"padding": 0}),
    "near the identity": Layer(
        torch.eye(16, dtype=torch.float64)[:, :, None] + 1e-3 * random(16, 16, 3), (20,)
    ),
    "transposed": Layer(
        random(12, 8, 4, 4), (5, 5), {"transposed": True, "stride": 2, "padding": 1}
    ),
}


@pytest.fixture
def never_direct(monkeypatch):
    """Factors and Lanczos for small layers, too, of which NumPy knows all values."""
    monkeypatch.setattr(circular, "DIRECT_FLOPS", 0)
    monkeypatch.setattr(circular, "DIRECT_ORDER", 0)


@pytest.mark.usefixtures("never_direct")
@pytest.mark.parametrize("layer", LARGE.values(), ids=LARGE.keys())
def test_factors_and_lanczos_find_the_extremes(layer):
    op = layer.operator()
    check_extremes(op, np.linalg.svd(wrapped(op), compute_uv=False))


@pytest.mark.usefixtures("never_direct")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (48, 30), (30, 48)])
def test_no_frequency_is_missed(rows, columns, seed):
    weight = random(rows, columns, 5, seed=seed)
    symbols = np.fft.fft(weight.numpy(), 79, axis=2).transpose(2, 0, 1)
    values = np.linalg.svd(symbols, compute_uv=False)
    found = circular_extremes(ConvOperator(weight, 79))
    assert found.sigma_max == pytest.approx(values.max(), rel=1e-5)
    assert found.sigma_min == pytest.approx(values.min(), rel=1e-5)
    assert found.mean_log == pytest.approx(np.log(values).mean(), rel=1e-10)


@pytest.mark.usefixtures("never_direct")
@pytest.mark.parametrize("channels", [(6, 6), (6, 4)])
def test_singular_symbols(channels):
    """A kernel that sums to 0 takes constants to 0."""
    weight = random(*channels, 3)
    weight[:, 0] -= weight[:, 0].mean(1, keepdim=True)
    op = ConvOperator(weight, 12)
    found = circular_extremes(op)
    assert found.sigma_min <= 1e-14 * found.sigma_max
    assert found.mean_log == -math.inf


@pytest.mark.usefixtures("never_direct")
def test_small_values_that_a_gram_matrix_loses():
    scales = torch.logspace(0, -9, 10, dtype=torch.float64)
    weight = (random(16, 10, 3) @ torch.eye(3, dtype=torch.float64)) * scales[None, :, None]
    op = ConvOperator(weight, 8)
    values = np.linalg.svd(wrapped(op), compute_uv=False)
    found = circular_extremes(op)
    assert found.sigma_min == pytest.approx(values[-1], rel=1e-5)
    assert found.mean_log == pytest.approx(np.log(values).mean(), abs=1e-6)


def test_closed_form():
    """1, 4, 1 on a torus of an even size: 4 + 2 cos runs from 2 to 6."""
    found = circular_extremes(ConvOperator(kernel(1.0, 4.0, 1.0), 10_000))
    assert found.sigma_max == pytest.approx(6)
    assert found.sigma_min == pytest.approx(2)
    # The mean of log(a + b cos) over a turn is log((a + sqrt(a^2 - b^2)) / 2).
    assert found.mean_log == pytest.approx(math.log((4 + 12**0.5) / 2))


def test_zero_rows_and_zero_weights():
    wide = circular_extremes(ConvOperator(random(3, 2, 1, 1), (4, 4), stride=2, padding=0))
    assert (wide.sigma_min, wide.mean_log) == (0.0, -math.inf)
    assert circular_extremes(ConvOperator(torch.zeros(2, 2, 3), 5)) == (0.0, 0.0, -math.inf)


@pytest.mark.parametrize("scale", [2.0**-400, 2.0**400])
def test_scales(scale):
    op = ConvOperator(random(3, 3, 3), 8)
    one, other = circular_extremes(op), circular_extremes(op.with_weight(scale * op.weight))
    assert other.sigma_max == one.sigma_max * scale
    assert other.sigma_min == one.sigma_min * scale
    assert other.mean_log == pytest.approx(one.mean_log + math.log(scale))


def test_refusals():
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got int"):
        circular_extremes(3)
    with pytest.raises(ValueError, match="the stride 2 does not divide the input size 5"):
        circular_extremes(ConvOperator(random(2, 2, 3), 5, stride=2, padding=1))
    with pytest.raises(ValueError, match="the kernel reaches over 7 points, more than twice"):
        circular_extremes(ConvOperator(random(2, 2, 7), 2))
    with pytest.raises(ValueError, match="expected the symbols to take at most"):
        circular_extremes(ConvOperator(random(2, 2, 3), 8), max_bytes=10)
