"""What `svds` says of the singular values that it does not give."""

import math

import pytest
import torch

import convspectra as cs
from convspectra.spectra._singular_values import METHODS


def layer(generator_seed=0, channels=6, size=(7, 7)):
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.float64, generator=generator)
    return cs.ConvOperator(weight, size)


CASES = [
    (which, method)
    for which in METHODS
    for method in METHODS[which]
    if method not in ("auto", "circulant", "davidson")
]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("which", "method"), CASES)
def test_others_bounds_all_other_values(which, method, k):
    op = layer()
    true = torch.linalg.svdvals(op.to_dense())
    result = cs.svds(op, k, which, method=method, separation=1e-6, maxiter=2000)
    if which == "LM":
        assert result.others >= float(true[k]) * (1 - 1e-12)
    else:
        assert result.others <= float(true[-1 - k]) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("which", "method"), [case for case in CASES if case[1] not in ("lobpcg", "gram")]
)
def test_a_simple_value_is_shown_to_be_separated(which, method):
    result = cs.svds(layer(), 1, which, method=method, separation=1e-6)
    if which == "LM":
        assert result.others < float(result.s[0])
    else:
        assert result.others > float(result.s[0])


@pytest.mark.parametrize(("which", "method"), CASES)
def test_a_repeated_value_is_not_shown_to_be_separated(which, method):
    # Two groups with the same weight: every singular value at least twice.
    weight = layer(channels=3).weight
    op = cs.ConvOperator(torch.cat([weight, weight]), (7, 7), groups=2)
    result = cs.svds(op, 1, which, method=method, separation=1e-6, maxiter=2000)
    if which == "LM":
        assert result.others >= float(result.s[0]) * (1 - 1e-9)
    else:
        assert result.others <= float(result.s[0]) * (1 + 1e-9)


def test_davidson_tells_nothing_of_the_others():
    with pytest.raises(ValueError, match="no separation for method='davidson'"):
        cs.svds(layer(), 1, "LM", method="davidson", separation=1e-6)


@pytest.mark.parametrize("which", ["LM", "SM"])
def test_without_others_there_is_nothing_to_bound(which):
    op = cs.ConvOperator(torch.randn(2, 1, 3, dtype=torch.float64), 4)
    assert cs.svds(op, 4, which).others == (0.0 if which == "LM" else math.inf)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_the_bound_scales_with_the_layer(scale):
    op = layer()
    here = cs.svds(op, 1, "SM", separation=1e-6).others
    there = cs.svds(op.with_weight(op.weight * scale), 1, "SM", separation=1e-6).others
    assert there == pytest.approx(here * scale, rel=1e-6)


def test_separation_costs_less_than_the_next_value():
    op = layer(channels=16, size=(8, 8))
    separated = cs.svds(op, 1, "SM", method="capacitance", separation=1e-6)
    two = cs.svds(op, 2, "SM", method="capacitance")
    assert separated.matvecs < two.matvecs


@pytest.mark.parametrize("separation", [-0.1, 1.0, math.nan])
def test_a_separation_that_cannot_be_is_refused(separation):
    with pytest.raises(ValueError, match="expected a separation between 0 and 1"):
        cs.svds(layer(), 1, separation=separation)
