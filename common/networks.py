"""Deep plain CNNs, and the residual networks of the same width and depth.

All start from PyTorch's default initialization. The same seed gives the same kernels, whatever
stands between them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
"""Activations by name."""
HEADS = ("flatten", "pool")
"""What the linear layer may see."""
NETWORKS = ("plain", "residual")
"""The two kinds of networks."""


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """The input, with the body's output added."""
        return x + self.body(x)


class ShiftedReLU(nn.Module):
    """max(x, b) with a bias a channel that is learned, -1 at first.

    "SReLU" of Qi, You, Wang, Ma and Malik, "Deep Isometric Learning for Visual Recognition", ICML
    2020, arXiv:2006.16992.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels, 1, 1), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        """The larger one of input and bias."""
        return torch.relu(x - self.bias) + self.bias


def build(
    network: str,
    depth: int,
    channels: int,
    image_shape: Sequence[int],
    classes: int,
    *,
    activation: str = "relu",
    normalize: bool = False,
    head: str = "flatten",
    seed: int = 0,
) -> nn.Sequential:
    """A network of `depth` convolutions, 3 x 3 and zero-padded, and one linear layer.

    Parameters
    ----------
    network : "plain" or "residual"
        Plain: convolution and activation, `depth` times. Residual: always with batch
        normalization, in pre-activation blocks of two convolutions after one convolution, or two
        where `depth` is even.
    depth : int
        Number of convolutions. The first has stride 2.
    channels : int
        Of every convolution.
    image_shape : (channels, height, width)
    classes : int
    activation : "relu" or "tanh"
    normalize : bool
        Batch normalization before each activation of a plain network.
    head : "flatten" or "pool"
        What the linear layer sees: every pixel, or the mean over them.
    seed : int
        Of the kernels; the global random state stays as it is.
    """
    for name, value, known in (
        ("network", network, NETWORKS),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("head", head, HEADS),
    ):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {known}, got {value!r}")
    if depth < 1 or channels < 1:
        raise ValueError(
            f"expected at least one layer and one channel, got depth={depth}, channels={channels}"
        )
    pixels = math.prod(-(-side // 2) for side in image_shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Conv2d(image_shape[0], channels, 3, stride=2, padding=1)
        others = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth - 1)]
        linear = nn.Linear(channels * (pixels if head == "flatten" else 1), classes)
    kind = ACTIVATIONS[activation]
    if network == "plain":
        body = [
            module
            for convolution in (first, *others)
            for module in (
                convolution,
                *([nn.BatchNorm2d(channels)] if normalize else []),
                kind(),
            )
        ]
    else:
        body = _residual_body(first, others, channels, kind)
    pool = [nn.AdaptiveAvgPool2d(1)] if head == "pool" else []
    return nn.Sequential(*body, *pool, nn.Flatten(), linear)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions, in the order in which an input meets them."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def as_applied(network: nn.Module) -> nn.Module:
    """A float64 copy without parametrizations: its kernels are those that the network applies."""
    # In evaluation mode: reading a spectrally normalized kernel in training mode moves its power
    # iteration on.
    applied = copy.deepcopy(network).eval()
    for parent in list(applied.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module, "weight"):
                setattr(parent, name, _without_parametrization(module))
    return applied.double()


def _without_parametrization(module: nn.Conv2d) -> nn.Conv2d:
    # A new module: taking the parametrization off a copy takes it off the original's class too.
    plain = nn.utils.skip_init(
        nn.Conv2d,
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        bias=module.bias is not None,
    )
    with torch.no_grad():
        plain.weight.copy_(module.weight)
        if module.bias is not None:
            plain.bias.copy_(module.bias)
    return plain


def _residual_body(
    first: nn.Conv2d, others: list[nn.Conv2d], channels: int, kind: type[nn.Module]
) -> list[nn.Module]:
    def activated(convolution: nn.Conv2d) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels), kind(), convolution]

    single = len(others) % 2
    body = [first, *(module for c in others[:single] for module in activated(c))]
    for one, two in zip(others[single::2], others[single + 1 :: 2], strict=True):
        body.append(Residual(nn.Sequential(*activated(one), *activated(two))))
    return [*body, nn.BatchNorm2d(channels), kind()]
