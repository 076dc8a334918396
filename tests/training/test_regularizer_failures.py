"""SpectralRegularizer of weights that are not finite, and where computations fail."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.training import LAYERS, close, each_penalty, gradients, moved, naive, net, regularizer

from convspectra import ConvOperator
from convspectra.training import _followed_values as tracked

# --- weights that are no longer finite ------------------------------------------------------------


@pytest.mark.parametrize("name", ["frobenius", "stein", "circular_stein", "orthogonality"])
def test_a_penalty_that_follows_nothing_reports_from_the_last_refresh(name):
    model = net()
    reg = regularizer(model, name)
    before = reg()
    assert {layer.sigma_max for layer in reg.report().layers} == {None}
    reg.refresh()
    expected = gradients(model, before)
    assert close(gradients(model, reg()), expected, 1e-12), "the penalty reads nothing of it"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    reg()
    for layer, found in zip(reg.layers, reg.report().layers, strict=True):
        values = torch.linalg.svdvals(layer.operator().to_dense().detach().double())
        assert found.age == 1
        assert found.sigma_max == pytest.approx(float(values[0]), rel=1e-3)
        assert found.sigma_min == pytest.approx(float(values[-1]), rel=1e-2)
        assert found.sigma_max_lower <= float(values[0]) <= found.sigma_max_upper
        assert found.sigma_min_lower <= float(values[-1]) <= found.sigma_min_upper
    again = regularizer(copy.deepcopy(model), name)
    again.load_state_dict(reg.state_dict())
    assert again.report().layers == reg.report().layers


@each_penalty
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_longer_finite_is_named_with_the_step(name, bad):
    model = net()
    reg = regularizer(model, name)
    reg()
    moved(model)
    reg()
    with torch.no_grad():
        model.b.weight[1, 0, 2, 1] = bad
    message = r"^layer 'b': expected a finite weight, .* at step 2$"
    with pytest.raises(ValueError, match=message):
        reg()
    with pytest.raises(ValueError, match=message):
        reg.step(0.1)


@each_penalty
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_longer_finite_can_be_left_out(name, bad):
    model = net()
    reg = regularizer(model, name, nonfinite="skip")
    reg()
    healthy = model.b.weight.detach().clone()
    with torch.no_grad():
        model.b.weight[1, 0, 2, 1] = bad
    expected = naive(model, name, [layer for layer in LAYERS if layer[0] != "b"])
    value = reg()
    assert reg.step_count == 1
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, value), gradients(model, expected), 1e-3)
    report = reg.report()
    assert [layer.skipped for layer in report.layers] == [0, 1, 0, 0]
    assert report.layers[1].sigma_min is None
    assert report.aggregates()["skipped"] == 1
    assert "skipped 1 times" in " ".join(str(report).split())
    with torch.no_grad():
        reg()
    assert reg.report().layers[1].skipped == 1
    assert reg.step_count == 1, "NaN differs from itself, and is no step for all that"
    with torch.no_grad():
        model.b.weight.copy_(healthy)
    whole = naive(model, name)
    assert float(reg().detach()) == pytest.approx(float(whole.detach()), rel=1e-7)
    assert reg.report().layers[1].skipped == 1


def test_accumulation_with_a_layer_left_out_is_one_step():
    model = net()
    reg = regularizer(model, "conditioning", nonfinite="skip")
    reg()
    with torch.no_grad():
        model.b.weight.fill_(math.nan)
    for _ in range(3):
        reg()
    assert reg.step_count == 1


def test_an_exact_computation_of_a_weight_that_is_not_finite_names_the_layer_once():
    model = net()
    reg = regularizer(model, "conditioning", nonfinite="skip")
    with torch.no_grad():
        model.a.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^layer 'a': expected a finite weight"):
        reg.refresh()


# --- exact computations that fail -----------------------------------------------------------------


class Unconverged:
    """What a solver that gave up returns."""

    def __init__(self, result: object) -> None:
        self.result = result
        self.converged = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.result, name)


@pytest.mark.parametrize("how", [None, ArithmeticError, torch.linalg.LinAlgError])
def test_an_exact_computation_that_fails_keeps_the_last_good_vectors(monkeypatch, how):
    model = net()
    reg = regularizer(model, "conditioning", refresh_interval=1, improve_interval=100)
    reg()
    before = reg.state_dict()["layers"]
    original = tracked.svds

    def failing(op: ConvOperator, *args: object, **options: object) -> object:
        if not torch.equal(op.weight, model.a.weight):
            return original(op, *args, **options)
        if how is not None:
            raise how("not today")
        return Unconverged(original(op.with_weight(op.weight + 1), *args, **options))

    # A failure on demand, of one layer only, at a step of our choice.
    monkeypatch.setattr(tracked, "svds", failing)
    moved(model, 1.01)
    value = reg()
    assert float(value.detach()) == pytest.approx(
        float(naive(model, "conditioning").detach()), rel=1e-3
    )
    value.backward()
    assert model.a.weight.grad.isfinite().all()
    first, second = reg.report().layers[:2]
    assert (first.failures, first.age) == (1, 1)
    assert (second.failures, second.age) == (0, 0)
    assert first.sigma_min_lower <= first.sigma_min <= first.sigma_min_upper
    state = reg.state_dict()["layers"]
    key = "a@5x6"
    for name in ("vectors", "weight"):
        assert torch.equal(state[key][name], before[key][name])
    assert "1 failures" in " ".join(str(reg.report()).split())
    monkeypatch.setattr(tracked, "svds", original)
    moved(model, 1.01)
    reg()
    assert reg.report().layers[0].age == 0
    assert reg.report().aggregates()["failures"] == reg.report().layers[0].failures


def test_a_first_exact_computation_without_any_result_is_an_error(monkeypatch):
    def failing(op: ConvOperator, *args: object, **options: object) -> object:
        raise ArithmeticError("not today")

    reg = regularizer(net(), "conditioning")
    monkeypatch.setattr(tracked, "svds", failing)
    with pytest.raises(ArithmeticError, match=r"^layer 'a': not today$"):
        reg()
