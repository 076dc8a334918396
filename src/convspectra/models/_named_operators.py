"""The layers of a model as named operators, wherever the model came from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models._forward_pass import check_has_data, evaluated, recorded_pass
from convspectra.models._recorder import LAZY, Recorder, Use, is_lazy, not_linear
from convspectra.models._selection import modules_of, unwrapped
from convspectra.operator import LAYER_TYPES, ConvOperator

_UNREACHED = "the forward pass of the example input does not reach it"
"""Reason for a layer that the pass does not come to."""

_UNREAD = "no convolution or product with a matrix reads its {}"
"""Reason for a module with a matrix that nothing multiplies by; the parameters are in braces."""


OUTPUT = -1
"""The place of the model's output among what layers feed."""


@dataclass(frozen=True)
class Feed:
    """A way from the output of a layer to another, with no layer between.

    Attributes
    ----------
    place : int
        Of the other layer in the forward pass, from 0; -1 for the model's output.
    gain : float
        What a typical gradient is multiplied by on its way back along it.
    """

    place: int
    gain: float


@dataclass(frozen=True)
class NamedOperator:
    """One layer at one input size, or one that was passed over.

    Attributes
    ----------
    name, type : str
        As in the model or file, such as "layer1.0.conv1" and "Conv2d"; a model that is one layer
        has its type for a name.
    operator : ConvOperator, optional
        None if the layer was passed over.
    scale : Tensor, optional
        (h,), what the batch normalization that alone reads the output multiplies each channel by.
    batch_norm : str
        Name of that normalization; "" if there is none.
    skipped : str
        Why there is no operator.
    notes : tuple of str
        What else a reader should know, such as a separate padding before the layer.
    uses : int
        Calls at this input size in the forward pass.
    place : int
        In the forward pass, from 0; -1 where that is not known.
    feeds : tuple of Feed
        What reads its output, with activations, normalizations and averages between. Backward ways,
        of a layer that is called several times, are left out.
    followed_by : tuple of str
        Activations and normalizations that act on its output before another layer does.
    """

    name: str
    type: str
    operator: ConvOperator | None
    scale: Tensor | None = None
    batch_norm: str = ""
    skipped: str = ""
    notes: tuple[str, ...] = ()
    uses: int = 1
    place: int = -1
    feeds: tuple[Feed, ...] = ()
    followed_by: tuple[str, ...] = ()


def named_operators(model: nn.Module, example_input: Any) -> list[NamedOperator]:
    """Every linear layer that one forward pass uses, in its order, then those it does not.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; its modes and buffers are left as they
        were. ``torch.compile`` and (Distributed)DataParallel around it are looked through.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments

    Returns
    -------
    list of NamedOperator
        One for each layer and input size. A layer that is no linear map that `ConvOperator` knows
        has `skipped` set. A convolution or matrix product that the model calls as a function is
        listed under the name of its weight.

    Raises
    ------
    ValueError
        If the model is not an ``nn.Module`` or has weights on the meta device.

    Notes
    -----
    Cost: one forward pass. Memory: the output of every layer at once. Errors of the forward
    pass itself are not changed.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.PReLU())
    >>> [(t.name, t.type, t.batch_norm) for t in named_operators(model, torch.zeros(1, 1, 8, 8))]
    [('0', 'Conv2d', '1')]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    lazy = {name: type(module).__name__ for name, module in modules_of(model) if _is_lazy(module)}
    if lazy:
        model = copy.deepcopy(model)  # its forward pass makes the weights
    check_has_data(model)
    with evaluated(model):
        return traced_operators(model, example_input, lazy)


def traced_operators(
    model: nn.Module, example_input: Any, lazy: Mapping[str, str] = MappingProxyType({})
) -> list[NamedOperator]:
    """The same as `named_operators`, in the mode that the model is in and without its checks.

    The modules named in `lazy`, with their types, are passed over. Takes TorchScript and exported
    programs too.
    """
    recorder = recorded_pass(model, example_input, lazy)
    groups = _grouped(recorder.uses)
    feeds = _squared_gains(groups, recorder.flow.output_gains)
    reached = [_named_operator(i, uses, feeds[i]) for i, uses in enumerate(groups)]
    return reached + list(_unread(model, recorder, lazy))


def with_flow(
    named: Sequence[NamedOperator], uses: Sequence[Use], output_gains: Mapping[Use, float]
) -> list[NamedOperator]:
    """Layers that a file lists, each with its place, what it feeds and what follows it.

    Parameters
    ----------
    named, uses : sequence of NamedOperator and of Use
        The same layers, each called once.
    output_gains : mapping of Use to float
        Mean square gains of gradients from the model's output.
    """
    squares = _squared_gains([[use] for use in uses], output_gains)
    return [
        replace(
            layer,
            place=place,
            feeds=_feeds(squares[place], layer.scale),
            followed_by=_followed_by([use], layer.batch_norm),
        )
        for place, (layer, use) in enumerate(zip(named, uses, strict=True))
    ]


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(
        map(is_lazy, module.parameters(recurse=False))
    )


def _grouped(uses: list[Use]) -> list[list[Use]]:
    """The uses of one layer at one size together, in the order of the first.

    Several weights computed from one stored array are several layers, with a number behind the
    name.
    """
    groups: dict[Any, list[Use]] = {}
    weights: dict[str, list[Tensor]] = {}
    for use in uses:
        op = use.operator
        if op is not None:
            known = weights.setdefault(use.name, [])
            place = next((i for i, w in enumerate(known) if _equal(w, op.weight)), len(known))
            known += [op.weight] * (place == len(known))
            use.name += f" ({place + 1})" * (place > 0)
        key = (use.name, use.skipped, op and (op.geometry, op.groups, op.transposed, op.shape))
        groups.setdefault(key, []).append(use)
    return list(groups.values())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _squared_gains(
    groups: list[list[Use]], output_gains: Mapping[Use, float]
) -> list[dict[int, float]]:
    """The ways on from the last use of each group to the first of others, and their gains."""
    places = {uses[-1]: place for place, uses in enumerate(groups)}
    found: list[dict[int, float]] = [{} for _ in groups]
    for target, uses in enumerate(groups):
        for source, square in uses[0].fed_by.items():
            place = places.get(source, target)
            if place < target:
                found[place][target] = square
    for source, square in output_gains.items():
        if source in places:
            found[places[source]][OUTPUT] = square
    return found


def _named_operator(place: int, uses: list[Use], squares: Mapping[int, float]) -> NamedOperator:
    first = uses[0]
    notes = list(dict.fromkeys(note for use in uses for note in use.notes))
    scale, batch_norm, remark = _normalization(uses)
    if remark:
        notes.append(remark)
    return NamedOperator(
        first.name or first.type,
        first.type,
        first.operator,
        scale,
        batch_norm,
        first.skipped,
        tuple(notes),
        len(uses),
        place,
        _feeds(squares, scale),
        _followed_by(uses, batch_norm),
    )


def _feeds(squares: Mapping[int, float], scale: Tensor | None) -> tuple[Feed, ...]:
    """The ways on; the scale that is folded into the layer is not in them."""
    folded = 1.0 if scale is None else float(scale.square().mean())
    return tuple(Feed(i, math.sqrt(square / (folded or 1.0))) for i, square in squares.items())


def _followed_by(uses: list[Use], batch_norm: str) -> tuple[str, ...]:
    """Words for what acts on the output; a batch normalization that is named is left out."""
    normalizations = dict.fromkeys(kind for use in uses for kind in use.normalizations)
    if batch_norm:
        normalizations.pop("batch normalization", None)
    activations = (
        f"{a.name} {a.slope:g}" if a.slope else a.name for use in uses for a in use.activations
    )
    return tuple(dict.fromkeys([*normalizations, *activations]))


def _normalization(uses: list[Use]) -> tuple[Tensor | None, str, str]:
    """Scale and name of the normalization that alone reads every use, or a note why not."""
    if uses[0].operator is None:
        return None, "", ""
    found = [next((r for r in use.readers if r.scale is not None), None) for use in uses]
    names = sorted({reader.name for reader in found if reader is not None})
    if not names:
        return None, "", ""
    if len(names) > 1 or None in found:
        listed = " or ".join(names)
        return None, "", f"not every use is followed by the same batch normalization ({listed})"
    others = [r for use in uses for r in use.readers if r.name != names[0]]
    if others or any(len(use.readers) > 1 for use in uses):
        listed = ", ".join(dict.fromkeys(r.name for r in others)) or names[0]
        return None, "", f"batch normalization {names[0]} is not alone to read it: {listed} too"
    assert found[0] is not None
    return found[0].scale, names[0], ""


def _unread(
    model: nn.Module, recorder: Recorder, lazy: Mapping[str, str]
) -> Iterator[NamedOperator]:
    """The modules with a matrix that no use of the pass stands for."""
    covered = {use.name for use in recorder.uses} | recorder.taken
    if "" in covered:  # the model itself is one layer
        return
    for name, module in modules_of(model):
        if any(name == known or name.startswith(f"{known}.") for known in covered):
            continue
        matrices = [
            parameter
            for parameter, value in module.named_parameters(recurse=False)
            if _is_matrix(value) and _qualified(name, parameter) not in recorder.read
        ]
        unreached = name not in recorder.reached
        attention = isinstance(module, nn.MultiheadAttention) and unreached
        listed = (
            isinstance(module, LAYER_TYPES) or attention or bool(not_linear(module)) or name in lazy
        )
        if not listed and (not matrices or _is_normalization(module)):
            continue
        covered.add(name or type(module).__name__)
        kind = getattr(module, "original_name", type(module).__name__)
        if name in lazy:
            reason = LAZY
        elif listed and unreached:
            reason = not_linear(module) or _UNREACHED
        else:
            reason = _UNREAD.format(" or ".join(matrices) or "weight")
        yield NamedOperator(name or kind, kind, None, skipped=reason, uses=0)


def _qualified(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and sum(n > 1 for n in parameter.shape) > 1


def _is_normalization(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.PReLU))
