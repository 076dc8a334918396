"""Extreme singular values that counts prove to be the extreme ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.strategies import Layer, layers, one_thread, random  # noqa: F401
from helpers.svds import check, truth
from hypothesis import given, settings

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator import normalized
from convspectra.solvers import dense_svd
from convspectra.spectra._count import proven_by_counts

LARGE = {
    "square": Layer(random(8, 8, 3, 3) / 8, (18, 18)),
    "stride": Layer(random(12, 6, 3, 3) / 8, (25, 24), {"stride": 2, "padding": 1}),
    "groups": Layer(random(12, 6, 3, 3) / 8, (15, 15), {"groups": 2}),
}


@given(layers())
@settings(max_examples=60)
def test_random_layers(layer: Layer) -> None:
    op, true = layer.operator(), truth(layer)
    for which, k in itertools.product(("LM", "SM"), range(1, min(3, *op.shape) + 1)):
        check(layer, cs.svds(op, k, which, certify="count"), k, which, true)


@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize("name", LARGE)
def test_layers_that_are_counted_by_inertia(name: str, which: str) -> None:
    layer = LARGE[name]
    true = truth(layer)
    result = cs.svds(layer.operator(), 2, which, certify="count")
    check(layer, result, 2, which, true)
    assert result.converged
    assert "without chance" in result.certificate
    assert not result.certificate.endswith(" 0 factorizations")
    next_one = true[2] if which == "LM" else true[-3]
    assert result.others == pytest.approx(next_one, rel=1e-4)
    width = (result.upper - result.lower) / result.s
    assert float(width.max()) < 1e-4


@pytest.mark.parametrize("largest", [True, False])
def test_a_value_that_was_missed_is_noticed(largest: bool) -> None:
    op, _ = normalized(ConvOperator(random(3, 3, 3), 20))
    triplets = dense_svd(op.to_dense()[None], 4, largest)
    kept = [0, 2, 3]
    missed = replace(
        triplets,
        **{name: getattr(triplets, name)[kept] for name in ("u", "s", "v", "lower", "upper")},
    )
    whole = proven_by_counts(op, triplets, 3, largest, 1e-8, 2**30)
    lacking = proven_by_counts(op, missed, 2, largest, 1e-8, 2**30)
    assert whole.converged
    assert not lacking.converged
    assert torch.allclose(whole.s, triplets.s[:3])


def test_the_choice_is_checked() -> None:
    with pytest.raises(ValueError, match="expected certify to be one of"):
        cs.svds(ConvOperator(random(2, 2, 3), 9), certify="luck")
