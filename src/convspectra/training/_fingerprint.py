"""Whether the weights of layers have changed since they were last looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from convspectra.models import Layer

Fingerprint: TypeAlias = tuple[list[tuple[int, int]], list[float]]
SAMPLED_CHANNELS = 8
"""Output and input channels of a weight that its fingerprint looks at."""


def fingerprint(layers: Sequence[Layer], weights: Sequence[Tensor]) -> Fingerprint:
    """A value that is another once the weights of the layers, or their parameters, have changed.

    Fused optimizers do not change the version of a tensor, but what a sample of it sums up to;
    weights that a parametrization computes are new tensors every time, unlike their parameters.
    """
    parameters: list[Tensor] = []
    for layer, weight in zip(layers, weights, strict=True):
        computed = not isinstance(weight, nn.Parameter)
        parameters += layer.module.parameters() if computed else (weight,)
    sums = torch.stack([_sample(weight.detach()) for weight in weights]).tolist()
    sums = [total if math.isfinite(total) else math.inf for total in sums]  # NaN != NaN
    return [_identity(parameter) for parameter in parameters], sums


def _identity(parameter: Tensor) -> tuple[int, int]:
    """Address and version; those of the pieces that a parameter was gathered from."""
    pieces = getattr(parameter, "pieces", None)
    if pieces is None:
        return parameter.data_ptr(), parameter._version
    return pieces.to_local().data_ptr(), pieces._version


def _sample(weight: Tensor) -> Tensor:
    """The sum, float64, of the entries for some output and input channels, spread over all."""
    outputs, inputs = (-(-n // SAMPLED_CHANNELS) for n in weight.shape[:2])
    return weight[::outputs, ::inputs].sum(dtype=torch.float64)
