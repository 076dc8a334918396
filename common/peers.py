"""Stand-ins that people use for penalties on the layer's own matrix, one small function each.

All are written from their papers. A weight has PyTorch's shape (h, g, *taps); W is that weight
reshaped to (h, g * taps). W is not the matrix of the layer: that of a convolution has one copy of
W's rows for each output point, and copies overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.parametrizations import spectral_norm

import convspectra as cs


def soft_orthogonality(weight: Tensor) -> Tensor:
    """`convspectra.penalties.soft_orthogonality` of a weight, in its own type."""
    return cs.penalties.soft_orthogonality(_some_layer(weight)).to(weight.dtype)


def srip(weight: Tensor, iterations: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """`convspectra.penalties.srip` of a weight, in its own type."""
    return cs.penalties.srip(_some_layer(weight), iterations, generator).to(weight.dtype)


def convolutional_orthogonality(weight: Tensor, stride: int = 1) -> Tensor:
    """||Conv(K, K, padding, stride) - I_r0||_F^2: how far the layer's rows are from orthonormal.

    Parameters
    ----------
    weight : Tensor of shape (h, g, k, k)
    stride : int

    Returns
    -------
    Tensor
        0-dim, with gradient. The padding is the largest multiple of the stride below k, so that
        every overlap of two filters counts; I_r0 is 1 where a filter meets itself unshifted.

    Notes
    -----
    "OCNN" of Wang, Chen, Chakraborty and Yu, "Orthogonal Convolutional Neural Networks", CVPR 2020.
    It is ||M M' - I||_F^2 a row of output points of a layer without a border; rows at the border of
    a zero-padded layer are shorter and are not seen. Cost: one convolution of h images of k x k.
    """
    padding = [(k - 1) // stride * stride for k in weight.shape[2:]]
    overlaps = conv2d(weight, weight, stride=stride, padding=padding)
    target = torch.zeros_like(overlaps)
    target[:, :, padding[0] // stride, padding[1] // stride] = _identity_like(overlaps[:, :, 0, 0])
    return (overlaps - target).square().sum()


def normalize_spectrally(network: nn.Module, seed: int = 0) -> None:
    """Divide every kernel by sigma_max(W), in place, by torch's ``spectral_norm`` parametrization.

    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", ICLR 2018. Cost: one power iteration with W a step. sigma_max of the layer itself
    can be larger, up to the square root of the number of taps times.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # The parametrization starts from a random vector.
        for module in list(network.modules()):
            if isinstance(module, nn.Conv2d):
                spectral_norm(module)


def project_circular(weight: Tensor, input_size: Sequence[int], limit: float = 1.0) -> Tensor:
    """Clip the singular values of the circularly padded layer, and crop back to its taps.

    Parameters
    ----------
    weight : Tensor of shape (h, g, k, k)
        Of a layer of stride 1: the paper treats no other.
    input_size : (int, int)
        Height and width of the layer's input, at least k.
    limit : float
        Singular values above it become `limit`.

    Returns
    -------
    Tensor
        The new weight. The clipped layer has taps everywhere on the torus; those outside k x k are
        dropped, so that values can be above the limit again: the paper repeats the step in
        training.

    Raises
    ------
    ValueError
        If the kernel is longer than the input.

    Notes
    -----
    Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019. Cost: an SVD
    of an h x g matrix for each point of the input.
    """
    taps = tuple(weight.shape[2:])
    if any(k > n for k, n in zip(taps, input_size, strict=True)):
        raise ValueError(
            f"expected an input_size of at least the kernel's {taps}, got {tuple(input_size)}"
        )
    symbols = torch.fft.fft2(weight.detach(), s=list(input_size)).permute(2, 3, 0, 1)
    U, s, Vh = torch.linalg.svd(symbols, full_matrices=False)
    clipped = (U * s.clamp(max=limit)[..., None, :].to(U.dtype)) @ Vh
    kernel = torch.fft.ifft2(clipped, dim=(0, 1)).real.permute(2, 3, 0, 1)
    return kernel[:, :, : taps[0], : taps[1]].contiguous()


def delta_orthogonal_(
    weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight, in place: `gain` times a random orthogonal matrix at the middle tap, else 0.

    Parameters
    ----------
    weight : Tensor of shape (h, g, k, k), k odd
        With h >= g the layer (stride 1, zero padding) has all its singular values equal to `gain`;
        with h < g its nonzero ones.
    gain : float
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        For an even kernel, which has no middle tap.

    Notes
    -----
    Xiao, Bahri, Sohl-Dickstein, Schoenholz and Pennington, "Dynamical Isometry and a Mean Field
    Theory of CNNs", ICML 2018. Cost: one QR decomposition of an h x g matrix, once.
    """
    taps = tuple(weight.shape[2:])
    if any(k % 2 == 0 for k in taps):
        raise ValueError(f"expected an odd kernel, which has a middle tap, got {taps}")
    with torch.no_grad():
        weight.zero_()
        matrix = weight.new_empty(weight.shape[:2])
        nn.init.orthogonal_(matrix, gain, generator)
        weight[:, :, taps[0] // 2, taps[1] // 2] = matrix
    return weight


def _some_layer(weight: Tensor) -> cs.ConvOperator:
    """A layer with this weight: what looks at the weight alone does not ask for more."""
    return cs.ConvOperator(weight, weight.shape[2:])


def _identity_like(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=square.dtype, device=square.device)
