"""Singular values that are followed, against dense ones along a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import convspectra as cs
from convspectra import ConvOperator
from convspectra.training._followed_values import Stack

SIZE = 6
LAYERS = {
    "square": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "wide": {"padding": 1, "outputs": 2},
    "grouped": {"padding": 1, "groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "valid": {"padding": 0},
}


def network(options: dict, dtype: torch.dtype = torch.float32, count: int = 3) -> nn.Sequential:
    """Well-conditioned kernels: a delta-orthogonal one, and a tenth of noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = []
        for _ in range(count):
            conv = nn.Conv2d(
                4,
                options.get("outputs", 4),
                3,
                **{key: value for key, value in options.items() if key != "outputs"},
            )
            nn.init.normal_(conv.weight, std=0.02)
            with torch.no_grad():
                for i in range(conv.weight.shape[0]):
                    conv.weight[i, i % conv.weight.shape[1], 1, 1] += 1.0
            layers.append(conv)
    return nn.ModuleList(layers).to(dtype)


class SideBySide(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return torch.stack([layer(x).square().sum() for layer in self.layers])


def dense_ends(layer: nn.Conv2d) -> tuple[float, float]:
    op = ConvOperator.from_module(layer, (SIZE, SIZE))
    s = torch.linalg.svdvals(op.with_weight(op.weight.detach().double()).to_dense())
    return float(s[-1]), float(s[0])


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_followed_along_a_run(options, dtype):
    """Enclosures hold at every step; where the weights come to rest the values become exact."""
    model = SideBySide(network(options, dtype))
    example = torch.zeros(1, 4, SIZE, SIZE, dtype=dtype)
    reg = cs.SpectralRegularizer(
        model,
        example,
        penalty="conditioning",
        weight=0.1,
        improve_interval=1,
        refresh_interval=10**6,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    x = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    slack = 1e-5 if dtype == torch.float32 else 1e-9
    first = [dense_ends(layer) for layer in model.layers]
    for _ in range(30):
        loss = 1e-2 * model(x).sum() + reg()
        optimizer.zero_grad()
        loss.backward()
        for layer, found in zip(model.layers, reg.report().layers, strict=True):
            smallest, largest = dense_ends(layer)
            assert found.sigma_min_lower <= smallest * (1 + slack)
            assert smallest <= found.sigma_min_upper * (1 + slack)
            assert found.sigma_max_lower <= largest * (1 + slack)
            assert largest <= found.sigma_max_upper * (1 + slack)
            assert math.isclose(found.sigma_max, largest, rel_tol=0.05)
        optimizer.step()
    assert reg.step_count == 29
    last = [dense_ends(layer) for layer in model.layers]
    assert max(abs(b[1] / a[1] - 1) for a, b in zip(first, last, strict=True)) > 1e-2
    for _ in range(150):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
        reg()
    for layer, found in zip(model.layers, reg.report().layers, strict=True):
        smallest, largest = dense_ends(layer)
        # Copies of a circular layer's values slow a single vector down.
        assert math.isclose(found.sigma_max, largest, rel_tol=1e-2)
        assert math.isclose(found.sigma_min, smallest, rel_tol=1e-2)
        assert found.age == reg.step_count, "nothing was computed exactly since the start"


def test_layers_take_turns_at_being_computed_exactly(monkeypatch):
    computed = []
    original = Stack.refresh
    monkeypatch.setattr(
        Stack,
        "refresh",
        lambda self, index, step: (
            computed.append((self.layers[index].name, step)),
            original(self, index, step),
        )[1],
    )
    model = SideBySide(network({"padding": 1}))
    reg = cs.SpectralRegularizer(
        model, torch.zeros(1, 4, SIZE, SIZE), penalty="cond", refresh_interval=6
    )
    for _ in range(13):
        reg()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
    names = ["layers.0", "layers.1", "layers.2"]
    assert computed[:3] == [(name, 0) for name in names]
    assert [step for _, step in computed[3:]] == [2, 4, 6, 8, 10, 12]
    assert sorted(name for name, _ in computed[3:6]) == names
    assert sorted(name for name, _ in computed[6:]) == names
    assert max(layer.age for layer in reg.report().layers) == 4


def test_vectors_that_are_lost_are_said_to_be():
    """A random square layer: its smallest value is far below what one step moves it by."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    reg = cs.SpectralRegularizer(conv, torch.zeros(1, 8, 12, 12), penalty="sigma_min")
    reg()
    assert not reg.report().layers[0].lost
    for _ in range(8):
        with torch.no_grad():
            conv.weight.add_(0.01 * torch.randn_like(conv.weight))
        reg()
    layer = reg.report().layers[0]
    exact = cs.sigma_min(ConvOperator.from_module(conv, (12, 12)))
    assert layer.lost
    assert layer.sigma_min_lower <= exact <= layer.sigma_min_upper
    assert layer.sigma_min > 2 * exact
    reg.refresh()
    layer = reg.report().layers[0]
    assert not layer.lost
    assert layer.age == 0
    assert math.isclose(layer.sigma_min, exact, rel_tol=1e-6)


def test_a_layer_of_one_value():
    conv = nn.Conv1d(1, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(-3.0)
    for name, expected in (("sigma_min", -3.0), ("sigma_max", 3.0), ("cond", 0.0)):
        reg = cs.SpectralRegularizer(conv, torch.zeros(1, 1, 1), penalty=name, weight=1)
        assert math.isclose(float(reg().detach()), expected, abs_tol=1e-6)
        with torch.no_grad():
            conv.weight.add_(0.0)
        assert math.isclose(float(reg().detach()), expected, abs_tol=1e-6)


def test_a_weight_of_zero_has_no_gradient_and_no_nan():
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    reg = cs.SpectralRegularizer(conv, torch.zeros(1, 2, 5, 5), penalty="conditioning")
    for _ in range(5):
        value = reg()
        value.backward()
        assert float(value.detach()) == 0.0
        assert not conv.weight.grad.any()
        with torch.no_grad():
            conv.weight.mul_(1.0)
    (layer,) = reg.report().layers
    assert (layer.sigma_min, layer.sigma_max) == (0.0, 0.0)


def test_a_weight_of_zero_has_no_condition_number():
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    reg = cs.SpectralRegularizer(conv, torch.zeros(1, 2, 5, 5), penalty="cond")
    with pytest.raises(ArithmeticError, match="the penalty is not finite"):
        reg()


def test_several_values_at_each_end():
    model = SideBySide(network({"padding": 1}, torch.float64, count=1))
    options = {"lower": 0.95, "upper": 1.02, "k": 3}
    reg = cs.SpectralRegularizer(
        model,
        torch.zeros(1, 4, SIZE, SIZE).double(),
        penalty="band",
        penalty_options=options,
        weight=1.0,
    )
    op = ConvOperator.from_module(model.layers[0], (SIZE, SIZE))
    expected = cs.penalties.band(op, **options)
    value = reg()
    assert math.isclose(float(value.detach()), float(expected.detach()), rel_tol=1e-6)
    weight = model.layers[0].weight
    gradients = [torch.autograd.grad(v, weight)[0] for v in (value, expected)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_a_report_sees_ends_that_the_vectors_do_not():
    """Vectors that have settled on singular values inside the spectrum stay there."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[range(4), range(4), 1, 1] = torch.tensor([0.5, 1.0, 1.5, 2.0])
    reg = cs.SpectralRegularizer(conv, torch.zeros(1, 4, SIZE, SIZE), penalty="cond")
    reg()
    ((stack, _),) = reg._penalties._stacks
    inside = torch.zeros(2, 4, SIZE, SIZE)
    inside[0, 1, 2, 2] = inside[1, 2, 2, 2] = 1
    stack.ends.vectors[0] = inside.flatten(1)
    stack.ends.directions.zero_()
    read, settled = reg.report(settle=False).layers[0], reg.report().layers[0]
    assert (read.sigma_min, read.sigma_max) == pytest.approx((1.0, 1.5))
    assert (settled.sigma_min, settled.sigma_max) == pytest.approx((0.5, 2.0))
    assert settled.sigma_min_lower <= 0.5 <= settled.sigma_min_upper
    assert settled.sigma_max_lower <= 2.0 <= settled.sigma_max_upper
