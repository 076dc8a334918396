"""What every rank of a training with fully sharded weights does; one process is the reference."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.ranks import batch, net, regularizer
from torch import Tensor, nn

NAMES = ("conditioning", "stein", "isometry")
STEPS = 4


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def sharded(model: nn.Module) -> nn.Module:
    """Two units of FSDP2: one layer, and the rest with it."""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.c, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(name: str, after_forward: bool) -> dict[str, Any]:
    """Training with the penalty in the loss, before or after the forward pass."""
    model = sharded(net())
    reg = regularizer(model, name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values, gradients = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        (x,) = batch(step)
        if after_forward:
            loss = model(x).square().mean()
            penalty = reg()
        else:
            penalty = reg()
            loss = model(x).square().mean()
        (loss + penalty).backward()
        gradients.append([whole(p.grad) for p in model.parameters()])
        values.append(float(penalty.detach()))
        optimizer.step()
    return {
        "values": values,
        "gradients": gradients,
        "weights": [whole(p) for p in model.parameters()],
        "records": reg.report().records(),
        "count": reg.step_count,
    }


def apart(name: str) -> dict[str, Any]:
    """`step` and `add_gradient`; nothing of the model is left as it should not be."""
    model = sharded(net())
    reg = regularizer(model, name)
    before = [(key, type(p).__name__) for key, p in model.named_parameters()]
    for _ in range(3):
        model(batch(0)[0])
        reg.step(0.1)
    reg.refresh()
    added = reg.add_gradient(0.5)
    again = reg.add_gradient(0.5)  # the weights have not changed: no step more
    assert [(key, type(p).__name__) for key, p in model.named_parameters()] == before
    return {
        "added": (added, again),
        "count": reg.step_count,
        "weights": [whole(p) for p in model.parameters()],
        "gradients": [whole(p.grad) for p in model.parameters() if p.grad is not None],
    }


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {f"{name} apart": apart(name) for name in NAMES}
    for name in NAMES:
        for after in (False, True):
            found[f"{name} {after}"] = train(name, after)
    return found


def worker(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(everything(), folder / f"{rank}.pt")
    dist.destroy_process_group()
