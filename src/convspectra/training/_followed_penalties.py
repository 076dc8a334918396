"""Penalties of singular values that are followed from step to step (Note [Tracking])."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convspectra.models import Layer, is_convolution, named
from convspectra.solvers import working_dtype
from convspectra.training._extreme_values import ExtremePenalty, weighted
from convspectra.training._followed_values import Stack
from convspectra.training._gradients import Evaluation, Gradient
from convspectra.training._report import LayerReport
from convspectra.training._safe_step import own_size_step

STACKED_ENTRIES = 1 << 16
"""Weights of up to so many entries are put together: the calls cost more than the copy."""


class FollowedPenalties:
    """Penalties of extreme singular values that are followed (Note [Tracking])."""

    def __init__(
        self,
        layers: Sequence[Layer],
        own: Sequence[int],
        penalty: ExtremePenalty,
        improve_interval: int,
        refresh_interval: int,
    ) -> None:
        self._layers, self._penalty = layers, penalty
        self._refresh_interval = refresh_interval
        self.gradient_needs_value = penalty.smallest + penalty.largest > 0
        # Both ends, whatever is read: condition numbers cost little more then.
        smallest, largest = (max(n, 1) for n in (penalty.smallest, penalty.largest))
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

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> dict[int, Tensor]:
        """||M||_F^2 / n, or the sum of squares of the weight where no value is asked for."""
        if valued or self.gradient_needs_value:
            return {i: self._place[i][0].mean_square(weights[i]) for i in active}
        return {i: _square(weights[i]) for i in active}

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
        if factors and not self.gradient_needs_value:
            return self._evaluate_squares(weights, sizes, factors, moving, valued)
        for i in factors:
            stack, position = self._place[i]
            last = stack.last_exact[position]
            if last is None or (moving and last.tried < self._last_turn(i, step)):
                self.refresh(i, step)
        total = weights[0].new_zeros((), dtype=torch.float64)
        gradients: dict[int, Gradient] = {}
        for stack, kind in self._stacks:
            active = [position for position, i in enumerate(kind) if i in factors]
            if not active:
                continue
            found = stack.evaluate(
                self._penalty,
                [weights[i] for i in kind],
                {position: sizes[kind[position]] for position in active},
                [factors[kind[position]] for position in active],
                moving=moving,
                step=step if moving else None,
            )
            total = total + found.value
            gradients |= {kind[position]: one for position, one in found.gradients.items()}
        return Evaluation(total, gradients)

    def _evaluate_squares(
        self,
        weights: Sequence[Tensor],
        sizes: Mapping[int, Tensor],
        factors: Mapping[int, float],
        moving: bool,
        valued: bool,
    ) -> Evaluation:
        """`evaluate` of a penalty that reads no singular values: a multiple of ||M||_F^2."""
        scale = torch.tensor(list(factors.values()), dtype=torch.float64, device=weights[0].device)
        squares = torch.zeros_like(scale)  # The slope is the same everywhere.
        if valued:
            squares = torch.stack([sizes[i] for i in factors]).double()
        none = squares.new_zeros(len(squares), 0)
        value, slopes = weighted(self._penalty, scale, squares, none, none)
        assert slopes[0] is not None
        gradients: dict[int, Gradient] = {
            i: self._place[i][0].gradient_of_square(weights[i], slope)
            for i, slope in zip(factors, slopes[0].tolist(), strict=True)
            if moving
        }
        return Evaluation(value, gradients)

    def moves(
        self,
        weights: Mapping[int, Tensor],
        gradients: Mapping[int, Gradient],
        factors: Mapping[int, float],
        learning_rate: float,
    ) -> dict[int, tuple[Gradient, float]]:
        """See `LayerPenalties`. The gradient, over a step that is safe (Note [Step length])."""
        found: dict[int, tuple[Gradient, float]] = {}
        for i, gradient in gradients.items():
            rate = learning_rate
            if self._penalty.longest_step is not None:
                longest = self._penalty.longest_step(self._place[i][0].template)
                rate = min(rate, longest / factors[i])
            if not self._penalty.bounded_slope:
                rate = min(rate, own_size_step(weights[i], gradient))
            found[i] = gradient.scaled(rate), rate
        return found

    def _last_turn(self, index: int, step: int) -> int:
        """The last step up to this one at which it was the turn of a layer, whoever computes it."""
        count = len(self._layers)
        turn = step * count // self._refresh_interval
        turn -= (turn - index) % count
        return -(-turn * self._refresh_interval // count)

    def refresh(self, index: int, step: int) -> None:
        """See `LayerPenalties`."""
        stack, position = self._place[index]
        with named(self._layers[index]):
            stack.refresh(position, step)

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """See `LayerPenalties`."""
        stack, position = self._place[index]
        return stack.report(position, step, skipped, settle)

    def state(self, index: int) -> dict[str, Any] | None:
        """See `LayerPenalties`."""
        stack, position = self._place[index]
        return stack.state(position)

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """See `LayerPenalties`."""
        stack, position = self._place[index]
        with named(self._layers[index]):
            stack.load(position, state)

    def to(self, device: torch.device) -> None:
        """See `LayerPenalties`."""
        for stack, _ in self._stacks:
            stack.to(device)


def _square(weight: Tensor) -> Tensor:
    """The sum of squares, 0-dim."""
    flat = weight.detach().to(working_dtype(weight.dtype)).flatten()
    return torch.dot(flat, flat)
