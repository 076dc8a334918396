"""SpectralRegularizer apart from the loss: `step`, `add_gradient`, and their reports."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training import (
    batch,
    close,
    each_penalty,
    gradients,
    net,
    parametrized,
    regularizer,
    same,
)

import convspectra as cs
from convspectra.training import _followed_values as tracked


@each_penalty
def test_a_step_is_the_learning_rate_times_the_gradient(name):
    model = net()
    reg = regularizer(model, name)
    value = reg()
    expected = gradients(model, value)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.zero_grad()
    reg.step(0.1)  # no longer than any penalty allows
    assert all(parameter.grad is None for parameter in model.parameters())
    after = [old - 0.1 * gradient for old, gradient in zip(before, expected, strict=True)]
    assert close(list(model.parameters()), after, 1e-12)
    assert not torch.equal(model.a.weight, before[0])


@each_penalty
def test_a_report_has_the_value_of_a_step(name):
    model = net()
    reg = regularizer(model, name)
    before = float(reg().detach())
    reg.step(0.1)
    found = reg.report(settle=False).penalty
    with torch.no_grad():
        after = float(regularizer(model, name)())
    assert found == pytest.approx(after if name == "frobenius" else before, rel=1e-12)
    assert abs(after - before) > 1e-6 * abs(before)


def test_a_step_that_needs_no_value_computes_none(monkeypatch):
    model = net()
    reg = regularizer(model, "frobenius", schedule=lambda step: 2.0 * (step == 0))
    reg.step(0.1)
    state = reg.state_dict()
    value = reg.report().penalty
    reg.step(0.1)  # without a weight, as the schedule says
    with torch.no_grad():
        assert value == pytest.approx(2 * float(regularizer(model, "frobenius")()), rel=1e-12)
    assert reg.report().penalty == value
    resumed = regularizer(model, "frobenius", schedule=lambda step: 0.0)
    resumed.load_state_dict(state)
    assert resumed.report().penalty == value
    # A value that nobody asked for would be computed here.
    monkeypatch.setattr(tracked.Stack, "mean_square", lambda *_: pytest.fail("computed"))
    regularizer(model, "frobenius").step(0.1)


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max"])
def test_a_report_settles_or_gives_what_the_penalty_reads(name):
    model = net()
    reg = regularizer(model, name)
    reg()
    for _ in range(12):
        reg.step(0.05)
    sign = 1 if name == "sigma_max" else -1
    with torch.no_grad():
        value = float(reg())
    read, settled = (
        [getattr(layer, name) for layer in reg.report(settle=settle).layers]
        for settle in (False, True)
    )
    assert value == pytest.approx(sign * reg.weight * sum(read), rel=1e-9)
    exact = [getattr(cs, name)(layer.operator()) for layer in reg.layers]
    assert settled == pytest.approx(exact, rel=2e-3)
    assert all(sign * new >= sign * old for new, old in zip(settled, read, strict=True))
    assert max(abs(one / s - 1) for one, s in zip(read, exact, strict=True)) > 1e-6
    assert [getattr(layer, name) for layer in reg.report(settle=False).layers] != settled


def test_a_step_leaves_the_moments_of_adam_as_they_were_without_it():
    moments, weights = [], []
    for decoupled in (False, True):
        model = net().eval()
        reg = regularizer(model, "conditioning")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        gradients(model, model(batch()).square().mean())
        optimizer.step()
        if decoupled:
            reg.step(1e-2)
        weights.append(model.a.weight.detach().clone())
        moments.append([
            value for p in model.parameters() for value in optimizer.state[p].values()
        ])  # fmt: skip
    assert same(moments[1], moments[0])
    assert moments[0][1].any()
    assert not torch.equal(*weights)


def test_the_step_counts_once_for_each_decoupled_step():
    model = net()
    reg = regularizer(model, "conditioning")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    values = []
    for step in range(4):
        gradients(model, model(batch()).square().mean())
        optimizer.step()
        reg.step(0.05)
        values.append(reg.report(settle=False).penalty)
        assert reg.step_count == step
    assert values[-1] < values[0]


def test_a_step_without_parameters_to_move_moves_none():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    before = model.a.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"a parametrization or forward pass computes; use the add"
    ):
        reg.step(0.1)
    assert torch.equal(model.a.weight, before)


@pytest.mark.parametrize("rate", [-0.1, math.nan, "1"])
def test_a_step_refuses_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="expected learning_rate to be"):
        regularizer(net(), "frobenius").step(rate)


@each_penalty
@pytest.mark.parametrize("scale", [1.0, 2.5, -0.5])
def test_an_added_gradient_is_that_of_the_scaled_penalty(name, scale):
    model = net().eval()
    reg = regularizer(model, name)
    loss = model(batch()).square().mean()
    expected = gradients(model, loss + scale * reg())
    gradients(model, model(batch()).square().mean())
    value = reg.add_gradient(scale)
    assert value == pytest.approx(float(reg().detach()), rel=1e-12), "without the scale"
    assert close(gradients(model), expected, 1e-12)


def test_an_added_gradient_needs_none_before_it_and_goes_through_parametrizations():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    expected = gradients(model, reg())
    model.zero_grad()
    reg.add_gradient()
    assert same(gradients(model), expected)
    assert model.b.parametrizations.weight.original.grad.any()
