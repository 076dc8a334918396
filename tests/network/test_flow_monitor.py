"""`GradientFlowMonitor` against gradients kept by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs


def network(*parts: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*body, *parts, nn.Flatten(), nn.Linear(4 * 36, 3))


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def by_hand(model: nn.Module, seeds: tuple[int, ...]) -> dict[str, float]:
    """Norms at outputs and weights, of the gradients of all seeds put beside each other."""
    model, found = copy.deepcopy(model).double(), {}
    for seed in seeds:
        kept: dict[str, Tensor] = {}
        x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).double()
        for name, module in model.named_children():
            x = module(x.clone())
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                x.retain_grad()
                kept[name] = x
        x.square().mean().backward()
        for name, output in kept.items():
            found[name] = math.hypot(found.get(name, 0.0), float(output.grad.norm()))
    values = {f"flow/{name}/gradient": value for name, value in found.items()}
    for name in found:
        weight = model.get_submodule(name).weight
        values[f"flow/{name}/weight_gradient"] = float(weight.grad.norm())
    return values | {"flow/first_over_last": found["0"] / found["2"]}


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_norms_are_those_of_all_batches_of_a_step(seeds: tuple[int, ...]) -> None:
    model = network()
    expected = by_hand(model, seeds)
    monitor = cs.GradientFlowMonitor(model, every=1)
    for seed in seeds:
        backward(model, seed)
    assert monitor.step() == pytest.approx(expected, rel=1e-5)
    assert list(monitor.step()) == [f"flow/{name}/weight_gradient" for name in ("0", "2", "4")]


def test_it_records_every_so_many_steps() -> None:
    model = network()
    monitor = cs.GradientFlowMonitor(model, every=3)
    recorded = []
    for step in range(7):
        backward(model, step)
        if monitor.step():
            recorded.append(step)
    assert recorded == [0, 3, 6]
    assert monitor.count == 7


def test_gradients_are_those_without_it() -> None:
    model = network()
    backward(model)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cs.GradientFlowMonitor(model, every=1)
    backward(model)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_evaluation_and_frozen_layers_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    monitor = cs.GradientFlowMonitor(model, every=1)
    model.eval()
    backward(model)
    with torch.no_grad():
        model.train()(torch.randn(2, 1, 6, 6))
    assert not any(key.endswith("/gradient") for key in monitor.step())
    model.zero_grad()
    backward(model)
    values = monitor.step()
    assert "flow/0/gradient" not in values
    assert values["flow/first_over_last"] == 1.0  # of layer 2 over itself: layer 4 is the head


def test_a_loss_scale_is_taken_out_of_outputs() -> None:
    model = network()
    monitor = cs.GradientFlowMonitor(model, every=1)
    backward(model)
    plain = monitor.step()
    backward(model)
    scaled = monitor.step(loss_scale=4.0)
    assert scaled["flow/0/gradient"] == pytest.approx(plain["flow/0/gradient"] / 4)
    assert scaled["flow/first_over_last"] == pytest.approx(plain["flow/first_over_last"])


def test_a_parametrized_weight_has_the_gradient_of_what_it_is_made_of() -> None:
    model = network()
    nn.utils.parametrizations.spectral_norm(model[2])
    monitor = cs.GradientFlowMonitor(model, every=1)
    backward(model)
    original = model[2].parametrizations.weight.original
    assert monitor.step()["flow/2/weight_gradient"] == pytest.approx(float(original.grad.norm()))


def test_hooks_come_off() -> None:
    model = network()
    monitor = cs.GradientFlowMonitor(model, every=1)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 3
    backward(model)
    monitor.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_is_recorded_without_a_backward_pass() -> None:
    assert cs.GradientFlowMonitor(network(), every=1).step() == {}


def test_what_is_refused() -> None:
    for every in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="expected every to be an integer of at least 1"):
            cs.GradientFlowMonitor(network(), every)
    with pytest.raises(ValueError, match=r"expected model to be a torch\.nn\.Module, got str"):
        cs.GradientFlowMonitor("model")
    with pytest.raises(ValueError, match=r"at least two layers, got \['0'\]"):
        cs.GradientFlowMonitor(nn.Sequential(nn.Linear(2, 2)))
