"""The geometry of a convolution: sizes, padding and which pixel each tap reads.

Everything here is made of integers. One axis is described by a table ``tap_sources`` of shape
(taps, outputs) whose entry [p, r] is the input position that tap p reads for output r, or -1 where
it reads a padded zero. The index sets Omega of the paper, the tap counts, the dense and sparse
matrices and the Frobenius norm all follow from these tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]
Padding: TypeAlias = "int | str | Sequence[int] | Sequence[tuple[int, int]]"

PADDING_MODES = get_args(PaddingMode)
"""The names that PyTorch has for them."""


@dataclass(frozen=True)
class ConvGeometry:
    """One convolution's integers, all of them tuples with one entry per spatial axis.

    Parameters
    ----------
    input_size, output_size, kernel_size, stride, dilation
        Positive integers per axis. ``output_size`` is a field of its own because a transposed
        layer with ``output_padding >= stride`` uses only the first outputs of its convolution.
    padding
        (before, after) per axis, non-negative.
    padding_mode
        One of "zeros", "circular", "reflect", "replicate".

    Notes
    -----
    Build one with :func:`conv_geometry` or :func:`transposed_geometry`, which validate.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: PaddingMode

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.input_size)

    @property
    def reach(self) -> tuple[int, ...]:
        """Extent of the dilated kernel per axis, ``dilation * (k - 1) + 1``."""
        return tuple(_reach(k, d) for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def padded_sources(self, axis: int) -> IntArray:
        """Input position behind each of the N + before + after padded points; -1 is a zero."""
        n = self.input_size[axis]
        before, after = self.padding[axis]
        position: IntArray = np.arange(-before, n + after, dtype=np.int64)
        source: dict[str, IntArray] = {
            "zeros": np.where((position >= 0) & (position < n), position, -1),
            "circular": position % n,
            "replicate": position.clip(0, n - 1),
            "reflect": (n - 1) - np.abs((n - 1) - np.abs(position)),
        }
        return source[self.padding_mode]

    def tap_sources(self, axis: int) -> IntArray:
        """Input position that tap p reads for output r, (k, N_out); -1 is a padded zero."""
        taps: IntArray = np.arange(self.kernel_size[axis], dtype=np.int64) * self.dilation[axis]
        outputs = np.arange(self.output_size[axis], dtype=np.int64) * self.stride[axis]
        sources: IntArray = self.padded_sources(axis)[taps[:, None] + outputs[None, :]]
        return sources

    def tap_reads(self, axis: int) -> IntArray:
        """The most times that tap p reads one input position, (k,)."""
        most = [
            np.bincount(source[source >= 0], minlength=1).max() for source in self.tap_sources(axis)
        ]
        return np.array(most, dtype=np.int64)

    def tap_gram(self, axis: int) -> IntArray:
        """Gram matrix of the taps, (k, k): number of outputs for which p and p' read one pixel.

        Diagonal ``c_p`` for zero padding. The product over axes is the quadratic form of
        ``||M||_F^2`` in the kernel.
        """
        source = self.tap_sources(axis)
        same = (source[:, None, :] == source[None, :, :]) & (source[:, None, :] >= 0)
        gram: IntArray = same.sum(axis=2, dtype=np.int64)
        return gram

    def tap_product_gram(self, axis: int) -> IntArray:
        """Gram matrix of the products ``S_p' S_q`` in the Frobenius inner product, (k^2, k^2).

        S_p is the 0/1 matrix, outputs by inputs, of tap p along this axis; pairs are ordered
        (p, q). The product over axes is the form of ``||M'M||_F^2`` in the products of taps.
        """
        source, n = self.tap_sources(axis), self.input_size[axis]
        pair, output = np.divmod(
            np.arange(len(source) ** 2 * source.shape[1]), max(source.shape[1], 1)
        )
        p, q = np.divmod(pair, len(source))
        row, column = source[p, output], source[q, output]
        inside = (row >= 0) & (column >= 0)
        entries, place = np.unique((row * n + column)[inside], return_inverse=True)
        products = np.zeros((len(source) ** 2, len(entries)), dtype=np.int64)
        np.add.at(products, (pair[inside], place), 1)
        gram: IntArray = products @ products.T
        return gram

    def tap_counts(self) -> IntArray:
        """``|Omega|``: the number of entries of M in which each tap stands, shape kernel_size.

        Counted for one (input channel, output channel) pair. Cost: integers per axis, then one
        outer product; remembered. The array cannot be written to.
        """
        return _tap_counts(self)

    def index_set(self, tap: tuple[int, ...]) -> tuple[IntArray, IntArray]:
        """Omega of one tap: flat (output, input) positions of M, for one pair of channels.

        Returns two arrays of length ``tap_counts()[tap]``, ordered by output position.
        """
        output_grid = np.arange(math.prod(self.output_size), dtype=np.int64)
        inputs = np.zeros((), dtype=np.int64)
        inside = np.ones((), dtype=np.bool_)
        for axis, p in enumerate(tap):
            source = self.tap_sources(axis)[p]
            inputs = np.add.outer(inputs * self.input_size[axis], source)
            inside = np.logical_and.outer(inside, source >= 0)
        keep = inside.ravel()
        return output_grid[keep], inputs.ravel()[keep]


@functools.lru_cache(maxsize=1024)
def _tap_counts(geometry: ConvGeometry) -> IntArray:
    counts = np.ones((), dtype=np.int64)
    for axis in range(geometry.ndim):
        per_tap = (geometry.tap_sources(axis) >= 0).sum(axis=1, dtype=np.int64)
        counts = np.multiply.outer(counts, per_tap)
    counts.flags.writeable = False
    return counts


def conv_geometry(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "same",
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
) -> ConvGeometry:
    """Validate the options of a convolution and work out its padding and output size.

    Raises
    ------
    ValueError
        For sizes, strides or dilations that are not positive integers, a wrong number of axes,
        ``padding="same"`` with a stride, a kernel that reaches past the padded input, and
        circular or reflect padding wider than the input allows.
    """
    sizes = _per_axis("input_size", input_size, len(kernel_size), minimum=1)
    kernel = _per_axis("kernel_size", kernel_size, len(sizes), minimum=1)
    strides = _per_axis("stride", stride, len(sizes), minimum=1)
    dilations = _per_axis("dilation", dilation, len(sizes), minimum=1)
    mode = _padding_mode(padding_mode)
    pads = resolve_padding(padding, kernel, strides, dilations)
    _check_padding_fits(pads, sizes, mode)
    output = []
    for axis, n in enumerate(sizes):
        padded = n + sum(pads[axis])
        reach = _reach(kernel[axis], dilations[axis])
        if reach > padded:
            raise ValueError(
                f"the kernel reaches past the padded input on axis {axis}: expected "
                f"dilation * (k - 1) + 1 <= {padded} (input {n} with padding {pads[axis]}), "
                f"got {reach}; use a larger input, more padding or a smaller kernel"
            )
        output.append((padded - reach) // strides[axis] + 1)
    return ConvGeometry(sizes, tuple(output), kernel, strides, dilations, pads, mode)


def transposed_geometry(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
    output_padding: int | Sequence[int] = 0,
) -> ConvGeometry:
    """Geometry of the convolution whose transpose maps ``input_size`` as a transposed layer does.

    Its ``output_size`` is the ``input_size`` given here, and its ``input_size`` is what the
    transposed layer puts out: ``(N - 1) * stride - before - after + reach + output_padding``.

    Raises
    ------
    ValueError
        In the cases of :func:`conv_geometry`; also for a padding mode other than "zeros" (PyTorch
        has no other for transposed layers), an ``output_padding`` not below max(stride, dilation),
        and an empty output.
    """
    sizes = _per_axis("input_size", input_size, len(kernel_size), minimum=1)
    kernel = _per_axis("kernel_size", kernel_size, len(sizes), minimum=1)
    strides = _per_axis("stride", stride, len(sizes), minimum=1)
    dilations = _per_axis("dilation", dilation, len(sizes), minimum=1)
    extra = _per_axis("output_padding", output_padding, len(sizes), minimum=0)
    mode = _padding_mode(padding_mode)
    if mode != "zeros":
        raise ValueError(
            f"expected padding_mode='zeros' for a transposed convolution, got {mode!r}; "
            "PyTorch's transposed layers have no other"
        )
    pads = resolve_padding(padding, kernel, strides, dilations)
    output = []
    for axis, n in enumerate(sizes):
        if extra[axis] >= max(strides[axis], dilations[axis]):
            raise ValueError(
                f"expected output_padding < max(stride, dilation) = "
                f"{max(strides[axis], dilations[axis])} on axis {axis}, got {extra[axis]}"
            )
        reach = _reach(kernel[axis], dilations[axis])
        length = (n - 1) * strides[axis] - sum(pads[axis]) + reach + extra[axis]
        if length < 1:
            raise ValueError(
                f"the transposed convolution has an empty output on axis {axis}: expected "
                f"(N - 1) * stride + reach + output_padding > {sum(pads[axis])} (its padding), "
                f"got {length + sum(pads[axis])}; use a larger input or less padding"
            )
        output.append(length)
    return ConvGeometry(tuple(output), sizes, kernel, strides, dilations, pads, mode)


def resolve_padding(
    padding: Padding,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """Turn any accepted form of padding into (before, after) per axis.

    "same" puts ``dilation * (k - 1)`` around each axis, the smaller half before: for even k that
    is m - 1 before and k - m after with the paper's m = ceil(k / 2), and what PyTorch does.
    """
    ndim = len(kernel_size)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * ndim
        if padding != "same":
            raise ValueError(
                f"expected padding 'same', 'valid', an integer, one integer per axis or one "
                f"(before, after) pair per axis, got {padding!r}"
            )
        if any(s != 1 for s in stride):
            raise ValueError(
                f"expected stride 1 with padding='same', got stride {stride}; "
                "give the padding as numbers, as PyTorch asks too"
            )
        totals = [_reach(k, d) - 1 for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, Sequence) and any(isinstance(p, Sequence) for p in padding):
        if len(padding) != ndim or any(not isinstance(p, Sequence) or len(p) != 2 for p in padding):
            raise ValueError(
                f"expected {ndim} (before, after) pairs of padding, one per axis, got {padding!r}"
            )
        pairs = [_per_axis("padding", cast("Sequence[int]", p), 2, minimum=0) for p in padding]
        return tuple((before, after) for before, after in pairs)
    amounts = _per_axis("padding", cast("int | Sequence[int]", padding), ndim, minimum=0)
    return tuple((p, p) for p in amounts)


def _reach(kernel_size: int, dilation: int) -> int:
    return dilation * (kernel_size - 1) + 1


def _per_axis(name: str, value: int | Sequence[int], ndim: int, *, minimum: int) -> tuple[int, ...]:
    if ndim == 0 and not isinstance(value, Sequence) and value != minimum:
        raise ValueError(f"expected {minimum} for {name} of a linear layer, got {value!r}")
    values = value if isinstance(value, Sequence) else (value,) * ndim
    if isinstance(value, str) or len(values) != ndim:
        raise ValueError(f"expected {ndim} integers for {name}, one per axis, got {value!r}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < minimum:
            raise ValueError(f"expected integers >= {minimum} for {name}, got {value!r}")
    return tuple(int(v) for v in values)


def _padding_mode(mode: str) -> PaddingMode:
    if mode not in PADDING_MODES:
        raise ValueError(f"expected padding_mode in {PADDING_MODES}, got {mode!r}")
    return cast("PaddingMode", mode)


def _check_padding_fits(
    padding: tuple[tuple[int, int], ...], input_size: tuple[int, ...], mode: PaddingMode
) -> None:
    slack = {"circular": 0, "reflect": 1}
    if mode not in slack:
        return
    for axis, n in enumerate(input_size):
        widest = n - slack[mode]
        if max(padding[axis]) > widest:
            raise ValueError(
                f"expected {mode} padding of at most {widest} on axis {axis} of size {n}, "
                f"got {padding[axis]}; PyTorch refuses it too"
            )
