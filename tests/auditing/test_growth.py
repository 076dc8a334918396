"""What the audit predicts of gradients, beside what they do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs

WIDTH, SIZE = 12, 8


def conv(channels: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(channels, WIDTH, 3, padding=1)


class Residual(nn.Module):
    """Pre-activation blocks without normalization."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = conv(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv()) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Concatenated(nn.Module):
    """Two branches beside each other, one of them scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = conv(3), conv(), conv()
        self.last = conv(2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([self.left(x), 0.3 * self.right(x)], 1))


def chain(activation: nn.Module, depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3)]
    for _ in range(depth):
        layers += [activation, conv()]
    return nn.Sequential(*layers)


def normalized(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(3), norm, conv(), nn.ReLU(), conv())


def scaled_batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(WIDTH)
    with torch.no_grad():
        norm.running_var.uniform_(0.01, 4.0)
        norm.weight.uniform_(0.2, 2.0)
    return norm


NETWORKS = {
    "relu": lambda: chain(nn.ReLU()),
    "leaky": lambda: chain(nn.LeakyReLU(0.3)),
    "nothing": lambda: chain(nn.Identity()),
    "prelu": lambda: chain(nn.PReLU(init=0.1)),
    "residual": lambda: Residual(4),
    "concatenated": Concatenated,
    "maximum": lambda: nn.Sequential(conv(3), nn.MaxPool2d(2), conv()),
    "upsampled": lambda: nn.Sequential(conv(3), nn.Upsample(scale_factor=2), conv()),
    "batch norm": lambda: normalized(scaled_batch_norm()),
    "pre-activation": lambda: nn.Sequential(conv(3), nn.ReLU(), scaled_batch_norm(), conv()),
    "strided": lambda: nn.Sequential(conv(3), nn.Conv2d(WIDTH, 30, 3, stride=2), nn.ReLU()),
    "transposed": lambda: nn.Sequential(
        conv(3), nn.ConvTranspose2d(WIDTH, 6, 4, stride=2, padding=1), nn.ReLU()
    ),
    "groups": lambda: nn.Sequential(conv(3), nn.Conv2d(WIDTH, 24, 3, groups=4), nn.ReLU()),
}


def measured(model: nn.Module, name: str) -> float:
    """Root mean square ratio of gradients at a layer's input to random ones at the output."""
    inputs = {}
    layer = model.get_submodule(name)
    x = torch.randn(100, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)

    def copied(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        inputs["x"] = args[0].clone()  # what other layers read of it is not counted
        return (inputs["x"],)

    handle = layer.register_forward_pre_hook(copied)
    y = model(x)
    handle.remove()
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, inputs["x"], g)
    return float(gradient.norm() / g.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_predicted_gain_is_near_the_measured_one(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.zeros_(module.bias)
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64))
    assert not report.network.chain
    for layer, growth in zip(report.layers, report.network.growth, strict=True):
        # Paths that meet are not quite uncorrelated, and inputs of a ReLU no standard normal ones.
        assert math.exp(growth) == pytest.approx(measured(model, layer.name), rel=0.25)


@pytest.mark.parametrize(
    ("pooling", "numbers"), [(nn.AvgPool2d(2), 4), (nn.AdaptiveAvgPool2d(1), SIZE**2)]
)
def test_an_average_is_counted_as_one(pooling: nn.Module, numbers: int) -> None:
    """It divides a gradient's norm by the root of its length, and a weight's by nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), pooling, conv()).double()
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64))
    expected = measured(model, "0") * numbers**0.5
    assert math.exp(report.network.growth[0]) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (nn.GroupNorm(3, WIDTH), "group normalization"),
        (nn.InstanceNorm2d(WIDTH), "instance normalization"),
        (nn.LayerNorm((WIDTH, SIZE, SIZE)), "layer normalization"),
    ],
)
def test_a_normalization_takes_the_scale_of_its_layer(norm: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    model = normalized(norm).double()
    with torch.no_grad():
        model[0].weight *= 100
        model[0].bias.zero_()
    report = cs.audit(model, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64))
    assert report.layers[0].followed_by == (name,)
    assert math.exp(report.network.growth[0]) == pytest.approx(measured(model, "0"), rel=0.25)


def test_a_shared_layer_counts_as_often_as_it_is_used() -> None:
    torch.manual_seed(0)
    shared = conv()
    model = nn.Sequential(conv(3), shared, shared, shared, nn.ReLU()).double()
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64))
    assert [layer.uses for layer in report.layers] == [1, 3]
    gain = report.layers[1].gain
    assert gain is not None
    assert report.network.growth[1] == pytest.approx(3 * math.log(gain) + 0.5 * math.log(0.5))


def test_attention_leaves_its_own_maps_unknown() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    report = cs.audit(model, torch.zeros(1, 5, 8, dtype=torch.float64))
    unknown = [
        layer.name
        for layer, growth in zip(report.layers, report.network.growth, strict=True)
        if math.isnan(growth)
    ]
    assert unknown == [f"self_attn.{part}" for part in ("query", "key", "value", "out_proj")]
    assert "not known for 4 of 6 layers" in str(report)


def test_a_graph_survives_json() -> None:
    torch.manual_seed(0)
    report = cs.audit(Residual(2), torch.zeros(1, 3, SIZE, SIZE))
    assert len(report.layers[0].feeds) == 3  # both blocks, and the output
    assert cs.AuditReport.from_dict(report.to_dict()) == report


def alarms(model: nn.Module) -> set[str]:
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE), fold=False)
    return {finding.kind for finding in report.findings if finding.alarm}


def test_layers_that_shrink_gradients_are_no_alarm_where_skips_carry_them() -> None:
    torch.manual_seed(0)
    model = Residual(4)
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE))
    (found,) = (finding for finding in report.findings if finding.kind == "vanishing")
    assert (found.alarm, "nothing needs to be done" in found.advice) == (False, True)
    assert not alarms(model)


def test_a_deep_network_is_said_to_vanish_until_it_is_prepared() -> None:
    torch.manual_seed(0)
    model = chain(nn.ReLU(), depth=20)
    report = cs.audit(model, torch.zeros(1, 3, SIZE, SIZE))
    first = report.findings[0]
    assert (first.kind, first.layers[0], first.alarm) == ("gradient vanishes", "0", True)
    assert first.advice.startswith("cs.prepare(model, images)")
    assert report.network.leaves_band == first.layers[-1]
    cs.prepare(model, torch.randn(16, 3, SIZE, SIZE))
    assert not alarms(model)
