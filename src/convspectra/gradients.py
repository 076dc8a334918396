"""Gradients that are known before the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convspectra.batched_lu import differentiable_once


@dataclass(frozen=True)
class Gradient:
    """A gradient by a weight: a tensor, and a factor that waits for its one use."""

    tensor: Tensor
    factor: Tensor | float = 1.0

    def scaled(self, factor: Tensor | float) -> Gradient:
        """A multiple of it; no entry is touched."""
        return Gradient(self.tensor, self.factor * factor)

    def product(self, dtype: torch.dtype) -> Tensor:
        """The gradient itself, a new tensor."""
        return (self.tensor * self.factor).to(dtype)


def give_gradient(
    value: Tensor, weights: Sequence[Tensor], gradients: Sequence[Gradient | None]
) -> Tensor:
    """The value, with these gradients by the weights; None is a gradient of 0."""
    result: Tensor = _Given.apply(value, gradients, *weights)  # type: ignore[no-untyped-call]
    return result


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Gradient | None], *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*weights)
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_weight: list[Tensor | None] = []
        for weight, gradient in zip(ctx.saved_tensors, ctx.gradients, strict=True):
            if gradient is None:
                by_weight.append(None)
                continue
            product = gradient.scaled(grad.detach()).product(weight.dtype)
            by_weight.append(differentiable_once(product, weight))
        return None, None, *by_weight
