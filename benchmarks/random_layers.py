"""Random small layers over all options of a convolution, each with its reference in torch.nn.

Layer i of a seed depends on (seed, i) only. The reference shares no code with `ConvOperator`: it
pads and crops explicitly around PyTorch's own convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convspectra as cs

CONV = (F.conv1d, F.conv2d, F.conv3d)
"""PyTorch's convolutions by dimensions."""
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
"""PyTorch's transposed convolutions by dimensions."""
KERNELS = {
    "gaussian": 0.38,
    "identity": 0.08,
    "orthogonal": 0.08,
    "separable": 0.1,
    "rank-deficient": 0.1,
    "integer": 0.12,
    "zero": 0.02,
    "cancelling": 0.04,
    "unread": 0.04,
    "span": 0.04,
}
"""Kinds of kernels with the part of the layers that have them. A choice."""
DTYPES = (torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights; float64 twice as often, since all its digits are compared."""
LARGEST_SCALE = {torch.float64: 150, torch.float32: 30, torch.float16: 2, torch.bfloat16: 30}
"""Powers of ten that weights are scaled by, so that they stay finite in their type."""
MOST_SINGULAR_VALUES = 300
"""Size of the largest dense SVD: a choice, twice of it takes eight times as long."""
MOST_ENTRIES = 200_000
"""Entries of the largest dense matrix. A choice: it bounds the time of the dense SVD."""


@dataclass(frozen=True)
class RandomLayer:
    """The arguments of ConvOperator, and its padding in numbers."""

    weight: Tensor
    input_size: tuple[int, ...]
    options: dict[str, Any]
    pads: tuple[tuple[int, int], ...]
    kind: str

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"{self.kind} weight{tuple(self.weight.shape)} {self.weight.dtype} at "
            f"{self.input_size}{options}, max {float(self.weight.abs().max()):.2g}"
        ).replace("torch.", "")

    def operator(self) -> cs.ConvOperator:
        """The layer under test."""
        return cs.ConvOperator(self.weight, self.input_size, **self.options)

    def reference(self, weight: Tensor) -> nn.Module:
        """The same layer with another weight as a module made of torch.nn.functional."""
        return _Reference(self, weight)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(g, *input_size)."""
        first, second = self.weight.shape[:2]
        groups = self.options.get("groups", 1)
        return (first if self.options.get("transposed") else second * groups, *self.input_size)


class _Reference(nn.Module):
    def __init__(self, layer: RandomLayer, weight: Tensor) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        pads, options = self.layer.pads, dict(self.layer.options)
        if not self.layer.input_size:
            return F.linear(x, self.weight)
        function = len(pads) - 1
        options.pop("padding", None)
        if options.pop("transposed", False):
            x = CONV_TRANSPOSE[function](x, self.weight, **options)
            for axis, (before, after) in enumerate(pads, start=2):
                x = x.narrow(axis, before, x.shape[axis] - before - after)
            return x
        mode = options.pop("padding_mode", "zeros")
        amounts = [amount for pair in reversed(pads) for amount in pair]
        padded = F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)
        return CONV[function](padded, self.weight, **options)


@dataclass
class _Draw:
    """One attempt: the layer's options, drawn axis by axis."""

    rng: np.random.Generator
    ndim: int = 1
    transposed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[self.rng.integers(len(values))]

    def integers(self, least: int, most: int) -> tuple[int, ...]:
        return tuple(int(n) for n in self.rng.integers(least, most + 1, self.ndim))

    def layer(self) -> RandomLayer | None:
        """A layer, or None where sizes do not fit together."""
        rng = self.rng
        if rng.random() < 0.05:
            shape = self.one_of([(1, 1), (7, 7), (40, 90), (200, 30), (5, 1)])
            return RandomLayer(self.weight(shape, 1), (), {}, (), "linear")
        self.ndim = self.one_of([1, 1, 2, 2, 2, 3])
        self.transposed = rng.random() < 0.2
        kernel = self.integers(1, 5 if self.ndim < 3 else 3)
        stride = (1,) * self.ndim if rng.random() < 0.6 else self.integers(1, 3)
        dilation = (1,) * self.ndim if rng.random() < 0.6 else self.integers(1, 3)
        mode = "zeros" if self.transposed or rng.random() < 0.6 else None
        mode = mode or self.one_of(["circular", "reflect", "replicate"])
        padding, pads = self.padding(kernel, stride, dilation)
        size = self.size()
        output = self.output_size(size, kernel, stride, dilation, pads, mode)
        if output is None:
            return None
        channels = self.channels(math.prod(size), math.prod(output))
        if channels is None:
            return None
        groups, inputs, outputs = channels
        self.options |= {"stride": stride, "padding": padding, "dilation": dilation}
        self.options |= {"groups": groups}
        if self.transposed:
            self.options["transposed"] = True
        else:
            self.options["padding_mode"] = mode
        first, second = (inputs, outputs) if self.transposed else (outputs, inputs)
        kind = str(rng.choice(list(KERNELS), p=list(KERNELS.values())))
        weight = self.weight((groups * first, second, *kernel), groups, kind)
        if kind == "unread" and mode == "zeros" and not self.transposed:
            reads = _reading_taps(kernel, size, stride, dilation, pads)
            weight = torch.where(reads, weight, 1e4 * weight.abs().amax())
        return RandomLayer(weight, size, self.options, pads, kind)

    def padding(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
    ) -> tuple[Any, tuple[tuple[int, int], ...]]:
        """The padding as ConvOperator takes it, and as (before, after) per axis."""
        kind = self.one_of(["same", "same", "valid", "number", "pairs", "wide"])
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        same = tuple(((r - 1) // 2, r - 1 - (r - 1) // 2) for r in reach)
        if kind == "same":
            return ("same" if max(stride) == 1 else same), same
        if kind == "valid":
            return "valid", ((0, 0),) * self.ndim
        if kind == "number":
            numbers = self.integers(0, 3)
            return numbers, tuple((n, n) for n in numbers)
        beyond = 2 if kind == "wide" else 0
        pads = tuple(
            (int(self.rng.integers(r)) + beyond, int(self.rng.integers(r)) + beyond) for r in reach
        )
        return pads, pads

    def size(self) -> tuple[int, ...]:
        shape = self.rng.random()
        if shape < 0.1:
            return self.integers(1, 2)
        if shape < 0.2:  # long and thin
            sizes = [1] * self.ndim
            sizes[self.rng.integers(self.ndim)] = int(self.rng.integers(20, 120))
            return tuple(sizes)
        return self.integers(1, {1: 60, 2: 12, 3: 5}[self.ndim])

    def output_size(
        self,
        size: tuple[int, ...],
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        pads: tuple[tuple[int, int], ...],
        mode: str,
    ) -> tuple[int, ...] | None:
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        axes = list(zip(size, reach, stride, pads, strict=True))
        if self.transposed:
            extra = tuple(
                int(self.rng.integers(max(s, d))) for s, d in zip(stride, dilation, strict=True)
            )
            self.options["output_padding"] = extra
            out = [
                (n - 1) * s + r - sum(p) + e for (n, r, s, p), e in zip(axes, extra, strict=True)
            ]
        else:
            out = [(n + sum(p) - r) // s + 1 if n + sum(p) >= r else 0 for n, r, s, p in axes]
        widest = {"circular": 0, "reflect": 1}
        narrow = [n - widest.get(mode, -math.inf) for n in size]
        if any(max(p) > n for p, n in zip(pads, narrow, strict=True)):
            return None
        return tuple(out) if min(out) > 0 else None

    def channels(self, pixels_in: int, pixels_out: int) -> tuple[int, int, int] | None:
        """Groups, and channels per group in and out; None if even single channels are too many."""
        groups, inputs, outputs = 1, 1, 1
        if self.rng.random() < 0.3:
            groups = int(self.rng.integers(2, 5))
        if groups == 1 or self.rng.random() < 0.5:
            inputs, outputs = (int(n) for n in self.rng.integers(1, 9, 2))
        if self.rng.random() < 0.5:
            outputs = inputs
        while True:
            columns, rows = groups * inputs * pixels_in, groups * outputs * pixels_out
            if min(columns, rows) <= MOST_SINGULAR_VALUES and columns * rows <= MOST_ENTRIES:
                return groups, inputs, outputs
            if max(groups, inputs, outputs) == 1:
                return None
            groups, inputs, outputs = ((n + 1) // 2 for n in (groups, inputs, outputs))

    def weight(self, shape: tuple[int, ...], groups: int, kind: str = "gaussian") -> Tensor:
        """Entries of this kind in a random dtype, now and then at an extreme scale."""
        blocks = [self.block((shape[0] // groups, *shape[1:]), kind) for _ in range(groups)]
        array, dtype = torch.from_numpy(np.concatenate(blocks)), self.one_of(DTYPES)
        if kind in ("cancelling", "span"):  # other types do not hold such numbers
            return array
        if self.rng.random() < 0.3:
            most = LARGEST_SCALE[dtype]
            array = array * 10.0 ** self.rng.uniform(-most, most)
        return array.to(dtype)

    def block(self, shape: tuple[int, ...], kind: str) -> np.ndarray:
        rng, (h, g), taps = self.rng, shape[:2], shape[2:]
        gaussian = rng.standard_normal(shape)
        if kind in ("identity", "orthogonal"):
            square = rng.standard_normal((max(h, g),) * 2)
            matrix = np.eye(h, g) if kind == "identity" else np.linalg.qr(square)[0][:h, :g]
            delta = np.zeros(taps)
            delta[tuple((k - 1) // 2 for k in taps)] = 1
            return np.multiply.outer(matrix, delta)
        if kind == "separable":
            product = rng.standard_normal((h, g))
            for k in taps:
                product = np.multiply.outer(product, rng.standard_normal(k))
            return product
        if kind == "rank-deficient":
            rank = max(1, min(h, g) - 1)
            return np.tensordot(rng.standard_normal((h, rank)), gaussian[:rank], 1)
        if kind == "cancelling":  # equal taps of alternating sign, and a little beside
            signs = (-1.0) ** np.indices(taps).sum(0)
            return np.multiply.outer(rng.standard_normal((h, g)), signs) + 1e-8 * gaussian
        if kind == "span":
            return gaussian * 10.0 ** rng.uniform(-300, 300, shape)
        if kind == "integer":
            return rng.integers(-2, 3, shape).astype(float)
        return 0 * gaussian if kind == "zero" else gaussian


def _reading_taps(
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
) -> Tensor:
    """Whether each tap of a zero-padded layer reads a pixel for some output."""
    axes = []
    for k, n, s, d, (before, after) in zip(kernel, size, stride, dilation, pads, strict=True):
        outputs = range((n + before + after - d * (k - 1) - 1) // s + 1)
        axes.append([any(0 <= o * s + t * d - before < n for o in outputs) for t in range(k)])
    reads = torch.tensor(axes[0])
    for axis in axes[1:]:
        reads = reads[..., None] & torch.tensor(axis)
    return reads


def random_layer(seed: int, index: int) -> RandomLayer:
    """Layer `index` of a seed: the first of its draws whose sizes fit together."""
    rng = np.random.default_rng((seed, index))
    while True:
        layer = _Draw(rng).layer()
        if layer is not None:
            return layer
