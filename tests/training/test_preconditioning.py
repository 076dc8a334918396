"""Well-conditioned kernels before training, against the SVD of naive matrices at full size."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers.preconditioned import dense_values, everything, state
from helpers.strategies import Layer, layers
from helpers.training import seeded
from hypothesis import assume, given, settings
from torch import nn

import convspectra as cs

LAYERS = {
    "3 x 3": (lambda: nn.Conv2d(6, 6, 3, padding=1), (6, 10, 9)),
    "3 x 3, beyond the first grid": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 18, 19)),
    "same": (lambda: nn.Conv2d(4, 4, (3, 5), padding="same"), (4, 9, 9)),
    "strided": (lambda: nn.Conv2d(3, 6, 4, stride=2, padding=1), (3, 12, 10)),
    "strided, more inputs": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 12, 11)),
    "patches": (lambda: nn.Conv2d(3, 12, 4, stride=4), (3, 16, 12)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3), (6, 10, 10)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 12, 12)),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), (4, 11, 11)),
    "1-D": (lambda: nn.Conv1d(5, 5, 5, padding=2), (5, 40)),
    "3-D": (lambda: nn.Conv3d(3, 3, 3, padding=1), (3, 5, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), (4, 5, 6)),
    "transposed, stride 1": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), (4, 9, 9)),
    "wide": (lambda: nn.Conv2d(8, 3, 3, padding=1), (8, 9, 9)),
    "tall": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 9, 9)),
    "circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (3, 9, 10)),
    "reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 9, 10)),
    "even, wide": (lambda: nn.Conv2d(6, 3, 2, padding="same"), (6, 9, 9)),
    "even, strided": (lambda: nn.Conv2d(4, 8, 4, stride=2, padding=1), (4, 10, 10)),
    "1 x 1": (lambda: nn.Conv2d(5, 7, 1), (5, 6, 6)),
    "a kernel beyond its grid": (lambda: nn.Conv2d(2, 2, 7, padding=3), (2, 4, 4)),
    "linear": (lambda: nn.Linear(12, 7), (12,)),
    "linear, square": (lambda: nn.Linear(12, 12), (12,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_condition_number_asked_for_is_reached(name):
    make, shape = LAYERS[name]
    layer = seeded(make)
    before = dense_values(layer, shape)
    condition = 1.5
    (report,) = cs.precondition(
        layer, torch.zeros(1, *shape), condition=condition, gain=0.7, include=everything
    )
    after = dense_values(layer, shape)
    assert before[0] / before[-1] > condition, "there was something to do"
    assert after[0] / after[-1] <= condition * (1 + 1e-5)
    assert report.converged
    assert np.sqrt(np.mean(after**2)) == pytest.approx(0.7, rel=1e-6)
    # What it says of the layer, to the accuracy of `_ends`.
    assert report.name == ""
    assert report.input_size == shape[1:]
    assert report.sigma_max == pytest.approx((before[0], after[0]), rel=1e-3)
    assert report.sigma_min == pytest.approx((before[-1], after[-1]), rel=1e-3)
    assert report.condition == pytest.approx(
        (before[0] / before[-1], after[0] / after[-1]), rel=2e-3
    )
    assert 0 < report.iterations <= 100
    assert len(report.grid) == len(shape) - 1
    assert all(points <= n for points, n in zip(report.grid, shape[1:], strict=True))


@given(layers())
@settings(max_examples=40)
def test_any_layer_is_scaled_and_reported_truthfully_or_refused(layer: Layer):
    """Whether it converges or not: the report is that of the weight that the layer now has."""
    operator = layer.operator()
    padding = layer.options.get("padding", "same")
    assume(not (isinstance(padding, (tuple, list)) and isinstance(padding[0], (tuple, list))))
    assume(not (layer.options.get("transposed") and isinstance(padding, str)))
    model = layer.module()
    shape = operator.input_shape
    before = dense_values(model, shape)
    unchanged = state(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        try:
            (report,) = cs.precondition(
                model, torch.zeros(1, *shape).double(), max_iter=10, include=everything
            )
        except ArithmeticError:
            assert before[-1] <= 1e-9 * before[0]
            assert all(torch.equal(unchanged[k], v) for k, v in state(model).items())
            return
    after = dense_values(model, shape)
    assert np.sqrt(np.mean(after**2)) == pytest.approx(1.0, rel=1e-6)
    assert report.sigma_max == pytest.approx((before[0], after[0]), rel=1e-3)
    if after[-1] > 1e-6 * after[0]:
        assert report.sigma_min[1] in (0.0, pytest.approx(after[-1], rel=1e-3))
        if report.sigma_min[1] and abs(after[0] / after[-1] / 2 - 1) > 2e-3:
            assert report.converged == (after[0] <= 2 * after[-1])
    else:
        assert not report.converged


@pytest.mark.parametrize("condition", [1.05, 1.3, 3.0, 20])
def test_gradients_for_a_condition_number(condition):
    """It stops where it is told to: below 1 / 0.9 as well."""
    make, shape = LAYERS["depthwise"]
    layer = seeded(make)
    (report,) = cs.precondition(layer, torch.zeros(1, *shape), condition=condition)
    values = dense_values(layer, shape)
    assert values[0] / values[-1] <= condition * (1 + 1e-5)
    most = {1.05: 60, 1.3: 40, 3.0: 25, 20: 25}[condition]
    assert report.iterations <= most


@pytest.mark.parametrize("gain", [1, 2**0.5, 1e-3])
def test_the_gain_is_the_root_mean_square(gain):
    make, shape = LAYERS["strided"]
    layer = seeded(make)
    cs.precondition(layer, torch.zeros(1, *shape), gain=gain)
    values = dense_values(layer, shape)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_weight(dtype):
    """Computed in double precision and rounded once; a bfloat16 is good to 0.4%."""
    layer = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1)).to(dtype)
    (report,) = cs.precondition(layer, torch.zeros(1, 4, 8, 8, dtype=dtype), condition=1.3)
    values = dense_values(layer, (4, 8, 8))
    eps = torch.finfo(dtype).eps
    assert layer.weight.dtype == dtype
    assert report.converged
    assert values[0] / values[-1] == pytest.approx(report.condition[1], rel=1e-5 + 4 * eps)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(1.0, rel=1e-6 + eps)


def test_the_scale_of_the_initialization_does_not_matter():
    make, shape = LAYERS["1-D"]
    small, large = seeded(make), seeded(make)
    with torch.no_grad():
        small.weight.mul_(2.0**-40)
        large.weight.mul_(2.0**40)
    for layer in (small, large):
        cs.precondition(layer, torch.zeros(1, *shape))
    torch.testing.assert_close(small.weight, large.weight, rtol=1e-6, atol=1e-7)
