"""What the functions of singular values refuse."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import random
from helpers.svds import LARGE

import convspectra as cs
from convspectra import ConvOperator

OP = ConvOperator(random(2, 3, 3), 4)
BAD_OPTIONS = [
    ({"k": 0}, r"k in 1 to 8 = min\(op.shape\), got 0"),
    ({"k": 9}, "k in 1 to 8 .* got 9"),
    ({"k": -1}, "got -1"),
    ({"k": True}, "got True"),
    ({"k": 1.0}, r"got 1\.0"),
    ({"k": None}, "got None"),
    ({"which": "SA"}, r"which to be one of \('LM', 'SM'\), got 'SA'"),
    ({"which": None}, "which to be one of .* got None"),
    ({"method": "svd"}, "method for which='LM' to be one of .* got 'svd'"),
    ({"method": "capacitance"}, "method for which='LM' .* got 'capacitance'"),
    ({"method": "lobpcg"}, "method for which='LM' .* got 'lobpcg'"),
    ({"which": "SM", "method": "capacitance"}, "a square layer with zero padding and N ="),
    ({"tol": 0}, "tol between 0 and 1, got 0"),
    ({"tol": -1e-8}, "tol between 0 and 1"),
    ({"tol": 1.0}, "tol between 0 and 1"),
    ({"tol": math.nan}, "tol between 0 and 1, got nan"),
    ({"tol": "1e-8"}, "tol between 0 and 1, got '1e-8'"),
    ({"tol": True}, "tol between 0 and 1, got True"),
    ({"maxiter": 0}, "maxiter to be a positive integer or None, got 0"),
    ({"maxiter": 2.5}, r"maxiter to be a positive integer or None, got 2\.5"),
    ({"maxiter": True}, "maxiter to be a positive integer or None, got True"),
    ({"max_bytes": 100, "method": "dense"}, "the dense matrix to take at most max_bytes=100 bytes"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cs.svds(OP, **options)


def test_matrices_over_the_limit_are_refused():
    op = LARGE["random"].operator()
    with pytest.raises(ValueError, match="the border matrix to take at most max_bytes=1,000"):
        cs.svds(op, 1, "SM", method="capacitance", max_bytes=1000)
    for which in ("LM", "SM"):
        with pytest.raises(ValueError, match="the dense matrix to take at most"):
            cs.svds(op, 1, which, method="dense", max_bytes=1000)
    with pytest.raises(ValueError, match="the dense matrix to take at most max_bytes=1,000"):
        cs.svdvals(op, max_bytes=1000)


@pytest.mark.parametrize(
    "function", [cs.svds, cs.sigma_max, cs.sigma_min, cs.cond, cs.svdvals, cs.frobenius_norm]
)
@pytest.mark.parametrize("value", [random(2, 2, 3), None, torch.nn.Conv1d(1, 1, 1)])
def test_only_operators_are_taken(function, value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, "):
        function(value)
