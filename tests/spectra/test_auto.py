"""Which way is taken for which layer."""

import math

import pytest
import torch

import convspectra as cs
from benchmarks.layers import smoothed
from convspectra import ConvOperator
from convspectra.spectra import _auto as auto
from convspectra.spectra._request import Request
from convspectra.spectra.ways import _davidson as preconditioned


def request(op: ConvOperator, k: int, *, largest: bool) -> Request:
    return Request(op, k, largest, True, 1e-6, None, torch.Generator(), 2**31, None)


def near_the_identity(channels: int, n: int, noise: float) -> ConvOperator:
    torch.manual_seed(0)
    weight = noise * torch.randn(channels, channels, 3, 3, dtype=torch.float64)
    weight /= 3 * channels**0.5
    weight[range(channels), range(channels), 1, 1] += 1
    return ConvOperator(weight, (n, n))


@pytest.mark.parametrize(
    ("channels", "n", "k", "way"),
    [
        (64, 32, 1, "davidson"),
        (64, 32, 5, "davidson"),
        (64, 32, 10, "lanczos"),
        (16, 112, 10, "davidson"),
        (128, 28, 1, "lanczos"),
        (512, 7, 1, "lanczos"),
        (512, 7, 10, "lanczos"),
    ],
)
def test_the_circulant_must_pay_for_itself(channels, n, k, way):
    op = ConvOperator(torch.zeros(channels, channels, 3, 3, dtype=torch.float64), (n, n), padding=1)
    assert auto.candidates(request(op, k, largest=True))[0].way.name == way


@pytest.mark.parametrize(
    ("channels", "n", "noise", "way"),
    [
        (64, 24, 0.3, "lanczos"),
        (64, 24, 3.0, "capacitance"),  # badly conditioned
        (16, 24, 0.3, "capacitance"),  # cheap to factor
    ],
)
def test_well_conditioned_layers_are_not_factored_where_that_is_dear(channels, n, noise, way):
    op = near_the_identity(channels, n, noise)
    asked = auto.candidates(request(op, 1, largest=False))
    assert (asked[0].way.name, asked[0].trial) == (way, way == "lanczos")
    assert "capacitance" in [choice.way.name for choice in asked]


@pytest.mark.parametrize(
    ("shape", "size", "next_way"),
    [
        ((88, 1, 5, 5), (3, 96), "dense"),  # 88 blocks of order 288
        ((32, 1, 3, 3), (6, 96), "dense"),  # not even its Gram matrix at once
        ((24, 1, 3, 3), (32, 32), "davidson"),
        ((60, 2, 5, 5), (9, 12), "dense"),  # the augmented matrix before
        ((60, 2, 5, 5), (16, 24), "davidson"),
    ],
)
def test_what_factors_do_not_tell_is_dense_where_that_is_cheap(shape, size, next_way):
    groups = shape[0] // 3 if shape[1] == 2 else shape[0]
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    op = cs.ConvOperator(weight, size, padding=shape[2] // 2, groups=groups)
    names = [choice.way.name for choice in auto.candidates(request(op, 1, largest=False))]
    tried = {"capacitance", "gram", "augmented", "qr"}
    assert next(name for name in names if name not in tried) == next_way
    assert names.count("dense") == 1


@pytest.mark.parametrize(
    ("shape", "size", "options", "way"),
    [
        ((768, 3072), (), {}, "qr"),
        ((900, 900), (), {}, "qr"),
        ((6200, 768), (), {}, "gram"),  # much wider: the Gram matrix takes a third of the time
        ((96, 1, 3, 3), (28, 28), {"stride": 2}, "qr"),
        ((40, 1, 3, 3), (14, 14), {}, "capacitance"),
    ],
)
def test_lines_are_eliminated_where_that_costs_least(shape, size, options, way):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = shape[0] if len(shape) > 2 and shape[1] == 1 else 1
    padding = 1 if size else 0
    op = cs.ConvOperator(weight, size, padding=padding, groups=groups, **options)
    # As for a layer that does not seem well-conditioned.
    names = [choice.way.name for choice in auto.candidates(request(op, 1, largest=False))]
    assert next(name for name in names if name != "lanczos") == way


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("k", "ways"), [(1, None), (100, ["gram", "dense"])])
def test_many_values_take_no_iteration(k, ways, largest):
    weight = torch.randn(20, 10, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    op = ConvOperator(weight, (10, 10), padding=1)
    names = [choice.way.name for choice in auto.candidates(request(op, k, largest=largest))]
    assert (names == ways) == (ways is not None)


SMOOTH = {
    "wide": ((32, 16, 3, 3), (28, 28), {"stride": 2, "padding": 1}, 10.0),
    "tall": ((32, 3, 7, 7), (64, 64), {"stride": 2, "padding": 3}, 8.0),
}


def smooth_layer(name: str) -> ConvOperator:
    shape, size, options, smooth = SMOOTH[name]
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ConvOperator(smoothed(weight, smooth), size, **options)


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_layers_that_are_dear_to_factor_are_not(name):
    """The factors give the same value, with a bound that does not rest on the iteration."""
    op = smooth_layer(name)
    first, second, *_ = auto.candidates(request(op, 1, largest=False))
    assert (first.way.name, first.trial, second.way.name) == ("davidson", True, "augmented")
    found, factored = (cs.svds(op, 2, "SM", method=way) for way in ("auto", "augmented"))
    assert (found.method, found.converged) == ("davidson", True)
    torch.testing.assert_close(found.s, factored.s, rtol=1e-8, atol=0)
    assert bool((found.lower >= 0.9 * found.s[0]).all())
    assert float(found.lower[0]) <= float(factored.s[0]) * (1 + 1e-12)
    assert float(found.others) <= float(factored.s[1]) * (1 + 1e-12)


def test_a_circulant_that_knows_smaller_values_is_kept_from_amplifying_them(monkeypatch):
    """Without padding M has fewer rows than columns, and none of the circulant's small values."""
    weight = torch.randn(24, 24, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    op = ConvOperator(smoothed(weight, 4.0), (10, 10), padding=0)
    found = cs.svds(op, 1, "SM", method="davidson", maxiter=300)
    assert found.converged
    torch.testing.assert_close(found.s[0], torch.linalg.svdvals(op.to_dense())[-1])
    assert float(found.lower[0]) > 0.94 * float(found.s[0])
    # Without the guard the same steps do not converge: it is what helps.
    monkeypatch.setattr(preconditioned, "MUCH_SMALLER", math.inf)
    assert not cs.svds(op, 1, "SM", method="davidson", maxiter=300).converged


def test_a_trial_of_davidson_in_vain_is_followed_by_the_factors(monkeypatch):
    # A trial so short that it fails on a layer of test size.
    monkeypatch.setattr(preconditioned, "DAVIDSON_TRIAL_STEPS", 5)
    op = smooth_layer("wide")
    assert cs.svds(op, 1, "SM").method == "augmented"


def test_lanczos_is_first_where_few_steps_see_no_small_value():
    shape = (48, 24, 3, 3)
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    op = ConvOperator(weight, (32, 32), stride=2, padding=1)
    names = [choice.way.name for choice in auto.candidates(request(op, 1, largest=False))]
    assert names[:3] == ["lanczos", "davidson", "augmented"]


def test_without_a_factor_the_value_is_the_same():
    op = near_the_identity(64, 24, 0.3)
    tried, factored = (
        cs.svds(op, 2, "SM", tol=1e-7, method=method) for method in ("auto", "capacitance")
    )
    assert (tried.method, tried.converged) == ("lanczos", True)
    torch.testing.assert_close(tried.s, factored.s, rtol=1e-7, atol=0)
    assert bool((tried.lower > 0.98 * tried.s).all())


def test_a_trial_in_vain_is_followed_by_the_factor(monkeypatch):
    op = near_the_identity(64, 24, 3.0)
    expected = cs.svds(op, 1, "SM")
    assert expected.method == "capacitance"
    # A glimpse that promises a well-conditioned layer where there is none.
    monkeypatch.setattr(auto, "glimpsed_least", lambda request: 1.0)
    found = cs.svds(op, 1, "SM")
    assert (found.method, found.converged) == ("capacitance", True)
    torch.testing.assert_close(found.s, expected.s)
