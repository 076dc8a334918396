"""Both ends of a network's Lipschitz constant.

Note [Composed bounds]. Between activations a network is linear. A difference of an activation is
that of its input times a diagonal matrix of slopes, c I + r S with c and r the middle and half the
width of their interval and S a diagonal matrix of norm at most 1. So what an array differs by is a
sum ``sum_i T_i d_i`` over arrays behind activations, d_i known to be at most l_i, with T_i linear
maps that go on through the middles c of the activations that are expanded. Its norm is at most

    ||[s_1 T_1, s_2 T_2, ...]|| sqrt(sum_i (l_i / s_i)^2)  for any s_i > 0,

and with s_i = sqrt(l_i / ||T_i||) that is at most ``sum_i ||T_i|| l_i``, since the square of the
norm of blocks side by side is at most the sum of theirs. With no activation expanded that sum is
the product of norms along a chain; each more gives another bound, and the least one is taken
(Combettes and Pesquet 2020, for chains of averaged operators, with sums).

References
----------
P. L. Combettes and J.-C. Pesquet (2020), "Lipschitz methods for layered network structures
    driven by averaged activation operators", SIAM J. Math. Data Sci. 2,
    doi:10.1137/19M1272780.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models import Arguments, example_arguments
from convspectra.network._frozen import undisturbed
from convspectra.network._lipschitz_lower import sharpest
from convspectra.network._lipschitz_maps import LinearMap, Norm, SideBySide
from convspectra.network._lipschitz_parts import Part, parts, sources
from convspectra.network._lipschitz_rules import Linear, Slopes
from convspectra.network._lipschitz_scaling import channel_factors
from convspectra.network._lipschitz_trace import Node, traced
from convspectra.network._segment import Segment, Selector
from convspectra.operator import not_compiled, with_gradients
from convspectra.text import text_table

WORTHWHILE = 0.99
"""Scaled channels are taken where they lower the product of norms to so much of it, or less: then
all norms are computed once more. A choice."""


@dataclass(frozen=True)
class LipschitzLayer:
    """The share of one linear part of a network, up to the next activation.

    Attributes
    ----------
    name : str
        Of its layers, in their order.
    operations : str
        What is composed in it.
    factor : float
        The bound behind it over the largest one that it reads.
    bound : float
        On the Lipschitz constant of the network from its input to here.
    expanded : int
        Activations before it through which it is composed with the layers before.
    methods : tuple of str
        The ways to the norms, as `svds` calls them; "factors" where entries are only multiplied.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> [(t.name, t.operations) for t in cs.lipschitz_bound(model, torch.ones(1, 4)).layers]
    [('0', 'linear'), ('2', 'linear')]
    """

    name: str
    operations: str
    factor: float
    bound: float
    expanded: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class LipschitzBound:
    """Both ends of the Lipschitz constant of a network, in the Euclidean norm.

    Attributes
    ----------
    lower : float
        Lower end of the norm of the Jacobian at `at`: the constant is at least so large.
    upper : float
        For every pair of inputs the outputs differ by at most so many times what they differ by.
    layers : tuple of LipschitzLayer
        What each linear part of the network adds to the upper end.
    plain : float
        The bound that products of norms along chains, and sums at skips, give.
    scaled : bool
        Whether channels were scaled between the layers: the bounds in `layers`, except the last,
        are then those of the scaled channels.
    at : Tensor
        The input, of one sample, where the lower end was found.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = torch.nn.init.dirac_(conv.weight)  # the identity
    >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten())
    >>> print(cs.lipschitz_bound(model, torch.ones(1, 1, 6, 6)))
    Lipschitz constant in [1, 1] (products of norms: 1)
    layers  operations   factor  bound
    0       convolution  1       1
    """

    lower: float
    upper: float
    layers: tuple[LipschitzLayer, ...]
    plain: float
    scaled: bool
    at: Tensor = field(repr=False)

    def __str__(self) -> str:
        rows = [
            {
                "layers": layer.name,
                "operations": layer.operations,
                "factor": f"{layer.factor:.4g}",
                "bound": f"{layer.bound:.4g}",
            }
            for layer in self.layers
        ]
        table = text_table(("layers", "operations", "factor", "bound"), rows)
        return (
            f"Lipschitz constant in [{self.lower:.6g}, {self.upper:.6g}] "
            f"(products of norms: {self.plain:.6g})\n{table}"
        )


@not_compiled
@with_gradients
def lipschitz_bound(
    model: nn.Module,
    x: Any,
    *,
    select: Selector | None = None,
    expand: int = 2,
    scaling: int = 40,
    ascent: int = 30,
) -> LipschitzBound:
    """Both ends of the Lipschitz constant of a network, in the Euclidean norm.

    Parameters
    ----------
    model : nn.Module
        Copied, in evaluation mode and double precision: nothing of it changes.
    x : Tensor, tuple of positional arguments, or mapping of keyword arguments
        Inputs (b, ...), at which the lower end is looked for. The upper end holds for all inputs of
        this shape. Other arguments are held fixed; there is one input then.
    select : callable, optional
        The tensor that is meant, from the model's output; needed where there are several.
    expand : int
        Most activations that are expanded at once; 0 for products of norms alone.
    scaling : int
        Steps in which factors for the channels between layers are looked for that lower the bound
        (Note [Scaled channels] in the source); 0 for none.
    ascent : int
        Steps from the best input uphill.

    Returns
    -------
    LipschitzBound

    Raises
    ------
    ValueError
        For an operation that has no bound, such as attention or layer normalization, or one whose
        choice depends on the values of the input: it is named, with its module. For what
        `JacobianOperator` refuses.

    Notes
    -----
    The upper end: norms of the linear maps between activations, from the upper ends of `svds`,
    composed (see docs/network.md). Norms of composed maps with both sides above 512 fail with a
    probability of 1e-10 each. The lower end: the lower end of the norm of one Jacobian.

    Cost: one norm for each linear part and each of the `expand` activations before it, of a network
    piece of so many layers: 20 to 60 products each, and once more with scaled channels; a product
    with each part and its transpose, for 8 vectors, for each step of `scaling`. The lower end takes
    the norm of a Jacobian for each input and for 15 points on the way up, and two forward and
    backward passes a step. Memory: some passes.

    Source: Combettes and Pesquet, Lipschitz methods for layered network structures driven by
    averaged activation operators, SIAM J. Math. Data Sci. 2 (2020), doi:10.1137/19M1272780.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> conv = torch.nn.Conv2d(1, 4, 3, padding=1)
    >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 3, padding=1))
    >>> result = cs.lipschitz_bound(model, torch.randn(2, 1, 8, 8))
    >>> 0 < result.lower <= result.upper < result.plain
    True
    """
    for name, value in (("expand", expand), ("scaling", scaling), ("ascent", ascent)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"expected {name} to be an integer of at least 0, got {value!r}")
    samples = _samples(x)
    segment = Segment(model, samples[0], None, None, select, torch.float64)
    first = segment.input()
    with undisturbed(first.device):
        start, end = traced(segment.model, segment.inputs, segment.selected)
    lower, at = sharpest(model, samples, select, ascent)
    with undisturbed(first.device):
        upper, plain, layers, factors = _upper(start, end, first, expand, scaling)
    return LipschitzBound(lower, upper, tuple(layers), plain, bool(factors), at)


def _upper(
    start: Node, end: Node, first: Tensor, expand: int, scaling: int
) -> tuple[float, float, list[LipschitzLayer], dict[Node, Tensor]]:
    """The upper end, the plain bound, the layers, and the factors if they lower it."""
    like = first.new_zeros(())
    network = Network(start, end, like, expand, {})
    upper, plain = network.bound()
    factors = channel_factors(start, end, like, scaling)
    if factors and Network(start, end, like, 0, factors).bound()[0] < WORTHWHILE * plain:
        scaled = Network(start, end, like, expand, factors)
        lower, _ = scaled.bound()
        if lower < upper:
            return lower, plain, scaled.layers, factors
    return upper, plain, network.layers, {}


def _samples(x: Any) -> list[Arguments]:
    """The arguments for each input."""
    if isinstance(x, (tuple, Mapping)):
        return [example_arguments(x)]
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected x to be a tensor of inputs (b, ...), got {shape}")
    return [example_arguments(image[None]) for image in x]


@dataclass(frozen=True)
class _Term:
    """A part of a difference: a linear map, the bound on what it acts on, and its factor."""

    map: LinearMap
    norm: Norm
    size: float


class Network:
    """Bounds for every array of a traced network, from its input on.

    With `factors` (Note [Scaled channels]) the difference at an activation is measured after its
    channels have been multiplied by them.
    """

    def __init__(
        self, start: Node, end: Node, like: Tensor, expand: int, factors: Mapping[Node, Tensor]
    ) -> None:
        self._end, self._like, self._expand = end, like, expand
        self._factors = dict(factors)
        self._inverse = {node: factor.reciprocal() for node, factor in factors.items()}
        self._plain: dict[Node, float] = {start: 1.0}
        self._before: dict[Node, float] = {}
        self._behind: dict[Node, float] = {start: 1.0}
        self._norms: dict[tuple[object, ...], Norm] = {}
        self.layers: list[LipschitzLayer] = []

    def bound(self) -> tuple[float, float]:
        """An upper bound on the Lipschitz constant, and the one by products and sums of norms."""
        for part in parts(self._end):
            bound, plain = self._bound_at(part)
            if part.reader is None:
                return bound, plain
            self._before[part.reader] = bound
            self._behind[part.reader] = part.constant * bound
            self._plain[part.reader] = part.constant * plain
        return self._behind[self._end], self._plain[self._end]

    def _bound_at(self, part: Part) -> tuple[float, float]:
        """The least of the bounds with none, one, two, ... activations expanded, and the plain one.

        The plain one is the sum of norms times plain bounds, with none expanded.
        """
        expanded: frozenset[Node] = frozenset()
        best, chosen = math.inf, 0
        plain = sum(
            self._norm(self._map(source, part, expanded)).upper * self._plain[source]
            for source in sources(part.targets)
        )
        methods: dict[str, None] = {}
        for count in range(self._expand + 1):
            before = sources(part.targets, expanded)
            value, names = self._combined(part, before, expanded)
            if value < best:
                best, chosen, methods = value, count, names
            # The last activation before the targets that is not expanded yet.
            latest = [
                n
                for n in before
                if n not in expanded and isinstance(n.rule, Slopes) and n.rule.center != 0
            ]
            if not latest:
                break
            expanded |= {max(latest, key=lambda node: node.index)}
        self._note(part, best, chosen, methods)
        return best, plain

    def _map(self, source: Node, part: Part, expanded: frozenset[Node]) -> LinearMap:
        reader = part.reader
        return LinearMap(
            source,
            part.targets,
            expanded,
            self._like,
            before=self._inverse.get(source),
            behind=None if reader is None else self._factors.get(reader),
        )

    def _norm(self, linear: LinearMap) -> Norm:
        """The norm of a map, computed once."""
        norm = self._norms.get(linear.key)
        if norm is None:
            norm = self._norms[linear.key] = self.norm_of(linear)
        return norm

    def norm_of(self, linear: LinearMap) -> Norm:
        """The norm of a map."""
        return linear.norm()

    def _combined(
        self, part: Part, before: list[Node], expanded: frozenset[Node]
    ) -> tuple[float, dict[str, None]]:
        """The better of the sum and of the bound for all terms side by side."""
        terms = []
        for source in before:
            linear = self._map(source, part, expanded)
            size = self._behind[source]
            if source in expanded:
                assert isinstance(source.rule, Slopes)
                size = source.rule.radius * self._before[source]
            norm = self._norm(linear)
            if norm.upper > 0 and size > 0:
                terms.append(_Term(linear, norm, size))
        names = dict.fromkeys(term.norm.method for term in terms)
        total = sum(term.norm.upper * term.size for term in terms)
        if len(terms) > 1:
            factors = [math.sqrt(term.size / term.norm.upper) for term in terms]
            joint = SideBySide([term.map for term in terms], factors).norm()
            sizes = [term.size / s for term, s in zip(terms, factors, strict=True)]
            beside = joint.upper * math.hypot(*sizes)
            if beside < total:
                return beside, names | {joint.method: None}
        return total, names

    def _note(self, part: Part, bound: float, expanded: int, methods: dict[str, None]) -> None:
        nodes: dict[Node, None] = {}
        before = sources(part.targets)
        for source in before:
            nodes |= dict.fromkeys(self._map(source, part, frozenset()).program)
        program = sorted(nodes, key=lambda node: node.index)
        if all(isinstance(n.rule, Linear) and n.rule.moves for n in program):
            return
        names = dict.fromkeys(
            n.module
            for n in program
            if n.module and isinstance(n.rule, Linear) and not n.rule.moves
        )
        largest = max(self._behind[source] for source in before)
        self.layers.append(
            LipschitzLayer(
                ", ".join(names) or program[-1].module,
                ", ".join(dict.fromkeys(_WORDS.get(n.operation, n.operation) for n in program)),
                bound / largest if largest > 0 else 0.0,
                bound,
                expanded,
                tuple(methods),
            )
        )


_WORDS = {"native_batch_norm": "batch norm", "addmm": "linear", "mm": "linear"}
"""Names of operations for the table."""
