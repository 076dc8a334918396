"""Gradients that are known before the backward pass, or cheap to have in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    add_weight_gradient,
    frobenius_form,
    subtract_frobenius_form,
)
from convspectra.solvers import differentiable_once


class Gradient(Protocol):
    """A gradient by a weight, with a factor that waits for its one use."""

    def scaled(self, factor: Tensor | float) -> Gradient:
        """A multiple of it; no entry is touched."""

    def product(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient itself at this weight, a new tensor."""

    def descend(self, weight: Tensor) -> None:
        """Subtract the gradient at this weight from it, in place."""


@dataclass(frozen=True)
class KnownGradient:
    """A gradient that was computed."""

    tensor: Tensor
    factor: Tensor | float = 1.0

    def scaled(self, factor: Tensor | float) -> KnownGradient:
        """See `Gradient`."""
        return KnownGradient(self.tensor, self.factor * factor)

    def product(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Gradient`."""
        return (self.tensor * self.factor).to(dtype)

    def descend(self, weight: Tensor) -> None:
        """See `Gradient`."""
        weight.sub_(self.product(weight, weight.dtype))


@dataclass(frozen=True)
class SpectralGradient:
    """The gradient of ``sum(slopes * s) + square_slope ||M||_F^2 / n`` by the weight of M.

    For one singular value s it is the sum of u_i v_j over the index sets Omega: Theorem 3.2 of Guo,
    "Regularization for convolutional kernel tensors to avoid unstable gradient problem in
    convolutional neural networks", arXiv:2102.04294. The second term is Theorem 3.1.

    It is formed in the backward pass, with the factor that comes then: there is one array of the
    size of the weight, written once.

    Attributes
    ----------
    layer : ConvOperator
        What M is, but for its weight.
    right, left : Tensor
        Vectors v, (k, *layer.input_shape), and slopes times unit vectors along M v; k may be 0.
    square_slope : Tensor or float, optional
        0-dim.
    factor : Tensor or float
    """

    layer: ConvOperator
    right: Tensor
    left: Tensor
    square_slope: Tensor | float | None
    factor: Tensor | float = 1.0

    def scaled(self, factor: Tensor | float) -> SpectralGradient:
        """See `Gradient`."""
        return replace(self, factor=self.factor * factor)

    def product(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Gradient`. Cost: a weight gradient for k arrays."""
        with torch.no_grad():
            weight = weight.detach().to(self.right.dtype)
            if self.square_slope is None:
                total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            else:
                total = frobenius_form(weight, self.layer.geometry, *self._square_factors())
            self._add_products(total, self.factor)
            return total.to(dtype)

    def descend(self, weight: Tensor) -> None:
        """See `Gradient`. Cost: as `product`, without an array of the size of the weight.

        On a CPU most of the time of `product` is that the system hands out such an array.
        """
        if weight.dtype != self.right.dtype or not weight.is_contiguous():
            weight.sub_(self.product(weight, weight.dtype))
            return
        with torch.no_grad():
            if self.square_slope is not None:
                subtract_frobenius_form(weight, self.layer.geometry, *self._square_factors())
            self._add_products(weight, -self.factor)

    def _square_factors(self) -> tuple[int, Tensor | float]:
        assert self.square_slope is not None
        return min(self.layer.shape), 2 * self.factor * self.square_slope

    def _add_products(self, total: Tensor, factor: Tensor | float) -> None:
        if len(self.right):
            pair = self.right, factor * self.left
            x, y = reversed(pair) if self.layer.transposed else pair
            with torch.autocast(total.device.type, enabled=False):
                add_weight_gradient(total, x, y, self.layer.geometry, self.layer.groups)


@dataclass(frozen=True)
class Evaluation:
    """The weighted sum of the penalties of some layers, and its gradients.

    Attributes
    ----------
    value : Tensor
        0-dim, float64.
    gradients : mapping of int to Gradient
        By the number of the layer; empty if they were not asked for.
    """

    value: Tensor
    gradients: Mapping[int, Gradient]


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
            product = gradient.scaled(grad.detach()).product(weight.detach(), weight.dtype)
            by_weight.append(differentiable_once(product, weight, grad))
        return None, None, *by_weight
