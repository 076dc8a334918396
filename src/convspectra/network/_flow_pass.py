"""One pass of a network in pieces, every layer and normalization cut from the next.

Note [Pieces]. Each layer and each normalization reads a copy of its input and hands on a copy of
its output, both without history. So what lies between two of them, activations, pooling, sums of
branches, is a graph of its own, and the backward pass goes from piece to piece: every gradient is
that of the whole network, and it is known how much of it came along which way.

Note [A probe of signs]. For a map D between two pieces and a vector r of random signs,
``E ||D' r||^2 = ||D||_F^2``, and for one that acts on every number alone it is so for every r: the
root mean square slope of an activation is measured exactly, without a word of which one it is.

Note [Through a cut]. Cut the network behind the t-th piece, in the order of calls: the gradients
along all the ways that cross the cut, squared and added, are its flow. In a chain it is the norm of
the gradient at that piece. Beside a skip it is that of the skip and the branch together: a branch
that begins at zero does not count as vanishing gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convspectra.network._frozen import floating_leaves
from convspectra.operator import LAYER_TYPES, ConvOperator
from convspectra.spectra import frobenius_norm

NORMALIZATION_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
"""Modules that are pieces of their own beside layers."""
FLAT = 0.1
"""A slope below this part of the largest counts as saturated: that of tanh beyond 1.8. A choice."""

Call = Callable[[nn.Module], Any]
"""Runs a model on the images."""


@dataclass
class Piece:
    """One call of a layer or a normalization.

    Attributes
    ----------
    name : str
    module : nn.Module
    arriving : Tensor
        Its input, with the graph back to the outputs of the pieces before.
    inside, raw : Tensor
        The copy of its input that it read, and its output.
    output : Tensor
        The copy of its output that was handed on, a leaf of the next graphs.
    bias : float
        Mean square of its bias.
    """

    name: str
    module: nn.Module
    arriving: Tensor
    inside: Tensor
    raw: Tensor
    output: Tensor
    bias: float

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or a linear layer."""
        return isinstance(self.module, LAYER_TYPES)

    @property
    def channel_axis(self) -> int:
        """The axis of the output's channels."""
        last = isinstance(self.module, (nn.Linear, nn.LayerNorm, nn.RMSNorm))
        return self.output.ndim - 1 if last or self.output.ndim < 2 else 1


@dataclass
class Gains:
    """Root mean square gains of gradients: of pieces, and of what lies between two of them.

    `slopes` has the largest slope behind each entry of a piece's output, over the ways from there.
    """

    pieces: list[float]
    between: dict[tuple[int, int], float]
    slopes: dict[int, Tensor]


@dataclass
class Gradients:
    """Norms of gradients: at outputs, inputs and weights, and along the ways between pieces.

    The place ``len(outputs)`` stands for the loss.
    """

    outputs: list[float]
    inputs: list[float]
    weights: list[float]
    ways: dict[tuple[int, int], float]


class Pieces:
    """A forward pass in pieces (Note [Pieces]).

    Parameters
    ----------
    model : nn.Module
        A copy that is the caller's own: gradients to the weights of its layers are turned on.
    call : callable
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.all: list[Piece] = []
        self._open: list[tuple[Tensor, Tensor]] = []
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, (*LAYER_TYPES, *NORMALIZATION_TYPES)):
                module.requires_grad_(True)
                hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                hooks.append(module.register_forward_hook(self._leaver(name)))
        try:
            with torch.enable_grad():
                self.answer = call(model)
        finally:
            for hook in hooks:
                hook.remove()
        for piece in self.all:
            if not piece.raw.requires_grad:
                raise ValueError(
                    f"expected a model with gradients, got none through {piece.name!r}: it is "
                    "called under no_grad() or inference_mode(); take that out"
                )
        self._places = {id(piece.output): i for i, piece in enumerate(self.all)}

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [*args, *kwargs.values()]
        inside = values[0].detach().requires_grad_()
        self._open.append((values[0], inside))
        if args:
            return (inside, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): inside}

    def _leaver(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def leave(module: nn.Module, args: Any, raw: Tensor) -> Tensor:
            arriving, inside = self._open.pop()
            output = raw.detach().requires_grad_()
            bias = module._parameters.get("bias")
            square = 0.0 if bias is None else float(bias.detach().square().mean())
            self.all.append(Piece(name, module, arriving, inside, raw, output, square))
            # In-place activations write into a copy, not into what is looked at later.
            return output.clone()

        return leave

    def gradients(self, loss: Tensor) -> Gradients:
        """The backward pass of a loss of the answer, piece by piece.

        A last layer whose weight is 0 passes nothing on: the pass then begins at its input.
        """
        pieces, count = self.all, len(self.all)
        arrived: list[Tensor | None] = [None] * count
        found = Gradients([0.0] * count, [0.0] * count, [math.nan] * count, {})
        started = self._hand_on(loss, None, count, arrived, found.ways)
        for i in reversed(range(count)):
            piece, gradient = pieces[i], arrived[i]
            if gradient is None:
                continue
            found.outputs[i] = _norm(gradient)
            # A weight that a parametrization computes is no parameter of the module.
            weight = piece.module._parameters.get("weight") if piece.is_layer else None
            asked = [piece.inside, *([] if weight is None else [weight])]
            back = torch.autograd.grad(
                piece.raw, asked, gradient, retain_graph=True, allow_unused=True
            )
            if len(back) == 2 and back[1] is not None:
                found.weights[i] = _norm(back[1])
            at_input = back[0]
            if at_input is None:
                continue
            if started == [i] and piece.is_layer and not bool(at_input.any()):
                at_input = random_signs(at_input)
            found.inputs[i] = _norm(at_input)
            self._hand_on(piece.arriving, at_input, i, arrived, found.ways)
            arrived[i] = None
        return found

    def _hand_on(
        self,
        arriving: Tensor,
        gradient: Tensor | None,
        place: int,
        arrived: list[Tensor | None],
        ways: dict[tuple[int, int], float],
    ) -> list[int]:
        """Take a gradient back to the outputs that an array was made of; their places."""
        sources = self._sources(arriving)
        for source, part in zip(sources, self._back(arriving, gradient, sources), strict=True):
            ways[source, place] = _norm(part)
            before = arrived[source]
            arrived[source] = part if before is None else before + part
        return sources

    def _back(
        self, arriving: Tensor, gradient: Tensor | None, sources: list[int]
    ) -> tuple[Tensor, ...]:
        if not sources:
            return ()
        leaves = [self.all[source].output for source in sources]
        return torch.autograd.grad(
            arriving, leaves, gradient, retain_graph=True, materialize_grads=True
        )

    def _sources(self, arriving: Tensor) -> list[int]:
        """Places of the pieces whose outputs an array is made of, by a walk along its graph."""
        seen, waiting, places = set(), [arriving.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._places:
                places.add(self._places[id(variable)])
            waiting += [following for following, _ in node.next_functions]
        return sorted(places)

    def gains(self) -> Gains:
        """Gains of kernels, normalizations and all between them, for gradients of any direction."""
        found = Gains([], {}, {})
        for i, piece in enumerate(self.all):
            found.pieces.append(_kernel(piece) if piece.is_layer else _probed(piece))
            sources = self._sources(piece.arriving)
            signs = random_signs(piece.arriving)
            for source, part in zip(
                sources, self._back(piece.arriving, signs, sources), strict=True
            ):
                found.between[source, i] = _norm(part) / piece.arriving.numel() ** 0.5
                size, before = part.abs(), found.slopes.get(source)
                found.slopes[source] = size if before is None else torch.maximum(before, size)
        return found

    def acts_on_numbers_alone(self, way: tuple[int, int]) -> bool:
        """Whether the map along a way is diagonal: signs and ones then find the same slopes."""
        source, arriving = way[0], self.all[way[1]].arriving
        if arriving.numel() != self.all[source].output.numel():
            return False
        (signs,) = self._back(arriving, random_signs(arriving), [source])
        (ones,) = self._back(arriving, torch.ones_like(arriving), [source])
        return bool(torch.allclose(signs.abs(), ones.abs(), rtol=1e-6, atol=0))


def flow_through_cuts(ways: Mapping[tuple[int, int], float], count: int) -> list[float]:
    """The flow behind each piece (Note [Through a cut])."""
    flow = np.zeros(count)
    for (source, place), norm in ways.items():
        flow[source:place] = np.hypot(flow[source:place], norm)
    return [float(value) for value in flow]


def predicted(
    measured: Gradients,
    gains: Gains,
    pieces: Callable[[int], bool] = lambda i: True,
    between: bool = True,
) -> tuple[list[float], list[float]]:
    """Norms at outputs and the flow through cuts that gains alone give, from the same loss.

    Parameters
    ----------
    measured : Gradients
    gains : Gains
    pieces : callable
        Whether the gain of a piece counts; 1 stands for one that does not.
    between : bool
        Whether those between pieces count.
    """
    count = len(measured.outputs)
    norms = [measured.ways.get((i, count), 0.0) for i in range(count)]
    ways = {way: norm for way, norm in measured.ways.items() if way[1] == count}
    into: dict[int, list[int]] = {}
    for source, place in gains.between:
        into.setdefault(place, []).append(source)
    for i in reversed(range(count)):
        passed = norms[i] * (gains.pieces[i] if pieces(i) else 1.0)
        if not gains.pieces[i]:  # a head of zeros: see `Pieces.gradients`
            passed = measured.inputs[i]
        for source in into.get(i, []):
            ways[source, i] = passed * (gains.between[source, i] if between else 1.0)
            norms[source] = math.hypot(norms[source], ways[source, i])
    return norms, flow_through_cuts(ways, count)


def random_loss(answer: Any) -> Tensor:
    """A random linear function of the output of a model: its one floating tensor, or its logits.

    Raises
    ------
    ValueError
        For several tensors, or none.
    """
    tensors = floating_leaves(answer)
    logits = answer.get("logits") if isinstance(answer, Mapping) else None
    if isinstance(logits, Tensor):
        tensors = [logits]
    if len(tensors) != 1:
        raise ValueError(
            f"expected the model to return one floating tensor, got {type(answer).__name__} with "
            f"{len(tensors)}; give a loss, a function of what the model returns"
        )
    output = tensors[0]
    generator = torch.Generator(device=output.device).manual_seed(0)
    direction = torch.randn(
        output.shape, dtype=output.dtype, device=output.device, generator=generator
    )
    return (output * direction).sum()


def random_signs(like: Tensor) -> Tensor:
    """An array of 1 and -1, always the same one for a shape."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    signs = torch.randint(0, 2, like.shape, device=like.device, generator=generator)
    return (2 * signs - 1).to(like)


def saturation(piece: Piece, slopes: Tensor) -> tuple[float, float]:
    """Share of channels without any slope, and of entries on a flat part of a curved activation.

    Slopes are compared with the largest one, and only in channels where they vary: a constant
    factor is no saturation. An activation that is flat on its negative side alone, as GELU, does
    not count.
    """
    channels = slopes.movedim(piece.channel_axis, 0).flatten(1)
    largest = channels.amax(1, keepdim=True)
    dead = float((largest == 0).double().mean())
    smallest = torch.where(channels > 0, channels, math.inf).amin(1, keepdim=True)
    curved = largest > 1.01 * smallest
    flat = (channels < FLAT * largest.max()) & (channels > 0) & curved
    positive = piece.output.detach().movedim(piece.channel_axis, 0).flatten(1) > 0
    if bool(positive.any()) and not bool((flat & positive).any()):
        return dead, 0.0
    return dead, float(flat.double().mean())


def remove_biases(model: nn.Module) -> bool:
    """Set the biases of layers to 0; whether there were any."""
    found = False
    for module in model.modules():
        bias = module._parameters.get("bias") if isinstance(module, LAYER_TYPES) else None
        if bias is not None and bool(bias.any()):
            bias.data.zero_()
            found = True
    return found


def _kernel(piece: Piece) -> float:
    """``||M||_F / sqrt(rows)``, known exactly."""
    size = () if isinstance(piece.module, nn.Linear) else tuple(piece.inside.shape[2:])
    try:
        op = ConvOperator.from_module(piece.module, size)
    except ValueError as error:
        raise ValueError(f"layer {piece.name!r}: {error}") from error
    return float(frobenius_norm(op)) / op.shape[0] ** 0.5


def _probed(piece: Piece) -> float:
    """The root mean square gain of a normalization, by a probe of signs."""
    signs = random_signs(piece.raw)
    (part,) = torch.autograd.grad(
        piece.raw, piece.inside, signs, retain_graph=True, materialize_grads=True
    )
    return _norm(part) / signs.numel() ** 0.5


def _norm(array: Tensor) -> float:
    return float(torch.linalg.vector_norm(array))
