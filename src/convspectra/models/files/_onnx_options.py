"""The options of ONNX's Conv and ConvTranspose as those of `ConvOperator`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import AttributeProto


def convolution_options(
    attributes: dict[str, AttributeProto],
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    transposed: bool,
) -> dict[str, Any]:
    """Options of `ConvOperator` for one Conv or ConvTranspose node.

    Raises
    ------
    ValueError
        If the node's padding is negative, or an attribute does not fit the weight.
    """
    ndim = len(size)
    declared = _integers(attributes, "kernel_shape", kernel)
    if declared != kernel:
        raise ValueError(f"its kernel_shape {declared} is not that of its weight, {kernel}")
    strides = _integers(attributes, "strides", (1,) * ndim)
    dilations = _integers(attributes, "dilations", (1,) * ndim)
    extra = _integers(attributes, "output_padding", (0,) * ndim) if transposed else (0,) * ndim
    for name, given in (
        ("strides", strides),
        ("dilations", dilations),
        ("output_padding", extra),
    ):
        if len(given) != ndim:
            raise ValueError(f"expected {ndim} integers in its {name}, got {list(given)}")
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    mode = attributes["auto_pad"].s.decode() if "auto_pad" in attributes else "NOTSET"
    output = _integers(attributes, "output_shape", ())
    if transposed and (output or mode.startswith("SAME")):
        if 0 < len(output) < ndim:
            raise ValueError(f"expected {ndim} integers in its output_shape, got {list(output)}")
        output = output[-ndim:] or tuple(n * s for n, s in zip(size, strides, strict=True))
        totals = [
            s * (n - 1) + e + r - m
            for s, n, e, r, m in zip(strides, size, extra, reach, output, strict=True)
        ]
        padding = _halves(totals, smaller_first=mode == "SAME_UPPER")
    elif mode.startswith("SAME"):
        totals = [
            max(0, (-(-n // s) - 1) * s + r - n)
            for n, s, r in zip(size, strides, reach, strict=True)
        ]
        padding = _halves(totals, smaller_first=mode == "SAME_UPPER")
    elif mode == "VALID":
        padding = ((0, 0),) * ndim
    else:
        pads = _integers(attributes, "pads", (0,) * 2 * ndim)
        if len(pads) != 2 * ndim:
            raise ValueError(f"expected {2 * ndim} integers in its pads, got {list(pads)}")
        padding = tuple(zip(pads[:ndim], pads[ndim:], strict=True))
    if any(p < 0 for pair in padding for p in pair):
        raise ValueError(f"its padding {padding} is negative: it crops")
    return {
        "stride": strides,
        "padding": padding,
        "dilation": dilations,
        "groups": attributes["group"].i if "group" in attributes else 1,
        "transposed": transposed,
        "output_padding": extra,
    }


def _integers(
    attributes: dict[str, AttributeProto], name: str, default: tuple[int, ...]
) -> tuple[int, ...]:
    return tuple(attributes[name].ints) if name in attributes else default


def _halves(totals: Sequence[int], smaller_first: bool) -> tuple[tuple[int, int], ...]:
    pairs = [(total // 2, total - total // 2) for total in totals]
    return tuple(pair if smaller_first else pair[::-1] for pair in pairs)
