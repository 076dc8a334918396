"""SpectralRegularizer and what counts as a step: accumulated gradients, fused optimizers."""

from __future__ import annotations

import pytest
import torch
from helpers.training import batch, close, each_penalty, gradients, net, parametrized, regularizer


@each_penalty
@pytest.mark.parametrize("fused", [False, True])
def test_accumulated_gradients_are_those_of_one_call(name, fused):
    """Over several steps: the vectors must move on once a step, however many parts there are."""
    found = []
    for parts in (1, 4):
        model = net().eval()
        reg = regularizer(model, name, improve_interval=2, refresh_interval=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
        for step in range(4):
            optimizer.zero_grad()
            for chunk in batch().chunk(parts):
                ((model(chunk).square().mean() + reg()) / parts).backward()
            assert reg.step_count == step
            optimizer.step()
        found.append((list(model.parameters()), reg.report()))
    (once, first), (often, second) = found
    assert close(often, once, 1e-9)
    assert second.step == first.step == 3
    assert second.penalty == pytest.approx(first.penalty, rel=1e-9)
    assert [layer.age for layer in second.layers] == [layer.age for layer in first.layers]


def test_fused_optimizers_change_no_version_and_are_counted_all_the_same():
    model = net()
    reg = regularizer(model, "frobenius")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    before = float(reg().detach())
    for step in (1, 2, 3):
        reg().backward()
        optimizer.step()
        assert float(reg().detach()) < before
        reg()
        assert reg.step_count == step


def test_without_gradients_nothing_moves_on():
    model = net()
    reg = regularizer(model, "conditioning", improve_interval=1, refresh_interval=1)
    value = reg()
    with torch.no_grad():
        for _ in range(3):
            model.a.weight.mul_(1.1)
            reg()
    assert reg.step_count == 0
    assert {layer.age for layer in reg.report().layers} == {0}
    assert float(reg().detach()) != float(value.detach())
    assert reg.step_count == 1


def test_weights_from_a_parametrization_are_new_tensors_but_no_new_step():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    kept = [reg() for _ in range(4)]
    assert reg.step_count == 0
    assert torch.equal(kept[0], kept[-1])
    with torch.no_grad():
        model.b.parametrizations.weight.original.mul_(1.01)
    reg()
    assert reg.step_count == 1


def test_weights_from_a_parametrization_get_twice_the_gradient():
    plain, model = net(), parametrized()
    expected = gradients(plain, regularizer(plain, "conditioning")())
    regularizer(model, "conditioning")().backward()
    got = model.b.parametrizations.weight.original.grad
    assert torch.allclose(got, 2 * plain.b.weight.grad, rtol=1e-9)
    assert torch.allclose(model.a.weight.grad, expected[0], rtol=1e-9)


def test_weights_from_a_parametrization_count_without_gradients_too():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    value = float(reg().detach())
    with torch.no_grad():
        assert float(reg()) == pytest.approx(value, rel=1e-12)
        assert not any(layer.frozen for layer in reg.report().layers)
