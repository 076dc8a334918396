"""Penalties that are computed anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convspectra import penalties
from convspectra.models import Layer, is_convolution, named
from convspectra.operator import ConvOperator, block_diagonal, is_square_toeplitz
from convspectra.training._followed_values import Stack
from convspectra.training._gradients import Evaluation, Gradient, KnownGradient
from convspectra.training._report import LayerReport
from convspectra.training._safe_step import own_size_step, quartic_step, whole_spectrum_step

Penalty: TypeAlias = Callable[..., Tensor]
"""A function of a `ConvOperator`, with options."""

EXACT_PENALTIES: dict[str, Penalty] = {
    "stein": penalties.stein,
    "circular_stein": penalties.circular_stein,
    "orthogonality": penalties.orthogonality,
}
"""Penalties of all singular values, which are computed anew at every call."""
PER_LAYER = (penalties.sigma_min, penalties.sigma_max, penalties.cond, penalties.band)
"""Penalties that do not grow with the number of singular values."""
ADDITIVE = (penalties.frobenius, penalties.orthogonality, penalties.circular_stein)
"""Penalties that add up over the blocks of a block diagonal matrix at no more cost."""


class ExactPenalties:
    """Penalties that are computed anew at every call."""

    gradient_needs_value = True

    def __init__(
        self, layers: Sequence[Layer], penalty: Penalty, options: Mapping[str, Any]
    ) -> None:
        self._layers, self._penalty, self._options = layers, penalty, dict(options)
        self._stacks = [Stack([layer], 1, 1, 1) for layer in layers]

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> dict[int, Tensor]:
        """The 2-norm of each weight."""
        return {i: torch.linalg.vector_norm(weights[i].detach()) for i in active}

    def evaluate(
        self,
        weights: Sequence[Tensor],
        sizes: Mapping[int, Tensor],
        factors: Mapping[int, float],
        step: int,
        *,
        moving: bool,
        valued: bool,
    ) -> Evaluation:
        """See `LayerPenalties`."""
        total = weights[0].new_zeros((), dtype=torch.float64)
        gradients: dict[int, Gradient] = {}
        for kind in self._kinds(factors):
            variables = [weights[i].detach().requires_grad_(moving) for i in kind]
            with torch.set_grad_enabled(moving):
                values = self._values(kind, variables)
                value = factors[kind[0]] * torch.stack(values).sum().double()
            total = total + value.detach()
            if not moving:
                continue
            found: Sequence[Tensor | None] = [None] * len(kind)
            if value.requires_grad:
                found = torch.autograd.grad(value, variables, allow_unused=True)
            for i, variable, gradient in zip(kind, variables, found, strict=True):
                found_or_zero = torch.zeros_like(variable) if gradient is None else gradient
                gradients[i] = KnownGradient(found_or_zero)
        return Evaluation(total, gradients)

    def moves(
        self,
        weights: Mapping[int, Tensor],
        gradients: Mapping[int, Gradient],
        factors: Mapping[int, float],
        learning_rate: float,
    ) -> dict[int, tuple[Gradient, float]]:
        """See `LayerPenalties`. The gradient, over a step that is safe for the named penalties.

        Nothing is known of the curvature of a function: its steps are as long as asked for.
        """
        gain = float(self._options.get("gain", 1.0))
        found: dict[int, tuple[Gradient, float]] = {}
        for i, gradient in gradients.items():
            rate = learning_rate
            if self._penalty is penalties.orthogonality:
                wanted = rate * factors[i]
                longest = quartic_step(self._layers[i].operator(), gain, wanted)
                rate = min(rate, longest / factors[i])
            elif self._penalty in (penalties.stein, penalties.circular_stein):
                longest = gain**2 * whole_spectrum_step(self._layers[i].operator())
                rate = min(rate, longest / factors[i], own_size_step(weights[i], gradient))
            found[i] = gradient.scaled(rate), rate
        return found

    def _kinds(self, factors: Mapping[int, float]) -> list[list[int]]:
        """The layers, those that can be the groups of one operator together.

        That takes a penalty that adds up over the blocks of a block diagonal matrix, and a way to
        compute it that costs no more for the blocks together than one by one.
        """
        kinds: dict[Hashable, list[int]] = {}
        for i, factor in factors.items():
            layer = self._layers[i]
            stackable = is_convolution(layer.name, layer.module) and (
                self._penalty in ADDITIVE
                or (self._penalty is penalties.stein and is_square_toeplitz(layer.operator()))
            )
            kinds.setdefault((layer.kind(), factor) if stackable else i, []).append(i)
        return list(kinds.values())

    def _values(self, kind: list[int], variables: list[Tensor]) -> list[Tensor]:
        """The penalty of layers of one kind: their sum, or one by one where that fails."""
        ops = [
            self._layers[i].operator().with_weight(variable)
            for i, variable in zip(kind, variables, strict=True)
        ]
        if len(ops) > 1:
            try:
                return [self._value(block_diagonal(ops), min(ops[0].shape))]
            except (ValueError, ArithmeticError):
                pass  # Too large together, or one of them singular: below it is named.
        values = []
        for i, op in zip(kind, ops, strict=True):
            with named(self._layers[i]):
                values.append(self._value(op, min(op.shape)))
        return values

    def _value(self, op: ConvOperator, count: int) -> Tensor:
        """The penalty, per singular value of one layer."""
        return self._penalty(op, **self._options) / (1 if self._penalty in PER_LAYER else count)

    def refresh(self, index: int, step: int) -> None:
        """See `LayerPenalties`. For the reports: the penalty reads nothing of it."""
        with named(self._layers[index]):
            self._stacks[index].refresh(0, step)

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """See `LayerPenalties`."""
        return self._stacks[index].report(0, step, skipped, settle)

    def state(self, index: int) -> dict[str, Any] | None:
        """See `LayerPenalties`."""
        return self._stacks[index].state(0)

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """See `LayerPenalties`."""
        with named(self._layers[index]):
            self._stacks[index].load(0, state)

    def to(self, device: torch.device) -> None:
        """See `LayerPenalties`."""
        for stack in self._stacks:
            stack.to(device)
