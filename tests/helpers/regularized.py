"""A network with layers of several kinds, and penalties summed by hand."""

from __future__ import annotations

import torch
from helpers.training import seeded
from torch import Tensor, nn

from convspectra import ConvOperator, penalties
from convspectra.training import _exact_penalties as exact


class Net(nn.Module):
    """Layers of one kind and of others, a shared one at two sizes, BatchNorm, a linear head."""

    def __init__(self, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(3, 3, 3, padding=1, padding_mode=padding_mode)
        self.d = nn.Conv2d(3, 3, 3, padding=1, padding_mode=padding_mode)
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(self.stem(x)).relu()))
        x = self.d(self.c(x))
        x = self.a(self.up(x))
        return self.head(x.mean((2, 3)))


X = torch.ones(2, 1, 8, 6)


def assert_close(got: list[Tensor], expected: list[Tensor], rtol: float = 1e-3) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=rtol, atol=rtol * float(other.abs().max() + 1e-30))


def stack(count: int, channels: int = 3, **options) -> nn.Module:
    options = {"padding": 1} | options
    return seeded(
        lambda: nn.Sequential(*[nn.Conv2d(channels, channels, 3, **options) for _ in range(count)])
    ).double()


ADDITIVE = ("frobenius", "orthogonality", "circular_stein")


def recorded(monkeypatch, name: str) -> list[int]:
    """The groups of every operator that the penalty is asked for."""
    groups = []
    original = getattr(penalties, name)

    def record(op: ConvOperator) -> Tensor:
        groups.append(op.groups)
        return original(op)

    monkeypatch.setattr(penalties, name, record)
    monkeypatch.setitem(exact.EXACT_PENALTIES, name, record)
    monkeypatch.setattr(exact, "ADDITIVE", (record,) if name in ADDITIVE else ())
    return groups
