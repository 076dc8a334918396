"""When a SpectralRegularizer computes which layers: schedules, factors, turns."""

from __future__ import annotations

import pytest
import torch
from helpers.training import (
    LAYERS,
    SIZE,
    close,
    each_penalty,
    gradients,
    moved,
    naive,
    net,
    regularizer,
)
from torch import nn

from convspectra import Schedule, SpectralRegularizer
from convspectra.training import _exact_penalties as exact
from convspectra.training import _followed_values as tracked


def test_the_schedule_is_the_factor_of_every_step():
    model = net()
    schedule = Schedule(warmup=3, half_life=2, stop=7)
    reg = regularizer(model, "frobenius", schedule=schedule)
    factors = []
    for _ in range(8):
        reg()
        factors.append(float(reg().detach() / naive(model, "frobenius").detach()))
        moved(model)
    expected = [1 / 3, 2 / 3, 1, 1, 0.5**0.5, 0.5, 0.5**1.5, 0]
    assert factors == pytest.approx(expected, rel=1e-7)


@each_penalty
def test_nothing_is_computed_where_the_schedule_is_zero(name, monkeypatch):
    model = net()
    reg = regularizer(
        model, name, schedule=Schedule(stop=1), improve_interval=1, refresh_interval=1
    )
    first = float(reg().detach())
    assert first != 0
    moved(model)
    for module, attribute in (
        (tracked, "svds"),
        (tracked, "improved"),
        (tracked.Stack, "evaluate"),
        (tracked.Stack, "mean_square"),
        (exact, "block_diagonal"),
        (exact.ExactPenalties, "_value"),
    ):
        monkeypatch.setattr(module, attribute, lambda *_, **__: pytest.fail("computed"))
    value = reg()
    assert float(value.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model, value))
    weight = model.a.weight.detach().clone()
    reg.step(1.0)
    assert torch.equal(model.a.weight, weight)
    assert reg.step_count == 1


@each_penalty
def test_every_third_step_counts_three_times(name):
    model = net()
    often, now_and_then = (
        regularizer(model, name),
        regularizer(model, name, schedule=Schedule(every=3)),
    )
    for step in range(4):
        value = float(often().detach())
        expected = 0.0 if step % 3 else 3 * value
        assert float(now_and_then().detach()) == pytest.approx(expected, rel=1e-5)
        moved(model)
    assert now_and_then.step_count == 3


@pytest.mark.parametrize("every", [1, 3, 4, 20])
def test_every_layer_has_its_turn_whatever_the_schedule(every):
    """Turns come every two steps here; a layer is computed at the next step with a penalty."""
    model = net()
    reg = regularizer(model, "conditioning", schedule=Schedule(every=every), refresh_interval=8)
    assert len(reg.layers) == 4
    computed = [0] * 4
    for step in range(41):
        reg()
        if step % every == 0:
            for turn in range(1, step // 2 + 1):
                if 2 * turn > computed[turn % 4]:
                    computed[turn % 4] = step
        assert [layer.age for layer in reg.report().layers] == [step - at for at in computed]
        moved(model)


def test_a_computation_that_failed_is_tried_again_in_its_next_turn(monkeypatch):
    model = net()
    reg = regularizer(model, "conditioning", refresh_interval=4)
    reg()

    def fails(*args, **options):
        raise ArithmeticError("none")

    # No layer fails when it is asked to: the failure is made up.
    monkeypatch.setattr(tracked, "svds", fails)
    for _ in range(8):
        moved(model)
        reg()
        reg()
    assert [layer.failures for layer in reg.report().layers] == [2] * 4
    assert [layer.age for layer in reg.report().layers] == [8] * 4


def test_the_report_has_the_last_penalty_that_had_a_weight():
    model = net()
    reg = regularizer(model, "frobenius", schedule=Schedule(every=2))
    expected = float(reg().detach())
    moved(model)
    assert float(reg().detach()) == 0
    assert reg.report().penalty == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("entry", [(1, 0), (0, 1)])
def test_a_step_that_leaves_no_trace_but_the_entries_is_counted(entry):
    """As fused optimizers do, which do not change the version of a tensor."""
    model = net()
    reg = regularizer(model, "frobenius")
    reg()
    version = model.a.weight._version
    model.a.weight.detach().numpy()[entry] += 0.25
    assert model.a.weight._version == version
    reg()
    reg()
    assert reg.step_count == 1


def test_a_step_that_moves_biases_only_is_none():
    model = net()
    reg = regularizer(model, "frobenius")
    reg()
    with torch.no_grad():
        model.a.bias.add_(1.0)
    reg()
    assert reg.step_count == 0


def test_a_channel_is_seen_wherever_it_is():
    conv = nn.Conv2d(40, 40, 3, padding=1)
    reg = SpectralRegularizer(conv, torch.zeros(1, 40, *SIZE), penalty="frobenius")
    reg()
    for step, where in enumerate([(slice(None), 5), (35, slice(None))], start=1):
        conv.weight.detach().numpy()[where] += 0.25
        reg()
        assert reg.step_count == step


def test_the_schedule_is_asked_once_a_call():
    model = net()
    asked = []
    reg = regularizer(model, "frobenius", schedule=lambda step: asked.append(step) or 1.0)
    reg()
    reg.add_gradient()
    reg.step(0.1)
    assert asked == [0, 0, 0]


def test_a_schedule_of_the_users_starts_late():
    model = net()
    reg = regularizer(model, "conditioning", schedule=lambda step: float(step >= 2))
    for step in range(4):
        value = float(reg().detach())
        started = step >= 2
        assert (value != 0) == started
        assert all((layer.sigma_min is not None) == started for layer in reg.report().layers)
        moved(model)
    assert [layer.age for layer in reg.report().layers] == [1] * 4


@pytest.mark.parametrize("given", ["names", "function"])
def test_layers_have_weights_of_their_own(given):
    model = net()
    factors = {"a": 2.0, "shared": 0.5, "b": 0.0}
    weights = factors if given == "names" else lambda name, module: factors[name]
    reg = regularizer(model, "conditioning", layer_weights=weights)
    expected = 2 * naive(model, "conditioning", LAYERS[:1]) + 0.5 * naive(
        model, "conditioning", LAYERS[2:]
    )
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, reg()), gradients(model, expected), 1e-3)


def test_layers_that_a_mapping_leaves_out_count_once():
    model = net()
    reg = regularizer(model, "frobenius", layer_weights={"a": 3.0})
    expected = naive(model, "frobenius") + 2 * naive(model, "frobenius", LAYERS[:1])
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": 1.0}, r"expected layer_weights of the layers \['a', 'b', .* got some for \['c'\]"),
        ({"a": -1.0}, r"expected the weight of layer 'a' to be finite and at least 0, got -1\.0"),
        (lambda *_: None, r"expected the weight of layer 'a' to be a number, got None"),
    ],
)
def test_layer_weights_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        regularizer(net(), "frobenius", layer_weights=given)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "a"}, ["a"]),
        ({"include": ["a", "sha*"]}, ["a", "shared", "shared"]),
        ({"include": "[ab]"}, ["a", "b"]),
        ({"include": "*", "exclude": "head"}, ["a", "b", "shared", "shared"]),
        ({"exclude": ["shared"]}, ["a", "b"]),
        ({"exclude": lambda name, module: name == "a"}, ["b", "shared", "shared"]),
        ({"include": ["a", "head"]}, ["a", "head"]),
    ],
)
def test_patterns_choose_the_layers(options, names):
    reg = regularizer(net(), "frobenius", **options)
    assert [layer.name for layer in reg.layers] == names


def test_patterns_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"its convolutions are \['a', 'b', 'shared'\]"):
        regularizer(net(), "frobenius", include="a", exclude="a*")
