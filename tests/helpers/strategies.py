"""Random layers over all options, each with an independent reference made of torch.nn only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convspectra import ConvOperator
from convspectra.testing import naive_dense

MODES = ("zeros", "circular", "reflect", "replicate")
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread for thousands of tiny products: two cost 50 times as much on a busy machine.

    In every test file: `conftest.py` imports it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PadThenConv(nn.Module):
    """Asymmetric padding: an explicit F.pad, then the layer without padding."""

    def __init__(self, pairs: Sequence[tuple[int, int]], mode: str, conv: nn.Module) -> None:
        super().__init__()
        self.amounts = [amount for pair in reversed(pairs) for amount in pair]
        self.mode = "constant" if mode == "zeros" else mode
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.amounts, mode=self.mode))


class TransposeThenCrop(nn.Module):
    """Asymmetric padding of a transposed layer: no padding, then a crop of its output."""

    def __init__(self, pairs: Sequence[tuple[int, int]], conv: nn.Module) -> None:
        super().__init__()
        self.pairs = pairs
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for axis, (before, after) in enumerate(self.pairs):
            y = y.narrow(2 + axis, before, y.shape[2 + axis] - before - after)
        return y


@dataclass(frozen=True)
class Layer:
    """One layer: what ConvOperator is given, and the same thing in torch.nn."""

    weight: Tensor
    input_size: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Layer(weight{tuple(self.weight.shape)}, {self.input_size}, {self.options})"

    def operator(self, weight: Tensor | None = None) -> ConvOperator:
        weight = self.weight if weight is None else weight
        return ConvOperator(weight, self.input_size, **self.options)

    def module(self, weight: Tensor | None = None) -> nn.Module:
        """The torch.nn module, with a random bias that the matrix must not show."""
        weight = self.weight if weight is None else weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _module(weight.detach().clone(), dict(self.options)).to(weight.dtype)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        """The matrix by applying the module to the identity."""
        channels = self.weight.shape[1]
        groups = self.options.get("groups", 1)
        channels = self.weight.shape[0] if self.options.get("transposed") else channels * groups
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using padding='same' with even")
            return naive_dense(self.module(weight), (channels, *self.input_size))


def _module(weight: Tensor, options: dict[str, Any]) -> nn.Module:
    ndim = weight.ndim - 2
    if ndim == 0:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight = nn.Parameter(weight)
        return linear
    transposed = options.pop("transposed", False)
    padding = options.pop("padding", "same")
    first, second = weight.shape[0], weight.shape[1] * options.get("groups", 1)
    pairs = None
    if isinstance(padding, (tuple, list)) and isinstance(padding[0], (tuple, list)):
        pairs = padding
    elif transposed and padding == "valid":
        padding = 0
    elif transposed and padding == "same":
        pairs = same_pairs(weight.shape[2:], as_tuple(options.get("dilation", 1), ndim))
    mode = "zeros" if transposed else options.pop("padding_mode", "zeros")
    if transposed:
        conv = CONV_TRANSPOSE[ndim - 1](
            first, second, tuple(weight.shape[2:]), padding=0 if pairs else padding, **options
        )
        module = TransposeThenCrop(pairs, conv) if pairs else conv
    elif pairs:
        conv = CONV[ndim - 1](second, first, tuple(weight.shape[2:]), padding=0, **options)
        module = PadThenConv(pairs, mode, conv)
    else:
        conv = CONV[ndim - 1](
            second,
            first,
            tuple(weight.shape[2:]),
            padding=padding,
            padding_mode=mode,
            **options,
        )
        module = conv
    conv.weight = nn.Parameter(weight)
    return module


def same_pairs(kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [(math.floor(total / 2), math.ceil(total / 2)) for total in totals]


def as_tuple(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * ndim


# Largest kernel, stride, dilation, padding and spread of input sizes for 1, 2 and 3 axes.
_LIMITS = {1: (5, 6, 3, 5, 7), 2: (4, 3, 3, 3, 3), 3: (3, 2, 2, 1, 1)}
_MOST_PIXELS = 240
_MOST_ROWS = 240


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers, the same ones for the same seed and dtype."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def direct(layer: Layer) -> tuple[ConvOperator, Tensor]:
    """The layer that is not transposed, and its naive matrix."""
    op, dense = layer.operator(), layer.dense().detach()
    return (op.T, dense.T) if op.transposed else (op, dense)


@st.composite
def layers(draw: st.DrawFn, kinds: Sequence[str] = ("conv", "transposed", "linear")) -> Layer:
    """A layer of any kind, with matrices of at most about 240 x 240."""
    kind = draw(
        st.sampled_from([k for k in ("conv", "conv", "transposed", "linear") if k in kinds])
    )
    if kind == "linear":
        h, g = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        return Layer(_weight(draw, (h, g)), ())
    ndim = draw(st.sampled_from([1, 1, 2, 2, 3]))
    most_taps, most_stride, most_dilation, most_padding, spread = _LIMITS[ndim]

    def per_axis(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(ndim))

    transposed = kind == "transposed"
    kernel = per_axis(1, most_taps)
    dilation = per_axis(1, most_dilation)
    padding_kind = draw(st.sampled_from(["int", "tuple", "same", "valid", "pairs", "default"]))
    same = padding_kind in ("same", "default")
    stride = (1,) * ndim if same else per_axis(1, most_stride)
    mode = "zeros" if transposed else draw(st.sampled_from(("zeros", *MODES)))
    if same:
        pairs = same_pairs(kernel, dilation)
        padding: Any = "same"
    elif padding_kind == "valid":
        pairs, padding = [(0, 0)] * ndim, "valid"
    elif padding_kind == "int":
        padding = draw(st.integers(0, most_padding))
        pairs = [(padding, padding)] * ndim
    elif padding_kind == "tuple":
        padding = per_axis(0, most_padding)
        pairs = [(p, p) for p in padding]
    else:
        pairs = list(zip(per_axis(0, most_padding), per_axis(0, most_padding), strict=True))
        padding = pairs if draw(st.booleans()) else tuple(pairs)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {}
    if transposed:
        options["transposed"] = True
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        if any(extra) or draw(st.booleans()):
            options["output_padding"] = _shorter(draw, extra)
        fixed = [r + e - sum(p) for r, e, p in zip(reach, extra, pairs, strict=True)]
        least = [1 + max(0, math.ceil((1 - f) / s)) for f, s in zip(fixed, stride, strict=True)]
    else:
        margin = {"reflect": 1, "circular": 0}
        least = [
            max(1, r - sum(p), max(p) + margin[mode] if mode in margin else 1)
            for r, p in zip(reach, pairs, strict=True)
        ]
    size = tuple(draw(st.integers(n, n + spread)) for n in least)
    if transposed:
        out = [(n - 1) * s + f for n, s, f in zip(size, stride, fixed, strict=True)]
    else:
        out = [
            (n + sum(p) - r) // s + 1 for n, p, r, s in zip(size, pairs, reach, stride, strict=True)
        ]
    pixels_in, pixels_out = math.prod(size), math.prod(out)
    assume(max(pixels_in, pixels_out) <= _MOST_PIXELS)
    most_in, most_out = _MOST_ROWS // pixels_in, _MOST_ROWS // pixels_out
    groups = draw(st.integers(1, min(3, most_in, most_out)))
    in_per_group = draw(st.integers(1, min(3, most_in // groups)))
    out_per_group = draw(st.integers(1, min(3, most_out // groups)))
    if groups > 1 or draw(st.booleans()):
        options["groups"] = groups
    if any(s > 1 for s in stride) or draw(st.booleans()):
        options["stride"] = _shorter(draw, stride)
    if any(d > 1 for d in dilation) or draw(st.booleans()):
        options["dilation"] = _shorter(draw, dilation)
    if mode != "zeros" or draw(st.booleans()):
        options["padding_mode"] = mode
    if padding_kind != "default":
        options["padding"] = padding
    channels = (groups * in_per_group, out_per_group)
    if not transposed:
        channels = (groups * out_per_group, in_per_group)
    return Layer(_weight(draw, (*channels, *kernel)), size, options)


def _shorter(draw: st.DrawFn, values: tuple[int, ...]) -> int | tuple[int, ...] | list[int]:
    if len(set(values)) == 1 and draw(st.booleans()):
        return values[0]
    return list(values) if draw(st.booleans()) else values


def _weight(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Standard normal entries; sometimes not contiguous, as a kernel_to_weight view is."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    return torch.randn(shape[::-1], dtype=torch.float64, generator=generator).permute(
        *range(len(shape) - 1, -1, -1)
    )
