"""Smallest values by QR, line by line: depthwise, one-dimensional, linear and singular layers."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import random

import convspectra as cs


def smallest(op: cs.ConvOperator) -> torch.Tensor:
    """The singular values of all groups, ascending, by a dense SVD of each."""
    outputs = op.weight.shape[0] // op.groups
    geometry = op.geometry
    found = [
        torch.linalg.svdvals(
            cs.ConvOperator(
                weight,
                geometry.input_size,
                stride=geometry.stride,
                padding=geometry.padding,
                padding_mode=geometry.padding_mode,
            ).to_dense()
        )
        for weight in op.weight.split(outputs)
    ]
    return torch.cat(found).sort().values


LAYERS = {
    "depthwise": (random(6, 1, 3, 3), (18, 20), {"padding": 1, "groups": 6}),
    "near the identity": (
        0.1 * random(6, 1, 5, 5) + torch.nn.functional.pad(torch.ones(1, 1, 1, 1), (2, 2, 2, 2)),
        (18, 18),
        {"padding": 2, "groups": 6},
    ),
    "depthwise, strided": (random(6, 1, 3, 3), (23, 22), {"padding": 1, "groups": 6, "stride": 2}),
    "grouped": (random(8, 4, 3, 3), (12, 12), {"padding": 1, "groups": 2}),
    "long": (random(12, 5, 3), (151,), {"padding": 1}),
    "long, strided": (random(8, 8, 3), (301,), {"stride": 2, "padding": 1}),
    "reflect": (random(9, 1, 3, 3), (14, 15), {"padding_mode": "reflect", "padding": 1}),
    "tall": (random(700, 300), (), {}),
    "wide": (random(300, 700), (), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_enclosures_and_vectors(name):
    weight, size, options = LAYERS[name]
    op = cs.ConvOperator(weight, size, **options)
    true = smallest(op)
    for k in (1, 3):
        found = cs.svds(op, k, "SM", method="qr")
        assert found.converged
        assert (found.lower <= true[:k] * (1 + 1e-12)).all()
        assert (true[:k] <= found.upper).all()
        assert found.others <= float(true[k])
        torch.testing.assert_close(found.s, true[:k], rtol=1e-8, atol=1e-14 * float(true[-1]))
        if float(true[0]) > 1e-10 * float(true[-1]):
            assert float(found.lower[0]) > 0.9 * float(true[0])
            assert found.logabsdet == pytest.approx(float(true.log().sum()), rel=1e-9)
        assert float(found.residuals.max()) < 1e-8 * float(true[-1])


def test_a_singular_channel_ends_the_search(monkeypatch):
    """One channel of six shifts the image, and so loses a line of it."""
    monkeypatch.setattr("convspectra.spectra.ways._qr.PART_BYTES", 1)  # one channel after the other
    weight = 0.1 * random(6, 1, 3, 3)
    weight[:, 0, 1, 1] += 1
    weight[2] = 0
    weight[2, 0, 1, 2] = 1.0
    op = cs.ConvOperator(weight, (16, 17), padding=1, groups=6)
    true = smallest(op)
    for k in (1, 16, 18):  # the shift has 16 values 0
        found = cs.svds(op, k, "SM", method="qr")
        assert found.converged == (k <= 16)  # beyond the zeros rounding hides what it is beside
        assert float(found.s[0]) < 1e-14
        assert (found.upper >= true[:k]).all()
        assert (found.lower <= true[:k] + 1e-14).all()
        if k > 16:
            continue
        torch.testing.assert_close(found.s, true[:k], rtol=1e-8, atol=1e-13)
        assert found.others <= float(true[k])
        assert (found.logabsdet is None) or found.logabsdet < -100


def test_values_that_a_depthwise_layer_has_beside_its_zeros_are_not_claimed():
    """Random channels on 30 x 40 points are singular to working precision; `auto` says so."""
    op = cs.ConvOperator(random(64, 1, 3, 3), (30, 40), padding=1, groups=64)
    found = cs.svds(op, 1, "SM", return_singular_vectors=False)
    assert (found.method, found.converged) == ("qr", True)
    assert float(found.lower[0]) == 0.0
    assert float(found.upper[0]) < 1e-11
    one = cs.ConvOperator(op.weight[:1], (30, 40), padding=1)
    assert float(cs.sigma_min(one, method="dense")) < 1e-8


def test_a_triangle_that_does_not_fit_is_refused():
    op = cs.ConvOperator(random(4, 4, 3, 3), (30, 30), padding=1)
    with pytest.raises(ValueError, match="expected the triangle to take at most max_bytes=1,000"):
        cs.svds(op, 1, "SM", method="qr", max_bytes=1000)
