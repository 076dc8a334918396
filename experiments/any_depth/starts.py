"""What others start plain networks from, and keep beside the loss, each from its paper."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common import peers

SIGNAL_GOAL = 0.9
"""Cosine between two orthogonal inputs behind all layers, in Zhang, Botev and Martens."""
VARIANCE_TOLERANCE = 0.1
"""Distance from unit variance that LSUV stops at, its published value."""


def layer_sequential_unit_variance(model: nn.Module, images: Tensor) -> None:
    """Orthonormal rows of the reshaped kernels, then outputs of unit variance, layer by layer.

    Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv:1511.06422.
    """
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.orthogonal_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        with torch.no_grad():
            for _ in range(10):
                variance = float(_output(model, conv, images).var())
                if variance == 0 or abs(variance - 1) < VARIANCE_TOLERANCE:
                    break
                conv.weight /= math.sqrt(variance)


def _output(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The output of one layer in a forward pass."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(images)
    hook.remove()
    return outputs[0]


def looks_linear(convolutions: Sequence[nn.Conv2d]) -> None:
    """Mirrored Gaussian kernels, with ReLU a linear network at the start, that are not isometric.

    Balduzzi et al., "The shattered gradients problem", ICML 2017, arXiv:1702.08591.
    """
    for i, conv in enumerate(convolutions):
        rows, columns = conv.out_channels // 2, conv.in_channels // (2 if i else 1)
        half = torch.empty(rows, columns, *conv.kernel_size)
        nn.init.normal_(half, std=(columns * half[0, 0].numel()) ** -0.5)
        wide = torch.cat([half, -half], 1) if i else half
        assert conv.bias is not None
        with torch.no_grad():
            conv.weight.copy_(torch.cat([wide, -wide]))
            conv.bias.zero_()


@functools.cache
def tailored_slope(depth: int) -> float:
    """The slope of a leaky ReLU for which orthogonal inputs end with a cosine of `SIGNAL_GOAL`.

    0, that of ReLU, for some ten layers or fewer, where the cosine stays below that.

    Zhang, Botev and Martens, "Deep Learning without Shortcuts: Shaping the Kernel with Tailored
    Rectifiers", ICLR 2022, arXiv:2203.08120.
    """

    def end(slope: float) -> float:
        cosine = 0.0
        for _ in range(depth):
            arc = math.sqrt(max(1 - cosine**2, 0.0)) + (math.pi - math.acos(cosine)) * cosine
            mixed = (1 - slope) ** 2 * arc / math.pi + 2 * slope * cosine
            cosine = min(mixed / (1 + slope**2), 1.0)
        return cosine

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if end(middle) > SIGNAL_GOAL else (low, middle)
    return (low + high) / 2


def peer_penalty(
    name: str, convolutions: Sequence[nn.Conv2d], generator: torch.Generator
) -> Tensor:
    """The sum over the layers of "SRIP", or of OCNN's term, which ISONet has too."""
    if name == "SRIP":
        terms = [peers.srip(conv.weight, generator=generator) for conv in convolutions]
    else:
        terms = [
            peers.convolutional_orthogonality(conv.weight, conv.stride[0]) for conv in convolutions
        ]
    return torch.stack(terms).sum()
