"""Padding that stands outside of a layer, from the table of the pixels that the layer reads."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convspectra.operator._geometry import PADDING_MODES, ConvGeometry, IntArray


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
