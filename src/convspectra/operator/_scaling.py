"""A weight divided by a power of two, so that neither tiny nor huge layers lose anything."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator._conv_operator import ConvOperator


def normalized(op: ConvOperator) -> tuple[ConvOperator, int | None]:
    """The layer detached, in float64, divided by 2^exponent; the exponent is None for weight 0."""
    weight = op.weight.detach().double()
    largest = weight.abs().amax()
    if float(largest) == 0.0:
        return op.with_weight(weight), None
    exponent = int(torch.frexp(largest).exponent)
    return op.with_weight(ldexp(weight, -exponent)), exponent


def ldexp(x: Tensor, exponent: int) -> Tensor:
    """The product x 2^exponent, in two factors so that neither overflows before x does."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
