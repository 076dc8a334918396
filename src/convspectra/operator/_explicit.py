"""Explicit matrices of a convolution: dense, sparse and SciPy's, with a limit on their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from convspectra.operator._convolution import full_weight
from convspectra.operator._geometry import ConvGeometry, IntArray

FloatArray: TypeAlias = npt.NDArray[Any]

DEFAULT_MAX_BYTES = 2 * 2**30
"""The limit on explicit matrices and factors unless said otherwise, 2 GiB, the same everywhere.

A choice: at half of it a layer is refused, with a message, that a laptop could do.
"""
ENTRIES_AT_ONCE = 1 << 18
"""Squares summed at once: a megabyte in single precision, which stays in a cache. A choice."""


def dense_matrix(
    weight: Tensor, geometry: ConvGeometry, groups: int, max_bytes: int = DEFAULT_MAX_BYTES
) -> Tensor:
    """Matrix of `convolve`, (h * prod(N_out), g * prod(N_in)), differentiable in the weight.

    One axis of taps after the other becomes a pair of output and input positions; where several
    taps meet in one entry (circular or reflect padding) they are summed.
    """
    rows, columns = _matrix_shape(weight, geometry, groups)
    check_bytes("the dense matrix", rows * columns * weight.element_size(), max_bytes)
    blocks = full_weight(weight, groups)
    for axis in range(geometry.ndim):
        size = geometry.output_size[axis], geometry.input_size[axis]
        source = geometry.tap_sources(axis)
        tap, output = np.nonzero(source >= 0)
        entry = torch.from_numpy(output * size[1] + source[tap, output]).to(blocks.device)
        values = blocks.movedim(2, -1).index_select(-1, torch.from_numpy(tap).to(blocks.device))
        empty = values.new_zeros(*values.shape[:-1], math.prod(size))
        blocks = empty.index_add(-1, entry, values).reshape(*values.shape[:-1], *size)
    # (h, g, out_1, in_1, out_2, in_2, ...) -> (h, out_1, out_2, ..., g, in_1, in_2, ...)
    last = 2 + 2 * geometry.ndim
    order = [0, *range(2, last, 2), 1, *range(3, last, 2)]
    return blocks.permute(order).reshape(rows, columns)


def sparse_matrix(
    weight: Tensor, geometry: ConvGeometry, groups: int, max_bytes: int = DEFAULT_MAX_BYTES
) -> scipy.sparse.csr_array:
    """Matrix of `convolve` as ``sum_p kron(weight[:, :, p], S_p)``, S_p the 0/1 matrix of tap p."""
    stored = int(geometry.tap_counts().sum()) * weight.shape[0] * weight.shape[1]
    check_bytes("the sparse matrix", 16 * stored, max_bytes)
    taps = weight.detach().cpu().numpy()
    out_channels, in_per_group = weight.shape[:2]
    group = np.arange(out_channels) // (out_channels // groups)
    channel_rows = np.repeat(np.arange(out_channels), in_per_group)
    channel_columns = (group[:, None] * in_per_group + np.arange(in_per_group)).ravel()
    size = (math.prod(geometry.output_size), math.prod(geometry.input_size))
    matrix = scipy.sparse.csr_array(_matrix_shape(weight, geometry, groups), dtype=taps.dtype)
    for tap in np.ndindex(*geometry.kernel_size):
        ones = np.ones(len(geometry.index_set(tap)[0]), dtype=taps.dtype)
        shift = scipy.sparse.csr_array((ones, geometry.index_set(tap)), shape=size)
        values = taps[(slice(None), slice(None), *tap)].ravel()
        channels = scipy.sparse.csr_array(
            (values, (channel_rows, channel_columns)), shape=(out_channels, in_per_group * groups)
        )
        channels.eliminate_zeros()
        # kron forgets the dtype where a factor has no entries.
        product = scipy.sparse.kron(channels, shift, format="csr").astype(taps.dtype, copy=False)
        matrix = matrix + product
    return matrix


def index_set(
    weight: Tensor, geometry: ConvGeometry, groups: int, index: Sequence[int]
) -> tuple[IntArray, IntArray]:
    """Omega of ``weight[index]``: (rows, columns) of the matrix of `convolve` where it stands."""
    if (
        not isinstance(index, Sequence)
        or len(index) != weight.ndim
        or not all(isinstance(i, Integral) for i in index)
        or not all(0 <= i < n for i, n in zip(index, weight.shape, strict=True))
    ):
        raise ValueError(
            f"expected an index into a weight of shape {tuple(weight.shape)}, got {index!r}"
        )
    out_channel, in_channel_of_group, *tap = index
    group = out_channel // (weight.shape[0] // groups)
    in_channel = group * weight.shape[1] + in_channel_of_group
    rows, columns = geometry.index_set(tuple(tap))
    return (
        rows + out_channel * math.prod(geometry.output_size),
        columns + in_channel * math.prod(geometry.input_size),
    )


def scipy_operator(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    like: Tensor,
) -> LinearOperator:
    """A SciPy operator on flat NumPy columns from batched maps on tensors typed as `like`."""
    dtype = torch.zeros((), dtype=like.dtype, device="cpu").numpy().dtype

    def on_columns(
        function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
    ) -> Callable[[FloatArray], FloatArray]:
        def apply(array: FloatArray) -> FloatArray:
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise ValueError(f"expected real arrays like {dtype}, got {array.dtype}")
            columns = np.asarray(array, dtype=dtype).reshape(math.prod(shape), -1)
            batch = torch.tensor(columns.T, device=like.device).reshape(-1, *shape)
            result = function(batch).flatten(1).T.cpu().numpy()
            return result.reshape(-1, *array.shape[1:])

        return apply

    forward, adjoint = on_columns(matvec, input_shape), on_columns(rmatvec, output_shape)
    return LinearOperator(
        shape=(math.prod(output_shape), math.prod(input_shape)),
        dtype=dtype,
        matvec=forward,
        rmatvec=adjoint,
        matmat=forward,
        rmatmat=adjoint,
    )


def check_bytes(what: str, needed: int, max_bytes: int) -> None:
    """Raise a ValueError, with both sizes, if `what` would take more than `max_bytes`."""
    if needed > max_bytes:
        raise ValueError(
            f"expected {what} to take at most max_bytes={max_bytes:,} bytes, it would take "
            f"{needed:,}; work without it (matvec, rmatvec, svds) or raise max_bytes"
        )


def _matrix_shape(weight: Tensor, geometry: ConvGeometry, groups: int) -> tuple[int, int]:
    rows = weight.shape[0] * math.prod(geometry.output_size)
    return rows, weight.shape[1] * groups * math.prod(geometry.input_size)
