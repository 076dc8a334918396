"""A penalty on every convolution of a model, for a training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convspectra import penalties
from convspectra.capacitance import is_square_toeplitz
from convspectra.layers import Layer, Predicate, find_layers, is_convolution
from convspectra.operator import ConvOperator, block_diagonal

Penalty: TypeAlias = Callable[[ConvOperator], Tensor]

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
        terms = [term for layers in self._kinds() for term in self._terms(layers)]
        total = torch.stack(terms).sum()
        dtype = torch.promote_types(torch.float32, self._layers[0].operator().dtype)
        return (self.weight * total).to(dtype)

    def _kinds(self) -> Iterable[list[Layer]]:
        """The layers, those that can be the groups of one operator together.

        That takes a penalty that adds up over the blocks of a block diagonal matrix, and a way to
        compute it that costs no more for the blocks together than one by one.
        """
        kinds: dict[Hashable, list[Layer]] = {}
        for position, layer in enumerate(self._layers):
            stackable = is_convolution(layer.name, layer.module) and (
                self._penalty is penalties.frobenius
                or (self._penalty is penalties.stein and is_square_toeplitz(layer.operator()))
            )
            kinds.setdefault(layer.kind() if stackable else position, []).append(layer)
        return kinds.values()

    def _terms(self, layers: list[Layer]) -> list[Tensor]:
        """The penalty of layers of one kind: their sum, or one by one where that fails."""
        ops = [layer.operator() for layer in layers]
        if len(ops) > 1:
            try:
                return [self._value(block_diagonal(ops), min(ops[0].shape))]
            except (ValueError, ArithmeticError):
                pass  # Too large together, or one of them singular: below it is named.
        return [self._term(layer.name, op) for layer, op in zip(layers, ops, strict=True)]

    def _term(self, name: str, op: ConvOperator) -> Tensor:
        try:
            return self._value(op, min(op.shape))
        except (ValueError, ArithmeticError, RuntimeError) as error:
            reason = [f"layer {name!r}", *map(str, error.args[:1])]
            error.args = (": ".join(reason), *error.args[1:])
            raise

    def _value(self, op: ConvOperator, count: int) -> Tensor:
        """The penalty, divided by the number of singular values of one layer."""
        with torch.autocast(op.device.type, enabled=False):
            return self._penalty(op) / (1 if self._penalty is penalties.sigma_min else count)
