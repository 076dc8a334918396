"""Zeros by dependent filters and input channels, against dense singular values."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import layers
from hypothesis import given
from hypothesis import strategies as st

import convspectra as cs
from convspectra.spectra._dependent_channels import without_dependent_channels, zero_triplets

ROUNDING = 1e-10


def direct(op: cs.ConvOperator) -> cs.ConvOperator:
    return op.T if op.transposed else op


def spoiled(op: cs.ConvOperator, kind: str, factor: float) -> cs.ConvOperator:
    """The layer with a filter or an input channel that depends on another."""
    weight = op.weight.detach().clone()
    axis = 0 if kind == "filter" else 1
    rows = weight.movedim(axis, 0)
    rows[-1] = factor * rows[0] if len(rows) > 1 else 0
    return op.with_weight(weight)


@given(layers(), st.sampled_from(("filter", "channel")), st.sampled_from((0.0, 1.0, -2.5)))
def test_zeros_are_zeros_and_the_others_stay(layer, kind, factor):
    op = direct(spoiled(layer.operator(), kind, factor))
    truth = torch.linalg.svdvals(op.to_dense())
    nonzero = truth[truth > ROUNDING * truth[0]]
    if len(nonzero) == 0:
        return
    zeros = len(truth) - len(nonzero)
    assert zero_triplets(op, zeros + 1) is None, "no value is taken for 0 that is not"
    for k in {1, zeros}:
        found = zero_triplets(op, k) if k else None
        if found is not None:
            assert not found.s.any()
            assert bool((found.upper <= ROUNDING * truth[0]).all())
            vectors = torch.cat([found.u, found.v], 1)
            assert torch.allclose(vectors @ vectors.T, torch.eye(k).double(), atol=1e-12)
            images = torch.cat([found.u @ op.to_dense(), found.v @ op.to_dense().T], 1)
            assert float(images.norm()) <= float(ROUNDING * truth[0])
    left = torch.linalg.svdvals(without_dependent_channels(op).to_dense())
    left = left[left > ROUNDING * truth[0]]
    assert torch.allclose(left, nonzero, rtol=0, atol=float(1e-12 * truth[0]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_every_zero_of_a_zero_padded_layer_is_counted(kind, groups):
    torch.manual_seed(0)
    weight = torch.randn(4 * groups, 4, 3, 3, dtype=torch.float64)
    op = spoiled(cs.ConvOperator(weight, (5, 6), padding=1, groups=groups), kind, 3.0)
    zeros = 30 * (groups if kind == "channel" else 1 if groups == 1 else 0)
    if kind == "filter" and groups == 2:  # the last filter is that of another group
        assert zero_triplets(op, 1) is None
        return
    found = zero_triplets(op, zeros)
    assert found is not None
    assert zero_triplets(op, zeros + 1) is None
    result = cs.svds(op, zeros, "SM", return_singular_vectors=False)
    assert (result.method, result.converged, result.logabsdet) == ("structure", True, -torch.inf)
    assert float(result.residuals.max()) < 1e-13


@pytest.mark.parametrize("small", [1e-6, 1e-9])
def test_a_weak_filter_is_none_that_depends(small):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    weight[2] *= small
    op = cs.ConvOperator(weight, (6, 6), padding=1)
    truth = torch.linalg.svdvals(op.to_dense())
    assert zero_triplets(op, 1) is None
    assert cs.sigma_min(op) == pytest.approx(float(truth[-1]), rel=1e-3)


def test_a_large_layer_with_a_dead_filter_takes_no_iteration():
    torch.manual_seed(0)
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    weight[3] = weight[4]
    result = cs.svds(cs.ConvOperator(weight, (64, 64), padding=1), 1, "SM",
                     return_singular_vectors=False)  # fmt: skip
    assert (float(result.s), result.matvecs, result.converged) == (0.0, 0, True)


def test_a_wide_linear_layer_is_not_asked_for_zeros_it_has_none_of():
    """A head of many classes: an SVD of the order of its longer side would not fit in memory."""
    weight = torch.randn(50_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for op in (cs.ConvOperator(weight, ()), cs.ConvOperator(weight[:, :, None, None], (1, 2))):
        assert zero_triplets(op, 1) is None
    assert cs.sigma_min(cs.ConvOperator(weight, ())) == pytest.approx(
        float(torch.linalg.svdvals(weight)[-1]), rel=1e-10
    )


def test_dependent_columns_of_a_tall_kernel_are_found_from_the_smaller_side():
    torch.manual_seed(0)
    weight = torch.randn(3000, 3, 1, 1, dtype=torch.float64)
    weight[:, 2] = weight[:, 0] - weight[:, 1]
    op = cs.ConvOperator(weight, (1, 2))
    found = zero_triplets(op, 2)
    assert found is not None
    assert not found.s.any()
    assert zero_triplets(op, 3) is None
    assert torch.allclose(found.v @ found.v.T, torch.eye(2).double(), atol=1e-12)
    assert float(op.apply(found.v.reshape(2, 3, 1, 2)).abs().max()) < 1e-12
