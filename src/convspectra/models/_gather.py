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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convspectra.operator import ConvOperator, IntArray, outer_padding

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
