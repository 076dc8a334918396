"""The penalties of all layers of a model and their gradients: followed, or computed anew.

Both kinds hold the layers of one rank, know them by their position in the model, and answer the
same calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from convspectra import penalties
from convspectra.models import Layer, is_convolution, named
from convspectra.operator import ConvOperator, block_diagonal, is_square_toeplitz
from convspectra.solvers import working_dtype
from convspectra.training._gradients import Gradient, KnownGradient
from convspectra.training._objectives import Objective, weighted
from convspectra.training._report import LayerReport
from convspectra.training._tracked import Stack

Penalty: TypeAlias = Callable[[ConvOperator], Tensor]

EXACT_PENALTIES: dict[str, Penalty] = {
    "stein": penalties.stein,
    "circular_stein": penalties.circular_stein,
    "orthogonality": penalties.orthogonality,
}
PER_LAYER = (penalties.sigma_min, penalties.sigma_max, penalties.cond, penalties.band)
"""Penalties that do not grow with the number of singular values."""
ADDITIVE = (penalties.frobenius, penalties.orthogonality, penalties.circular_stein)
"""Penalties that add up over the blocks of a block diagonal matrix at no more cost."""
STACKED_ENTRIES = 1 << 16
"""Weights of up to so many entries are put together: the calls cost more than the copy."""


class Terms(Protocol):
    """What a regularizer asks of its layers; indices are positions in the model."""

    gradient_needs_value: bool
    """Whether the value costs nothing beside the gradient."""

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> list[float]:
        """A norm of the weight of each active layer: finite only if the weight is."""

    def evaluate(
        self, weights: Sequence[Tensor], factors: dict[int, float], step: int, moving: bool
    ) -> tuple[Tensor, list[Gradient]]:
        """The sum of factors times penalties, float64, and if `moving` the gradients in order.

        Of the layers whose sizes were asked for just before. The sum is 0 if that was not `valued`
        and the gradients do not need it.
        """

    def refresh(self, index: int, step: int) -> None:
        """Compute a layer exactly."""

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """What is known of a layer."""

    def state(self, index: int) -> dict[str, Any] | None:
        """What `load` takes up again."""

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """Take up what `state` gave."""

    def to(self, device: torch.device) -> None:
        """Move what is held."""


class TrackedTerms:
    """Penalties of extreme singular values that are followed (Note [Tracking])."""

    def __init__(
        self,
        layers: Sequence[Layer],
        own: Sequence[int],
        objective: Objective,
        improve_interval: int,
        refresh_interval: int,
    ) -> None:
        self._layers, self._objective = layers, objective
        self._refresh_interval = refresh_interval
        self.gradient_needs_value = objective.smallest + objective.largest > 0
        # Both ends, whatever is read: condition numbers cost little more then.
        smallest, largest = (max(n, 1) for n in (objective.smallest, objective.largest))
        kinds: dict[Hashable, list[int]] = {}
        for i in range(len(layers)):
            small = layers[i].operator().weight.numel() <= STACKED_ENTRIES
            stackable = small and is_convolution(layers[i].name, layers[i].module)
            kinds.setdefault(layers[i].kind() if stackable else i, []).append(i)
        parts = [[i for i in kind if i in own] for kind in kinds.values()]
        self._stacks = [
            (Stack([layers[i] for i in part], smallest, largest, improve_interval), part)
            for part in parts
            if part
        ]
        self._place = {
            i: (stack, position) for stack, kind in self._stacks for position, i in enumerate(kind)
        }
        self._squares: dict[int, Tensor] = {}

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> list[float]:
        """See `Terms`."""
        if not (valued or self.gradient_needs_value):
            self._squares = {}
            return torch.stack([_square(weights[i]) for i in active]).tolist()
        self._squares = {i: self._place[i][0].mean_square(weights[i]) for i in active}
        return torch.stack(list(self._squares.values())).tolist()

    def evaluate(
        self, weights: Sequence[Tensor], factors: dict[int, float], step: int, moving: bool
    ) -> tuple[Tensor, list[Gradient]]:
        """See `Terms`."""
        if factors and not self.gradient_needs_value:
            return self._evaluate_squares(weights, factors, moving)
        for i in factors:
            stack, position = self._place[i]
            reference = stack.references[position]
            if reference is None or (moving and reference.tried < self._last_turn(i, step)):
                self.refresh(i, step)
        total = weights[0].new_zeros((), dtype=torch.float64)
        gradients: dict[int, Gradient] = {}
        for stack, kind in self._stacks:
            active = [position for position, i in enumerate(kind) if i in factors]
            if not active:
                continue
            scale = [factors[kind[position]] for position in active]
            found = stack.evaluate(
                self._objective,
                [weights[i] for i in kind],
                {position: self._squares[kind[position]] for position in active},
                scale,
                moving=moving,
                step=step if moving else None,
            )
            total = total + found.value
            for position, gradient in zip(active, found.gradients, strict=False):
                gradients[kind[position]] = gradient
        self._squares = {}
        return total, [gradients[i] for i in factors] if moving else []

    def _evaluate_squares(
        self, weights: Sequence[Tensor], factors: dict[int, float], moving: bool
    ) -> tuple[Tensor, list[Gradient]]:
        """`evaluate` of a penalty that reads no singular values: a multiple of ||M||_F^2."""
        scale = torch.tensor(list(factors.values()), dtype=torch.float64, device=weights[0].device)
        squares = torch.zeros_like(scale)  # The slope is the same everywhere.
        if self._squares:
            squares = torch.stack([self._squares[i] for i in factors]).double()
        none = squares.new_zeros(len(squares), 0)
        value, slopes = weighted(self._objective, scale, squares, none, none)
        self._squares = {}
        assert slopes[0] is not None
        return value, [
            self._place[i][0].gradient_of_square(weights[i], slope)
            for i, slope in zip(factors, slopes[0].tolist(), strict=True)
            if moving
        ]

    def _last_turn(self, index: int, step: int) -> int:
        """The last step up to this one at which it was the turn of a layer, whoever computes it."""
        count = len(self._layers)
        turn = step * count // self._refresh_interval
        turn -= (turn - index) % count
        return -(-turn * self._refresh_interval // count)

    def refresh(self, index: int, step: int) -> None:
        """See `Terms`."""
        stack, position = self._place[index]
        with named(self._layers[index]):
            stack.refresh(position, step)

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """See `Terms`."""
        stack, position = self._place[index]
        return stack.report(position, step, skipped, settle)

    def state(self, index: int) -> dict[str, Any] | None:
        """See `Terms`."""
        stack, position = self._place[index]
        return stack.state(position)

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """See `Terms`."""
        stack, position = self._place[index]
        with named(self._layers[index]):
            stack.load(position, state)

    def to(self, device: torch.device) -> None:
        """See `Terms`."""
        for stack, _ in self._stacks:
            stack.to(device)


class ExactTerms:
    """Penalties that are computed anew at every call."""

    gradient_needs_value = True

    def __init__(self, layers: Sequence[Layer], penalty: Penalty) -> None:
        self._layers, self._penalty = layers, penalty
        self._stacks = [Stack([layer], 1, 1, 1) for layer in layers]

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> list[float]:
        """See `Terms`."""
        return torch.stack([torch.linalg.vector_norm(weights[i].detach()) for i in active]).tolist()

    def evaluate(
        self, weights: Sequence[Tensor], factors: dict[int, float], step: int, moving: bool
    ) -> tuple[Tensor, list[Gradient]]:
        """See `Terms`."""
        total = weights[0].new_zeros((), dtype=torch.float64)
        gradients: dict[int, Gradient] = {}
        for kind in self._kinds(factors):
            variables = [weights[i].detach().requires_grad_(moving) for i in kind]
            with torch.set_grad_enabled(moving):
                values = self._values(kind, variables)
                value = factors[kind[0]] * torch.stack(values).sum().double()
            total = total + value.detach()
            if moving and value.requires_grad:
                found = torch.autograd.grad(value, variables, allow_unused=True)
            else:
                found = ()
            for i, variable, gradient in itertools.zip_longest(kind, variables, found):
                found_or_zero = torch.zeros_like(variable) if gradient is None else gradient
                gradients[i] = KnownGradient(found_or_zero)
        return total, [gradients[i] for i in factors] if moving else []

    def _kinds(self, factors: dict[int, float]) -> list[list[int]]:
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
        return self._penalty(op) / (1 if self._penalty in PER_LAYER else count)

    def refresh(self, index: int, step: int) -> None:
        """See `Terms`. For the reports: the penalty reads nothing of it."""
        with named(self._layers[index]):
            self._stacks[index].refresh(0, step)

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """See `Terms`."""
        return self._stacks[index].report(0, step, skipped, settle)

    def state(self, index: int) -> dict[str, Any] | None:
        """See `Terms`."""
        return self._stacks[index].state(0)

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """See `Terms`."""
        with named(self._layers[index]):
            self._stacks[index].load(0, state)

    def to(self, device: torch.device) -> None:
        """See `Terms`."""
        for stack in self._stacks:
            stack.to(device)


def _square(weight: Tensor) -> Tensor:
    """The sum of squares, 0-dim."""
    flat = weight.detach().to(working_dtype(weight.dtype)).flatten()
    return torch.dot(flat, flat)
