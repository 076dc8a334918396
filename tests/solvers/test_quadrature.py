"""Stochastic Lanczos quadrature on matrices of known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.strategies import random
from helpers.symmetric import SPECTRA, with_spectrum

from convspectra.solvers._quadrature import (
    Tridiagonals,
    bin_fractions,
    gauss_rules,
    mean_log,
    radau_rules,
    random_directions,
    tridiagonals,
)

POSITIVE = [
    name for name, values in SPECTRA.items() if min(values) >= 0 and 1e-100 < max(values) < 1e100
]


def runs_of(values, probes: int = 3, steps: int = 20, seed: int = 0) -> Tridiagonals:
    matrix = with_spectrum(list(values))
    generator = torch.Generator().manual_seed(seed)
    start = random_directions(probes, len(matrix), matrix, generator)
    return tridiagonals(lambda x: x @ matrix, start, steps)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_gauss_rules_have_the_moments_of_their_vectors(steps):
    matrix = with_spectrum(list(np.linspace(0.1, 1, 30)))
    start = random_directions(4, 30, matrix, torch.Generator().manual_seed(1))
    assert torch.allclose(start.norm(dim=1), torch.ones(4, dtype=torch.float64))
    rules = gauss_rules(tridiagonals(lambda x: x @ matrix, start, 8), steps)
    powers = [start]
    for _ in range(2 * steps - 1):
        powers.append(powers[-1] @ matrix)
    for i, rule in enumerate(rules):
        assert len(rule.nodes) == steps
        for degree, power in enumerate(powers):
            wanted = float(power[i] @ start[i])
            assert rule.mean(lambda x, d=degree: x**d) == pytest.approx(wanted, rel=1e-12)


def test_complex_hermitian_matrices_of_their_own_for_each_row():
    blocks = torch.complex(random(3, 12, 12), random(3, 12, 12, seed=1))
    blocks = blocks @ blocks.mH
    start = random_directions(3, 12, blocks, torch.Generator().manual_seed(0))
    runs = tridiagonals(lambda x: (blocks @ x[:, :, None])[:, :, 0], start, 12)
    for rule, block in zip(gauss_rules(runs, 12), blocks, strict=True):
        assert np.allclose(rule.nodes, np.linalg.eigvalsh(block.numpy()), rtol=1e-9)


@pytest.mark.parametrize("name", POSITIVE)
def test_an_exhausted_space_gives_the_whole_distribution_of_its_vector(name):
    values = SPECTRA[name]
    rules = gauss_rules(runs_of(values, steps=len(values) + 5), len(values) + 5)
    for rule in rules:
        assert rule.weights.sum() == pytest.approx(1)
        assert len(rule.nodes) <= len(values)
        top = max(values)
        assert np.abs(rule.nodes[:, None] - np.array(values)).min(1).max() <= 1e-12 * top + 1e-300


def test_runs_that_end_at_different_steps():
    matrix = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
    start = torch.zeros(3, 5, dtype=torch.float64)
    start[0, 0] = 1
    start[1, :2] = 0.5**0.5
    start[2] = 0.2**0.5
    runs = tridiagonals(lambda x: x @ matrix, start, 9)
    assert runs.last.tolist() == [1, 2, 5]
    rules = gauss_rules(runs, 9)
    assert [rule.nodes.round(12).tolist() for rule in rules] == [[1], [1, 2], [1, 2, 3, 4, 5]]
    assert all(rule.settled.all() for rule in rules)
    assert np.allclose(rules[1].fraction_below(np.array([0.5, 1.5, 2.5])), [0, 0.5, 1])
    assert np.allclose(rules[2].fraction_below(np.array([0.5, 2.5, 4.5, 6])), [0, 0.4, 0.8, 1])


def test_radau_and_gauss_enclose_the_logarithm():
    values = np.linspace(0.01, 1, 60) ** 2
    matrix = with_spectrum(list(values))
    start = random_directions(5, 60, matrix, torch.Generator().manual_seed(0))
    runs = tridiagonals(lambda x: x @ matrix, start, 10)
    spectrum, vectors = np.linalg.eigh(matrix.numpy())
    above, below = gauss_rules(runs, 10), radau_rules(runs, 1e-6)
    for i, (upper, lower) in enumerate(zip(above, below, strict=True)):
        exact = float((start[i].numpy() @ vectors) ** 2 @ np.log(spectrum))
        assert lower.nodes[0] == pytest.approx(1e-6)
        assert lower.mean(np.log) < exact < upper.mean(np.log)


@pytest.mark.parametrize("shape", ["line", "square of a line", "far from 0", "with an atom"])
def test_errors_hold(shape):
    line = np.linspace(0, 1, 400)[1:]
    values = {
        "line": line,
        "square of a line": line**2,
        "far from 0": 1 + line,
        "with an atom": np.append(line[200:], np.full(200, 0.09)),
    }[shape]
    edges = np.linspace(0, np.sqrt(values.max()) * (1 + 1e-9), 31)
    true = np.histogram(np.sqrt(values), edges)[0] / len(values)
    outside = total = 0
    for seed in range(8):
        runs = runs_of(values, probes=3, steps=40, seed=seed)
        fractions, errors = bin_fractions(runs, len(values), edges)
        assert fractions.sum() == pytest.approx(1)
        assert (fractions >= -1e-12).all()
        outside += int((np.abs(fractions - true) > 3 * errors).sum())
        total += len(true)
        mean, error = mean_log(runs, len(values))
        assert abs(mean - np.log(values).mean()) <= 4 * error
    assert outside <= 0.01 * total
    assert np.median(errors) < 0.02


def test_fewer_probes_have_larger_errors_as_the_square_root():
    values = 1 + np.linspace(0, 1, 300)
    errors = [mean_log(runs_of(values, probes, 40), 300)[1] for probes in (2, 8)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["zero", "one zero", "rank two"])
def test_zero_eigenvalues_leave_the_mean_logarithm_open(name):
    values = SPECTRA[name]
    runs = runs_of(values, steps=len(values))
    assert mean_log(runs, len(values))[1] == np.inf
    fractions, errors = bin_fractions(runs, len(values), np.array([0.0, 0.5, 2.0]))
    true = np.mean(np.array(values) < 0.25)
    assert abs(fractions[0] - true) <= 3 * errors[0] + 1e-9


def test_one_bin_has_everything():
    fractions, errors = bin_fractions(runs_of(SPECTRA["simple"]), 60, np.array([0.0, 1.0]))
    assert fractions.tolist() == [1.0]
    assert errors.tolist() == [0.0]


def test_products_that_are_not_finite_are_reported():
    start = random_directions(2, 5, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ArithmeticError, match="expected finite products"):
        tridiagonals(lambda x: x * float("nan"), start, 3)
