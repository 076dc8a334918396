"""Operations of PyTorch as what a Lipschitz bound needs of them: linear maps, slopes, constants.

Note [Three kinds of operations]. A linear operation is replayed, with its constants set to 0: its
norm is that of the composed map, whatever it is. An activation acts on every number alone, with
slopes between two ends. Anything else that is bounded has a constant. An operation
of no such kind is refused by its name.

References
----------
Slopes of GELU, SiLU and Mish are the extremes of their derivatives, rounded outwards. Softmax with
J = diag(p) - p p': each row has the absolute sum 2 p_i (1 - p_i) <= 1/2, and so the norm is at most
1/2 (Gershgorin). Log-softmax: I - 1 p' is a projection of the norm sqrt(n) ||p|| <= sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from convspectra.operator import ConvOperator

LinearMap = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear map of one or several arrays.

    Attributes
    ----------
    map : callable
        From the values of the inputs to that of the result.
    moves : bool
        Whether each entry of the result is 0 or one entry of the input, each used at most once.
    layer : ConvOperator or None
        The layer that it is.
    scales : tuple of Tensor, or None
        Where it is a sum of its inputs times a factor for each entry, of the result's shape: the
        factors for each input, of shapes that broadcast.
    """

    map: LinearMap
    moves: bool = False
    layer: ConvOperator | None = None
    scales: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Slopes:
    """A function of every number alone; (f(a) - f(b)) / (a - b) is in [lower, upper]."""

    lower: float
    upper: float

    @property
    def constant(self) -> float:
        """Its Lipschitz constant."""
        return max(abs(self.lower), abs(self.upper))

    @property
    def center(self) -> float:
        """The slope in the middle."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> float:
        """How far slopes are from the middle."""
        return (self.upper - self.lower) / 2


@dataclass(frozen=True)
class Bounded:
    """A map of one or several arrays side by side with a Lipschitz constant.

    `by_channel` says that each channel, along the axis 1, is mapped alone and positively
    homogeneously, all in the same way.
    """

    constant: float
    by_channel: bool = False


@dataclass(frozen=True)
class Refused:
    """An operation without a bound, and why."""

    reason: str


Rule = Linear | Slopes | Bounded | Refused


@dataclass(frozen=True)
class Call:
    """One operation as it was applied.

    Attributes
    ----------
    func : callable
        The operation, by the names of its arguments.
    name : str
        Without its namespace, and without the underscore of one that writes in place.
    arguments : mapping
        By the names of its schema, defaults included.
    depends : callable
        Whether a tensor depends on the input.
    results : list of Tensor
    """

    func: Any
    name: str
    arguments: Mapping[str, Any]
    depends: Callable[[Tensor], bool]
    results: list[Tensor]

    def given(self, *names: str) -> list[bool]:
        """Whether each argument of these names depends on the input."""
        return [
            any(isinstance(t, Tensor) and self.depends(t) for t in tree_leaves(self.arguments[n]))
            for n in names
        ]

    def replayed(
        self, constants: bool = False, changed: Mapping[str, Any] = MappingProxyType({})
    ) -> LinearMap:
        """The operation as a map of its arrays that depend on the input, in their order.

        Its other floating arrays are 0, unless `constants` says to keep them; `changed` gives other
        values of arguments.
        """
        arguments = {**self.arguments, **changed}
        depends, func = self.depends, self.func

        def fixed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if depends(leaf):
                return _HOLE
            return torch.zeros_like(leaf) if leaf.is_floating_point() and not constants else leaf

        template = tree_map(fixed, arguments)

        def apply(values: Sequence[Tensor]) -> Tensor:
            queue = list(values)
            filled = tree_map(lambda leaf: queue.pop(0) if leaf is _HOLE else leaf, template)
            return func(**filled)

        return apply


class _Hole:
    """The place of an array in the arguments of an operation that is replayed."""


_HOLE = _Hole()
"""The one of them that templates hold."""

_MOVES = frozenset((
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "slice", "select", "split",
    "split_with_sizes", "unbind", "squeeze", "unsqueeze", "clone", "alias", "flip", "roll",
    "narrow", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "lift_fresh",
    "contiguous", "_reshape_alias", "native_channel_shuffle", "rot90",
))  # fmt: skip
"""Operations that move entries, or leave some out."""

_LINEAR = frozenset((
    "expand", "repeat", "cat", "stack", "sum", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "upsample_linear1d",
    "_upsample_nearest_exact3d", "upsample_bilinear2d", "upsample_trilinear3d",
    "upsample_bicubic2d", "im2col", "_upsample_bilinear2d_aa", "col2im", "index_select", "index",
    "gather", "cumsum", "tril", "triu", "neg", "as_strided", "unfold", "diag_embed",
    "slice_scatter", "select_scatter", "index_add", "scatter_add",
))  # fmt: skip
"""Other operations that are linear in their floating arrays, taken together."""

_PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "mul": ("self", "other"),
}
"""Operations that are linear in each of two factors."""

_SLOPES = {
    "relu": (0.0, 1.0),
    "tanh": (0.0, 1.0),
    "sigmoid": (0.0, 0.25),
    "silu": (-0.09983934, 1.09983934),
    "mish": (-0.1127, 1.0885),
    "softplus": (0.0, 1.0),
    "hardtanh": (0.0, 1.0),
    "relu6": (0.0, 1.0),
    "hardswish": (-0.5, 1.5),
    "hardsigmoid": (0.0, 0.16666667),
    "log_sigmoid_forward": (0.0, 1.0),
    "softshrink": (0.0, 1.0),
    "clamp": (0.0, 1.0),
    "clamp_min": (0.0, 1.0),
    "clamp_max": (0.0, 1.0),
    "abs": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "atan": (0.0, 1.0),
    "asinh": (0.0, 1.0),
    "erf": (0.0, 1.12837917),
    "gelu": (-0.12915, 1.12915),
}
"""Slopes of activations between two points. GELU's are those of its approximation by tanh, too,
which reach farther by 2e-4 than the exact ones."""

_UNBOUNDED = {
    "native_layer_norm": "layer normalization divides by what it measures of the input",
    "native_group_norm": "group or instance normalization divides by what it measures of the input",
    "_fused_rms_norm": "root mean square normalization divides by what it measures of the input",
    "glu": "a gated unit multiplies two arrays that depend on the input",
    "exp": "the slope of exp is not bounded",
    "pow": "the slope of a power is not bounded",
    "sqrt": "the slope of sqrt is not bounded at 0",
    "rsqrt": "the slope of rsqrt is not bounded at 0",
    "log": "the slope of log is not bounded at 0",
    "reciprocal": "the slope of 1 / x is not bounded at 0",
    "detach": "the derivative that gradients see is another one",
    "hardshrink": "it jumps",
    "round": "it jumps",
    "floor": "it jumps",
    "ceil": "it jumps",
    "sign": "it jumps",
}
"""Operations that have no constant, and why."""
_ATTENTION = ("a product of two arrays that both depend on the input, as in attention or a gate, "
              "has no constant")  # fmt: skip
"""The reason for products."""
_RANDOM = "it is random in evaluation mode"
"""The reason for noise."""
_ADDITIONS = ("add", "sub", "rsub")
"""Sums of two arrays, the second times alpha."""
_BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
)
"""Batch normalization as ATen calls it on various devices."""
_ONE = ("amax", "amin", "max", "min", "sort", "topk", "logsumexp")
"""Operations with the constant 1: they take the largest of disjoint groups, or put in order."""


def rule_of(call: Call) -> Rule:
    """The rule of an operation's first result; `Refused` where there is none."""
    name, first = call.name, call.results[0]
    if not first.is_floating_point():
        return Refused(f"its result is of {first.dtype}, and a choice by it may jump")
    if first.dtype != torch.float64:
        return Refused(f"it casts to {first.dtype}")
    special = _SPECIAL.get(name)
    if special is not None:
        return special(call)
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        return Refused(_RANDOM)
    if name in _UNBOUNDED:
        return Refused(_UNBOUNDED[name])
    if name in _MOVES:
        return Linear(call.replayed(), moves=True)
    if name in _LINEAR:
        return Linear(call.replayed())
    if name in _PRODUCTS:
        return _product(call)
    if name in _ADDITIONS:
        return _addition(call)
    if name in _BATCH_NORMS:
        return _batch_norm(call)
    if name in _SLOPES:
        others = [key for key in call.arguments if key != "self"]
        return Refused(_ATTENTION) if any(call.given(*others)) else Slopes(*_SLOPES[name])
    if name in _ONE:
        return Bounded(1.0)
    if "pool" in name and "max" in name:
        return _max_pool(call)
    return Refused("no bound is known for it")


def _product(call: Call) -> Rule:
    names = _PRODUCTS[call.name]
    given = call.given(*names)
    if all(given):
        return Refused(_ATTENTION)
    if not any(given):  # a constant product is added to an array
        return Linear(call.replayed())
    if call.name == "mul":
        return _scaling(call, call.arguments[names[given[0]]])
    changed = {}
    if "self" not in names and not call.given("self")[0]:
        changed["self"] = torch.zeros((), dtype=torch.float64, device=call.results[0].device)
    replay = call.replayed(constants=True, changed=changed)
    layer = None
    weight = call.arguments[names[given[0]]]
    plain = call.arguments.get("alpha", 1) == 1
    if call.name in ("mm", "addmm") and given[0] and plain and len(call.results[0]) == 1:
        layer = ConvOperator(weight.T.contiguous(), ())
    return Linear(replay, layer=layer)


def _scaling(call: Call, factor: Any) -> Rule:
    like = call.results[0]
    scale = torch.as_tensor(factor, dtype=like.dtype, device=like.device)
    if not bool(scale.isfinite().all()):
        return Refused("it multiplies by NaN or Inf")
    shape = call.arguments["self" if call.given("self")[0] else "other"].shape
    same = shape == like.shape
    return Linear(call.replayed(constants=True), scales=(scale,) if same else None)


def _division(call: Call) -> Rule:
    if call.given("other")[0]:
        return Refused("a division by an array that depends on the input has no constant")
    if call.arguments.get("rounding_mode") is not None:
        return Refused("it jumps")
    like = call.results[0]
    other = torch.as_tensor(call.arguments["other"], dtype=like.dtype, device=like.device)
    return _scaling(call, other.reciprocal())


def _addition(call: Call) -> Rule:
    given = call.given("self", "other")
    numbers = {
        key: 0.0
        for key, depends in zip(("self", "other"), given, strict=True)
        if not depends and not isinstance(call.arguments[key], Tensor)
    }
    replay = call.replayed(changed=numbers)
    alpha = float(call.arguments["alpha"])
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.name]
    like = call.results[0]
    scales = []
    for key, depends, factor in zip(("self", "other"), given, factors, strict=True):
        if depends:
            if call.arguments[key].shape != like.shape:
                return Linear(replay)
            scales.append(like.new_tensor(factor))
    return Linear(replay, scales=tuple(scales))


def _convolution(call: Call) -> Rule:
    a = call.arguments
    if call.given("weight")[0]:
        return Refused("its weight depends on the input")
    weight, x = a["weight"], a["input"]
    ndim = weight.ndim - 2
    options: dict[str, Any] = {
        key: tuple(a[key]) * ndim if len(a[key]) == 1 else tuple(a[key])
        for key in ("stride", "padding", "dilation", "output_padding")
    }
    op = ConvOperator(
        weight, tuple(x.shape[2:]), groups=a["groups"], transposed=a["transposed"], **options
    )
    alone = len(x) == 1 and op.output_shape == tuple(call.results[0].shape[1:])
    return Linear(
        call.replayed(constants=True, changed={"bias": None}), layer=op if alone else None
    )


def _batch_norm(call: Call) -> Rule:
    a = call.arguments
    if a.get("training", False) or a["running_var"] is None:
        return Refused("it normalizes by what it measures of the input (instance normalization)")
    eps = a["eps"] if "eps" in a else a["epsilon"]
    scale = (a["running_var"] + eps).rsqrt()
    if a["weight"] is not None:
        scale = scale * a["weight"]
    scale = scale.reshape(-1, *(1,) * (call.results[0].ndim - 2))
    return Linear(lambda values: values[0] * scale, scales=(scale,))


def _padding(call: Call) -> Rule:
    # Negative padding crops, and no entry is read twice.
    return Linear(call.replayed(changed={"value": 0}), moves=True)


def _copy(call: Call) -> Rule:
    shape = call.results[0].shape
    if not call.given("src")[0]:
        return Linear(lambda values: torch.zeros_like(values[0]))
    moves = call.arguments["src"].shape == shape
    reads = sum(call.given("self", "src"))
    return Linear(lambda values: values[reads - 1].expand(shape).clone(), moves=moves and reads < 2)


def _choice(call: Call) -> Rule:
    if call.given("condition")[0]:
        return Refused("a choice by a condition on the input may jump")
    return Linear(call.replayed())


def _masked(call: Call) -> Rule:
    if any(call.given("mask", "value")):
        return Refused("a mask that depends on the input may jump")
    value = call.arguments["value"]
    zero = torch.zeros_like(value) if isinstance(value, Tensor) else 0
    return Linear(call.replayed(changed={"value": zero}), moves=True)


def _cast(call: Call) -> Rule:
    source = call.arguments["self"]
    if source.dtype != torch.float64:
        return Refused(f"it casts from {source.dtype}")
    return Linear(lambda values: values[0], moves=True)


def _leaky(call: Call) -> Rule:
    a = call.arguments
    if a.get("training", False):
        return Refused(_RANDOM)
    slope = a["negative_slope"] if "negative_slope" in a else (a["lower"] + a["upper"]) / 2
    return Slopes(min(slope, 1.0), max(slope, 1.0))


def _prelu(call: Call) -> Rule:
    weight = call.arguments["weight"]
    if call.depends(weight):
        return Refused(_ATTENTION)
    return Slopes(min(float(weight.amin()), 1.0), max(float(weight.amax()), 1.0))


def _elu(call: Call) -> Rule:
    a = call.arguments
    ends = (0.0, a["scale"], a["scale"] * a["alpha"] * a["input_scale"])
    return Slopes(min(ends), max(ends))


def _celu(call: Call) -> Rule:
    if call.arguments["alpha"] <= 0:
        return Refused("the slope of celu is not bounded where alpha is negative")
    return Slopes(0.0, 1.0)


def _threshold(call: Call) -> Rule:
    if call.arguments["threshold"] != call.arguments["value"]:
        return Refused("it jumps at its threshold")
    return Slopes(0.0, 1.0)


def _extremum(call: Call) -> Rule:
    return Bounded(1.0) if all(call.given("self", "other")) else Slopes(0.0, 1.0)


def _vector_norm(call: Call) -> Rule:
    order = call.arguments.get("ord", call.arguments.get("p", 2))
    if order not in (2, math.inf):
        return Refused(f"no bound is known for a norm of order {order}")
    return Bounded(1.0)


def _softmax(call: Call) -> Rule:
    return Bounded(0.5)


def _log_softmax(call: Call) -> Rule:
    x = call.arguments["self"]
    return Bounded(math.sqrt(x.shape[call.arguments["dim"]]) if x.ndim else 1.0)


def _max_pool(call: Call) -> Rule:
    """The square root of the largest number of windows that a pixel is in.

    The largest entries of a window differ by at most the largest difference in it, and its square
    by at most the sum of their squares; each pixel counts once for every window that it is in.
    """
    a = call.arguments
    x, y = a["self"], call.results[0]
    ndim = int(call.name.split("pool")[1][0])
    most = 1
    for axis in range(ndim):
        n, outputs = x.shape[axis - ndim], y.shape[axis - ndim]
        counts = [0] * n
        for o in range(outputs):
            for i in _window(call, axis, o, n, outputs):
                counts[i] += 1
        most *= max(counts)
    return Bounded(math.sqrt(most), by_channel=x.ndim == ndim + 2)


def _window(call: Call, axis: int, o: int, n: int, outputs: int) -> list[int]:
    a = call.arguments
    if "adaptive" in call.name:
        return list(range(o * n // outputs, -(-(o + 1) * n // outputs)))

    def entry(name: str, default: Sequence[int]) -> int:
        values = a[name] if name in a and len(a[name]) else default
        return values[axis if len(values) > 1 else 0]

    kernel = a["kernel_size"]
    first = o * entry("stride", kernel) - entry("padding", (0,))
    step = entry("dilation", (1,))
    reach = range(first, first + step * entry("kernel_size", kernel), step)
    return [i for i in reach if 0 <= i < n]


_SPECIAL: dict[str, Callable[[Call], Rule]] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "div": _division,
    "constant_pad_nd": _padding,
    "copy": _copy,
    "where": _choice,
    "masked_fill": _masked,
    "_to_copy": _cast,
    "leaky_relu": _leaky,
    "rrelu_with_noise": _leaky,
    "_prelu_kernel": _prelu,
    "celu": _celu,
    "elu": _elu,
    "threshold": _threshold,
    "maximum": _extremum,
    "minimum": _extremum,
    "linalg_vector_norm": _vector_norm,
    "norm": _vector_norm,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
}
"""Operations with a rule of their own."""
