"""The checkers that users are given see what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import random
from torch import nn

from convspectra import ConvOperator
from convspectra.testing import assert_adjoint, assert_matches_dense, naive_dense


class Spoiled(ConvOperator):
    """An operator whose answers are spoiled on the way out."""

    def __init__(self, spoil: str, change) -> None:
        super().__init__(random(2, 1, 3), 5)
        inner = getattr(self, spoil)
        setattr(self, spoil, lambda *args: change(inner(*args)))


@pytest.mark.parametrize("form", ["matvec", "rmatvec"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * (1 + 1e-9), "differ"),
        (lambda a: -a, "differ"),
        (lambda a: a.flip(-1), "differ"),
        (lambda a: a.float(), "dtype"),
        (lambda a: a[..., 1:], "shape"),
        (lambda a: a * math.nan, "NaN"),
    ],
)
def test_checkers_see_a_wrong_matvec(form, change, message):
    op = Spoiled(form, change)
    dense = ConvOperator(random(2, 1, 3), 5).to_dense()
    with pytest.raises(AssertionError, match=message):
        assert_adjoint(op)
    with pytest.raises(AssertionError, match=rf"(T\.)?{form} .*{message}"):
        assert_matches_dense(op, dense)


@pytest.mark.parametrize("form", ["to_dense", "to_sparse"])
def test_checkers_see_a_wrong_view(form):
    op = Spoiled(form, lambda a: a * (1 + 1e-9))
    dense = ConvOperator(random(2, 1, 3), 5).to_dense()
    with pytest.raises(AssertionError, match=rf"{form}\(\) differs from the dense matrix by"):
        assert_matches_dense(op, dense)


def test_checkers_see_a_wrong_dense_matrix():
    op = ConvOperator(random(2, 1, 3), 5)
    with pytest.raises(AssertionError, match=r"to_dense\(\) differs"):
        assert_matches_dense(op, op.to_dense() + 1e-9)
    with pytest.raises(AssertionError, match=r"shape is \(10, 5\), expected \(5, 10\)"):
        assert_matches_dense(op, op.to_dense().T)
    with pytest.raises(AssertionError, match="rmatvec is not the adjoint of matvec: <Mx, y> = "):
        assert_adjoint(ConvOperator(random(2, 1, 3), 5), rtol=-1.0)


def test_checkers_leave_the_global_generator_alone_and_take_another():
    op = ConvOperator(random(2, 1, 3), 5)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    naive_dense(nn.AvgPool1d(2), (1, 4))
    assert_adjoint(op)
    assert_adjoint(op, generator=generator)
    assert not torch.equal(generator.get_state(), before)
    assert_matches_dense(op, op.to_dense(), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


def test_naive_dense_refuses_what_is_not_affine():
    assert naive_dense(nn.BatchNorm1d(2).eval(), (2, 3)).shape == (6, 6)
    with pytest.raises(ValueError, match="affine in its input, got ReLU"):
        naive_dense(nn.ReLU(), (2, 3))
    with pytest.raises(ValueError, match="affine in its input, got BatchNorm1d"):
        naive_dense(nn.BatchNorm1d(2), (2, 3))


def test_naive_dense_has_a_limit():
    assert naive_dense(nn.Identity(), (4,), max_bytes=4 * 32).shape == (4, 4)
    with pytest.raises(ValueError, match="at most max_bytes=127 bytes, it would take 128"):
        naive_dense(nn.Identity(), (4,), max_bytes=127)
    with pytest.raises(ValueError, match="input_shape of positive integers"):
        naive_dense(nn.Identity(), (0,))
