"""The convolution in a module with a forward pass of its own: it pads, or computes its weight.

Note [A forward pass of its own]: the pass runs on an array of the numbers of its entries, as far as
the one convolution that it calls. The array that this is given is the table of the pixels that the
layer reads, so that padding belongs to it; and it is given the weight, with the graph of how it was
computed, so that gradients reach the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convspectra.operator._geometry import conv_geometry
from convspectra.operator._outer_padding import outer_padding

_CALLS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(
        (torch.conv1d, torch.conv2d, torch.conv3d),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    nn.functional.linear: ("input", "weight", "bias"),
}
"""Functions that a forward pass may end in, with the names of their arguments."""

_TOLERANCE = 1e-3
"""Largest difference, relative to the largest output, between a forward pass and the operator that
was read from it. A choice: far above rounding in single precision, where sums have thousands of
terms, and far below any other map; half or double of it changes nothing.
"""


class _ReachedError(Exception):
    """Ends the pass at its convolution."""


class _UntilConvolution(TorchFunctionMode):
    """Keeps the arguments of the first convolution, and ends the pass there."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CALLS:
            self.arguments = {**dict(zip(_CALLS[func], args, strict=False)), **kwargs}
            raise _ReachedError
        return func(*args, **kwargs)


def own_convolution(
    module: nn.Module, transposed: bool, input_size: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Weight and options of the convolution that a module's forward pass applies.

    Parameters
    ----------
    module : nn.Module
        Of one of `LAYER_TYPES`.
    transposed : bool
        Whether it is one of the transposed ones.
    input_size : tuple of int, optional
        On which padding may depend; a small one without it.

    Raises
    ------
    ValueError
        If the pass cannot be followed: it takes other arguments, changes its input otherwise than
        by padding, or calls no convolution.

    Notes
    -----
    Cost: the computation of the weight, and a pass over an array of the input's size.
    """
    size = _size(module, input_size)
    channels = int(getattr(module, "in_channels", None) or module.in_features)  # type: ignore[arg-type]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    count = channels * math.prod(size)
    x = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    until = _UntilConvolution()
    try:
        with until:
            module.forward(x.reshape(1, channels, *size))
        raise ValueError("it calls no convolution or linear map of torch.nn.functional")
    except _ReachedError:
        pass
    except Exception as error:  # anything may be in a forward pass
        raise _refusal(module, f"{type(error).__name__}: {error}") from error
    try:
        return _read(until.arguments, transposed)
    except (ValueError, TypeError) as error:
        raise _refusal(module, str(error)) from error


def check_own_forward(module: nn.Module, op: Any) -> None:
    """Raise a ValueError unless a forward pass of its own applies this operator, plus a constant.

    Cost: two passes of the module and one product, on one input.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *op.input_shape, generator=generator, dtype=op.dtype, device="cpu")
    x = x.to(op.device)
    try:
        with torch.no_grad():
            found = module.forward(x) - module.forward(torch.zeros_like(x))
            expected = op.matvec(x)
    except Exception as error:  # anything may be in a forward pass
        raise _refusal(module, f"{type(error).__name__}: {error}") from error
    same = found.shape == expected.shape
    if not same or not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        raise _refusal(module, "its output is not that of the convolution that it calls")


def _refusal(module: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"expected a layer whose forward pass pads, convolves and adds a bias, got "
        f"{type(module).__name__}, whose own pass is another or cannot be followed ({reason}); "
        "give its effective weight and padding to ConvOperator, or exclude the layer"
    )


def _size(module: nn.Module, input_size: Any) -> tuple[int, ...]:
    """The given size, or one on which any padding is possible."""
    kernel = getattr(module, "kernel_size", ())
    dilation = getattr(module, "dilation", ())
    if isinstance(input_size, Integral):
        input_size = (input_size,) * len(kernel)
    given = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if len(given) == len(kernel) and all(isinstance(n, int) and n > 0 for n in given):
        return given
    return tuple(2 * d * k + 1 for k, d in zip(kernel, dilation, strict=False))


def _read(arguments: dict[str, Any], transposed: bool) -> tuple[Tensor, dict[str, Any]]:
    weight, table = arguments["weight"], arguments["input"].detach().cpu()
    ndim = weight.ndim - 2
    if not bool((table == table.round()).all()) or bool((table < 0).any()):
        raise ValueError("it changes its input before the convolution")
    index = table.numpy().astype(np.int64)
    names = ("stride", "padding", "dilation", "output_padding", "groups")
    options = {name: arguments[name] for name in names if name in arguments}
    if ndim == 0:
        if transposed or not (index.ravel() == np.arange(1, index.size + 1)).all():
            raise ValueError("it changes its input before the product")
        return weight, {}
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    options |= {"transposed": transposed, "padding_mode": "zeros"}
    outer = outer_padding(index.reshape(-1, *index.shape[index.ndim - ndim :]))
    if outer is None:
        return weight, options
    if transposed:
        raise ValueError("it pads its input, which transposed convolutions cannot do")
    geometry = conv_geometry(
        index.shape[index.ndim - ndim :],
        tuple(weight.shape[2:]),
        stride=options["stride"],
        padding=options["padding"],
        dilation=options["dilation"],
        padding_mode="zeros",
    )
    return weight, options | outer.options(geometry)
