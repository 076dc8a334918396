"""The pixels that stand before a layer: moved, repeated, or written as zeros.

Note [The gather before a layer]: padding, slicing and concatenation of one array with parts of
itself only move pixels or write zeros. Run on an array of indices, 1 for the first entry of the
last array that is computed and 0 for a written zero, they give the table of what the layer reads.
Where this table is a product over the axes, padding of a convolution does the same, and belongs to
the layer. A value other than 0 that is written around the input adds a constant to the output, as
a bias does: the linear map is that of zeros. A function of each entry, such as ReLU or the product
with a mask, commutes with moving: its values are pixels of another array, moved alike, as long as
all copies of a pixel have one value.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convspectra.operator import PADDING_MODES, ConvGeometry, ConvOperator, IntArray

_INEXPRESSIBLE = (
    "its input is padded or copied by a separate operation ({}) in a way that no padding of a "
    "convolution does; judged as if it were not"
)
"""Note where the layer is judged on the array that it reads, with the operations in braces."""

_TRANSPOSED = (
    "its input is padded by a separate operation ({}), which transposed convolutions cannot do; "
    "judged without it"
)
"""Note where zeros stand around the input of a transposed layer: they would make it crop less."""

_ABSORBED = "its padding is that of a separate operation before it ({})"
"""Note where the padding became that of the layer."""

_CONSTANT = ", whose border of another value than 0 counts as a part of the bias"
"""End of this note where the border is not 0."""


@dataclass(frozen=True)
class OuterPadding:
    """Padding that stands outside of a layer.

    Attributes
    ----------
    input_size : tuple of int
        Spatial size before it.
    padding : tuple of (int, int)
        (before, after) on each axis.
    mode : str
        One of `PADDING_MODES`.
    """

    input_size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str

    def options(self, geometry: ConvGeometry) -> dict[str, Any]:
        """``padding`` and ``padding_mode`` of the layer together with this.

        Raises
        ------
        ValueError
            If the layer has padding of its own that is of another mode, or not of zeros.
        """
        own = any(sum(pair) for pair in geometry.padding)
        if own and not self.mode == geometry.padding_mode == "zeros":
            raise ValueError("two paddings, one inside the other, of which one is not of zeros")
        total = tuple(
            (before + outer[0], after + outer[1])
            for (before, after), outer in zip(geometry.padding, self.padding, strict=True)
        )
        return {"padding": total, "padding_mode": self.mode}


@dataclass(frozen=True)
class Gather:
    """The content of an array: indices of an earlier array's entries, and how they came there.

    Attributes
    ----------
    index : array
        1 for the earlier array's first entry; 0 where something was written that does not depend
        on it.
    by : str
        The operations, in words.
    constant : bool
        Whether something else than 0 was written.
    """

    index: npt.NDArray[np.float64]
    by: str
    constant: bool = False


def no_gather() -> None:
    """For `with_outer_padding` where there are no two paddings, one inside the other."""


def with_outer_padding(
    op: ConvOperator, gather: Gather | None, last: Callable[[], Gather | None] = no_gather
) -> tuple[ConvOperator, str]:
    """The layer with the padding that stands before it, and a note that says so.

    Parameters
    ----------
    op : ConvOperator
        The layer on the array that it reads.
    gather : Gather, optional
        Of that array; None where nothing is known to move pixels.
    last : callable
        Asked where this is no padding of a convolution: the gather from the array that the last
        padding operation read.

    Notes
    -----
    Cost: a few passes over the array. The layer is returned as it came where there is no padding,
    with an empty note, and where it cannot be expressed; it is another object where there is.
    """
    padded, note = _absorbed(op, gather)
    if padded is op and note:
        inner, inner_note = _absorbed(op, last())
        if inner is not op:
            return inner, f"{note}; {inner_note}"
    return padded, note


def _absorbed(op: ConvOperator, gather: Gather | None) -> tuple[ConvOperator, str]:
    ndim = op.geometry.ndim
    if gather is None or ndim == 0:
        return op, ""
    shape = gather.index.shape
    index = gather.index.reshape(-1, *shape[len(shape) - ndim :]).astype(np.int64)
    try:
        outer = outer_padding(index)
        if outer is None:
            return op, ""
        if op.transposed:
            return op, _TRANSPOSED.format(gather.by)
        padded = ConvOperator(
            op.weight,
            outer.input_size,
            stride=op.geometry.stride,
            dilation=op.geometry.dilation,
            groups=op.groups,
            **outer.options(op.geometry),
        )
    except ValueError:
        return op, _INEXPRESSIBLE.format(gather.by)
    if padded.output_shape != op.output_shape:
        return op, _INEXPRESSIBLE.format(gather.by)
    note = _ABSORBED.format(gather.by)
    return padded, note + _CONSTANT * (gather.constant and outer.mode == "zeros")


def entrywise_labels(
    parts: Sequence[npt.NDArray[Any]], zero: npt.NDArray[np.bool_]
) -> IntArray | None:
    """The pixels of a function of several arrays' entries: equal where all of these are.

    Parameters
    ----------
    parts : sequence of arrays of one shape
        Non-negative integers that say what stands at each entry of each array.
    zero : array of bool
        Where the result does not depend on the pixels.

    Returns
    -------
    array of int64 or None
        1, 2, ... in the order of the parts, the first before the second; 0 at `zero`. None if no
        two entries are equal and none is 0: the result is an array as any other.
    """
    code = parts[0].astype(np.int64)
    for part in parts[1:]:
        scale = int(part.max(initial=0)) + 1
        if int(code.max(initial=0)) > 2**62 // scale:
            code = np.unique(code, return_inverse=True)[1].reshape(code.shape)
        code = code * scale + part.astype(np.int64)
    labels = np.zeros(code.shape, dtype=np.int64)
    distinct, place = np.unique(code[~zero], return_inverse=True)
    if len(distinct) == code.size:
        return None
    labels[~zero] = place.reshape(-1) + 1
    return labels


def outer_padding(index: IntArray) -> OuterPadding | None:
    """The padding that a table of indices describes.

    Parameters
    ----------
    index : array of int64, (rows, *sizes)
        Rows are images and channels.

    Returns
    -------
    OuterPadding or None
        None if every pixel is read at most once and nothing is written: the layer's input is then
        the array as it is, whatever was cut off or moved before.

    Raises
    ------
    ValueError
        If the table is no product over the axes, or an axis is not padded as convolutions pad.
    """
    read = index > 0
    if np.bincount(index[read]).max(initial=0) <= 1:
        # Moved but read once each: the array as it is, perhaps with zeros around it.
        if read.all():
            return None
        index = np.where(read, np.cumsum(read).reshape(index.shape), 0)
    sources = _axis_sources(index)
    sizes = tuple(int(source.max()) + 1 for source in sources)
    modes = [_axis_modes(source, n) for source, n in zip(sources, sizes, strict=True)]
    if all(pair == (0, 0) for found in modes for pair in found.values()):
        return None
    for mode in PADDING_MODES:
        if all(mode in found for found in modes):
            return OuterPadding(sizes, tuple(found[mode] for found in modes), mode)
    raise ValueError("the axes are padded in different ways")


def _axis_sources(index: IntArray) -> list[IntArray]:
    """For every axis the position that each of its points reads, -1 for a zero.

    Positions that no point reads are not counted.
    """
    inside = index > 0
    axes = range(1, index.ndim)
    rows = inside.any(axis=tuple(axes))
    if not rows.any():
        raise ValueError("nothing but zeros")
    index, inside = index[rows], inside[rows]
    masks = [inside[0].any(axis=tuple(a - 1 for a in axes if a != axis)) for axis in axes]
    if not (inside == functools.reduce(np.logical_and.outer, masks)).all():
        raise ValueError("the zeros are no border")
    kept = index[np.ix_(range(len(index)), *masks)]
    # A product over the axes: the first entry of the row, plus an offset for each axis.
    offsets = [
        np.moveaxis(kept[0], axis - 1, 0).reshape(kept.shape[axis], -1)[:, 0] for axis in axes
    ]
    first = kept.reshape(len(kept), -1)[:, 0]
    offsets = [offset - first[0] for offset in offsets]
    if not (kept == functools.reduce(operator.add, _broadcast([first, *offsets]))).all():
        raise ValueError("the table is no product over the axes")
    sources = []
    for mask, offset in zip(masks, offsets, strict=True):
        source = np.full(len(mask), -1, dtype=np.int64)
        distinct, position = np.unique(offset, return_inverse=True)
        # Moved but read once each: the array as it is.
        source[mask] = np.arange(len(offset)) if len(distinct) == len(offset) else position
        sources.append(source)
    return sources


def _broadcast(vectors: Sequence[IntArray]) -> list[IntArray]:
    """Every vector along an axis of its own."""
    count = len(vectors)
    return [v.reshape(*(1,) * i, -1, *(1,) * (count - i - 1)) for i, v in enumerate(vectors)]


def _axis_modes(source: IntArray, n: int) -> dict[str, tuple[int, int]]:
    """The (before, after) with which each mode of padding reads these positions of n."""
    total = len(source) - n
    # The most even one first: of one pixel, say, there are several. Then other orders of the
    # pixels, as a shuffle of channels into space leaves behind.
    places = sorted(range(total + 1), key=lambda b: abs(total - 2 * b))
    found = _modes_at(source, n, places)
    if not found:
        for before in places:
            block = source[before : before + n]
            if len(np.unique(block[block >= 0])) == n:
                order = np.full(n + 1, -1)
                order[block] = np.arange(n)
                found = found or _modes_at(order[source], n, [before])
    if not found:
        raise ValueError("an axis is padded as no convolution pads")
    return found


def _modes_at(source: IntArray, n: int, places: Sequence[int]) -> dict[str, tuple[int, int]]:
    """The same where the array itself begins at one of these places."""
    found: dict[str, tuple[int, int]] = {}
    for before in places:
        if not (source[before : before + n] == np.arange(n)).all():
            continue
        for mode in PADDING_MODES:
            pads = ((before, len(source) - n - before),)
            if mode == "reflect" and max(pads[0]) >= n:
                continue
            axis = ConvGeometry((n,), (1,), (1,), (1,), (1,), pads, mode)
            if mode not in found and (axis.padded_sources(0) == source).all():
                found[mode] = pads[0]
    return found
