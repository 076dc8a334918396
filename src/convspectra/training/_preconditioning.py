"""Well-conditioned kernels before training, from whatever initialization there is.

Note [Small grids]. Stein's loss is minimized for the layer on a small grid and the result checked
at the layer's own size: a well-conditioned kernel is so on all larger grids alike, since what makes
a zero-padded layer singular, a border or a corner, is there on the small grid too. Where the check
fails the grid grows.

Note [Delta kernels]. The only layers with stride 1 and "same" zero padding, on a grid no smaller
than the kernel, that are exactly orthogonal have one tap, in the center: the border pixels see
fewer taps than the others, and M'M = I for both leaves nothing for the rest. Driven to its minimum
Stein's loss ends at a delta-orthogonal kernel (Xiao et al., ICML 2018); `condition` says how far to
go.

Note [Shifted channels]. Some descents end in local minima where a few channels pass through a tap
beside the center: a shift of the image, which loses a line of pixels. Where the loss stalls, the
center tap is replaced by its orthogonal polar factor and the others are halved, and the descent
goes on from there; after a few times it is in the basin of a delta kernel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convspectra import penalties
from convspectra.models import (
    Activation,
    Layer,
    LayerFlow,
    Selection,
    find_layers,
    is_convolution,
    named,
    refuse_pieces,
    signal_flow,
    unwrapped,
)
from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    FloatArray,
    check_choice,
    check_positive_integer,
    convolution_options,
    frobenius_form,
    has_own_forward,
    is_isometric_possible,
    is_square_toeplitz,
    kernel_to_weight,
    not_compiled,
    weight_to_kernel,
    with_gradients,
)
from convspectra.spectra import direct_cost, frobenius_norm, svds
from convspectra.training._descent import descend
from convspectra.training._isometric_plans import (
    KNOWN_ACTIVATIONS,
    IsometricPlan,
    activation_gain,
    isometric_weight,
)

ALGORITHMS = ("stein", "3.3")
"""The names that `precondition(algorithm=...)` takes."""
FIRST_SIZE = 8
"""Points per axis of the first grid, where the layer has that many."""
WORK_LIMIT = 2048
"""Order of the matrices that the first grid may ask for."""
FIRST_LOSS = 1e-2
"""Stein's loss per singular value at which the condition number is looked at for the first time."""
NEXT_LOSS = 0.25
"""Factor to the next look."""
PATIENCE = 8
"""Steps of L-BFGS after which the loss must have fallen ..."""
STALLED = 0.6
"""... to this part of what it was, or the descent has stalled (Note [Shifted channels])."""
GRID_MARGIN = 0.8
"""Part of what the condition number may exceed 1 by, to reach on a small grid."""
UNUSED_TAP = 1e-6
"""Least weight of a tap in the metric, relative to the largest: some taps are never used."""
SINGULAR_LOSS = 1e6
"""Stands for the infinite loss of a singular layer in a line search."""
CHECK_TOLERANCE = 1e-5
"""Relative accuracy of the condition numbers."""

LEAST_SIGNAL = 5e-4
"""Part of a signal that must be left behind the last ReLU, or a warning says that none is: with
gain 1, 20 layers keep 1e-3, and 30, which end at chance, 3e-5."""


@dataclass(frozen=True)
class PreconditionedLayer:
    """The outcome for one layer.

    Attributes
    ----------
    name, input_size
        The layer, at the first size at which it is used.
    sigma_min, sigma_max : (float, float)
        Of the layer at that size, before and after.
    iterations : int
        Gradients computed.
    grid : tuple of int
        Size of the last grid on which they were computed.
    converged : bool
        Whether the condition number asked for was reached.

    Examples
    --------
    >>> layer = PreconditionedLayer("0", (8, 8), (1e-3, 0.9), (2.0, 1.2), 20, (8, 8), True)
    >>> round(layer.condition[0]), round(layer.condition[1], 2)
    (2000, 1.33)
    """

    name: str
    input_size: tuple[int, ...]
    sigma_min: tuple[float, float]
    sigma_max: tuple[float, float]
    iterations: int
    grid: tuple[int, ...]
    converged: bool

    @property
    def condition(self) -> tuple[float, float]:
        """Condition numbers before and after."""
        before, after = (
            largest / smallest if smallest > 0 else math.inf
            for smallest, largest in zip(self.sigma_min, self.sigma_max, strict=True)
        )
        return before, after


@not_compiled
@with_gradients
def precondition(
    model: nn.Module,
    example_input: Any,
    *,
    algorithm: str = "stein",
    condition: float = 2.0,
    gain: float | None = None,
    activation: str = "auto",
    include: Selection = is_convolution,
    exclude: Selection = (),
    max_iter: int = 300,
    callback: Callable[[PreconditionedLayer], None] | None = None,
) -> tuple[PreconditionedLayer, ...]:
    """Drive the kernels of a model to well-conditioned ones, in place, before training.

    Parameters
    ----------
    model : nn.Module
        Its chosen weights are changed, nothing else; it may be compiled or wrapped. Frozen weights
        are left out, with a warning; weights that an invertible parametrization computes, such as
        ``torch.nn.utils.parametrizations.weight_norm``, are written through it.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
        One forward pass of it finds the input size of each layer.
    algorithm : {"stein", "3.3"}
        L-BFGS on Stein's loss, or the paper's Algorithm 3.3 with steps that need no tuning (for
        stride 1 and "same" zero padding), which seldom gets far (docs/paper.md).
    condition : float
        The condition number sigma_max / sigma_min to reach. 1 takes the nearest isometric kernel in
        closed form, where the layer's padding has one.
    gain : float, optional
        The size of the singular values in the end, their root mean square. By default what the
        activation behind each layer wants: sqrt(2) before ReLU, ``1 + 1 / sqrt(layers)`` before
        tanh, 1 where nothing follows.
    activation : str
        "auto" for the one that follows each layer in the model; "relu", "tanh", "gelu" and others
        for all layers, where it cannot be seen; "none" for gain 1.
    include, exclude : str, iterable of str, or callable (name, module) -> bool
        Which layers, as for `SpectralRegularizer`.
    max_iter : int
        Most gradients per layer, but for a line search, which is brought to its end.
    callback : callable (PreconditionedLayer) -> None, optional
        Called after each layer.

    Returns
    -------
    tuple of PreconditionedLayer
        One a weight; a layer used at several sizes, or a weight shared by several layers, is
        treated once. A layer that did not get to `condition` has the best kernel found.

    Raises
    ------
    ValueError
        For a layer that cannot be handled, which is named, or an option that cannot be. A weight
        that is computed by something that cannot be inverted is refused before any is changed.
    ArithmeticError
        If a layer is rank deficient from the start: Stein's loss is infinite there.

    Warns
    -----
    UserWarning
        If a `gain` that was given lets the signals of a deep ReLU network die: with 1, each layer
        divides them by sqrt(2).

    Notes
    -----
    Signals behind ReLU keep their size with gain sqrt(2) (He et al., "Delving deep into
    rectifiers", ICCV 2015, arXiv:1502.01852); `prepare` does more: mirrored kernels, biases and
    the learning rate. Cost: an SVD of the center tap a layer with ``condition=1``; else some 50 to
    100 times that of `logabsdet` and its gradient on a small grid (Note [Small grids]). Both take
    exact singular values of every layer before and after. Zero-padded layers end near
    delta-orthogonal kernels (Note [Delta kernels]). The initialization decides which: the result is
    as random as that was.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    >>> (layer,) = cs.precondition(conv, torch.zeros(1, 4, 12, 12), condition=1.5)
    >>> layer.converged, cs.cond(cs.ConvOperator.from_module(conv, (12, 12))) < 1.51
    (True, True)
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    _check_numbers(condition, gain)
    check_positive_integer("max_iter", max_iter)
    check_choice("activation", activation, ("auto", *KNOWN_ACTIVATIONS))
    model = unwrapped(model)
    every = find_layers(model, example_input, include, exclude)
    refuse_pieces([layer.module for layer in every], "cs.precondition")
    layers = _layers_to_write(every)
    gains = _gains(layers, signal_flow(model, example_input), gain, activation)
    if condition == 1:
        _refuse_unless_isometric(layers)
    results = []
    for layer, own in zip(layers, gains, strict=True):
        with named(layer):
            weight = convolution_options(layer.module)[0]
            with torch.autocast(weight.device.type, enabled=False):
                if condition == 1:
                    result, found = _isometric(layer, own)
                else:
                    result, found = _preconditioned(layer, algorithm, condition, own, max_iter)
            _write(layer.module, found.to(weight))
        results.append(result)
        if callback is not None:
            callback(result)
    return tuple(results)


def _check_numbers(condition: float, gain: float | None) -> None:
    for name, value in (("condition", condition), ("gain", 1.0 if gain is None else gain)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"expected {name} to be a number, got {value!r}")
    if not 1 <= condition < math.inf:
        raise ValueError(f"expected condition to be finite and at least 1, got {condition!r}")
    if gain is not None and not 0 < gain < math.inf:
        raise ValueError(f"expected gain to be finite and above 0, got {gain!r}")


def _gains(
    layers: Sequence[Layer],
    flows: Mapping[str, LayerFlow],
    gain: float | None,
    activation: str,
) -> list[float]:
    """The gain of each layer; a warning where that given lets signals behind ReLUs die."""
    depth = len(layers)
    known = None if activation in ("auto", "none") else Activation(activation)
    following = [flows[x.name].activation if activation == "auto" else known for x in layers]
    if gain is None:
        return [activation_gain(found, depth) for found in following]
    relus = sum(
        found is not None and found.name == "relu" and not flows[x.name].normalized
        for x, found in zip(layers, following, strict=True)
    )
    left = (gain / math.sqrt(2)) ** relus
    if relus and left < LEAST_SIGNAL:
        warnings.warn(
            f"precondition with gain {gain:g}: a signal is {left:.0e} of itself after the {relus} "
            "layers before ReLUs, and the network does not train; leave gain out, or call "
            "cs.prepare",
            stacklevel=4,
        )
    return [gain] * depth


def _refuse_unless_isometric(layers: Sequence[Layer]) -> None:
    for layer in layers:
        op = layer.operator()
        if not is_isometric_possible(op.T if op.transposed else op):
            raise ValueError(
                f"layer {layer.name!r}: expected a layer that has isometric kernels for "
                f"condition=1, got {op!r}; ask for a condition above 1, or exclude the layer"
            )


def _isometric(layer: Layer, gain: float) -> tuple[PreconditionedLayer, Tensor]:
    """The report of one layer and the nearest isometric kernel (Note [Delta kernels])."""
    op = layer.operator()
    op = op.with_weight(op.weight.detach().double())
    weight = isometric_weight(op, IsometricPlan(gain))
    before, after = _ends(op), _ends(op.with_weight(weight))
    ends = (before[0], after[0]), (before[1], after[1])
    grid = tuple(layer.input_size)
    return PreconditionedLayer(layer.name, grid, *ends, 0, grid, converged=True), weight


def _layers_to_write(layers: Sequence[Layer]) -> list[Layer]:
    """One layer a weight, without the frozen ones, of which a warning tells.

    Raises
    ------
    ValueError
        For a layer whose weight is computed in a way that cannot be inverted.
    """
    first_use: dict[Tensor | nn.Module, Layer] = {}
    frozen = []
    for layer in layers:
        with torch.enable_grad():
            weight = convolution_options(layer.module)[0]
        own = isinstance(weight, nn.Parameter)
        kept = own or parametrize.is_parametrized(layer.module, "weight")
        if (kept or has_own_forward(layer.module)) and not weight.requires_grad:
            frozen.append(layer.name)
            continue
        if not own and layer.module not in first_use:
            with named(layer):
                _refuse_unless_invertible(layer.module, weight.detach())
        first_use.setdefault(weight if own else layer.module, layer)
    if frozen:
        warnings.warn(
            f"precondition leaves out the layers {sorted(set(frozen))}, which are frozen: "
            "requires_grad of their weights is False",
            stacklevel=3,
        )
    return list(first_use.values())


@torch.no_grad()
def _write(module: nn.Module, weight: Tensor) -> None:
    """Make this the weight of the module, through its parametrization if it has one."""
    if parametrize.is_parametrized(module, "weight"):
        module.weight = weight
    else:
        convolution_options(module)[0].copy_(weight)


@torch.no_grad()
def _refuse_unless_invertible(module: nn.Module, weight: Tensor) -> None:
    """Raise a ValueError unless a computed weight becomes what is written; nothing is changed."""
    names = [name for name, _ in module.named_parameters() if "bias" not in name]
    advice = "make the weight a plain parameter first, or exclude the layer"
    if not parametrize.is_parametrized(module, "weight"):
        if has_own_forward(module):
            raise ValueError(
                "expected a weight that is a parameter or has an invertible parametrization, got "
                f"one that the forward pass of {type(module).__name__} computes from {names}; "
                "precondition its plain layer before it is put in the model, or exclude it"
            )
        raise ValueError(
            "expected a weight that is a parameter or has an invertible parametrization, got one "
            f"that a hook computes from {names} before each forward pass; {advice} "
            "(torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove)"
        )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        weight
    )
    asked = 1.5 * weight + weight.std() * noise
    try:
        _write(module, asked)
        got = convolution_options(module)[0]
        written = got.shape == asked.shape and torch.allclose(got, asked, rtol=1e-3, atol=1e-5)
        reason = "which does not give back the weight that is written to it"
    except Exception as error:  # whatever a user's right_inverse may raise
        written, reason = False, f"which cannot be written to: {error}"
    module.load_state_dict(before)
    if not written:
        kinds = [type(part).__name__ for part in module.parametrizations["weight"]]  # type: ignore[index]
        raise ValueError(
            f"expected a weight that is a parameter or has an invertible parametrization, got the "
            f"parametrization {kinds}, {reason}; {advice} "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _preconditioned(
    layer: Layer, algorithm: str, condition: float, gain: float, max_iter: int
) -> tuple[PreconditionedLayer, Tensor]:
    """The report of one layer and its new weight, float64."""
    op = layer.operator()
    op = op.with_weight(op.weight.detach().double())
    before = _ends(op)
    minimize = _by_stein if algorithm == "stein" else _by_algorithm_3_3
    iterations = 0
    for grid in _grids(layer, op):
        small = layer.operator(grid).with_weight(op.weight)
        weight, steps = minimize(small, condition, max_iter - iterations)
        iterations += steps
        scale = gain * math.sqrt(min(op.shape)) / frobenius_norm(op.with_weight(weight))
        op = op.with_weight(scale * weight)
        after = _ends(op)
        converged = after[1] <= condition * after[0]
        if converged or iterations >= max_iter:
            break
    result = PreconditionedLayer(
        name=layer.name,
        input_size=layer.input_size,
        sigma_min=(before[0], after[0]),
        sigma_max=(before[1], after[1]),
        iterations=iterations,
        grid=grid,
        converged=converged,
    )
    return result, op.weight


def _ends(op: ConvOperator) -> tuple[float, float]:
    """Both extreme singular values; the smallest is 0 where it cannot be told from that."""
    smallest, largest = (
        svds(op, 1, which, return_singular_vectors=False, tol=CHECK_TOLERANCE)
        for which in ("SM", "LM")
    )
    return float(smallest.s[0]) if smallest.converged else 0.0, float(largest.s[0])


def _grids(layer: Layer, op: ConvOperator) -> Iterator[tuple[int, ...]]:
    """The sizes to minimize on, growing to that of the layer (Note [Small grids])."""
    full = layer.input_size
    pads = op.geometry.padding
    least = max([1, *op.geometry.reach, *(1 + max(pair) for pair in pads)])
    points = max(least, FIRST_SIZE * max(op.geometry.stride, default=1))
    while points > least and _order(layer, _capped(points, full)) > WORK_LIMIT:
        points -= 1
    while (grid := _capped(points, full)) != full:
        yield grid
        points *= 2
    yield full


def _capped(points: int, full: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(points, n) for n in full)


def _order(layer: Layer, grid: tuple[int, ...]) -> float:
    """The order of a dense matrix whose log-determinant costs as much as the layer's on a grid."""
    op = layer.operator(grid)
    cost, _ = direct_cost(op, "logabsdet", DEFAULT_MAX_BYTES)
    return float(cost.flops / (2 * op.groups)) ** (1 / 3)


def _by_stein(op: ConvOperator, condition: float, max_iter: int) -> tuple[Tensor, int]:
    """L-BFGS on Stein's loss in the metric of ||M||_F, until the condition number is reached."""
    n = min(op.shape)
    counts = frobenius_form(torch.ones_like(op.weight), op.geometry, divisor=n)
    metric = counts.clamp_min(counts.amax() * UNUSED_TAP).sqrt()
    weight, count = op.weight, 0
    best = math.inf, weight
    losses: list[float] = []
    reached, next_look = False, FIRST_LOSS

    def weight_of(x: FloatArray) -> Tensor:
        return torch.from_numpy(x).reshape(metric.shape).to(metric) / metric

    @torch.enable_grad()
    def loss(x: FloatArray) -> tuple[float, FloatArray]:
        nonlocal count
        count += 1
        variable = weight_of(x).requires_grad_()
        try:
            value = penalties.stein(op.with_weight(variable)) / n
        except ArithmeticError:
            if count == 1:
                raise
            return SINGULAR_LOSS, np.zeros_like(x)
        (gradient,) = torch.autograd.grad(value, variable)
        return float(value.detach()), (gradient / metric).flatten().cpu().numpy()

    def look(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal next_look, reached
        losses.append(float(intermediate_result.fun))
        if losses[-1] <= next_look:
            next_look = NEXT_LOSS * losses[-1]
            smallest, largest = _ends(op.with_weight(weight_of(intermediate_result.x)))
            reached = largest <= (1 + GRID_MARGIN * (condition - 1)) * smallest
        if reached or (len(losses) > PATIENCE and losses[-1] > STALLED * losses[-1 - PATIENCE]):
            raise StopIteration

    while not reached and count < max_iter:
        losses.clear()
        next_look = FIRST_LOSS
        start = weight * (math.sqrt(n) / frobenius_norm(op.with_weight(weight)))
        found = scipy.optimize.minimize(
            loss,
            (start * metric).flatten().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            callback=look,
            options={"maxfun": max_iter - count, "maxiter": max_iter, "ftol": 0.0, "gtol": 1e-12},
        )
        weight = weight_of(found.x)
        best = min(best, (float(found.fun), weight), key=lambda one: one[0])
        if not is_square_toeplitz(op):
            break
        if not reached and count < max_iter:
            weight = _towards_the_center(weight, op)
    return weight if reached else best[1], count


def _towards_the_center(weight: Tensor, op: ConvOperator) -> Tensor:
    """The orthogonal polar factor in the tap that every output uses, half of the other taps."""
    center = int(op.geometry.tap_counts().argmax())
    taps = weight.flatten(2)
    u, _, vh = torch.linalg.svd(taps[:, :, center].unflatten(0, (op.groups, -1)))
    moved = 0.5 * taps
    moved[:, :, center] = (u @ vh).flatten(0, 1)
    return moved.reshape(weight.shape)


def _by_algorithm_3_3(op: ConvOperator, condition: float, max_iter: int) -> tuple[Tensor, int]:
    size = op.geometry.input_size
    paper = ConvOperator(op.weight, size)
    if (op.geometry, op.groups, op.transposed) != (paper.geometry, 1, False):
        raise ValueError(
            "expected stride 1, 'same' zero padding and one group for algorithm='3.3', got "
            f"{op!r}; use algorithm='stein', or exclude the layer"
        )
    start = op.weight * (math.sqrt(min(op.shape)) / frobenius_norm(op))
    result = descend(
        weight_to_kernel(start), size, algorithm="3.3", step_size="auto", max_iter=max_iter
    )
    return kernel_to_weight(result.kernel), result.iterations
