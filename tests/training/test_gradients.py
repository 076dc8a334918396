"""Gradients formed in the backward pass, against autograd through the dense matrix."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings
from hypothesis import strategies as st

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator._convolution import add_weight_gradient
from convspectra.operator._frobenius import squared_frobenius_norm_now
from convspectra.training._gradients import KnownGradient, SpectralGradient, give_gradient


@given(layers(), st.integers(0, 3), st.booleans())
@settings(max_examples=100)
def test_the_gradient_of_any_layer_is_that_of_its_dense_matrix(layer: Layer, count, square) -> None:
    """Of ``sum(u' M v) + c ||M||_F^2 / n``, with twice the factor."""
    op = layer.operator(layer.weight.double())
    right = random(count, *op.input_shape)
    left = random(count, *op.output_shape, seed=1)
    slope = torch.tensor(0.7, dtype=torch.float64) if square else None
    weight = op.weight.clone().requires_grad_()
    dense = op.with_weight(weight).to_dense()
    value = (left.flatten(1) * (right.flatten(1) @ dense.T)).sum()
    if square:
        value = value + 0.7 * dense.square().sum() / min(op.shape)
    value.backward()
    found = SpectralGradient(op, right, left, slope).scaled(2.0).product(op.weight, torch.float64)
    size = 1 + float(weight.grad.abs().amax())
    torch.testing.assert_close(found, 2 * weight.grad, rtol=0, atol=1e-12 * size)


@given(layers(), st.integers(1, 7))
@settings(max_examples=60)
def test_the_norm_part_by_part_is_that_of_the_dense_matrix(layer: Layer, divisor: int) -> None:
    op = layer.operator(layer.weight.double())
    found = squared_frobenius_norm_now(op.weight, op.geometry, divisor)
    true = op.to_dense().square().sum() / divisor
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-300)


def test_the_norm_of_more_than_one_part(monkeypatch) -> None:
    # A small weight in several parts: how it is divided is no option.
    monkeypatch.setattr("convspectra.operator._frobenius.ENTRIES_AT_ONCE", 50)
    op = ConvOperator(random(7, 3, 3, 3), (4, 5), padding=1)
    found = squared_frobenius_norm_now(op.weight, op.geometry, 1)
    torch.testing.assert_close(found, op.to_dense().square().sum())


def test_it_is_added_in_place() -> None:
    op = ConvOperator(random(2, 3, 3), 5, padding=1)
    total = torch.ones_like(op.weight)
    x, y = random(2, 3, 5), random(2, 2, 5, seed=1)
    alone = torch.zeros_like(total)
    add_weight_gradient(alone, x, y, op.geometry, 1)
    add_weight_gradient(total, x, y, op.geometry, 1)
    torch.testing.assert_close(total, 1 + alone)
    assert alone.any()


def test_channels_last_weights() -> None:
    weight = random(4, 3, 3, 3).to(memory_format=torch.channels_last)
    op = ConvOperator(weight, (5, 5), padding=1)
    right, left = random(1, 3, 5, 5), random(1, 4, 5, 5)
    for slope in (None, torch.tensor(1.0, dtype=torch.float64)):
        gradient = SpectralGradient(op, right, left, slope)
        plain = gradient.product(weight.contiguous(), torch.float64)
        torch.testing.assert_close(gradient.product(weight, torch.float64), plain)


def test_a_weight_that_moved_before_the_backward_pass_is_noticed() -> None:
    weight = random(2, 2, 3).requires_grad_()
    op = ConvOperator(weight.detach().clone(), 5, padding=1)
    slope = torch.tensor(1.0, dtype=torch.float64)
    gradient = SpectralGradient(op, random(0, 2, 5), random(0, 2, 5), slope)
    value = give_gradient(torch.zeros(()).double(), [weight], [gradient])
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_known_gradient_is_scaled_once() -> None:
    weight = random(2, 2, 3).requires_grad_()
    value = give_gradient(
        torch.zeros(()).double(), [weight], [KnownGradient(torch.ones(2, 2, 3)).scaled(3.0)]
    )
    (2 * value).backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 6.0))


def test_windows_row_by_row(monkeypatch) -> None:
    # Small windows row by row: how they are divided is no option.
    monkeypatch.setattr("convspectra.operator._convolution.WINDOW_ENTRIES", 1)
    op = ConvOperator(random(4, 2, 3, 3), (7, 6), padding=1, stride=2, groups=2)
    weight = op.weight.clone().requires_grad_()
    x, y = random(2, 4, 7, 6), random(2, 4, 4, 3, seed=1)
    (op.with_weight(weight).apply(x) * y).sum().backward()
    total = torch.zeros_like(op.weight)
    add_weight_gradient(total, x, y, op.geometry, 2)
    torch.testing.assert_close(total, weight.grad)


def test_a_second_derivative_raises_by_whatever_it_is() -> None:
    weight = random(2, 2, 3).requires_grad_()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    known = KnownGradient(torch.ones(2, 2, 3, dtype=torch.float64))
    slope = torch.tensor(1.0, dtype=torch.float64)
    op = ConvOperator(weight.detach().clone(), 5, padding=1)
    for gradient in (known, SpectralGradient(op, random(0, 2, 5), random(0, 2, 5), slope)):
        value = factor * give_gradient(torch.zeros(()).double(), [weight], [gradient])
        (first,) = torch.autograd.grad(value, weight, create_graph=True)
        for variable in (weight, factor):
            with pytest.raises(RuntimeError, match="at most one derivative, got a second one"):
                torch.autograd.grad(first.sum(), variable, retain_graph=True)


@pytest.mark.parametrize("penalty", ["frobenius", "conditioning"])
def test_no_part_of_a_gradient_is_in_half_precision_under_autocast(penalty) -> None:
    def regularizer() -> tuple[torch.nn.Conv2d, cs.SpectralRegularizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        return conv, cs.SpectralRegularizer(conv, torch.zeros(1, 3, 6, 6), penalty=penalty)

    conv, reg = regularizer()
    reg.add_gradient()
    other, same = regularizer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same.add_gradient()
        same.step(0.0)
    torch.testing.assert_close(other.weight.grad, conv.weight.grad, rtol=1e-6, atol=1e-9)
