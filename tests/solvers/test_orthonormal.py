"""Rows made orthonormal, and their inner products."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import random

from convspectra.solvers._orthonormal import LONG, PARTS, inner_products, less, orthonormal

each_length = pytest.mark.parametrize("length", [1, 7, LONG - 1, LONG, 2 * LONG + PARTS - 1])


@each_length
@pytest.mark.parametrize(
    ("rows", "others"), [(1, 1), (3, 5), (5, 3), (4, 6), (6, 4), (0, 2), (2, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products(length, rows, others, dtype):
    x = random(rows, length, seed=1).to(dtype)
    y = random(others, length, seed=2).to(dtype)
    found = inner_products(x, y)
    assert found.dtype == dtype
    expected = x.double() @ y.double().T
    tolerance = 4 * torch.finfo(dtype).eps * length**0.5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * tolerance)


@pytest.mark.parametrize("length", [20, LONG + 3])
def test_dependent_rows_are_dropped_and_what_was_found_is_left_out(length):
    found = torch.linalg.qr(random(length, 3, seed=1)).Q.T
    fresh = random(4, length, seed=2)
    rows = torch.cat([fresh, fresh[:2] + 1e-14 * random(2, length, seed=3), 5 * found[:1]])
    basis = orthonormal(rows, found)
    assert basis.shape == (4, length)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4).double(), rtol=0, atol=1e-13)
    assert float((basis @ found.T).abs().amax()) < 1e-14
    outside = less(less(less(fresh, found), basis), basis)
    assert float(outside.abs().amax()) < 1e-12


def test_nothing_is_left_of_rows_that_were_found():
    found = torch.linalg.qr(random(12, 3, seed=1)).Q.T
    assert orthonormal(found[:2].clone(), found).shape == (0, 12)
