"""SpectralRegularizer of frozen, shared and grouped parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.training import (
    LAYERS,
    SIZE,
    Net,
    close,
    each_penalty,
    gradients,
    naive,
    net,
    regularizer,
)
from torch import nn

from convspectra import SpectralRegularizer


@each_penalty
def test_frozen_layers_are_left_out_until_they_are_unfrozen(name):
    model = net()
    model.b.weight.requires_grad_(False)
    reg = regularizer(model, name)
    trained = [layer for layer in LAYERS if layer[0] != "b"]
    expected = naive(model, name, trained)
    got = reg()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    with torch.no_grad():
        assert float(reg()) == pytest.approx(float(expected.detach()), rel=1e-7)
    got.backward()
    assert model.b.weight.grad is None
    assert model.a.weight.grad.any()
    report = reg.report()
    assert [layer.frozen for layer in report.layers] == [False, True, False, False]
    assert "frozen" in str(report)
    model.b.weight.requires_grad_()
    whole = naive(model, name)
    got = reg()
    assert float(got.detach()) == pytest.approx(float(whole.detach()), rel=1e-7)
    assert close(gradients(model, got), gradients(model, whole), 1e-3)
    assert not any(layer.frozen for layer in reg.report().layers)


def test_a_model_frozen_as_a_whole_costs_nothing_and_can_be_trained_with_all_the_same():
    model = net().requires_grad_(False)
    reg = regularizer(model, "conditioning")
    with pytest.warns(UserWarning, match="^all layers of the regularizer are frozen"):
        value = reg()
    assert float(value) == 0
    assert not value.requires_grad
    assert float(reg()) == 0  # Said once: a second warning would be an error here.


@each_penalty
def test_one_module_under_two_names_counts_once_and_one_weight_in_two_modules_twice(name):
    conv = net().a
    once = nn.Sequential(conv, nn.ReLU(), conv)
    reg = regularizer(once, name)
    assert [layer.name for layer in reg.layers] == ["0"]
    twin = copy.deepcopy(conv)
    twin.weight = conv.weight
    tied = regularizer(nn.Sequential(conv, nn.ReLU(), twin), name)
    assert [layer.name for layer in tied.layers] == ["0", "2"]
    assert float(tied().detach()) == pytest.approx(2 * float(reg().detach()), rel=1e-9)
    single = gradients(once, reg())
    assert close(gradients(once, tied()), [2 * gradient for gradient in single], 1e-9)


@each_penalty
def test_a_layer_at_several_sizes_counts_for_each(name):
    model = net()
    reg = regularizer(model, name, include="shared")
    expected = naive(model, name, LAYERS[2:])
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, reg()), gradients(model, expected), 1e-3)
    assert float(expected.detach()) != float(naive(model, name, LAYERS[2:3]).detach())


def test_parameter_groups_move_at_their_own_rates():
    model = net()
    reg = regularizer(model, "conditioning")
    expected = gradients(model, reg())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rest = [p for name, p in model.named_parameters() if not name.startswith("a.")]
    groups = [{"params": list(model.a.parameters()), "lr": 0.1}, {"params": rest, "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    gradients(model, reg())
    optimizer.step()
    for (name, parameter), old, gradient in zip(
        model.named_parameters(), before, expected, strict=True
    ):
        rate = 0.1 if name.startswith("a.") else 0.01
        assert torch.allclose(parameter, old - rate * gradient, rtol=1e-12)
    assert not torch.equal(model.a.weight, before[0])


@each_penalty
def test_channels_last_weights_give_the_same(name):
    plain, model = net(), net().to(memory_format=torch.channels_last)
    assert model.a.weight.stride() != plain.a.weight.stride()
    expected, reg = regularizer(plain, name), regularizer(model, name)
    for _ in range(3):
        one, other = reg(), expected()
        assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-10)
        assert close(gradients(model, one), gradients(plain, other), 1e-7)
        for network in (plain, model):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0)
    assert reg.step_count == 2
    reg.step(0.1)
    expected.step(0.1)
    assert close(list(model.parameters()), list(plain.parameters()), 1e-8)
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_data_is_refused(device):
    with torch.device("meta"):
        model = Net.__new__(Net)
        nn.Module.__init__(model)
        model.a = nn.Conv2d(2, 2, 3, padding=1)
    model.forward = lambda x: model.a(x.to("meta"))
    with pytest.raises(ValueError, match=r"^expected a model with data, got 'a\.weight' .* meta"):
        SpectralRegularizer(model, torch.zeros(1, 2, *SIZE, device=device))
