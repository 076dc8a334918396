"""Fifty small networks of every kind of part, with an input each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """The input added to what the inner module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Concatenation(nn.Module):
    """The input beside what the inner module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], dim=1)


class Tokens(nn.Module):
    """Attention over the pixels of an image."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        mixed, _ = self.attention(tokens, tokens, tokens)
        return mixed.mT.reshape(x.shape)


class Gate(nn.Module):
    """Squeeze and excitation: channels are scaled by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


def conv(g: int = 2, h: int = 2, **options: object) -> nn.Conv2d:
    return nn.Conv2d(g, h, 3, padding=1, **options)  # type: ignore[arg-type]


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Batch normalization with statistics and weights as after training."""
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


PARTS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(conv(), nn.ReLU(inplace=True), conv(), nn.ReLU()),
    "tanh": lambda: nn.Sequential(conv(), nn.Tanh(), conv(2, 3), nn.Tanh()),
    "leaky": lambda: nn.Sequential(conv(), nn.LeakyReLU(0.1, inplace=True), conv()),
    "gelu": lambda: nn.Sequential(conv(), nn.GELU(), conv(), nn.SiLU()),
    "strided": lambda: nn.Sequential(conv(2, 4, stride=2), nn.ELU(), conv(4, 4, groups=2)),
    "dilated": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, dilation=2), nn.Softplus(), conv(3, 2)),
    "circular": lambda: nn.Sequential(conv(padding_mode="circular"), nn.Tanh()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 4, 2, 1), nn.Tanh()),
    "max pool": lambda: nn.Sequential(conv(2, 4), nn.MaxPool2d(2), nn.ReLU(), conv(4, 2)),
    "average pool": lambda: nn.Sequential(conv(2, 4), nn.AvgPool2d(2), nn.Tanh(), conv(4, 2)),
    "batch norm": lambda: nn.Sequential(conv(2, 4), trained(nn.BatchNorm2d(4)), nn.ReLU()),
    "instance norm": lambda: nn.Sequential(conv(2, 4), nn.InstanceNorm2d(4, affine=True), nn.ELU()),
    "group norm": lambda: nn.Sequential(conv(2, 4), nn.GroupNorm(2, 4), nn.ReLU()),
    "layer norm": lambda: nn.Sequential(conv(), nn.LayerNorm([6, 6]), nn.Tanh()),
    "skip": lambda: nn.Sequential(Skip(nn.Sequential(conv(), nn.ReLU(), conv())), nn.ReLU()),
    "deep skips": lambda: nn.Sequential(
        *(Skip(nn.Sequential(trained(nn.BatchNorm2d(2)), nn.ReLU(), conv())) for _ in range(3))
    ),
    "concatenation": lambda: nn.Sequential(Concatenation(conv()), nn.ReLU(), conv(4, 2)),
    "attention": lambda: nn.Sequential(conv(2, 4), Skip(Tokens(4, 2)), nn.Tanh()),
    "gate": lambda: nn.Sequential(conv(2, 4), nn.ReLU(), Gate(4)),
    "classifier": lambda: nn.Sequential(
        conv(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
    "critic": lambda: nn.Sequential(conv(), nn.Tanh(), nn.Flatten(), nn.Linear(72, 1)),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Softmax(1)),
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout(0.5), nn.PReLU(), nn.Dropout2d(0.5)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(conv()), nn.ReLU(), conv()
    ),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.Tanh()),
}
NETWORKS = [(name, seed) for name in PARTS for seed in (0, 1)]


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A network, in training mode as it comes, and one sample (1, 2, 6, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PARTS[name]()
        return model, torch.randn(1, 2, 6, 6)
