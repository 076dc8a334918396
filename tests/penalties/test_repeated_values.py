"""Gradients of penalties where singular values are repeated or vanish."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.index_sets import some_indices
from helpers.kernels import identity, kernel
from helpers.penalties import check, value_and_gradient
from helpers.strategies import Layer, random

import convspectra as cs
from convspectra import penalties
from convspectra.penalties import _extremes as extremes
from convspectra.penalties._extremes import CLUSTER_LIMIT, CLUSTER_TOLERANCE

REPEATED = {
    "identity": (Layer(identity(2), (3, 3)), 18),
    "identity, 1 axis": (Layer(kernel(0, 1, 0), (7,)), 7),
    "orthogonal mixing": (
        Layer(torch.linalg.qr(random(3, 3)).Q[..., None, None], (2, 2)),
        12,
    ),
    "kernel 1": (Layer(random(3, 2, 1, 1), (3, 2)), 6),
    "depthwise copies": (Layer(random(1, 1, 3).repeat(3, 1, 1), (5,), {"groups": 3}), 3),
    "symmetric": (
        Layer(
            kernel([0.1, 1, 0.1], [1, 5, 1], [0.1, 1, 0.1]), (4, 4), {"padding_mode": "circular"}
        ),
        1,
    ),
    "circular difference and 3": (Layer(kernel(-1, 3, 1), (8,), {"padding_mode": "circular"}), 2),
    "small copies": (
        Layer(random(1, 1, 3).repeat(2, 1, 1) * 1e-3, (5,), {"groups": 2}),
        2,
    ),
    "capacitance": (
        Layer(
            kernel([0, 1, 0], [1, -5, 1], [0, 1, 0]).repeat(5, 1, 1, 1),
            (8, 8),
            {"groups": 5},
        ),
        5,
    ),
}


@pytest.mark.parametrize(("layer", "copies"), REPEATED.values(), ids=REPEATED.keys())
def test_repeated_values_have_the_mean_over_the_cluster(layer, copies):
    dense = layer.dense().detach()
    s = torch.linalg.svdvals(dense)
    assert int((s <= s[-1] * (1 + 1e-9)).sum()) == copies
    value, gradient = value_and_gradient("sigma_min", layer)
    assert math.isclose(value, -float(s[-1]), rel_tol=1e-12)
    assert gradient.isfinite().all()
    for name in ("sigma_min", "conditioning", "stein"):
        check(name, layer, indices=some_indices(layer, 6))


def test_a_cluster_is_told_from_its_neighbours():
    """Two copies, and a third value that is further away than the tolerance."""
    one = random(1, 1, 3)
    for distance, copies in ((10 * CLUSTER_TOLERANCE, 2), (0.1 * CLUSTER_TOLERANCE, 3)):
        weight = torch.cat([one, one, one * (1 + distance)])
        layer = Layer(weight, (5,), {"groups": 3})
        _, gradient = value_and_gradient("sigma_min", layer)
        shares = gradient.flatten(1).norm(dim=1)
        alone = value_and_gradient("sigma_min", Layer(one, (5,)))[1].norm()
        assert torch.allclose(shares[:copies], alone / copies, rtol=1e-5)
        assert copies == 3 or float(shares[2]) < 1e-6 * float(alone)


def test_small_repeated_values_are_known_only_to_rounding_and_still_one_cluster():
    """At 1e-11 of sigma_max rounding tears two copies apart by far more than the tolerance."""
    one = kernel(1, 2, 1)[0, 0]
    blocks = torch.zeros(3, 3, 3, dtype=torch.float64)
    blocks[0, 0] = blocks[1, 1] = 1e-10 * one
    blocks[2, 2] = kernel(1, 5, 1)[0, 0]
    left, right = (torch.linalg.qr(random(3, 3, seed=seed)).Q for seed in (0, 1))
    layer = Layer(torch.einsum("ab,bcp,cd->adp", left, blocks, right), (9,))
    s = cs.svdvals(layer.operator())
    assert s[-2] / s[-1] - 1 > 10 * CLUSTER_TOLERANCE
    _, gradient = value_and_gradient("sigma_min", layer)
    unmixed = torch.einsum("ba,bcp,dc->adp", left, gradient, right)
    expected = torch.zeros_like(blocks)
    alone = value_and_gradient("sigma_min", Layer(one[None, None], (9,)))[1][0, 0]
    expected[0, 0] = expected[1, 1] = alone / 2
    assert torch.allclose(unmixed, expected, atol=1e-4)


def test_several_values_that_end_inside_a_cluster():
    """k = 3 of the values 1, 2, 2, 2, 3: the copies of 2 share two thirds between them."""
    factors = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    layer = Layer(factors[:, None, None], (1,), {"groups": 5})
    value, gradient = value_and_gradient("sigma_min", layer, k=3)
    assert math.isclose(value, -5 / 3)
    expected = -torch.tensor([3, 2, 2, 2, 0], dtype=torch.float64) / 9
    assert torch.allclose(gradient.flatten(), expected, atol=1e-14)
    value, gradient = value_and_gradient("sigma_min", layer, k=5)
    assert math.isclose(value, -2)
    assert torch.allclose(gradient.flatten(), -torch.full((5,), 0.2, dtype=torch.float64))


def test_a_cluster_larger_than_the_limit_costs_no_more_than_the_limit(monkeypatch):
    """The identity of 400 rows: nn.init.dirac_ makes such layers, of any size."""
    asked = []
    original = extremes.svds
    monkeypatch.setattr(
        extremes,
        "svds",
        lambda op, k, which, **options: asked.append(k) or original(op, k, which, **options),
    )
    layer = Layer(identity(4), (10, 10))
    value, gradient = value_and_gradient("sigma_min", layer)
    assert max(asked) <= 2 * (CLUSTER_LIMIT + 2)
    assert math.isclose(value, -1, rel_tol=1e-12)
    # A subgradient: u'v over the copies at hand, of mean -1 on the center taps together.
    assert math.isclose(float((gradient * identity(4)).sum()), -1, rel_tol=1e-10)
    assert gradient.abs().max() <= 1


@pytest.mark.parametrize("size", [(3, 3), (64, 64)], ids=["small", "large"])
def test_zero_weight(size):
    """Finite everywhere, and no cluster of 32,768 zeros is looked for."""
    layer = Layer(torch.zeros(8, 8, 3, 3).double(), size)
    n = min(layer.operator().shape)
    for name, expected in (("frobenius", 0.0), ("sigma_min", 0.0), ("conditioning", 0.0)):
        value, gradient = value_and_gradient(name, layer)
        assert value == expected
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= (n if name == "conditioning" else 1)
    with pytest.raises(ArithmeticError, match="Stein's loss is infinite: ConvOperator"):
        penalties.stein(layer.operator())


SINGULAR = {
    "copied output": Layer(random(4, 4, 3, 3)[[0, 1, 1, 3]], (5, 5)),
    "copied output, large": Layer(random(4, 4, 3, 3)[[0, 1, 1, 3]], (9, 9)),
    "1 0 1": Layer(kernel(1, 0, 1), (9,)),
    "1 0 1, large": Layer(kernel(1, 0, 1), (291,)),
    "windows that miss": Layer(random(1, 1, 1), (1,), {"padding": 2, "stride": 4}),
}


@pytest.mark.parametrize("layer", SINGULAR.values(), ids=SINGULAR.keys())
def test_singular_layers_have_finite_gradients(layer):
    value, gradient = value_and_gradient("sigma_min", layer)
    assert abs(value) <= 1e-13 * float(layer.weight.norm())
    assert gradient.isfinite().all()
    assert value_and_gradient("conditioning", layer)[1].isfinite().all()
    with pytest.raises(ArithmeticError, match="rank deficient; expected a layer with full rank"):
        penalties.stein(layer.operator(layer.weight.clone().requires_grad_()))


def test_a_step_along_the_gradient_of_a_singular_layer_lifts_it():
    layer = SINGULAR["copied output"]
    _, gradient = value_and_gradient("sigma_min", layer)
    lifted = cs.svds(layer.operator(layer.weight - 1e-3 * gradient), 1, "LM")
    assert lifted.converged
    assert float(gradient.norm()) > 0
