"""Ways of typical gradients back from an array to the layers before it, whatever runs the model.

Note [Typical gradients]. Between the output of one layer and the input of another stand maps A, of
which only a typical gain is known: E ||A'g||^2 / ||g||^2 for gradients g with independent entries.
It is ||A||_F^2 / rows for a fixed map, such as a batch normalization, and the mean square slope at
a standard normal input for an activation. An average of k numbers is counted as 1: it divides the
norm of a gradient by sqrt(k), and weights before it add up k equal gradients. Where paths meet in a
sum, their squares add up: their gradients are taken as uncorrelated. A normalization by statistics
of its input divides by the root mean square that the layers right before it give to inputs of size
1.

Note [Written out]. Exported models have no SiLU, GELU or layer normalization, but their arithmetic:
a product of an array and a saturating function of it, a quotient of an array and its deviation.
`Origin` keeps enough of an array's past to see that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from convspectra.operator import squared_frobenius_norm

if TYPE_CHECKING:
    from convspectra.models._recorder import Use

MEAN_SQUARE_SLOPES = {
    "relu": 0.5,
    "tanh": 0.4644,
    "gelu": 0.45585,
    "silu": 0.37948,
    "elu": 0.6681,
    "sigmoid": 0.04484,
    "hardswish": 0.35853,
    "hardsigmoid": 0.0277,
    "softplus": 0.29338,
    "mish": 0.47908,
    "sin": 0.56767,
    "abs": 1.0,
    "erf": 0.56941,
}
"""Mean of the squared slope of an activation over a standard normal input, by quadrature; a test
does it again."""

GATED = {
    ("sigmoid",): ("silu", 1.0),
    ("hardsigmoid",): ("hardswish", 1.0),
    ("tanh",): ("gelu", 2.0),
    ("erf",): ("gelu", 2.0),
    ("relu6",): ("hardswish", 6.0),
    ("softplus", "tanh"): ("mish", 1.0),
}
"""Activations that are x times functions of x, by these functions, and the factor that the product
still lacks: GELU is x (1 + erf(x / sqrt 2)) / 2."""


@dataclass(frozen=True)
class Activation:
    """An activation by name, with the slope of a leaky ReLU."""

    name: str
    slope: float = 0.0


@dataclass(frozen=True)
class Origin:
    """Where an array comes from: the last layers before it.

    Attributes
    ----------
    gains : mapping of Use to float
        The mean square of the gradient at the output of each of these layers for one of mean square
        1 at the array (Note [Typical gradients]).
    waiting : tuple of Use
        The layers that are not activated yet.
    external : bool
        Whether the input of the model reaches it without a layer.
    depth : int
        Layers on the longest way to it.
    normalized, concatenated : bool
        Whether it is the result of a normalization, or put together from several arrays.
    root : object
        The array that it depends on alone; the same for all that is computed from it only.
    entry : object
        The array that it is a function of, entry by entry.
    functions : tuple of str
        Activations between that array and this one, up to factors and constants (Note [Written
        out]).
    averaged, deviation : bool
        Whether it is an average over the root, or the square root of one or its inverse.
    """

    gains: Mapping[Use, float] = field(default_factory=dict)
    waiting: tuple[Use, ...] = ()
    external: bool = False
    depth: int = 0
    normalized: bool = False
    concatenated: bool = False
    root: object = field(default_factory=object)
    entry: object = field(default_factory=object)
    functions: tuple[str, ...] = ()
    averaged: bool = False
    deviation: bool = False

    def times(self, squared_gain: float) -> Origin:
        """The same, with other gains."""
        if squared_gain == 1.0:
            return self
        return replace(self, gains={use: g * squared_gain for use, g in self.gains.items()})


def joined(
    origins: Sequence[Origin],
    shares: Sequence[float],
    *,
    concatenated: bool = False,
    pointwise: bool = False,
) -> Origin:
    """The origin of what is computed from arrays, each with its share of the squared gradient."""
    first = origins[0]
    if len(origins) == 1 and shares[0] == 1.0:
        return first if pointwise else replace(first, entry=object(), functions=())
    one_root = all(origin.root is first.root for origin in origins)
    one_entry = pointwise and all(origin.entry is first.entry for origin in origins)
    return Origin(
        added(origins, shares),
        tuple(dict.fromkeys(use for origin in origins for use in origin.waiting)),
        any(origin.external for origin in origins),
        max(origin.depth for origin in origins),
        any(origin.normalized for origin in origins),
        concatenated or any(origin.concatenated for origin in origins),
        first.root if one_root else object(),
        first.entry if one_entry else object(),
    )


def added(origins: Sequence[Origin], shares: Sequence[float]) -> dict[Use, float]:
    """The gains along all the paths that meet, which add up, each with its share of the squares."""
    total: dict[Use, float] = {}
    for origin, share in zip(origins, shares, strict=True):
        for use, gain in origin.gains.items():
            total[use] = total.get(use, 0.0) + share * gain
    return total


def activated(origin: Origin, activation: Activation, squared_slope: float) -> Origin:
    """The origin of what an activation gives."""
    for use in origin.waiting:
        if activation not in use.activations:
            use.activations.append(activation)
    return replace(
        origin.times(squared_slope),
        waiting=(),
        functions=(*origin.functions, activation.name),
    )


def with_statistics(
    origin: Origin, *, averages: bool, roots: bool, norms: bool, pointwise: bool
) -> Origin:
    """The origin, with what is known of averages and deviations (Note [Written out]).

    Parameters
    ----------
    origin : Origin
        Of the result of an operation.
    averages, roots, norms : bool
        Whether the operation averages over entries, takes square roots, or does both of squares.
    pointwise : bool
        Whether it makes each entry from one entry of each array.
    """
    averaged = averages or (origin.averaged and pointwise)
    deviation = norms or (roots and origin.averaged) or (origin.deviation and pointwise)
    if (averaged, deviation) == (origin.averaged, origin.deviation):
        return origin
    return replace(origin, averaged=averaged, deviation=deviation)


def is_centering(origins: Sequence[Origin]) -> bool:
    """Whether the difference of two arrays is one less its own average: a projection."""
    if len(origins) != 2:
        return False
    x, mean = origins
    return x.root is mean.root and mean.averaged and not x.averaged and not mean.deviation


def product(left: Origin, right: Origin) -> Origin:
    """The origin of a product of two arrays; that of a gated activation where it is one."""
    for x, gate in ((left, right), (right, left)):
        if x.entry is gate.entry and not x.functions and gate.functions in GATED:
            name, lacking = GATED[gate.functions]
            for use in x.waiting:
                seen = [a for a in use.activations if a.name not in gate.functions]
                use.activations[:] = [*seen, Activation(name)]
            slope = MEAN_SQUARE_SLOPES[name] * lacking**2
            return replace(x.times(slope), waiting=())
        if x.root is gate.root and gate.deviation and not x.deviation:
            return normalized(x, "normalization", 1.0, by_statistics=True)
    return joined([left, right], [1.0, 1.0], pointwise=True)


def normalized(origin: Origin, kind: str, weight: float, *, by_statistics: bool) -> Origin:
    """The origin of what a normalization gives.

    Parameters
    ----------
    origin : Origin
    kind : str
        Its name for a reader.
    weight : float
        Mean square of what it multiplies by, divisions by stored deviations included.
    by_statistics : bool
        Whether it divides by the deviation of its own input.
    """
    for use in origin.waiting:
        use.normalized = True
        if kind not in use.normalizations:
            use.normalizations.append(kind)
    if by_statistics:
        skipped = origin.external or any(use not in origin.waiting for use in origin.gains)
        size = math.fsum([float(skipped), *map(_squared_gain, origin.waiting)]) or 1.0
        weight /= size
    after = replace(origin.times(weight), normalized=True, root=object(), entry=object())
    return replace(after, functions=(), averaged=False, deviation=False)


def slope_between(low: float, high: float) -> float:
    """Mean square slope of a number that is kept between two limits, at a standard normal input."""
    return max(0.0, 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))))


def softmax_slope(count: int) -> float:
    """Mean square slope of a softmax of equal numbers: (I - 11'/n) / n."""
    return 1.0 / max(1, count) ** 2


def leaky_slope(slopes: Tensor | float) -> float:
    """Mean square slope of a leaky ReLU."""
    return 0.5 * (1 + mean_square(slopes))


def mean_square(values: Tensor | float) -> float:
    """The mean of the squares; 1 for nothing."""
    if isinstance(values, Tensor):
        return float(values.detach().double().square().mean()) if values.numel() else 1.0
    return float(values) ** 2


def _squared_gain(use: Use) -> float:
    """||M||_F^2 / rows of a layer, and 1 for one that is not known."""
    op = use.operator
    if op is None:
        return 1.0
    return float(squared_frobenius_norm(op.weight.double(), op.geometry)) / op.shape[0]
