"""Layers divided among the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_GROUP = "default"
"""A word for the group that ``torch.distributed`` was started with, if it was."""


@dataclass(frozen=True)
class RankDivision:
    """Who computes what.

    Attributes
    ----------
    group : ProcessGroup or None
        None where one process has everything.
    rank, size : int
    owner : tuple of int
        The rank of each layer.
    """

    group: Any
    rank: int
    size: int
    owner: tuple[int, ...]

    @property
    def own(self) -> list[int]:
        """The layers of this rank."""
        return [i for i, rank in enumerate(self.owner) if rank == self.rank]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; collective."""
        if self.group is not None:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value

    def gathered(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """The union of what the ranks hold, on every rank; collective."""
        if self.group is None:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values, group=self.group)
        return {key: value for part in parts for key, value in part.items()}


def divide_among_ranks(costs: Sequence[float], group: Any) -> RankDivision:
    """Every layer to the rank with the least to do so far, the dearest first."""
    if isinstance(group, str):
        if group != DEFAULT_GROUP:
            raise ValueError(
                f"expected process_group to be {DEFAULT_GROUP!r}, None or a process group, got "
                f"{group!r}"
            )
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return RankDivision(None, 0, 1, (0,) * len(costs))
    load = [0.0] * size
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[i] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[i]] += costs[i]
    return RankDivision(group, dist.get_rank(group), size, tuple(owner))


def refuse_flat_shards(model: torch.nn.Module) -> None:
    """Raise a ValueError where FSDP1 has made one flat parameter of the weights of many layers."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"module {name!r} is wrapped by FullyShardedDataParallel, whose ranks hold pieces "
                "of a flat parameter: the singular values of a layer need its whole weight; use "
                "fully_shard (FSDP2) or DistributedDataParallel, or penalize before wrapping"
            )
