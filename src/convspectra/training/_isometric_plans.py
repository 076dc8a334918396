"""The isometric layer that each layer of a network is to become: its gain and its halves.

The gain keeps the second moment of signals through the activation behind the layer (He et al.,
"Delving deep into rectifiers", ICCV 2015, arXiv:1502.01852). Mirrored kernels make a ReLU network
linear at the start (Balduzzi et al., "The shattered gradients problem", ICML 2017,
arXiv:1702.08591), so that it is isometric where a ReLU alone halves the directions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from convspectra.models import Activation, Layer, LayerFlow
from convspectra.operator import (
    ConvOperator,
    is_isometric_possible,
    isometric_taps,
    isometric_target,
    normalized,
)

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
    "mish": torch.nn.functional.mish,
    "hardswish": torch.nn.functional.hardswish,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "relu6": torch.nn.functional.relu6,
    "hardtanh": torch.nn.functional.hardtanh,
}
"""Activations whose moments are computed; others count as linear."""
LINEAR_PAIRS = ("relu", "leaky_relu", "prelu", "gelu", "silu", "hardswish", "softplus")
"""Activations f with ``f(z) - f(-z) = c z``: mirrored kernels make them linear. c is 1, or 1 plus
the slope of a leaky ReLU."""
KNOWN_ACTIVATIONS = ("none", "relu", "leaky_relu", "prelu", *ACTIVATION_FUNCTIONS)
"""Activations whose gain is known."""
QUADRATURE_POINTS = 101
"""Points of Gauss-Hermite quadrature: a choice; half of them change no digit that is shown."""
PRELU_SLOPE = 0.25
"""The slope that PyTorch's PReLU begins with."""


@dataclass(frozen=True)
class IsometricPlan:
    """The target of one layer.

    Attributes
    ----------
    gain : float
        Its singular values; those of H for mirrored kernels.
    mirrored_input, mirrored_output : bool
        Whether its channels come in halves of opposite sign.
    activation : str
        What stands behind it: "relu", "none", ...
    note : str
        Why it is not what one would expect, such as a padding without isometric kernels.
    """

    gain: float
    mirrored_input: bool = False
    mirrored_output: bool = False
    activation: str = "none"
    note: str = ""

    def scaled(self, factor: float, note: str) -> IsometricPlan:
        """The same with another gain, and why."""
        notes = "; ".join(part for part in (self.note, note) if part)
        return replace(self, gain=self.gain * factor, note=notes)


def isometric_plans(
    layers: Sequence[Layer],
    flows: Mapping[str, LayerFlow],
    gain: float | None = None,
    mirrored: bool | None = None,
) -> list[IsometricPlan]:
    """The targets of some layers of a network.

    Parameters
    ----------
    layers : sequence of Layer
    flows : mapping
        What surrounds each, by name: `convspectra.models.signal_flow`.
    gain : float, optional
        For all layers; by default what the activation behind each one wants.
    mirrored : bool, optional
        False for no mirrored kernels; None and True for them wherever an activation of
        `LINEAR_PAIRS` follows and both of its sides can be halved. True notes those that cannot.
    """
    outputs = set() if mirrored is False else _mirrored_outputs(layers, flows)
    depth = len({layer.name for layer in layers})
    plans = []
    for layer in layers:
        flow = flows[layer.name]
        name = flow.activation.name if flow.activation else "none"
        plan = IsometricPlan(
            activation_gain(flow.activation, depth) if gain is None else gain,
            _all_mirrored(flow, outputs),
            layer.name in outputs,
            name,
        )
        if plan.mirrored_output and gain is None:
            plan = replace(plan, gain=1 / (1 + _slope(flow.activation)))
        notes = []
        if mirrored and name in LINEAR_PAIRS and not plan.mirrored_output:
            notes.append("not mirrored: its channels, or those of a layer it feeds, have no halves")
        op = layer.operator()
        if not is_isometric_possible(op.T if op.transposed else op):
            notes.append("no isometric kernel with this padding: nearly isometric")
        plans.append(replace(plan, note="; ".join(notes)))
    return plans


def _mirrored_outputs(layers: Sequence[Layer], flows: Mapping[str, LayerFlow]) -> set[str]:
    """The layers whose outputs can be mirrored, because all that they feed can read pairs.

    A layer that reads mirrored halves must read nothing else beside them; so one layer that cannot
    takes others with it, until no more change.
    """
    operators = {layer.name: layer.operator() for layer in layers}
    found = {
        name
        for name, op in operators.items()
        if (activation := flows[name].activation) is not None
        and activation.name in LINEAR_PAIRS
        and not flows[name].normalized
        and op.groups == 1
        and op.output_shape[0] % 2 == 0
    }
    while True:
        kept = {
            name
            for name in found
            if all(
                operators[reader].groups == 1 and _all_mirrored(flows[reader], found)
                for reader in flows[name].feeds
                if reader in operators
            )
        }
        if kept == found:
            return found
        found = kept


def _all_mirrored(flow: LayerFlow, outputs: set[str]) -> bool:
    """Whether everything that a layer reads comes in halves of opposite sign."""
    whole = bool(flow.fed_by) and not flow.reads_input and not flow.reads_concatenation
    return whole and set(flow.fed_by) <= outputs


def activation_gain(activation: Activation | None, depth: int) -> float:
    """The singular values of a layer that keep signals alive through its activation.

    sqrt 2 for ReLU, ``sqrt(2 / (1 + a^2))`` for leaky ReLU, ``1 + 1 / sqrt(depth)`` for tanh, else
    1 over the root mean square of the activation of a standard Gaussian; 1 where nothing follows.
    """
    if activation is None:
        return 1.0
    if activation.name in ("relu", "leaky_relu", "prelu"):
        return math.sqrt(2 / (1 + _slope(activation) ** 2))
    if activation.name == "tanh":
        return 1 + 1 / math.sqrt(max(depth, 1))
    if activation.name not in ACTIVATION_FUNCTIONS:
        return 1.0
    z, weights = _gaussian_points(1.0)
    return float((weights @ ACTIVATION_FUNCTIONS[activation.name](z).square()) ** -0.5)


def isometric_weight(op: ConvOperator, plan: IsometricPlan) -> Tensor:
    """The weight of the isometric layer nearest to one, in closed form: ``gain * Q``.

    Raises
    ------
    ValueError
        If the weight is zero: no layer is the nearest.
    """
    direct = op.T if op.transposed else op
    halves = plan.mirrored_input, plan.mirrored_output
    if op.transposed:
        halves = halves[::-1]
    scaled, exponent = normalized(direct)
    if exponent is None:
        raise ValueError("expected a weight that is not zero")
    return isometric_target(
        scaled.weight[None],
        direct.groups,
        isometric_taps(direct.geometry).taps,
        plan.gain,
        mirrored_input=halves[0],
        mirrored_output=halves[1],
    )[0]


def _slope(activation: Activation | None) -> float:
    """The slope below 0 of a ReLU of any kind."""
    if activation is None:
        return 0.0
    return PRELU_SLOPE if activation.name == "prelu" else activation.slope


def slope_spread(plan: IsometricPlan, activation: Activation | None, depth: int) -> float:
    """The spread that an activation adds to the squared singular values of the Jacobian.

    ``mu_2 / mu_1^2 - 1`` for the moments mu_k of its squared slope: 1 for ReLU, 0 where mirrored
    kernels make it linear (Pennington, Schoenholz and Ganguli, "Resurrecting the sigmoid in deep
    learning through dynamical isometry", NeurIPS 2017, arXiv:1711.04735).
    """
    if activation is None or plan.mirrored_output:
        return 0.0
    if activation.name in ("relu", "leaky_relu", "prelu"):
        slope = _slope(activation)
        return ((1 - slope**2) / (1 + slope**2)) ** 2
    if activation.name not in ACTIVATION_FUNCTIONS:
        return 0.0
    function = ACTIVATION_FUNCTIONS[activation.name]
    variance = 1.0
    for _ in range(depth):
        z, weights = _gaussian_points(variance)
        variance = plan.gain**2 * float(weights @ function(z).square())
    z, weights = _gaussian_points(variance)
    with torch.enable_grad():
        z = z.requires_grad_()
        (slopes,) = torch.autograd.grad(function(z).sum(), z)
    squares = slopes.square()
    first, second = float(weights @ squares), float(weights @ squares.square())
    return second / first**2 - 1


def _gaussian_points(variance: float) -> tuple[Tensor, Tensor]:
    """Points and weights of the mean over a Gaussian of mean 0."""
    points, weights = _standard_points()
    return points * math.sqrt(variance), weights


@functools.cache
def _standard_points() -> tuple[Tensor, Tensor]:
    """Points and weights for variance 1: each layer asks for them once for each of all layers."""
    points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
