"""A penalty on every convolution of a model, for a training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convspectra import penalties
from convspectra.layers import Layer, Predicate, find_layers, is_convolution
from convspectra.operator import ConvOperator, block_diagonal

Penalty: TypeAlias = Callable[[ConvOperator], Tensor]

ADDITIVE = (penalties.frobenius, penalties.stein)
"""Penalties whose value for a block diagonal M is the sum of those of its blocks."""

PENALTIES: dict[str, Penalty] = {
    "frobenius": penalties.frobenius,
    "sigma_min": penalties.sigma_min,
    "conditioning": penalties.conditioning,
    "stein": penalties.stein,
}


class SpectralRegularizer:
    """The weighted sum of a penalty over the layers of a model: ``loss = loss + reg()``.

    Parameters
    ----------
    model : nn.Module
        Left as it is: no parametrization, no hook, nothing in its state dict.
    example_input : Tensor, or tuple of positional arguments
        One forward pass of it finds the input size of each layer; its values do not matter.
    penalty : str or callable
        "frobenius", "sigma_min", "conditioning", "stein", or a function that takes a
        `ConvOperator` and returns a 0-dim tensor.
    weight : float
        Of the whole sum. Each layer's penalty is divided by the number min(rows, columns) of its
        singular values ("sigma_min", one value, is not), so that layers of different sizes count
        alike.
    include : callable (name, module) -> bool
        Which layers; by default every convolution. A layer used at several input sizes counts once
        for each.

    Raises
    ------
    ValueError
        If a layer cannot be handled: it is named, with the reason. Also for an unknown penalty, a
        weight that is negative or not finite, and a model without layers to include.

    Notes
    -----
    Cost of a call: that of the penalty for every layer, in float64 and outside autocast. The paper
    (arXiv 2102.04294) adds such terms to the loss of training.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU())
    >>> reg = cs.SpectralRegularizer(model, torch.zeros(1, 1, 8, 8), penalty="frobenius")
    >>> loss = model(torch.ones(1, 1, 8, 8)).mean() + reg()
    >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        penalty: str | Penalty = "stein",
        weight: float = 1e-2,
        include: Predicate = is_convolution,
    ) -> None:
        if isinstance(penalty, str):
            if penalty not in PENALTIES:
                raise ValueError(
                    f"expected penalty to be one of {tuple(PENALTIES)} or a function of a "
                    f"ConvOperator, got {penalty!r}"
                )
            self._penalty = PENALTIES[penalty]
        elif callable(penalty):
            self._penalty = penalty
        else:
            raise ValueError(
                f"expected penalty to be a name or a function, got {type(penalty).__name__}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"expected weight to be a number, got {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"expected weight to be finite and at least 0, got {weight!r}")
        self.weight = float(weight)
        self._layers = find_layers(model, example_input, include)
        with torch.no_grad():
            self()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are penalised, with their input sizes."""
        return tuple(self._layers)

    def __call__(self) -> Tensor:
        """The weighted sum over the layers as they stand now, a 0-dim tensor with gradient.

        Its dtype is that of the weights, but at least float32.

        Raises
        ------
        ValueError, ArithmeticError, ConvergenceError
            What the penalty raises, with the name of the layer in front.
        """
        terms = []
        for name, op, count in self._operators():
            with torch.autocast(op.device.type, enabled=False):
                try:
                    terms.append(self._penalty(op) / count)
                except (ValueError, ArithmeticError, RuntimeError) as error:
                    error.args = (f"{name}: {error.args[0]}", *error.args[1:])
                    raise
        total = torch.stack(terms).sum()
        dtype = torch.promote_types(torch.float32, self._layers[0].operator().dtype)
        return (self.weight * total).to(dtype)

    def _operators(self) -> Iterator[tuple[str, ConvOperator, int]]:
        """What to penalise: (name for errors, operator, singular values of one layer).

        For a penalty that adds up over the blocks of a block diagonal matrix, layers of one kind
        are stacked as the groups of one operator.
        """
        kinds: dict[Hashable, list[Layer]] = {}
        for position, layer in enumerate(self._layers):
            stackable = self._penalty in ADDITIVE and is_convolution(layer.name, layer.module)
            kinds.setdefault(layer.kind() if stackable else position, []).append(layer)
        for layers in kinds.values():
            names = ", ".join(repr(layer.name) for layer in layers)
            ops = [layer.operator() for layer in layers]
            count = 1 if self._penalty is penalties.sigma_min else min(ops[0].shape)
            yield f"layer {names}", block_diagonal(ops) if len(ops) > 1 else ops[0], count
