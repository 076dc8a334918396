"""SpectralRegularizer computes layers of one kind together, with the same result."""

from __future__ import annotations

import pytest
import torch
from helpers.regularized import ADDITIVE, assert_close, recorded, stack
from helpers.training import gradients

from convspectra import ConvOperator, SpectralRegularizer, penalties
from convspectra.penalties import _spectrum as spectrum


@pytest.mark.parametrize("name", [*ADDITIVE, "stein"])
@pytest.mark.parametrize("size", [(4, 4), (10, 10)], ids=["dense", "capacitance"])
@pytest.mark.parametrize("groups", [1, 3])
def test_layers_of_one_kind_are_computed_together_with_the_same_result(
    monkeypatch, name, size, groups
):
    model = stack(4, groups=groups)
    x = torch.zeros(1, 3, *size, dtype=torch.float64)
    asked = recorded(monkeypatch, name)
    reg = SpectralRegularizer(model, x, penalty=getattr(penalties, name), weight=1)
    value = reg()
    assert asked == [4 * groups]
    got = gradients(model, value)
    ops = [ConvOperator.from_module(conv, size) for conv in model]
    expected = sum(getattr(penalties, name)(op) / min(op.shape) for op in ops)
    assert torch.isclose(value, expected, rtol=1e-12)
    assert_close(got, gradients(model, expected))


@pytest.mark.parametrize("name", ["sigma_min", "conditioning"])
def test_penalties_that_do_not_add_up_are_computed_one_by_one(monkeypatch, name):
    asked = recorded(monkeypatch, name)
    x = torch.zeros(1, 3, 4, 4).double()
    SpectralRegularizer(stack(3), x, penalty=getattr(penalties, name))()
    assert asked == [1, 1, 1]


def test_layers_that_need_a_dense_matrix_are_computed_one_by_one(monkeypatch):
    """One block diagonal matrix of four would take sixteen times the memory of one."""
    asked = recorded(monkeypatch, "stein")
    x = torch.zeros(1, 3, 4, 4).double()
    SpectralRegularizer(stack(4, padding_mode="circular"), x, penalty="stein")()
    assert asked == [1] * 4


def test_layers_too_large_together_are_computed_one_by_one(monkeypatch):
    model = stack(4)
    x = torch.zeros(1, 3, 10, 10).double()
    expected = SpectralRegularizer(model, x, penalty="stein", weight=1)()
    original = spectrum.logabsdet
    # The limit of memory is no option of a regularizer.
    monkeypatch.setattr(spectrum, "logabsdet", lambda op: original(op, max_bytes=10**5))
    assert torch.isclose(SpectralRegularizer(model, x, penalty="stein", weight=1)(), expected)


def test_a_singular_layer_among_others_is_the_one_named():
    model = stack(3)
    with torch.no_grad():
        model[1].weight[0] = model[1].weight[2]
    with pytest.raises(ArithmeticError, match=r"^layer '1': Stein's loss is infinite"):
        SpectralRegularizer(model, torch.zeros(1, 3, 4, 4).double(), penalty="stein")()
