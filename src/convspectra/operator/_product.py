"""Products with M and its adjoint on flat rows, as fast as the layer allows."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator._conv_operator import ConvOperator, derived_operator
from convspectra.operator._geometry import conv_geometry
from convspectra.operator._structure import is_wide
from convspectra.operator._winograd import WinogradConvolution, faster_convolution


class Product:
    """A layer as maps between rows, (b, n) -> (b, m) and back, for inner loops.

    Parameters
    ----------
    op : ConvOperator
    fast : bool
        By fewer multiplications where that can be: for many products to come.
    """

    def __init__(self, op: ConvOperator, *, fast: bool = False) -> None:
        self.op = op
        direct = op.T if op.transposed else op
        # PyTorch's transposed convolution is the slower one in float64.
        adjoint = _adjoint_layer(direct) or direct.T
        maps = [(fast and _faster(layer)) or layer for layer in (direct, adjoint)]
        self._forward, self._backward = reversed(maps) if op.transposed else maps

    @classmethod
    def tall(cls, op: ConvOperator, *, fast: bool = False) -> tuple[Product, bool]:
        """M, or M' if M has more columns than rows, and whether it has."""
        wide = is_wide(op)
        return cls(op.T if wide else op, fast=fast), wide

    def apply(self, x: Tensor) -> Tensor:
        """M x."""
        return self._forward.apply(x.reshape(-1, *self.op.input_shape)).flatten(1)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """M' y."""
        return self._backward.apply(y.reshape(-1, *self.op.output_shape)).flatten(1)

    def gram(self, x: Tensor) -> Tensor:
        """M'M x."""
        return self.apply_adjoint(self.apply(x))


def _adjoint_layer(op: ConvOperator) -> ConvOperator | None:
    """M' as a layer that is not transposed: taps reversed, channels exchanged; None if it is not.

    That of stride 1 with zero padding is, unless it pads farther than the taps reach or does not
    read its last inputs.
    """
    g = op.geometry
    if g.ndim == 0 or g.padding_mode != "zeros" or any(s != 1 for s in g.stride):
        return None
    padding = [
        (reach - 1 - before, reach - 1 - after)
        for reach, (before, after) in zip(g.reach, g.padding, strict=True)
    ]
    if min(map(min, padding)) < 0:
        return None
    blocks = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    weight = blocks.transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + g.ndim)))
    geometry = conv_geometry(g.output_size, g.kernel_size, padding=padding, dilation=g.dilation)
    if geometry.output_size != g.input_size:
        return None
    return derived_operator(weight.contiguous(), geometry, op.groups)


def _faster(layer: ConvOperator) -> WinogradConvolution | None:
    if layer.transposed:
        return None
    return faster_convolution(layer.weight, layer.geometry, layer.groups)


def weight_rounding(op: ConvOperator, dtype: torch.dtype, factor: float = 1.0) -> float:
    """A bound on the norm of the change of M by rounding its weight to a type, twice.

    ``eps sqrt(||M||_1 ||M||_inf)`` of the weight's absolute values; a weight may be multiplied by a
    factor first, whose rounding is the other time, and be near 0 then. Cost: M and M' on ones.
    """
    info = torch.finfo(dtype)
    least = info.tiny * max(1.0, 1 / factor)
    size = op.with_weight(op.weight.detach().double().abs().clamp_min(least), check=False)
    rows = size.apply(size.weight.new_ones(1, *op.input_shape)).amax()
    columns = size.apply_adjoint(size.weight.new_ones(1, *op.output_shape)).amax()
    return float(1.01 * info.eps * (rows * columns).sqrt())


def rounding_of(op: ConvOperator) -> float:
    """Rounding error of a product with M, and of sums of its entries, relative to its norm."""
    eps: float = torch.finfo(op.dtype).eps
    return (16 + 4 * max(op.shape) ** 0.5) * eps
