"""Penalties of extreme singular values, against sums by hand over full spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convspectra.training._extreme_values import EXTREME_PENALTIES, extreme_penalty

SPECTRA = np.array([[3.0, 1.5, 0.9, 0.25], [2.5, 2.25, 0.5, 0.125], [1.0, 1.0, 1.0, 1.0]])
"""Singular values of three layers, descending."""

VALUES = [
    ("frobenius", {}, lambda s: 0.5 * np.mean(s**2)),
    ("sigma_min", {}, lambda s: -s[-1]),
    ("sigma_min", {"k": 3}, lambda s: -np.mean(s[-3:])),
    ("sigma_max", {}, lambda s: s[0]),
    ("sigma_max", {"k": 2}, lambda s: np.mean(s[:2])),
    ("conditioning", {}, lambda s: 0.5 * np.mean(s**2) - s[-1]),
    (
        "conditioning",
        {"k": 3, "gain": 1.5},
        lambda s: 0.5 * np.mean(s**2) - 1.5 * np.mean(s[-3:]),
    ),
    ("cond", {}, lambda s: math.log(s[0] / s[-1])),
    ("band", {}, lambda s: 0.5 * (max(0, 0.5 - s[-1]) ** 2 + max(0, s[0] - 2.0) ** 2)),
    (
        "band",
        {"lower": 1.0, "upper": 1.25, "k": 2},
        lambda s: (
            0.5 * np.mean(np.clip(1 - s[-2:], 0, None) ** 2 + np.clip(s[:2] - 1.25, 0, None) ** 2)
        ),
    ),
    ("band", {"lower": 0.0, "upper": math.inf}, lambda s: 0.0),
    ("band", {"lower": 1, "upper": 1}, lambda s: 0.5 * ((1 - s[-1]) ** 2 + (s[0] - 1) ** 2)),
]
each_value = pytest.mark.parametrize(
    ("name", "options", "by_hand"), VALUES, ids=[f"{name} {options}" for name, options, _ in VALUES]
)


def ends(spectra: np.ndarray, smallest: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """As an objective is given them: ascending, descending, and ||M||_F^2 per value."""
    low = torch.tensor(spectra[:, ::-1][:, :smallest].copy())
    high = torch.tensor(spectra[:, :largest].copy())
    return low, high, torch.tensor((spectra**2).mean(1))


@each_value
def test_values(name, options, by_hand):
    wanted = extreme_penalty(name, options)
    result = wanted.function(*ends(SPECTRA, wanted.smallest, wanted.largest))
    assert result.shape == (len(SPECTRA),)
    np.testing.assert_allclose(result.numpy(), [by_hand(s) for s in SPECTRA], rtol=1e-14)


@each_value
def test_values_beyond_those_asked_for_do_not_count(name, options, by_hand):
    wanted = extreme_penalty(name, options)
    result = wanted.function(*ends(SPECTRA, 4, 4))
    np.testing.assert_allclose(result.numpy(), [by_hand(s) for s in SPECTRA], rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("frobenius", {}, (0, 0)),
        ("sigma_min", {}, (1, 0)),
        ("sigma_min", {"k": 4}, (4, 0)),
        ("sigma_max", {}, (0, 1)),
        ("sigma_max", {"k": 4}, (0, 4)),
        ("conditioning", {}, (1, 0)),
        ("conditioning", {"k": 5}, (5, 0)),
        ("cond", {}, (1, 1)),
        ("band", {}, (1, 1)),
        ("band", {"k": 3}, (3, 3)),
    ],
)
def test_how_many_values_are_read(name, options, counts):
    wanted = extreme_penalty(name, options)
    assert (wanted.smallest, wanted.largest) == counts


def test_all_of_them_are_tested():
    assert {name for name, *_ in VALUES} == set(EXTREME_PENALTIES)


@each_value
def test_gradients(name, options, by_hand):
    wanted = extreme_penalty(name, options)
    inputs = [x.requires_grad_() for x in ends(SPECTRA[:2], 4, 4)]
    assert torch.autograd.gradcheck(wanted.function, inputs)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.sampled_from(sorted(EXTREME_PENALTIES)),
    st.floats(0, 1),
    st.floats(0, 3),
)
def test_penalties_of_orthogonal_layers_are_least(values, name, lower, width):
    """Of all layers of the same ||M||_F: sigma_min, sigma_max, conditioning and cond are."""
    options = {"lower": lower, "upper": lower + width} if name == "band" else {}
    wanted = extreme_penalty(name, options)
    spectrum = np.sort(np.array(values))[None, ::-1].copy()
    flat = np.full_like(spectrum, np.sqrt(np.mean(spectrum**2)))
    given_layer, orthogonal = (
        float(wanted.function(*ends(s, wanted.smallest, wanted.largest))) for s in (spectrum, flat)
    )
    assert orthogonal <= given_layer + 1e-12 * (1 + abs(given_layer))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "frobenius",
            {"k": 1},
            "penalty_options of 'frobenius': .*unexpected keyword argument 'k'",
        ),
        ("sigma_min", {"n": 1}, "penalty_options of 'sigma_min': .*unexpected .* 'n'"),
        ("conditioning", {"k": 0}, "expected k to be a positive integer, got 0"),
        ("conditioning", {"n": 2}, "penalty_options of 'conditioning': .*'n'"),
        ("cond", {"lower": 0.5}, "penalty_options of 'cond': .*'lower'"),
        ("band", {"low": 0.5}, "penalty_options of 'band': .*'low'"),
        ("sigma_min", {"k": 0}, "expected k to be a positive integer, got 0"),
        ("sigma_max", {"k": True}, "expected k to be a positive integer, got True"),
        ("band", {"k": 1.0}, r"expected k to be a positive integer, got 1\.0"),
        ("sigma_max", {"k": "1"}, "expected k to be a positive integer, got '1'"),
        ("band", {"lower": 3.0}, "expected 0 <= lower <= upper, got lower=3.0, upper=2.0"),
        ("band", {"lower": -1}, "expected 0 <= lower <= upper"),
        ("band", {"upper": math.nan}, "expected 0 <= lower <= upper"),
        ("band", {"upper": None}, "expected upper to be a number, got None"),
        ("band", {"lower": True}, "expected lower to be a number, got True"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        extreme_penalty(name, options)


def test_unknown_names_are_a_key_error():
    """The caller has checked them."""
    with pytest.raises(KeyError, match="sigma_mid"):
        extreme_penalty("sigma_mid", {})
