"""`prepare`: a network whose gradients are stable at the start, and the learning rate for it.

Every layer becomes the isometric one nearest to what it is, with the gain of the activation behind
it; mirrored kernels before ReLU and its like make the network linear at the start. One forward and
one backward pass check the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models import (
    Layer,
    LayerFlow,
    Selection,
    example_arguments,
    find_layers,
    named,
    refuse_pieces,
    signal_flow,
    unwrapped,
)
from convspectra.network import LEARNING_RATE_BUDGET, suggested_rate
from convspectra.operator import (
    is_isometric_possible,
    normalized,
    not_compiled,
    with_gradients,
)
from convspectra.penalties import orthogonality
from convspectra.spectra import frobenius_norm
from convspectra.text import text_table
from convspectra.training._isometric_plans import (
    IsometricPlan,
    isometric_plans,
    isometric_weight,
    slope_spread,
)

HEALTHY = (0.1, 10.0)
"""First over last gradient norm between which a network counts as healthy: a choice."""


@dataclass(frozen=True)
class PreparedLayer:
    """One layer and what was done with it.

    Attributes
    ----------
    name : str
    activation : str
        What stands behind it.
    gain : float or None
        Its singular values now, those of H for mirrored kernels; None if it was left as it is.
    mirrored : bool
        Whether its kernel is [H, -H; -H, H], or half of that at the ends.
    spread : float
        What the layer and its activation add to the variance of the Jacobian's squared singular
        values, over the square of their mean: 0 is isometric.
    note : str
        Why it was left as it is, or is not what one would expect.

    Examples
    --------
    >>> PreparedLayer("conv1", "relu", 1.0, True, 0.0, "").mirrored
    True
    """

    name: str
    activation: str
    gain: float | None
    mirrored: bool
    spread: float
    note: str


@dataclass(frozen=True)
class PreparationReport:
    """The result of `prepare`: each layer, the check, and how to train; printed as a table.

    Attributes
    ----------
    layers : tuple of PreparedLayer
    learning_rate : float
        For Adam with its default moments.
    reason : str
        Where the learning rate comes from.
    gradient_ratio : float
        Norm of the gradient at the output of the first prepared layer over that at the last.
    budget : float
        The sum of the layers' spreads: up to about 1 the network is nearly isometric.
    healthy : bool
        Whether `gradient_ratio` is between 0.1 and 10.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Tanh())
    >>> report = cs.prepare(model, torch.randn(4, 1, 8, 8))
    >>> report.layers[0].gain, report.healthy
    (2.0, True)
    """

    layers: tuple[PreparedLayer, ...]
    learning_rate: float
    reason: str
    gradient_ratio: float
    budget: float
    healthy: bool

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a layer, of plain values."""
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        rows = [
            {
                "layer": layer.name,
                "activation": layer.activation,
                "gain": "as it was" if layer.gain is None else f"{layer.gain:.4g}",
                "mirrored": "yes" if layer.mirrored else "",
                "spread": f"{layer.spread:.2g}",
                "note": layer.note,
            }
            for layer in self.layers
        ]
        verdict = "healthy"
        if not self.healthy:
            verdict = (
                "outside 0.1 to 10: even numbers of channels and mirrored kernels, tanh, shortcuts "
                "or normalization help"
            )
        return "\n".join(
            [
                text_table(tuple(rows[0]), rows),
                f"gradient, first over last layer: {self.gradient_ratio:.3g} ({verdict})",
                f"Jacobian budget: {self.budget:.3g} (about 1 or less is nearly isometric)",
                f"suggested learning rate (Adam): {self.learning_rate:.2g}, {self.reason}",
            ]
        )


@not_compiled
@with_gradients
def prepare(
    model: nn.Module,
    images: Any,
    *,
    mirrored: bool | None = None,
    include: Selection = "*",
    exclude: Selection = (),
) -> PreparationReport:
    """Make the gradients of a network stable at the start of training, at any depth.

    Parameters
    ----------
    model : nn.Module
        Changed in place: all of what the report says, or nothing if anything fails.
    images : Tensor, tuple of positional arguments, or mapping of keyword arguments
        A few inputs as in training, for the sizes of the layers and for the check.
    mirrored : bool, optional
        False for no mirrored kernels before ReLUs; True to have the layers noted that cannot have
        them; by default they are taken wherever channels can be halved.
    include, exclude : str, iterable of str, or callable (name, module) -> bool
        Which layers may change; by default all convolutions and linear layers.

    Returns
    -------
    PreparationReport
        With the learning rate to train with. Left as they are, and named in it: the head (a layer
        that feeds no other), layers beside a normalization, frozen ones, those whose weight is
        computed by a parametrization, and layers used more than once.

    Raises
    ------
    ValueError
        If no layer is left to prepare.
    ArithmeticError
        If the check finds signals or gradients that are not finite; the model is as it was.

    Notes
    -----
    Every layer becomes ``gain * Q``, Q the isometric layer nearest to it (`penalties.isometry`):
    gain sqrt 2 before ReLU, ``1 + 1 / sqrt(L)`` before tanh, 1 over the root mean square of other
    activations. Mirrored kernels [H, -H; -H, H] have gain 1, and ``1 / (1 + a)`` before a leaky
    ReLU: with ``f(z) - f(-z) = c z``, which ReLU, GELU, SiLU and others satisfy, the network is
    linear at the start. Ends of residual branches get ``1 / sqrt(number of branches)`` of
    it. Biases become 0. Cost: one SVD of a center tap a layer, two forward passes and a backward
    one. Sources: delta-orthogonal kernels (Xiao et al., "Dynamical isometry and a mean field theory
    of CNNs", ICML 2018, arXiv:1806.05393); mirrored kernels (Balduzzi et al., "The shattered
    gradients problem", ICML 2017, arXiv:1702.08591); docs/mathematics.md, "Isometric layers".

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> from torch import nn
    >>> layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    >>> for _ in range(49):
    ...     layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    >>> model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 10))
    >>> report = cs.prepare(model, torch.randn(4, 1, 8, 8))
    >>> report.healthy, f"{report.learning_rate:.1e}"
    (True, '8.5e-04')
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    layers = find_layers(model, images, include, exclude)
    refuse_pieces([layer.module for layer in layers], "cs.prepare")
    flows = signal_flow(model, images)
    left = {layer.name: why for layer in layers if (why := _left_alone(layer, flows, model))}
    chosen = [layer for layer in layers if layer.name not in left]
    if not chosen:
        raise ValueError(f"expected layers to prepare, got none: {left}")
    plans = dict(
        zip(
            [layer.name for layer in chosen],
            _with_branches(chosen, flows, isometric_plans(chosen, flows, None, mirrored)),
            strict=True,
        )
    )
    tensors = _new_values(chosen, plans)
    before = [(tensor, tensor.detach().clone()) for tensor, _ in tensors]
    try:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        ratio = _gradient_ratio(model, images, chosen)
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
    return _report(layers, left, plans, flows, ratio)


def _left_alone(layer: Layer, flows: Mapping[str, LayerFlow], model: nn.Module) -> str:
    """Why a layer is not changed; "" for one that is."""
    flow = flows[layer.name]
    weight = layer.module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization"
    if not weight.requires_grad:
        return "frozen"
    if flow.normalized:
        return "beside a normalization"
    if flow.uses > 1 or sum(weight is other for other in _all_parameters(model)) > 1:
        return "used more than once"
    if not flow.feeds and flow.activation is None:
        return "the head"
    return ""


def _all_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


def _with_branches(
    layers: Sequence[Layer], flows: Mapping[str, LayerFlow], plans: Sequence[IsometricPlan]
) -> list[IsometricPlan]:
    """The plans, with the ends of residual branches scaled so that their sum stays bounded."""
    ends = [flows[layer.name].ends_branch for layer in layers]
    scale = 1 / math.sqrt(max(1, sum(ends)))
    return [
        plan.scaled(scale, "the end of a residual branch") if end else plan
        for plan, end in zip(plans, ends, strict=True)
    ]


def _new_values(
    layers: Sequence[Layer], plans: Mapping[str, IsometricPlan]
) -> list[tuple[Tensor, Tensor]]:
    """Parameters and their new values."""
    values: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        plan, op = plans[layer.name], layer.operator()
        weight, bias = layer.module._parameters["weight"], layer.module._parameters.get("bias")
        assert weight is not None
        with named(layer):
            target = isometric_weight(op, plan)
        values.append((weight, target.to(weight.dtype)))
        if bias is not None:
            values.append((bias, torch.zeros_like(bias)))
    return values


def _gradient_ratio(model: nn.Module, images: Any, layers: Sequence[Layer]) -> float:
    """The gradient norm at the first layer's output over that at the last one's.

    Of a random linear function of the output; nothing of the model changes.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, output)

    ends = layers[0], layers[-1]
    hooks = [end.module.register_forward_hook(keep(end.name)) for end in ends]
    modes = [(module, module.training) for module in model.modules()]
    call = example_arguments(images)
    try:
        model.eval()
        with torch.enable_grad():
            output = call.run(model)
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"expected the model to return a tensor, got {type(output).__name__}; wrap it"
                )
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(
                output.shape, generator=generator, dtype=torch.float32, device="cpu"
            ).to(output)
            found = torch.autograd.grad(
                (output * direction).sum(), [outputs[end.name] for end in ends], allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    first, last = (math.nan if g is None else float(torch.linalg.vector_norm(g)) for g in found)
    if not bool(output.isfinite().all()) or not (math.isfinite(first) and math.isfinite(last)):
        raise ArithmeticError(
            "expected finite signals and gradients after the preparation, got NaN or Inf; the "
            "model is as it was"
        )
    return first / last if last else math.inf


def _report(
    layers: Sequence[Layer],
    left: Mapping[str, str],
    plans: Mapping[str, IsometricPlan],
    flows: Mapping[str, LayerFlow],
    ratio: float,
) -> PreparationReport:
    rows = []
    for layer in {layer.name: layer for layer in layers}.values():
        activation = flows[layer.name].activation
        name = activation.name if activation else "none"
        if layer.name in left:
            rows.append(PreparedLayer(layer.name, name, None, False, 0.0, left[layer.name]))
            continue
        plan = plans[layer.name]
        spread = slope_spread(plan, activation, len(plans))
        spread += _layer_spread(layer)
        mirrored = plan.mirrored_input or plan.mirrored_output
        rows.append(PreparedLayer(layer.name, name, plan.gain, mirrored, spread, plan.note))
    fan_ins = sum(layer.operator().weight[0].numel() for layer in layers if layer.name not in left)
    rate = suggested_rate(fan_ins)
    return PreparationReport(
        tuple(rows),
        rate,
        f"{LEARNING_RATE_BUDGET:g} over the sum of the fan-ins, {fan_ins}: one step may change "
        "the product of all layers by a fixed part",
        ratio,
        sum(row.spread for row in rows),
        HEALTHY[0] <= ratio <= HEALTHY[1],
    )


def _layer_spread(layer: Layer) -> float:
    """``n ||M'M||_F^2 / ||M||_F^4 - 1`` from integers: 0 where all singular values are equal."""
    op = layer.operator()
    direct = op.T if op.transposed else op
    if is_isometric_possible(direct):
        return 0.0
    op, _ = normalized(op)
    count = min(op.shape)
    square = frobenius_norm(op) ** 2
    fourth = float(orthogonality(op)) + 2 * square - count
    return max(count * fourth / square**2 - 1, 0.0)
