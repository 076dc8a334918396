"""The penalty "isometry": the distance to the nearest isometric layers, or a step towards them.

It needs no singular values of M: one batched SVD of the center taps of all layers of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models import Layer, LayerFlow
from convspectra.operator import (
    check_gain,
    frobenius_form,
    isometric_taps,
    isometric_target,
    seen_operator,
)
from convspectra.spectra import sigma_max, sigma_min
from convspectra.training._gradients import Evaluation, Gradient, KnownGradient
from convspectra.training._isometric_plans import IsometricPlan, isometric_plans
from convspectra.training._report import LayerReport, unknown

OPTIONS = ("gain", "mirrored", "bias_decay")
"""The names that ``penalty_options`` takes for 'isometry'."""


class IsometryPenalties:
    """``1/2 ||M(K) - M(Q)||_F^2 / n`` for every layer, Q the nearest isometric one.

    Parameters
    ----------
    layers : sequence of Layer
    flows : mapping
        What surrounds each layer, by name.
    gain : float, optional
        The singular values of all Q; by default what the activation behind each layer wants.
    mirrored : bool, optional
        Mirrored kernels where a ReLU follows: None and True wherever they fit, False nowhere.
    bias_decay : float, optional
        The part of every bias that a step takes away; by default as much as of the kernels.

    Raises
    ------
    ValueError
        For options that cannot be.
    """

    gradient_needs_value = False

    def __init__(
        self,
        layers: Sequence[Layer],
        flows: Mapping[str, LayerFlow],
        *,
        gain: float | None = None,
        mirrored: bool | None = None,
        bias_decay: float | None = None,
    ) -> None:
        if gain is not None:
            check_gain(gain)
        if mirrored not in (None, True, False):
            raise ValueError(f"expected mirrored to be True, False or None, got {mirrored!r}")
        if bias_decay is not None and not (
            isinstance(bias_decay, (int, float)) and 0 <= bias_decay <= 1
        ):
            raise ValueError(f"expected bias_decay between 0 and 1 or None, got {bias_decay!r}")
        self._layers = layers
        self._bias_decay = bias_decay
        self.plans = isometric_plans(layers, flows, gain, mirrored)
        self._exact: dict[int, tuple[int, float, float]] = {}
        self._kinds: dict[Hashable, list[int]] = {}
        for i, (layer, plan) in enumerate(zip(layers, self.plans, strict=True)):
            key = (layer.kind(), plan.gain, plan.mirrored_input, plan.mirrored_output)
            self._kinds.setdefault(key, []).append(i)
        operators = [layer.operator() for layer in layers]
        self._transposed = [op.transposed for op in operators]
        self._direct = [op.T if op.transposed else op for op in operators]

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> dict[int, Tensor]:
        """The 2-norm of each weight."""
        norms = torch._foreach_norm([weights[i].detach() for i in active]) if active else []
        return dict(zip(active, norms, strict=True))

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
        """See `LayerPenalties`; the gradient of a layer is ``|Omega_t| (K_t - Q_t) / n``."""
        total = weights[0].new_zeros((), dtype=torch.float64)
        gradients: dict[int, Gradient] = {}
        for kind in self._kinds.values():
            chosen = [i for i in kind if i in factors]
            if not chosen:
                continue
            op = self._direct[chosen[0]]
            stacked, targets = self._stacked(weights, chosen), self._targets(weights, chosen)
            apart = stacked - targets
            form = frobenius_form(apart.flatten(0, 1), op.geometry, min(op.shape))
            form = form.reshape(apart.shape)
            values = 0.5 * (apart * form).flatten(1).sum(1, dtype=torch.float64)
            scale = torch.tensor(
                [factors[i] for i in chosen], dtype=values.dtype, device=values.device
            )
            total = total + (values * scale).sum()
            if moving:
                for i, gradient in zip(chosen, form, strict=True):
                    gradients[i] = KnownGradient(gradient, factors[i])
        return Evaluation(total, gradients)

    def contract(self, weights: Sequence[Tensor], rates: Mapping[int, float]) -> None:
        """Move kernels to ``(1 - tau) K + tau Q(K)`` and biases towards 0, in place.

        Parameters
        ----------
        weights : sequence of Tensor
            Of all layers of the model.
        rates : mapping of int to float
            tau of each layer that moves, at most 1; a weight that stands for several layers moves
            once.
        """
        moved: set[int] = set()
        biases: list[Tensor] = []
        for kind in self._kinds.values():
            chosen = []
            for i in kind:
                if rates.get(i) and id(weights[i]) not in moved:
                    moved.add(id(weights[i]))
                    chosen.append(i)
            if not chosen:
                continue
            targets = [t.to(weights[chosen[0]].dtype) for t in self._targets(weights, chosen)]
            for rate in {rates[i] for i in chosen}:
                those = [k for k, i in enumerate(chosen) if rates[i] == rate]
                own = [weights[chosen[k]] for k in those]
                torch._foreach_lerp_(own, [targets[k] for k in those], rate)
                decay = rate if self._bias_decay is None else self._bias_decay
                biases = [b for k in those if (b := _bias(self._layers[chosen[k]])) is not None]
                if biases and decay:
                    torch._foreach_mul_(biases, 1 - decay)

    def refresh(self, index: int, step: int) -> None:
        """Compute both ends of the layer that signals see: M(H) for mirrored kernels."""
        op, plan = self._layers[index].operator(), self.plans[index]
        seen = seen_operator(
            op, mirrored_input=plan.mirrored_input, mirrored_output=plan.mirrored_output
        )
        self._exact[index] = step, sigma_min(seen), sigma_max(seen)

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """The values that `refresh` found, with their age; nothing is followed."""
        blank = replace(unknown(self._layers[index], skipped), judged=_words(self.plans[index]))
        if index not in self._exact:
            return blank
        at, smallest, largest = self._exact[index]
        condition = largest / smallest if smallest else math.inf
        return replace(
            blank, sigma_min=smallest, sigma_max=largest, condition=condition, age=step - at
        )

    def state(self, index: int) -> dict[str, Any] | None:
        """Nothing: the target is that of the weights."""
        return None

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """Nothing is kept."""

    def to(self, device: torch.device) -> None:
        """Nothing is held."""

    def _stacked(self, weights: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """Weights of one kind as those of direct layers, in float32 at least."""
        stacked = torch.stack([weights[i].detach() for i in chosen])
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    def _targets(self, weights: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        op, plan = self._direct[chosen[0]], self.plans[chosen[0]]
        halves = plan.mirrored_input, plan.mirrored_output
        if self._transposed[chosen[0]]:  # the weight is that of the adjoint
            halves = halves[::-1]
        return isometric_target(
            self._stacked(weights, chosen),
            op.groups,
            isometric_taps(op.geometry).taps,
            plan.gain,
            mirrored_input=halves[0],
            mirrored_output=halves[1],
        )


def _bias(layer: Layer) -> nn.Parameter | None:
    bias = getattr(layer.module, "bias", None)
    trained = isinstance(bias, nn.Parameter) and bias.requires_grad
    return bias if trained else None


def _words(plan: IsometricPlan) -> str:
    mirrored = "H of mirrored kernels" if plan.mirrored_input or plan.mirrored_output else ""
    return "; ".join(part for part in (mirrored, plan.note) if part)
