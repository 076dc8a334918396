"""The public upper bound on sigma_max, against NumPy's SVD of the naive matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.closed_forms import Separable, dense_values, orthogonal
from helpers.kernels import kernel
from helpers.strategies import MODES, Layer, layers, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convspectra as cs
from convspectra import ConvOperator
from convspectra.spectra._bounds import tap_norm_bound
from convspectra.torus._circulant_gram import CirculantGram, gram_cost

ROUNDING = 1e-13


def check(layer: Layer) -> float:
    """The bound is above the norm of the naive matrix; its ratio to it."""
    bound, true = cs.norm_bound(layer.operator()), float(dense_values(layer)[0])
    assert isinstance(bound, float)
    assert math.isfinite(bound)
    assert bound >= (1 - ROUNDING) * true
    return bound / true if true else math.inf


# --- above sigma_max ------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=250)
def test_it_is_above_the_largest_value_for_any_layer(layer):
    check(layer)


@given(layers(), st.floats(0.1, 3.0))
@settings(max_examples=100)
def test_it_is_above_the_largest_value_of_smooth_layers(layer, power):
    """Positive taps: they lose nothing by cancellation at a border, so the bound is near."""
    check(Layer(layer.weight.abs() ** power, layer.input_size, layer.options))


OPTIONS = {
    "linear": Layer(random(4, 6), ()),
    "1 axis": Layer(random(2, 3, 3), (9,)),
    "3 axes": Layer(random(2, 2, 3, 2, 3), (3, 4, 3)),
    "stride": Layer(random(4, 2, 3, 3), (8, 7), {"stride": 2, "padding": 1}),
    "stride and dilation": Layer(
        random(2, 2, 3), (23,), {"stride": 3, "dilation": 2, "padding": 2}
    ),
    "kernel == stride": Layer(random(8, 2, 2, 2), (6, 4), {"stride": 2, "padding": 0}),
    "dilation": Layer(random(2, 2, 3, 3), (9, 8), {"dilation": 2}),
    "dilation, padding 0": Layer(random(2, 2, 3), (15,), {"dilation": 3, "padding": 0}),
    "groups": Layer(random(6, 1, 3, 3), (5, 5), {"groups": 3}),
    "asymmetric": Layer(random(2, 2, 3), (8,), {"padding": [(2, 0)]}),
    "transposed": Layer(
        random(3, 2, 3, 3), (5, 4), {"transposed": True, "stride": 2, "padding": 1}
    ),
    "transposed, output padding": Layer(
        random(3, 2, 3),
        (7,),
        {"transposed": True, "stride": 3, "padding": 1, "output_padding": 2},
    ),
    "transposed, groups": Layer(
        random(4, 2, 3, 3), (4, 4), {"transposed": True, "groups": 2, "padding": 1}
    ),
    "transposed, output padding beyond the stride": Layer(
        random(2, 2, 1), (5,), {"transposed": True, "dilation": 2, "output_padding": 1}
    ),
} | {
    f"{mode}, {name}": Layer(weight, size, {"padding_mode": mode, **options})
    for mode in MODES
    for name, (weight, size, options) in {
        "same": (random(2, 3, 3, 3), (5, 6), {}),
        "stride": (random(3, 2, 3), (9,), {"stride": 2, "padding": 1}),
        "wide padding": (random(2, 2, 3, 3), (5, 4), {"padding": 3}),
        "3 axes, groups": (random(2, 1, 3, 1, 3), (3, 4, 3), {"groups": 2}),
    }.items()
}


@pytest.mark.parametrize("layer", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(layer):
    """Above it, and near: within the times that an input is read, and 40% for a small torus."""
    mode = layer.options.get("padding_mode", "zeros")
    reads = {"zeros": 1, "circular": 4, "reflect": 4, "replicate": 16}[mode]
    assert check(layer) <= 1.4 * reads ** (len(layer.input_size) / 2)


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_an_input_that_is_read_several_times(mode, n):
    """The mean of all taps, padded so that a border pixel is read twice (or thrice)."""
    options = {"padding_mode": mode, "padding": 2 if mode != "replicate" else 1}
    ratio = check(Layer(kernel(0.25, 0.5, 0.25), (n,), options))
    assert ratio <= 2**0.5 * 1.01


def test_where_all_reads_count_the_bound_is_reached():
    """Replicate padding of one pixel and one tap: M has rows of one 1 each, 7 of them equal."""
    layer = Layer(torch.ones(1, 1, 1).double(), (1,), {"padding": 3, "padding_mode": "replicate"})
    assert check(layer) == pytest.approx(1.0, rel=1e-10)
    assert cs.norm_bound(layer.operator()) == pytest.approx(7**0.5, rel=1e-10)


def test_no_input_is_read():
    """Two taps that meet only padded zeros: M is 0 though the weight is not."""
    layer = Layer(random(1, 1, 2), (1,), {"padding": 2, "dilation": 3})
    assert not dense_values(layer).any()
    assert cs.norm_bound(layer.operator()) == 0.0


# --- near sigma_max -------------------------------------------------------------------------------

CIRCULAR = {
    "1 axis": Layer(random(2, 3, 3), (7,)),
    "even kernel": Layer(random(2, 2, 4), (8,)),
    "2 axes": Layer(random(3, 3, 3, 3), (5, 6)),
    "tall": Layer(random(4, 2, 3, 2), (4, 5)),
    "wide": Layer(random(2, 4, 3, 3), (4, 5)),
    "groups": Layer(random(4, 2, 3, 3), (5, 5), {"groups": 2}),
    "dilation": Layer(random(2, 2, 3, 3), (7, 6), {"dilation": 2}),
    "asymmetric": Layer(random(2, 2, 3), (9,), {"padding": [(2, 0)]}),
    "long": Layer(random(2, 2, 5), (60,)),
    "3 axes": Layer(random(2, 1, 3, 2, 3), (3, 4, 3)),
}
for circular in CIRCULAR.values():
    circular.options["padding_mode"] = "circular"


@pytest.mark.parametrize("layer", CIRCULAR.values(), ids=CIRCULAR.keys())
def test_for_circular_padding_it_is_the_norm(layer):
    assert check(layer) <= 1 + 1e-9


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
def test_for_linear_layers_it_is_the_norm(shape):
    assert check(Layer(random(*shape), ())) <= 1 + 1e-9


@pytest.mark.parametrize("groups", [1, 2])
def test_for_layers_of_separate_pixels_it_is_the_norm(groups):
    assert check(Layer(random(4, 3, 1, 1), (3, 4), {"groups": groups})) <= 1 + 1e-9
    options = {"groups": groups, "stride": 2, "padding": 0}
    assert check(Layer(random(4, 3, 1), (9,), options)) <= 1 + 1e-9


@pytest.mark.parametrize(("seed", "limit"), [(0, 1.0025), (1, 1.002)])
def test_it_is_near_the_norm_of_a_random_layer(seed, limit):
    """3 channels on 24 x 24 points: the cut wins back more than half of what the torus loses."""
    op = ConvOperator(random(3, 3, 3, 3, seed=seed), (24, 24))
    dense = op.to_dense()
    true = float(torch.linalg.eigvalsh(dense.T @ dense)[-1]) ** 0.5
    bound = cs.norm_bound(op)
    assert (1 - 1e-12) * true <= bound <= limit * true
    whole = float(CirculantGram(op).upper_bounds(1))
    assert bound - true <= 0.5 * (whole - true)


@pytest.mark.parametrize("n", [16, 40, 100])
def test_it_nears_closed_forms(n):
    """Separable layers, up to 30 000 points: the ratio nears 1 with the square of the points."""
    layer = Separable(orthogonal(3), ((1.0, 2.0, 0.5), (0.5, 1.0, 0.5)), (n, n))
    true = float(layer.values()[0])
    assert true <= cs.norm_bound(layer.operator()) <= (1 + 8 / n**2) * true
    assert cs.norm_bound(layer.transposed()) == pytest.approx(cs.norm_bound(layer.operator()))


def test_it_is_above_what_sigma_max_finds():
    for seed in range(3):
        op = ConvOperator(random(8, 4, 3, 3, seed=seed), (20, 20), stride=2, padding=1)
        assert cs.sigma_max(op) * (1 - 1e-6) <= cs.norm_bound(op) <= 1.02 * cs.sigma_max(op)


# --- the weight -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-150, 1e-8, -1.0, 1e8, 1e150])
@pytest.mark.parametrize("name", ["1 axis", "groups", "linear", "replicate, stride", "transposed"])
def test_it_scales_with_the_weight(name, scale):
    op = OPTIONS[name].operator()
    scaled = cs.norm_bound(op.with_weight(scale * op.weight))
    assert scaled == pytest.approx(abs(scale) * cs.norm_bound(op), rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ["1 axis", "linear", "transposed", "reflect, same", "stride"])
def test_a_zero_weight_has_norm_zero(name):
    op = OPTIONS[name].operator()
    bound = cs.norm_bound(op.with_weight(torch.zeros_like(op.weight)))
    assert isinstance(bound, float)
    assert bound == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["1 axis", "groups", "linear", "replicate, same", "transposed"])
def test_any_floating_weight_is_bounded_in_double_precision(name, dtype):
    layer = OPTIONS[name]
    weight = layer.weight.to(dtype)
    bound = cs.norm_bound(layer.operator(weight))
    assert isinstance(bound, float)
    assert bound == cs.norm_bound(layer.operator(weight.double()))
    check(Layer(weight.double(), layer.input_size, layer.options))


def test_a_weight_that_needs_a_gradient():
    op = OPTIONS["groups"].operator()
    weight = op.weight.clone().requires_grad_()
    assert cs.norm_bound(op.with_weight(weight)) == cs.norm_bound(op)
    assert weight.grad is None


def test_it_is_the_same_every_time():
    op = OPTIONS["dilation"].operator()
    assert cs.norm_bound(op) == cs.norm_bound(op)


# --- what it takes --------------------------------------------------------------------------------


def test_too_few_bytes_are_refused():
    op = ConvOperator(random(4, 3, 3, 3), (6, 7))
    needed = math.ceil(gram_cost(op)[1])
    bound = cs.norm_bound(op)
    assert cs.norm_bound(op, max_bytes=needed) == bound
    for max_bytes in (needed - 1, 100, 0):
        with pytest.raises(ValueError, match="max_bytes"):
            cs.norm_bound(op, max_bytes=max_bytes)


@pytest.mark.parametrize("name", OPTIONS)
def test_too_few_bytes_are_refused_for_all_layers(name):
    with pytest.raises(ValueError, match="max_bytes"):
        cs.norm_bound(OPTIONS[name].operator(), max_bytes=10)


@pytest.mark.parametrize("value", [random(2, 2, 3), nn.Conv1d(2, 2, 3), None, "op"])
def test_only_operators_are_accepted(value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator"):
        cs.norm_bound(value)


# --- the bound from the taps alone ----------------------------------------------------------------


def check_taps(layer: Layer) -> tuple[float, np.ndarray]:
    """Between the norm and the Frobenius norm of the naive matrix; it and the singular values."""
    bound, values = tap_norm_bound(layer.operator()), dense_values(layer)
    assert isinstance(bound, float)
    assert bound >= values[0] * (1 - ROUNDING)
    assert bound <= np.sqrt(np.sum(values**2)) * (1 + 1e-12) + 1e-300
    return bound, values


@given(layers())
@settings(max_examples=200)
def test_taps_bound_any_layer(layer):
    bound, values = check_taps(layer)
    taps = math.prod(layer.weight.shape[2:])
    mode = layer.options.get("padding_mode", "zeros")
    if mode == "zeros":
        # The matrix of a tap that is read anywhere is a block of M.
        assert bound <= taps * values[0] * (1 + 1e-12)


@given(layers(), st.sampled_from([1.0, -1.0]))
@settings(max_examples=100)
def test_taps_bound_layers_of_one_sign(layer, sign):
    """Nothing cancels: the norm is as large as taps of these sizes allow."""
    check_taps(Layer(sign * torch.ones_like(layer.weight), layer.input_size, layer.options))


@pytest.mark.parametrize("layer", OPTIONS.values(), ids=OPTIONS.keys())
def test_taps_bound_all_options(layer):
    check_taps(layer)


@pytest.mark.parametrize("n", [9, 24])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_for_one_tap_it_is_the_norm(n, size):
    weight = torch.zeros(3, 4, 5, dtype=torch.float64)
    weight[:, :, 2] = size * random(3, 4)
    bound, values = check_taps(Layer(weight, (n,)))
    assert bound == pytest.approx(values[0], rel=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_it_is_near_for_positive_taps_and_the_number_of_taps_too_large_at_most(mode):
    bound, values = check_taps(Layer(kernel(1.0, 1.0, 1.0), (40,), {"padding_mode": mode}))
    assert bound <= 1.01 * values[0]
    orthogonal_taps = np.zeros((3, 3, 3))
    for p in range(3):
        orthogonal_taps[p, p, p] = 1.0
    layer = Layer(torch.from_numpy(orthogonal_taps), (40,), {"padding_mode": mode})
    bound, values = check_taps(layer)
    assert bound == pytest.approx(3 * values[0], rel=1e-12)


def test_it_is_never_above_the_frobenius_norm():
    """One output pixel: all taps are one row, whose norm is its Frobenius norm."""
    layer = Layer(random(1, 2, 4), (4,), {"padding": 0})
    bound, values = check_taps(layer)
    assert bound == pytest.approx(values[0], rel=1e-12)


def test_inputs_that_are_read_several_times_by_one_tap():
    """Replicate padding: a border pixel 7 times by the only tap."""
    layer = Layer(kernel(2.0), (1,), {"padding": 3, "padding_mode": "replicate"})
    bound, values = check_taps(layer)
    assert values[0] == pytest.approx(2 * 7**0.5)
    assert bound == pytest.approx(2 * 7**0.5, rel=1e-12)


def test_the_largest_group_counts():
    weight = random(4, 2, 1)
    weight[2:] *= 10
    bound, values = check_taps(Layer(weight, (5,), {"groups": 2}))
    assert bound == pytest.approx(values[0], rel=1e-12)
    assert bound == pytest.approx(np.linalg.norm(weight[2:, :, 0].numpy(), 2), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_taps_of_any_type_are_bounded_in_double_precision(dtype):
    layer = OPTIONS["groups"]
    weight = layer.weight.to(dtype).requires_grad_()
    bound = tap_norm_bound(layer.operator(weight))
    assert bound == tap_norm_bound(layer.operator(weight.detach().double()))


def test_zero_taps():
    layer = OPTIONS["stride"]
    assert tap_norm_bound(layer.operator(torch.zeros_like(layer.weight))) == 0.0
    unread = Layer(random(1, 1, 2), (1,), {"padding": 2, "dilation": 3})
    assert tap_norm_bound(unread.operator()) == 0.0
