"""Dense SVD and the Gram matrix's eigenvectors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.checker import EPS, MATRICES, check, counts, each_matrix, truth
from helpers.strategies import random

from convspectra.solvers._dense import GRAM_RESOLUTION, dense_svd, gram_eigh

each_end = pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])


def gram_of(matrix, k, largest):
    """As the strategy calls it: the smaller Gram matrix, u and v swapped back."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    result = gram_eigh(wide[None], k, largest)
    if wide is matrix:
        return result
    return type(result)(**{**vars(result), "u": result.v, "v": result.u})


@each_end
@each_matrix
def test_dense_svd(name, largest):
    for k in counts(name):
        result = dense_svd(MATRICES[name][None], k, largest)
        assert result.converged
        assert result.matvecs == 0
        check(name, result, k, largest=largest, tol=1e-14)


@each_end
@each_matrix
def test_dense_enclosure_is_tight(name, largest):
    result = dense_svd(MATRICES[name][None], 1, largest)
    width = (2 * max(MATRICES[name].shape) + 66) * EPS * float(truth(name)[0])
    assert float(result.upper - result.lower) <= width


@each_end
@each_matrix
def test_bound_on_the_others_is_tight(name, largest):
    """It is the next value but for rounding; with no other value it is the bound on nothing."""
    values = [float(value) for value in truth(name)]
    error = (max(MATRICES[name].shape) + 34) * EPS * values[0]
    for k in counts(name):
        result = dense_svd(MATRICES[name][None], k, largest)
        if k == len(values):
            assert result.others == (0.0 if largest else math.inf)
            continue
        true = values[k] if largest else values[-1 - k]
        assert abs(result.others - true) <= 2 * error
        squared = gram_of(MATRICES[name], k, largest).others ** 2
        assert abs(squared - true**2) <= 2 * error * values[0]


@each_end
@each_matrix
def test_gram_eigh(name, largest):
    for k in counts(name):
        result = gram_of(MATRICES[name], k, largest)
        assert result.matvecs == 0
        check(name, result, k, largest=largest, tol=1e-7)


@each_matrix
def test_gram_converges_exactly_where_it_resolves(name):
    values = [float(value) for value in truth(name)]
    m = max(MATRICES[name].shape)
    for k in counts(name):
        for largest in (True, False):
            worst = values[k - 1] if largest else values[-1]
            # The enclosure is about (m + 32) eps sigma_max^2 / s wide.
            width = (m + 32) * EPS * values[0] ** 2 / worst if worst else float(values[0] > 0)
            result = gram_of(MATRICES[name], k, largest)
            if width < 0.5 * GRAM_RESOLUTION * worst:
                assert result.converged
            elif width > 2 * GRAM_RESOLUTION * worst or values[0] == 0:
                assert not result.converged


def test_gram_loses_small_values_honestly():
    """Below sqrt(m eps) sigma_max the enclosure reaches down to 0 and up past the value."""
    result = gram_of(MATRICES["steeply graded"], 3, largest=False)
    assert not result.converged
    assert (result.lower == 0).all()
    assert (result.upper > 1e-8).all()


@pytest.mark.parametrize("function", [dense_svd, gram_of])
def test_nan_is_never_an_answer(function):
    matrix = random(4, 4)
    matrix[1, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"non-finite|converge"):
        function(matrix, 1, True)
