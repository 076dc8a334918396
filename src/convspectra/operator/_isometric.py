"""Isometric layers in closed form: their taps, the nearest one, and mirrored kernels.

With stride 1 and "same" zero padding the isometric layers are exactly those with an orthogonal
matrix in the center tap and 0 elsewhere (delta-orthogonal kernels: Xiao et al., "Dynamical isometry
and a mean field theory of CNNs", ICML 2018, arXiv:1806.05393; docs/mathematics.md, "Isometric
layers"). The nearest one is the polar factor of the center tap. With stride s the s x s taps that
tile the input take the place of the center.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convspectra.operator._conv_operator import ConvOperator
from convspectra.operator._geometry import ConvGeometry, IntArray


@dataclass(frozen=True)
class IsometricTaps:
    """The taps that an isometric layer has, and whether it is isometric with this padding.

    Attributes
    ----------
    taps : tuple of int
        Positions in the flattened kernel.
    tile : bool
        Whether their outputs read every input pixel at most once, and none of the padding.
    cover : bool
        Whether they read every pixel, too.
    """

    taps: tuple[int, ...]
    tile: bool
    cover: bool


@functools.lru_cache(maxsize=256)
def isometric_taps(geometry: ConvGeometry) -> IsometricTaps:
    """The s x s taps nearest the center of the kernel that tile the input, or nearly.

    From integers alone: the pixels that each tap reads. Where no choice of taps tiles it, those
    that the most outputs use.
    """
    axes = [_taps_along(geometry, axis) for axis in range(geometry.ndim)]
    flat = np.zeros(1, dtype=np.int64)
    for axis, (chosen, _, _) in enumerate(axes):
        flat = (flat[:, None] * geometry.kernel_size[axis] + chosen[None, :]).ravel()
    return IsometricTaps(
        tuple(flat.tolist()), all(tile for _, tile, _ in axes), all(c for _, _, c in axes)
    )


def _taps_along(geometry: ConvGeometry, axis: int) -> tuple[IntArray, bool, bool]:
    """The taps along one axis, whether they tile it, and whether they cover it."""
    sources, size = geometry.tap_sources(axis), geometry.kernel_size[axis]
    count = min(geometry.stride[axis], size)
    best: tuple[tuple[int, int, float], IntArray, bool, bool] | None = None
    for first in range(size - count + 1):
        chosen = np.arange(first, first + count)
        read = sources[chosen].ravel()
        inside = read[read >= 0]
        distinct = len(np.unique(inside))
        tile = bool(distinct == len(read))
        cover = distinct == geometry.input_size[axis]
        off_center = abs(first + (count - 1) / 2 - (size - 1) / 2)
        rank = (2 * int(tile) + int(cover), distinct, -off_center)
        if best is None or rank > best[0]:
            best = rank, chosen, tile, cover
    assert best is not None
    return best[1:]


def is_isometric_possible(op: ConvOperator) -> bool:
    """Whether `isometric_target` is an isometry: of the inputs, or of the outputs where M is wide.

    It needs taps that tile the input; where the block of taps has more rows than columns, they must
    cover it, too.
    """
    found = isometric_taps(op.geometry)
    rows, columns = op.weight.shape[0] // op.groups, op.weight.shape[1] * len(found.taps)
    return found.tile and (rows <= columns or found.cover)


def isometric_target(
    weight: Tensor,
    groups: int,
    taps: tuple[int, ...],
    gain: float = 1.0,
    *,
    mirrored_input: bool = False,
    mirrored_output: bool = False,
) -> Tensor:
    """The isometric weights nearest to some of one shape, (b, h, g / groups, *kernel).

    Parameters
    ----------
    weight : Tensor
        Weights of b layers of one kind.
    groups : int
    taps : tuple of int
        What `isometric_taps` gives for their geometry.
    gain : float
        The singular values of the result.
    mirrored_input, mirrored_output : bool
        Whether input and output channels come in halves of opposite sign ([H, -H] and [H; -H]),
        for ReLU: Balduzzi et al., "The shattered gradients problem", ICML 2017, arXiv:1702.08591.
        The singular values are then those of H.

    Returns
    -------
    Tensor
        As `weight`: `gain` times polar factors in the taps given, and 0 elsewhere.

    Notes
    -----
    Cost: a batched SVD of matrices of h by g prod(stride) a group.
    """
    b, h, g = weight.shape[:3]
    flat = weight.reshape(b, groups, h // groups, g, -1)
    block = flat[..., list(taps)]
    if mirrored_output:
        block = torch.sub(*block.chunk(2, dim=2))
    if mirrored_input:
        block = torch.sub(*block.chunk(2, dim=3))
    u, _, vh = torch.linalg.svd(block.flatten(3), full_matrices=False)
    polar = (gain * u @ vh).reshape(block.shape)
    if mirrored_input:
        polar = torch.cat([polar, -polar], dim=3)
    if mirrored_output:
        polar = torch.cat([polar, -polar], dim=2)
    target = torch.zeros_like(flat)
    target[..., list(taps)] = polar
    return target.reshape(weight.shape)


def seen_operator(
    op: ConvOperator, *, mirrored_input: bool = False, mirrored_output: bool = False
) -> ConvOperator:
    """The layer that signals see: H for mirrored kernels, the layer itself for others.

    ``K = [[K11, K12], [K21, K22]]`` acts on pairs relu(z), relu(-z) as ``H = (K11 - K12 - K21 +
    K22) / 4`` acts on z, exactly if K is mirrored.

    Examples
    --------
    >>> import torch
    >>> K = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])[:, :, None]
    >>> seen_operator(ConvOperator(K, 1), mirrored_input=True, mirrored_output=True).weight
    tensor([[[2.]]])
    """
    weight = op.weight
    if mirrored_output:
        weight = torch.sub(*weight.chunk(2, dim=0)) / 2
    if mirrored_input:
        weight = torch.sub(*weight.chunk(2, dim=1)) / 2
    if weight is op.weight:
        return op
    g = op.geometry
    return ConvOperator(
        weight,
        g.input_size,
        stride=g.stride,
        padding=g.padding if g.ndim else 0,
        dilation=g.dilation,
        padding_mode=g.padding_mode,
    )


def check_halves(op: ConvOperator, mirrored_input: bool, mirrored_output: bool) -> None:
    """Raise a ValueError unless the channels on these sides can be halved."""
    if op.groups != 1:
        raise ValueError(f"expected one group for mirrored kernels, got {op.groups} in {op!r}")
    for name, mirrored, count in (
        ("input", mirrored_input, op.input_shape[0]),
        ("output", mirrored_output, op.output_shape[0]),
    ):
        if mirrored and count % 2:
            raise ValueError(
                f"expected an even number of {name} channels for mirrored kernels, got {count}"
            )
