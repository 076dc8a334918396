"""What every rank of a distributed training does; without ranks it is the reference."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.training import near_delta, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convspectra import Schedule, SpectralRegularizer
from convspectra.training import _followed_values as tracked

NAMES = ("conditioning", "frobenius", "stein")
SIZE = (5, 6)
STEPS = 6


class Net(nn.Module):
    """Layers of two kinds, close to the identity: simple singular values of the order of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.c = nn.Conv2d(2, 3, 3, padding=1)
        self.d = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)
        for conv in (self.a, self.b, self.c, self.d):
            near_delta(conv, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(self.b(x)[..., :4])
        return self.head(self.d(self.c(x)).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    return seeded(Net, seed).double()


def regularizer(
    model: nn.Module, name: str = "conditioning", include: Iterable[str] = "abcd", **options
) -> SpectralRegularizer:
    x = torch.zeros(1, 2, *SIZE, dtype=torch.float64)
    schedule = Schedule(warmup=3)
    return SpectralRegularizer(
        model,
        x,
        penalty=name,
        include=list(include),
        **{"weight": 0.3, "schedule": schedule} | options,
    )


def batch(step: int, parts: int = 1) -> list[Tensor]:
    """This rank's share of a batch that is the same for any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, *SIZE, generator=generator, dtype=torch.float64)
    if dist.is_initialized():
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    return list(x.chunk(parts))


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(name: str, include: str, parts: int = 1, fused: bool = False) -> dict[str, Any]:
    """A training loop; all that can be seen of it."""
    model = net()
    whole = parallel(model)
    reg = regularizer(whole, name, include)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    gradients, values, counts = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        chunks = batch(step, parts)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1 or whole is model
            with contextlib.nullcontext() if last else whole.no_sync():
                penalty = reg()
                ((whole(chunk).square().mean() + penalty) / parts).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        values.append(float(penalty.detach()))
        counts.append(reg.step_count)
        optimizer.step()
    return {
        "gradients": gradients,
        "values": values,
        "counts": counts,
        "weights": weights(model),
        "records": reg.report().records(),
        "penalty": reg.report().penalty,
        "state": reg.state_dict(),
        "owner": reg._division.owner,
        "next": float(reg().detach()),
        "next records": reg.report().records(),
    }


def apart(include: str) -> dict[str, Any]:
    """`step` and `add_gradient`, without DistributedDataParallel."""
    model = net()
    reg = regularizer(model, include=include)
    values = []
    for _ in range(3):
        reg.step(0.1)
        values.append(reg.report(settle=False).penalty)
    values.append(reg.add_gradient(0.5))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"values": values, "weights": weights(model), "gradients": gradients}


def resumed(include: str, path: Path) -> dict[str, Any]:
    """The value and the report of a run that goes on from a checkpoint."""
    state = torch.load(path, weights_only=True)
    model = net(seed=1)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), state["weights"], strict=True):
            parameter.copy_(value)
    reg = regularizer(model, include=include)
    reg.load_state_dict(state["state"])
    value = float(reg().detach())
    return {"value": value, "records": reg.report().records(), "step": reg.step_count}


def skipping(include: str) -> dict[str, Any]:
    model = net()
    reg = regularizer(model, include=include, nonfinite="skip")
    reg()
    with torch.no_grad():
        model.c.weight.fill_(torch.nan)
    value = float(reg().detach())
    return {
        "value": value,
        "records": reg.report().records(),
        "skipped": reg.state_dict()["skipped"],
    }


def frozen(include: str) -> dict[str, Any]:
    """Only one layer is trained: the ranks of the others have nothing to do."""
    model = net().requires_grad_(False)
    model.c.weight.requires_grad_()
    reg = regularizer(model, include=include)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        values.append(reg.add_gradient())
        optimizer.step()
    return {"values": values, "weights": weights(model), "count": reg.step_count}


def computed(include: str) -> list[tuple[int, ...]]:
    """The (channels, input size) of what this rank computed exactly."""
    found, original = set(), tracked.svds

    def recorded(op: Any, *args: Any, **options: Any) -> Any:
        found.add((op.weight[0, 0, 0, 0].item(), *op.input_shape))
        return original(op, *args, **options)

    tracked.svds = recorded
    try:
        regularizer(net(), include=include)()
    finally:
        tracked.svds = original
    return sorted(found)


def alone(include: str) -> dict[str, Any]:
    """Without a process group every rank has everything."""
    model = net()
    reg = regularizer(model, include=include, process_group=None)
    value = reg()
    value.backward()
    return {"value": float(value.detach()), "owner": reg._division.owner, "state": reg.state_dict()}


def everything(include: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(name, include) for name in NAMES}
    found["apart"] = apart(include)
    found["skipping"] = skipping(include)
    found["frozen"] = frozen(include)
    found["computed"] = computed(include)
    return found


def worker(rank: int, size: int, include: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    found = everything(include)
    found["accumulated"] = train("conditioning", include, parts=2, fused=True)
    found["resumed"] = resumed(include, folder / "one.pt")
    found["alone"] = alone(include)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
