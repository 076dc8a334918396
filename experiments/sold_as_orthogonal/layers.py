"""The layers: each as its users get it, and what it claims to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convspectra as cs
from common.peers import delta_orthogonal_

POWER_ITERATIONS = 500
"""Forward passes in training mode for `spectral_norm`, each with one power iteration."""


class NotInstalledError(ImportError):
    """An optional package is missing: its rows say so."""


@dataclass(frozen=True)
class Candidate:
    """A way to make a layer with zero padding, and its claim.

    Attributes
    ----------
    name : str
    claim : str
        What is said of it, or what its construction makes true.
    build : callable (channels, size) -> Tensor
        The weight that the layer applies, from torch's global generator.
    claimed : callable (weight, size) -> Tensor, optional
        The singular values that the claim is about; None where nothing is claimed.
    tolerance : float
        How far these are from 1 by the precision that the layer is made in.
    """

    name: str
    claim: str
    build: Callable[[int, int], Tensor]
    claimed: Callable[[Tensor, int], Tensor] | None
    tolerance: float = 1e-6


def conv(channels: int) -> nn.Conv2d:
    """PyTorch's default initialization, float64, so that no claim is missed by rounding."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=torch.float64)


def reshaped(weight: Tensor, size: int = 0) -> Tensor:
    """Singular values of the h x 9g matrix that the weight is reshaped to."""
    return torch.linalg.svdvals(weight.flatten(1))


def circular(weight: Tensor, size: int) -> Tensor:
    """Singular values of the layer with circular padding, from its Fourier symbols."""
    wrapped = torch.zeros(*weight.shape[:2], size, size, dtype=weight.dtype)
    for p in range(weight.shape[2]):
        for q in range(weight.shape[3]):
            wrapped[:, :, p % size, q % size] += weight[:, :, p, q]
    symbols = torch.fft.fft2(wrapped).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(symbols).flatten()


def slices(weight: Tensor, size: int = 0) -> Tensor:
    """Singular values of all the 3 x 3 slices weight[i, j]."""
    return torch.linalg.svdvals(weight).flatten()


def middle(weight: Tensor, size: int = 0) -> Tensor:
    """Singular values of the middle tap."""
    return torch.linalg.svdvals(weight[:, :, 1, 1])


def _default(channels: int, size: int) -> Tensor:
    return conv(channels).weight.detach()


def _initialized(channels: int, size: int) -> Tensor:
    return nn.init.orthogonal_(conv(channels).weight.detach())


def _parametrized(channels: int, size: int) -> Tensor:
    return parametrizations.orthogonal(conv(channels)).weight.detach()


def _normalized(channels: int, size: int) -> Tensor:
    layer = parametrizations.spectral_norm(conv(channels)).train()
    for _ in range(POWER_ITERATIONS):
        weight: Tensor = layer.weight
    return weight.detach()


def _geotorch(channels: int, size: int) -> Tensor:
    try:
        import geotorch
    except ImportError as error:
        raise NotInstalledError("geotorch is not installed") from error
    layer = conv(channels)
    geotorch.orthogonal(layer, "weight")
    return layer.weight.detach()


def _adaptive(channels: int, size: int) -> Tensor:
    try:
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
    except ImportError as error:
        raise NotInstalledError("orthogonium is not installed") from error
    layer = AdaptiveOrthoConv2d(channels, channels, 3, padding=1, bias=False, padding_mode="zeros")
    weight: Tensor = layer.weight.detach()
    return weight.double()


def _skew(channels: int, size: int) -> Tensor:
    try:
        from orthogonium.layers.conv.adaptiveSOC import AdaptiveSOCConv2d
    except ImportError as error:
        raise NotInstalledError("orthogonium is not installed") from error
    layer = AdaptiveSOCConv2d(
        channels, channels, 3, padding="same", bias=False, padding_mode="zeros"
    )
    weight: Tensor = layer.weight.detach()
    return weight.double()


def _torchlip(channels: int, size: int) -> Tensor:
    try:
        from deel import torchlip
    except ImportError as error:
        raise NotInstalledError("deel-torchlip is not installed") from error
    layer = torchlip.SpectralConv2d(channels, channels, 3, padding=1, bias=False).double()
    layer(torch.zeros(1, channels, size, size, dtype=torch.float64))
    weight: Tensor = layer.vanilla_export().weight.detach()
    return weight


def _delta(channels: int, size: int) -> Tensor:
    return delta_orthogonal_(conv(channels).weight.detach())


def _preconditioned(channels: int, size: int) -> Tensor:
    layer = conv(channels)
    example = torch.zeros(1, channels, size, size, dtype=torch.float64)
    cs.precondition(layer, example)
    return layer.weight.detach()


def block_orthogonal(channels: int, size: int = 0) -> Tensor:
    """A 3 x 3 kernel that is exactly orthogonal with circular padding.

    Parameters
    ----------
    channels : int
    size : int
        Not used: the kernel is the same for all sizes.

    Returns
    -------
    Tensor of shape (channels, channels, 3, 3), float64

    Notes
    -----
    "BCOP" of Li, Haque, Anil, Lucas, Grosse and Jacobsen, "Preventing Gradient Attenuation in
    Lipschitz Constrained Convolutional Networks", NeurIPS 2019, after the initialization of Xiao et
    al., ICML 2018: an orthogonal matrix times, for each axis, two factors P + (I - P) z^{+-1} with
    P an orthogonal projection of half the rank. The shifts go both ways, so that the kernel is
    centered.
    """
    kernel = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = _random_orthogonal(channels)
    eye = torch.eye(channels, dtype=torch.float64)
    for axis in (2, 3):
        for shift in (-1, 1):
            half = _random_orthogonal(channels)[:, : channels // 2]
            stays = half @ half.T
            # Nothing wraps: each axis is shifted by at most one tap, either way, from the center.
            moved = kernel.roll(shift, axis)
            kernel = torch.einsum("hgpq,gf->hfpq", kernel, stays) + torch.einsum(
                "hgpq,gf->hfpq", moved, eye - stays
            )
    return kernel


def _random_orthogonal(order: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(order, order, dtype=torch.float64))


CANDIDATES = (
    Candidate("nn.Conv2d", "nothing", _default, None),
    Candidate(
        "nn.init.orthogonal_", "the reshaped weight has orthonormal rows", _initialized, reshaped
    ),
    Candidate(
        "parametrizations.orthogonal",
        "every 3 x 3 slice weight[i, j] is orthogonal",
        _parametrized,
        slices,
    ),
    Candidate(
        "parametrizations.spectral_norm",
        "the reshaped weight has norm 1",
        _normalized,
        lambda weight, size: reshaped(weight)[:1],
    ),
    Candidate(
        "geotorch.orthogonal", "every 3 x 3 slice weight[i, j] is orthogonal", _geotorch, slices
    ),
    Candidate(
        "block orthogonal (BCOP)", "orthogonal with circular padding", block_orthogonal, circular
    ),
    Candidate(
        "orthogonium AdaptiveOrthoConv2d (AOC)",
        "orthogonal with circular padding, in float32",
        _adaptive,
        circular,
        1e-5,
    ),
    Candidate(
        "orthogonium AdaptiveSOCConv2d (SOC)",
        "orthogonal with circular padding, by a truncated series",
        _skew,
        circular,
        0.05,
    ),
    Candidate(
        "deel-torchlip SpectralConv2d",
        "3 times the reshaped weight has orthonormal rows, so that the norm is at most 1",
        _torchlip,
        lambda weight, size: 3 * reshaped(weight),
    ),
    Candidate("delta-orthogonal", "the middle tap is orthogonal, the others are 0", _delta, middle),
    Candidate("cs.precondition", "condition at most 2 as it is applied", _preconditioned, None),
)
"""The layers, each with its claim."""
