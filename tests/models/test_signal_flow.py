"""What surrounds each layer: activations, neighbors, normalizations and branches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convspectra.models import Activation, signal_flow
from convspectra.models._gradient_paths import MEAN_SQUARE_SLOPES

X = torch.zeros(2, 3, 8, 8)


def conv(g: int, h: int) -> nn.Conv2d:
    return nn.Conv2d(g, h, 3, padding=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer, self.head = (
            conv(3, 4),
            conv(4, 4),
            conv(4, 4),
            conv(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), Activation("relu")),
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.LeakyReLU(0.2), Activation("leaky_relu", 0.2)),
        (nn.Tanh(), Activation("tanh")),
        (nn.GELU(), Activation("gelu")),
        (nn.SiLU(inplace=True), Activation("silu")),
        (nn.PReLU(4), Activation("prelu")),
        (nn.Identity(), None),
    ],
)
def test_the_activation_behind_a_layer(activation: nn.Module, expected: Activation | None) -> None:
    model = nn.Sequential(conv(3, 4), activation, nn.AvgPool2d(2), conv(4, 5))
    flows = signal_flow(model, X)
    assert flows["0"].activation == expected
    assert flows["3"].activation is None
    assert (flows["0"].feeds, flows["3"].fed_by) == (("3",), ("0",))
    assert (flows["0"].reads_input, flows["3"].reads_input) == (True, False)


def test_a_normalization_between() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.GroupNorm(2, 4))
    flows = signal_flow(model, X)
    assert flows["0"].normalized
    assert flows["3"].normalized
    assert flows["0"].activation == Activation("relu")


def test_a_residual_branch() -> None:
    flows = signal_flow(Residual(), X)
    assert {name: flow.ends_branch for name, flow in flows.items()} == {
        "first": False, "inner": False, "outer": True, "head": False,
    }  # fmt: skip
    assert set(flows["head"].fed_by) == {"first", "outer"}
    assert flows["outer"].activation == Activation("relu")


def test_a_function_call_and_a_layer_used_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = conv(3, 3), nn.Parameter(torch.zeros(2, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.tanh(self.layer(x))
            return nn.functional.conv2d(x, self.weight)

    flows = signal_flow(Shared(), X)
    assert (flows["layer"].uses, flows["layer"].activation) == (2, Activation("tanh"))
    assert flows["layer"].fed_by == ("layer",)
    assert flows["weight"].fed_by == ("layer",)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    signal_flow(model, X)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("name", MEAN_SQUARE_SLOPES)
def test_mean_square_slopes_are_those_of_normal_inputs(name: str) -> None:
    step = 16 / 100_000
    nodes = (np.arange(100_000) + 0.5) * step - 8
    x = torch.tensor(nodes, requires_grad=True)
    function = getattr(torch, name, None) or getattr(torch.nn.functional, name)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    density = step * np.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    assert MEAN_SQUARE_SLOPES[name] == pytest.approx(density @ slope.numpy() ** 2, abs=2e-5)
