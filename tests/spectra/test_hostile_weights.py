"""Weights that cancel, taps that read nothing, and entries from 1e-300 to 1e300."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import convspectra as cs
from benchmarks.random_layers import random_layer
from benchmarks.truth import Truth, outcomes
from convspectra.operator import with_distinct_taps

KINDS = ("cancelling", "unread", "span")


def layers_of(kind: str, count: int, seed: int = 7) -> list[int]:
    found = (i for i in itertools.count() if random_layer(seed, i).kind == kind)
    return list(itertools.islice(found, count))


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_holds_the_true_values(kind: str) -> None:
    for index in layers_of(kind, 8):
        failures = [outcome for outcome in outcomes(index, 7) if outcome.failed]
        assert not failures, failures


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_on_the_norm_are_above_it(kind: str) -> None:
    for index in layers_of(kind, 25):
        layer = random_layer(7, index)
        truth = Truth(layer)
        bound = math.ldexp(cs.norm_bound(layer.operator()), -truth.exponent)
        assert bound >= truth.values[0] * (1 - 1e-14), layer


@pytest.mark.parametrize("index", [55, 803])
def test_bounds_of_weights_that_underflow(index: int) -> None:
    """Leading vectors of such symbols were NaN."""
    layer = random_layer(11, index)
    assert layer.kind == "span"
    truth = Truth(layer)
    assert math.ldexp(cs.norm_bound(layer.operator()), -truth.exponent) >= truth.values[0]


@pytest.mark.parametrize(
    ("taps", "size", "padding", "mode"),
    [
        ([1.0, 1e-8, -1.0], 1, 1, "replicate"),
        ([1.0, 1e-8, -1.0], 1, 1, "circular"),
        ([1.0, 1e-8, -1.0], 2, 1, "circular"),
        ([1.0, 1e-8, -1.0], 2, 1, "reflect"),
        ([1.0, 3.0, 1e-8, -3.0, -1.0], 1, 2, "replicate"),
        ([0.1, 0.3, 1e-8, -0.3, -0.1], 2, 2, "circular"),
    ],
)
def test_taps_that_cancel(taps: list[float], size: int, padding: int, mode: str) -> None:
    weight = torch.tensor([[taps]], dtype=torch.float64)
    op = cs.ConvOperator(weight, size, padding=padding, padding_mode=mode)
    distinct = with_distinct_taps(op)
    entries = [Fraction(0) for _ in range(size * size)]
    for tap, value in enumerate(taps):
        alone = torch.zeros_like(weight)
        alone[..., tap] = 1.0
        counted = op.with_weight(alone).to_dense().flatten().tolist()
        entries = [e + Fraction(value) * int(n) for e, n in zip(entries, counted, strict=True)]
    exact = np.array([float(e) for e in entries]).reshape(size, size)
    np.testing.assert_array_equal(distinct.to_dense().numpy(), exact)
    values = np.linalg.svd(exact, compute_uv=False)
    for which, true in (("LM", values[0]), ("SM", values[-1])):
        found = cs.svds(op, 1, which)
        assert float(found.lower) <= true * (1 + 1e-15)
        assert true * (1 - 1e-15) <= float(found.upper)
        assert float(found.s) == pytest.approx(true, rel=1e-12)
    assert cs.norm_bound(op) >= values[0]
    assert float(cs.logabsdet(op)) == pytest.approx(np.log(values).sum(), rel=1e-12)


def test_distinct_taps_pass_gradients_on() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for size, mode in (((1, 4), "replicate"), ((2, 2), "circular"), ((1, 1), "zeros")):
        op = cs.ConvOperator(weight, size, padding=1, padding_mode=mode)

        def matrix(w: Tensor, op: cs.ConvOperator = op) -> Tensor:
            return with_distinct_taps(op.with_weight(w)).to_dense()

        torch.testing.assert_close(matrix(weight), op.to_dense(), rtol=0, atol=1e-15)
        assert torch.autograd.gradcheck(matrix, (weight,))


@pytest.mark.parametrize("seed", range(12))
def test_groups_of_unlike_scale_by_their_gram_matrices(seed: int) -> None:
    """A value that rounding loses in one group may be smaller than any of another."""
    rng = np.random.default_rng(seed)
    singular = rng.standard_normal((12, 11)) @ rng.standard_normal((11, 12))
    small = 1e-9 * np.linalg.qr(rng.standard_normal((12, 12)))[0]
    weight = torch.from_numpy(np.concatenate([singular, small]))[:, :, None]
    found = cs.svds(cs.ConvOperator(weight, 1, groups=2), 1, "SM", method="gram")
    assert float(found.lower) <= 1e-13  # the group of rank 11 has a value of 0


def test_an_iteration_that_does_not_converge_bounds_the_smallest_value_from_above() -> None:
    """The vectors of this one had a norm of 1e-9, and the value was as much too small."""
    found = [outcome for outcome in outcomes(692, 0) if outcome.way.startswith("SM")]
    assert "SM davidson" in {outcome.way for outcome in found}
    assert not [outcome for outcome in found if outcome.missed], found
