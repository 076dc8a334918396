"""A small network, its regularizer, and the penalty from dense singular values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convspectra import SpectralRegularizer

NAMES = ("conditioning", "band", "frobenius", "stein")
each_penalty = pytest.mark.parametrize("name", NAMES)
# Without a value when all is well: these bounds make it act at both ends.
OPTIONS = {"band": {"lower": 0.95, "upper": 1.02, "k": 2}}
SIZE = (5, 6)


def near_delta(conv: nn.Module, scale: float = 0.1) -> None:
    """A kernel whose layer is close to the identity: simple values, all of the order of 1."""
    with torch.no_grad():
        conv.weight.mul_(scale)
        channels = range(min(conv.weight.shape[:2]))
        conv.weight[channels, channels, 1, 1] += 1


class Net(nn.Module):
    """Two layers of one kind, a shared layer at two input sizes, BatchNorm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2, 2)
        for conv in (self.a, self.b, self.shared):
            near_delta(conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(self.b(self.a(x).relu())))
        return self.head(self.shared(self.pool(x)).mean((2, 3)))


# (name, input size) in the order of the forward pass.
LAYERS = [("a", SIZE), ("b", SIZE), ("shared", SIZE), ("shared", (2, 3))]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module as PyTorch initializes it, from this seed, without touching the global state."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        torch.manual_seed(seed)
        return make()


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    return seeded(Net, seed).to(dtype)


def batch(dtype: torch.dtype = torch.float64, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


def regularizer(model: nn.Module, name: str, **options) -> SpectralRegularizer:
    dtype = next(model.parameters()).dtype
    options = {"weight": 0.3, "penalty_options": OPTIONS.get(name)} | options
    return SpectralRegularizer(model, batch(dtype), penalty=name, **options)


def naive(model: Net, name: str, layers: list = LAYERS) -> Tensor:
    """The weighted sum from dense singular values, differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, size in layers:
        conv = getattr(model, layer)
        basis = torch.eye(2 * math.prod(size), dtype=conv.weight.dtype).reshape(-1, 2, *size)
        matrix = nn.functional.conv2d(basis, conv.weight, padding=1).flatten(1)
        sigma = torch.linalg.svdvals(matrix)
        if name == "band":
            below = (0.95 - sigma[-2:]).clamp_min(0).square().mean()
            above = (sigma[:2] - 1.02).clamp_min(0).square().mean()
            total = total + 0.5 * (below + above)
        elif name == "stein":
            total = total + (0.5 * sigma.square() - sigma.log() - 0.5).mean()
        else:
            frobenius = 0.5 * sigma.square().mean()
            total = total + frobenius - (sigma[-1] if name == "conditioning" else 0)
    return 0.3 * total


def gradients(model: nn.Module, loss: Tensor | None = None) -> list[Tensor]:
    """Of a loss by all parameters, or those already there; zeros where there is none."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def close(got: list[Tensor], expected: list[Tensor], tol: float) -> bool:
    size = max(float(tensor.detach().abs().max()) for tensor in expected)
    assert size > 0
    return all(
        torch.allclose(one.double(), other.double(), rtol=tol, atol=tol * size)
        for one, other in zip(got, expected, strict=True)
    )


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def parametrized() -> Net:
    model = net()
    parametrize.register_parametrization(model.b, "weight", Double())
    return model


def moved(model: nn.Module, factor: float = 1.001) -> None:
    with torch.no_grad():
        for conv in (model.a, model.b, model.shared):
            conv.weight.mul_(factor)
