"""Gradients along a network are the same whether it is a module, a trace or an ONNX file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convspectra.models import named_operators
from convspectra.models._gradient_paths import MEAN_SQUARE_SLOPES
from convspectra.models._named_operators import NamedOperator
from convspectra.models.files import load_operators


def conv(g: int, h: int) -> nn.Conv2d:
    return nn.Conv2d(g, h, 3, padding=1)


class Function(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = conv(3, 4), conv(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class LayerNorm2d(nn.Module):
    """The layer normalization of ConvNeXt, over channels, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-6))


class Skips(nn.Module):
    """A residual branch, a concatenation, a channel attention and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer = conv(3, 4), conv(4, 4), conv(4, 4)
        self.norm, self.last = nn.BatchNorm2d(4), conv(7, 4)
        self.gate, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        y = y + self.norm(self.outer(torch.tanh(self.inner(y))))
        y = 0.5 * self.last(torch.cat([y, x], 1))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return y, self.head(nn.functional.leaky_relu(y.mean((2, 3)), 0.2))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "hardtanh": lambda x: x.clamp(-1.0, 2.0),
    "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": nn.functional.elu,
    "softplus": nn.functional.softplus,
    "silu": nn.functional.silu,
    "silu, written out": lambda x: x * torch.sigmoid(x),
    "gelu": nn.functional.gelu,
    "gelu, written out": lambda x: (
        0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3))))
    ),
    "hardswish": nn.functional.hardswish,
    "hardswish, written out": lambda x: x * nn.functional.relu6(x + 3) / 6,
    "mish": nn.functional.mish,
    "softmax": lambda x: torch.softmax(x, 1),
    "max pooling": lambda x: nn.functional.max_pool2d(x, 2),
    "average pooling": lambda x: 3 * nn.functional.avg_pool2d(x, 2),
    "pooling, then silu": lambda x: nn.functional.silu(nn.functional.avg_pool2d(x, 2)),
    "division": lambda x: torch.abs(x) / 4,
}


def exported(model: nn.Module, path: Path, opset: int) -> list[NamedOperator]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, X, str(path), opset_version=opset, dynamo=False)
    return load_operators(path, [(3, 6, 6)])[1]


def traced(model: nn.Module, path: Path) -> list[NamedOperator]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, X).save(str(path))
    return load_operators(path, [(3, 6, 6)])[1]


X = torch.rand(1, 3, 6, 6)


def assert_same_flow(found: list[NamedOperator], expected: list[NamedOperator]) -> None:
    """The same ways on, and as much of a gradient along each of them."""
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        gains = [{feed.place: feed.gain for feed in layer.feeds} for layer in (one, two)]
        assert gains[0] == pytest.approx(gains[1], rel=1e-5)
        assert one.followed_by == two.followed_by


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_in_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Function(FUNCTIONS[name]).eval()
    expected = named_operators(model, X)
    short = name.partition(",")[0]
    if "pooling" not in name and name != "division":
        slope = f" {0.1:g}" if name == "leaky_relu" else ""
        assert expected[0].followed_by == (short + slope,)
    if short in MEAN_SQUARE_SLOPES:
        gain = expected[0].feeds[0].gain
        assert gain == pytest.approx(math.sqrt(MEAN_SQUARE_SLOPES[short]), rel=2e-3)
    assert_same_flow(exported(model, tmp_path / "model.onnx", 17), expected)
    assert_same_flow(traced(model, tmp_path / "model.pt"), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(1, 4),
        nn.LayerNorm(6),
        nn.PReLU(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_normalizations_in_a_file(module: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = Function(module).eval()
    found, expected = exported(model, tmp_path / "model.onnx", 17), named_operators(model, X)
    for one, two in zip(found, expected, strict=True):
        gains = [{feed.place: feed.gain for feed in layer.feeds} for layer in (one, two)]
        assert gains[0] == pytest.approx(gains[1], rel=1e-5)


@pytest.mark.parametrize("opset", [13, 17])
def test_a_normalization_that_is_written_out(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Function(LayerNorm2d(4)).eval()
    named = nn.LayerNorm(4).requires_grad_(False)
    with torch.no_grad():
        named.weight.copy_(model.function.weight.flatten())  # type: ignore[attr-defined]
    whole = Function(lambda x: named(x.movedim(1, -1)).movedim(-1, 1)).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    expected = named_operators(whole, X)
    assert expected[0].followed_by == ("layer normalization",)
    for found in (named_operators(model, X), exported(model, tmp_path / "m.onnx", opset)):
        assert found[0].followed_by == ("normalization",)
        assert found[0].feeds[0].gain == pytest.approx(expected[0].feeds[0].gain, rel=1e-5)
    layers = exported(whole, tmp_path / "whole.onnx", opset)
    assert layers[0].feeds[0].gain == pytest.approx(expected[0].feeds[0].gain, rel=1e-5)


@pytest.mark.parametrize("opset", [13, 17])
def test_skips_and_concatenations_in_a_file(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Skips().eval()
    expected = named_operators(model, X)
    assert {layer.name: len(layer.feeds) for layer in expected} == {
        "first": 2, "inner": 1, "outer": 1, "last": 3, "gate": 2, "head": 1,
    }  # fmt: skip
    assert_same_flow(exported(model, tmp_path / "model.onnx", opset), expected)
    assert_same_flow(traced(model, tmp_path / "model.pt"), expected)
