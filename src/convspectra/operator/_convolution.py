"""Convolution and its transpose as plain functions of (array, weight, geometry).

PyTorch's own convolutions do the work; the padding modes, asymmetric padding and the adjoint of
each are index arithmetic on the geometry's tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convspectra.operator._geometry import ConvGeometry

WINDOW_ENTRIES = 1 << 22
"""Numbers in the windows of an input that are copied at once: 16 megabytes in single precision.

A choice between memory and calls: at half of it twice as many products of matrices, the same sums.
"""

UNFOLDED_BYTES = 1 << 24
"""Half of what glibc keeps for the next call (32 MiB); larger arrays are new memory every time.

At more than twice this every call pays for fresh pages, which took twice as long; at half of it
there are more calls and nothing else changes.
"""

_CONV = (F.conv1d, F.conv2d, F.conv3d)
"""PyTorch\'s convolutions by the number of axes, from one."""
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
"""Their transposes."""


def convolve(x: Tensor, weight: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """The layer without bias: (b, g, *input_size) -> (b, h, *output_size); b may be absent."""
    if geometry.ndim == 0:
        return F.linear(x, weight)
    return _in_parts(_CONV[geometry.ndim - 1], _padded(x, geometry), weight, geometry, groups)


def _in_parts(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, geometry: ConvGeometry, groups: int
) -> Tensor:
    """One of PyTorch's convolutions, of some arrays at a time.

    In double precision on a CPU PyTorch unfolds the whole batch; with more than `UNFOLDED_BYTES`
    that takes twice as long as in parts.
    """
    options = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": groups}
    if x.dtype != torch.float64 or not x.is_cpu or x.ndim <= geometry.ndim + 1:
        return function(x, weight, **options)
    unfolded = x.element_size() * weight[0].numel() * math.prod(geometry.output_size)
    at_once, threads = UNFOLDED_BYTES // max(1, unfolded), torch.get_num_threads()
    # A batch is divided among the threads; with fewer arrays than threads each array is.
    at_once = at_once - at_once % threads if at_once >= threads else 1
    if len(x) <= at_once:
        return function(x, weight, **options)
    return torch.cat([function(part, weight, **options) for part in x.split(at_once)])


def _padded(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The input with its padding, as far as the layer reads it."""
    used = [
        (n - 1) * s + r
        for n, s, r in zip(geometry.output_size, geometry.stride, geometry.reach, strict=True)
    ]
    if geometry.padding_mode == "zeros":
        sides = zip(used, geometry.input_size, geometry.padding, strict=True)
        return pad([(before, length - n - before) for length, n, (before, _) in sides], x)
    first = x.ndim - geometry.ndim
    for axis, length in enumerate(used):
        source = torch.from_numpy(geometry.padded_sources(axis)[:length]).to(x.device)
        x = x.index_select(first + axis, source)
    return x


def convolve_transpose(y: Tensor, weight: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """The adjoint of `convolve`: (b, h, *output_size) -> (b, g, *input_size); b may be absent."""
    if geometry.ndim == 0:
        return F.linear(y, weight.T)
    x = _in_parts(_CONV_TRANSPOSE[geometry.ndim - 1], y, weight, geometry, groups)
    first = x.ndim - geometry.ndim
    if geometry.padding_mode == "zeros":
        sides = zip(x.shape[first:], geometry.input_size, geometry.padding, strict=True)
        return pad([(-before, n + before - length) for length, n, (before, _) in sides], x)
    for axis, n in enumerate(geometry.input_size):
        dim = first + axis
        source = torch.from_numpy(geometry.padded_sources(axis)[: x.shape[dim]]).to(x.device)
        shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
        x = x.new_zeros(shape).index_add(dim, source, x)
    return x


def add_weight_gradient(
    total: Tensor, x: Tensor, y: Tensor, geometry: ConvGeometry, groups: int
) -> None:
    """Add the gradient of ``sum(y * convolve(x, weight))`` by the weight to `total`, in place.

    Parameters
    ----------
    total : Tensor
        (h, g / groups, *kernel), contiguous.
    x, y : Tensor
        (b, g, *input_size) and (b, h, *output_size).

    Notes
    -----
    Products of matrices. For a few arrays in and a large kernel PyTorch's own way takes up to ten
    times as long. Cost: ``2 b h g / groups prod(k) prod(N_out)`` flops, and the windows of x that
    belong to some rows of outputs at a time.
    """
    if geometry.ndim == 0:
        total.addmm_(y.mT, x)
        return
    windows = _padded(x, geometry)
    axes = zip(geometry.reach, geometry.stride, geometry.dilation, strict=True)
    for axis, (reach, stride, dilation) in enumerate(axes):
        windows = windows.unfold(2 + axis, reach, stride)[..., ::dilation]
    # Axes of the windows: groups, b, *N_out, channels of a group, *kernel; those of y likewise.
    windows = windows.unflatten(1, (groups, -1)).movedim(2, 2 + geometry.ndim).movedim(1, 0)
    y = y.unflatten(1, (groups, -1)).movedim(0, 2)
    flat = total.view(groups, y.shape[1], -1)
    row = windows[:, :, :1].numel()
    at_once = max(1, WINDOW_ENTRIES // max(1, row))
    for first in range(0, geometry.output_size[0], at_once):
        columns = windows[:, :, first : first + at_once].flatten(2 + geometry.ndim)
        columns = columns.reshape(groups, -1, flat.shape[2])
        rows = y[:, :, :, first : first + at_once].flatten(2)
        flat.baddbmm_(rows, columns)


def full_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight over all channels, (h, g, *kernel), zero between different groups."""
    if groups == 1:
        return weight
    blocks = weight.reshape(groups, -1, 1, *weight.shape[1:])
    same_group = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    mask = same_group.reshape(groups, 1, groups, 1, *(1,) * (weight.ndim - 2))
    full: Tensor = blocks * mask
    return full.flatten(2, 3).flatten(0, 1)


def scaled_outputs(weight: Tensor, scale: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight of the layer whose output channels are multiplied by `scale`, (h,)."""
    if not transposed:
        return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    ones = (1,) * (weight.ndim - 2)
    return (blocks * scale.reshape(groups, 1, -1, *ones)).reshape(weight.shape)


def kernel_to_weight(kernel: Tensor) -> Tensor:
    """The paper's kernel (*taps, g, h) as a PyTorch weight (h, g, *taps); a view.

    Examples
    --------
    >>> import torch
    >>> kernel_to_weight(torch.zeros(3, 5, 2, 7)).shape
    torch.Size([7, 2, 3, 5])
    """
    if not isinstance(kernel, Tensor) or not 3 <= kernel.ndim <= 5:
        raise ValueError(
            f"expected a kernel of shape (*taps, g, h) with 1 to 3 axes of taps, "
            f"got {tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__}"
        )
    return kernel.movedim((-1, -2), (0, 1))


def weight_to_kernel(weight: Tensor) -> Tensor:
    """A PyTorch weight (h, g, *taps) as the paper's kernel (*taps, g, h); a view.

    Examples
    --------
    >>> import torch
    >>> weight_to_kernel(torch.zeros(7, 2, 3, 5)).shape
    torch.Size([3, 5, 2, 7])
    """
    if not isinstance(weight, Tensor) or not 3 <= weight.ndim <= 5:
        raise ValueError(
            f"expected a weight of shape (h, g, *taps) with 1 to 3 axes of taps, "
            f"got {tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}"
        )
    return weight.movedim((0, 1), (-1, -2))


def pad(sides: list[tuple[int, int]], x: Tensor) -> Tensor:
    """Zeros before and after each of the last axes; a negative amount crops."""
    amounts = [amount for pair in reversed(sides) for amount in pair]
    # In two steps: F.pad crops before it pads, and may then find nothing left to crop.
    grown = F.pad(x, [max(amount, 0) for amount in amounts])
    return F.pad(grown, [min(amount, 0) for amount in amounts]) if min(amounts) < 0 else grown
