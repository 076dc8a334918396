"""How small a Gaussian vector may be, against the distribution of its norm."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from convspectra.solvers import _gaussian as gaussian
from convspectra.solvers._gaussian import FAILURE_PROBABILITY, log_smallest_norm


def test_the_probability_is_the_one_stated():
    assert FAILURE_PROBABILITY == 1e-10


def below(count: int) -> float:
    return float(scipy.stats.chi.cdf(math.exp(log_smallest_norm(count)), count))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 20])
def test_norms_are_below_it_as_often_as_it_says(count):
    assert FAILURE_PROBABILITY / 2 <= below(count) <= FAILURE_PROBABILITY * (1 + 1e-9)


@pytest.mark.parametrize("count", [50, 200, 1000])
def test_norms_of_long_vectors_are_below_it_less_often(count):
    """The density leaves an exponential out that is no longer about 1."""
    assert below(count) <= FAILURE_PROBABILITY


@pytest.mark.parametrize("probability", [1e-4, 1e-2])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_it_follows_the_probability(monkeypatch, count, probability):
    # The probability is a constant, no option; other values check the formula.
    monkeypatch.setattr(gaussian, "FAILURE_PROBABILITY", probability)
    assert probability / 2 <= below(count) <= probability * (1 + 1e-9)


def test_longer_vectors_are_longer():
    logs = [log_smallest_norm(count) for count in range(1, 40)]
    assert logs == sorted(logs)
    assert math.isclose(logs[0], math.log(scipy.stats.chi.ppf(1e-10, 1)), rel_tol=1e-9)
