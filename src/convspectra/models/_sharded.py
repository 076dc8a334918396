"""Weights that several ranks hold in pieces, as FSDP2 (``fully_shard``) leaves them.

A singular value needs the whole weight. It is gathered for the time of one call, in the type in
which it is stored, and what changed goes back to the pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def in_pieces(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def piece_of(whole: Tensor, like: Any) -> Tensor:
    """The tensor in pieces as another is, from what every rank has; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Put the modules of FSDP2 back in pieces: after a forward pass some look whole."""
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


@contextmanager
def whole_weights(
    model: nn.Module, modules: Iterable[nn.Module], *, writes: bool = False
) -> Iterator[dict[int, Any]]:
    """Weights and biases of modules as plain parameters for a while; collective.

    Parameters
    ----------
    model : nn.Module
    modules : iterable of nn.Module
    writes : bool
        Whether what changed in them goes back to the pieces.

    Yields
    ------
    dict
        The parameter in pieces by the id of the whole one; empty for a model that is not sharded.
    """
    reshard(model)
    swapped: list[tuple[nn.Module, str, Any]] = []
    wholes: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if not in_pieces(parameter):
                continue
            if id(parameter) not in wholes:
                gathered = parameter.detach().full_tensor()  # type: ignore[union-attr]
                whole = nn.Parameter(gathered, requires_grad=parameter.requires_grad)  # type: ignore[union-attr]
                whole.pieces = parameter  # type: ignore[attr-defined]
                wholes[id(parameter)] = whole
            swapped.append((module, name, parameter))
    for module, name, parameter in swapped:
        module._parameters[name] = wholes[id(parameter)]
    try:
        yield {id(wholes[id(parameter)]): parameter for _, _, parameter in swapped}
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter
        if writes:
            with torch.no_grad():
                for parameter in {id(p): p for _, _, p in swapped}.values():
                    parameter.copy_(piece_of(wholes[id(parameter)], parameter))


def refuse_pieces(modules: Iterable[nn.Module], call: str) -> None:
    """Raise a ValueError for a weight in pieces, which a call would write to."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if in_pieces(parameter):
                raise ValueError(
                    f"expected whole weights, got the {name} of a {type(module).__name__} in "
                    f"pieces on several ranks; call {call} before fully_shard"
                )
