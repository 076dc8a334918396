"""The penalty of every layer of a model, of whatever kind: what a regularizer asks for.

A new kind is one file with a class that has the methods of `LayerPenalties`, and one branch in
`layer_penalties`. It need not know singular values: `report` may say `unknown`, `state` None.
Decoupled steps go against the gradient (`SteppedPenalties`), except those of "isometry", which is a
contraction of all layers at once and moves biases, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from convspectra.models import Layer, LayerFlow
from convspectra.operator import check_gain
from convspectra.training._exact_penalties import EXACT_PENALTIES, ExactPenalties, Penalty
from convspectra.training._extreme_values import EXTREME_PENALTIES, extreme_penalty
from convspectra.training._followed_penalties import FollowedPenalties
from convspectra.training._gradients import Evaluation, Gradient
from convspectra.training._isometry_penalties import OPTIONS, IsometryPenalties
from convspectra.training._report import LayerReport


class LayerPenalties(Protocol):
    """The penalties of the layers of one rank; an index is a position in the model.

    No method fills what another one consumes: a result goes to the regularizer, which gives it to
    the next call. `state` gives everything that is kept.
    """

    gradient_needs_value: bool
    """Whether the value costs nothing beside the gradient."""

    def sizes(
        self, weights: Sequence[Tensor], active: Sequence[int], *, valued: bool
    ) -> dict[int, Tensor]:
        """A norm of the weight of each active layer, 0-dim: finite only if the weight is."""

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
        """The sum of factors times penalties, and if `moving` the gradients times factors.

        Parameters
        ----------
        weights : sequence of Tensor
            Of all layers of the model.
        sizes : mapping
            What `sizes` gave for the same weights, for the layers in `factors` at least.
        factors : mapping of int to float
            Of the layers to evaluate, all of them finite.
        step : int
            Changes of the weights so far.
        moving : bool
            Whether gradients are asked for, and what is followed moves on.
        valued : bool
            The sum may be 0 without, where the gradients do not need it.
        """

    def refresh(self, index: int, step: int) -> None:
        """Compute a layer exactly."""

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """The knowledge of a layer."""

    def state(self, index: int) -> dict[str, Any] | None:
        """The values that `load` takes up again."""

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """Take up what `state` gave."""

    def to(self, device: torch.device) -> None:
        """Move what is held."""


class SteppedPenalties(LayerPenalties, Protocol):
    """Penalties whose decoupled step goes against their gradient, over a length that is safe."""

    def moves(
        self,
        weights: Mapping[int, Tensor],
        gradients: Mapping[int, Gradient],
        factors: Mapping[int, float],
        learning_rate: float,
    ) -> dict[int, tuple[Gradient, float]]:
        """The steps that `SpectralRegularizer.step` subtracts from the weights, and their rates.

        Parameters
        ----------
        gradients : mapping of int to Gradient
            What `evaluate` gave.
        factors : mapping of int to float
            Of the layers, times the number of layers that share the weight.
        learning_rate : float
            The rate asked for; a shorter one is returned where that could overflow.
        """


PENALTIES = (*EXTREME_PENALTIES, *EXACT_PENALTIES, "isometry")
"""The names of all penalties."""


def layer_penalties(
    penalty: str | Penalty,
    options: Mapping[str, Any] | None,
    layers: Sequence[Layer],
    own: Sequence[int],
    improve_interval: int,
    refresh_interval: int,
    flows: Mapping[str, LayerFlow],
) -> SteppedPenalties | IsometryPenalties:
    """The penalties of a model's layers, by name or as a function of a `ConvOperator`.

    Parameters
    ----------
    layers : sequence of Layer
        All of the model.
    own : sequence of int
        Positions of the layers that this rank computes.
    flows : mapping
        What surrounds each layer; only "isometry" asks.

    Raises
    ------
    ValueError
        For an unknown penalty, or for options that it cannot have.
    """
    if isinstance(penalty, str) and penalty in EXTREME_PENALTIES:
        chosen = extreme_penalty(penalty, options or {})
        return FollowedPenalties(layers, own, chosen, improve_interval, refresh_interval)
    if penalty == "isometry":
        unknown = sorted(set(options or {}) - set(OPTIONS))
        if unknown:
            raise ValueError(f"expected penalty_options among {OPTIONS}, got {unknown}")
        return IsometryPenalties(layers, flows, **(options or {}))
    if isinstance(penalty, str):
        if penalty not in EXACT_PENALTIES:
            raise ValueError(
                f"expected penalty to be one of {PENALTIES} or a function of a ConvOperator, got "
                f"{penalty!r}"
            )
        unknown = sorted(set(options or {}) - {"gain"})
        if unknown:
            raise ValueError(f"penalty_options of {penalty!r}: expected gain alone, got {unknown}")
        check_gain((options or {}).get("gain", 1.0))
        return ExactPenalties(layers, EXACT_PENALTIES[penalty], options or {})
    if not callable(penalty):
        raise ValueError(
            f"expected penalty to be a name or a function, got {type(penalty).__name__}"
        )
    if options:
        raise ValueError(
            f"expected no penalty_options for {penalty!r}, got {dict(options)!r}; give a function, "
            "for example functools.partial of one in convspectra.penalties"
        )
    return ExactPenalties(layers, penalty, {})
