"""SpectralRegularizer on several processes against one process, and what it refuses there."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.strategies import one_thread as one_thread
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convspectra import Schedule, SpectralRegularizer
from convspectra.models._rank_division import divide_among_ranks
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
        with torch.no_grad():
            for conv in (self.a, self.b, self.c, self.d):
                conv.weight.mul_(0.2)
                channels = range(conv.in_channels)
                conv.weight[channels, channels, 1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(self.b(x)[..., :4])
        return self.head(self.d(self.c(x)).mean((2, 3)))


ALL = {"a@5x6": "a", "b@5x6": "b", "b@5x4": "b", "c@5x4": "c", "d@5x4": "d"}


def keys(include: str) -> list[str]:
    """The layers whose names are in a string."""
    return [key for key, name in ALL.items() if name in include]


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


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


# --- what every rank does; without ranks it is the reference --------------------------------------


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


# --- the runs to compare --------------------------------------------------------------------------


class Runs(NamedTuple):
    """The same things done by one process and by several."""

    include: str
    one: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[(2, "abcd"), (3, "ac")], ids=["2 of 5", "3 of 2"])
def runs(request, tmp_path_factory) -> Runs:
    """So many ranks with so many layers: in the second case one rank has none."""
    size, include = request.param
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    assert not dist.is_initialized()
    one = everything(include)
    torch.save({key: one["conditioning"][key] for key in ("weights", "state")}, folder / "one.pt")
    # The ranks are forked from a process that has imported torch once, and nothing else.
    multiprocessing.set_forkserver_preload(["torch", "convspectra"])
    mp.start_processes(worker, (size, include, folder), size, start_method="forkserver")
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
    return Runs(include, one, ranks)


def close(got: list[Tensor], expected: list[Tensor], tol: float = 1e-6) -> bool:
    size = max(float(tensor.abs().max()) for tensor in expected)
    assert size > 0
    return all(
        torch.allclose(mine, other, rtol=tol, atol=tol * size)
        for mine, other in zip(got, expected, strict=True)
    )


def assert_records(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, other in zip(got, expected, strict=True):
        for key, value in other.items():
            number = isinstance(value, float)
            assert mine[key] == (pytest.approx(value, rel=1e-6) if number else value), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_process(runs, name):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found[name]["values"] == pytest.approx(one[name]["values"], rel=1e-6)
        assert found[name]["values"] == ranks[0][name]["values"], "the same on every rank"
        assert found[name]["counts"] == list(range(STEPS))
        for got, expected in zip(found[name]["gradients"], one[name]["gradients"], strict=True):
            assert close(got, expected)
        assert close(found[name]["weights"], one[name]["weights"])
        assert found[name]["next"] == pytest.approx(one[name]["next"], rel=1e-6)


def test_the_penalty_is_a_part_of_these_gradients(runs):
    """Else nothing above would notice a gradient that the ranks lose."""
    one = runs.one
    for first, second in (("conditioning", "frobenius"), ("conditioning", "stein")):
        assert not close(one[first]["gradients"][3], one[second]["gradients"][3], 1e-3)


def test_accumulated_gradients_are_reduced_once(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        got, expected = found["accumulated"], one["conditioning"]
        assert got["counts"] == list(range(STEPS)), "on ranks without a layer too"
        assert got["values"] == pytest.approx(expected["values"], rel=1e-6)
        assert close(got["gradients"][-1], expected["gradients"][-1])
        assert close(got["weights"], expected["weights"])


@pytest.mark.parametrize("name", NAMES)
def test_report_and_state_are_complete_on_every_rank(runs, name):
    include, one, ranks = runs
    for found in ranks:
        assert_records(found[name]["records"], one[name]["records"])
        assert_records(found[name]["next records"], one[name]["next records"])
        assert found[name]["penalty"] == pytest.approx(one[name]["penalty"], rel=1e-6)
        state = found[name]["state"]
        assert list(state["layers"]) == keys(include)
        assert state["step"] == STEPS - 1
        for key, expected in one[name]["state"]["layers"].items():
            if name != "conditioning":
                assert state["layers"][key] is None or "vectors" not in state["layers"][key]
                continue
            assert torch.equal(
                state["layers"][key]["vectors"],
                ranks[0][name]["state"]["layers"][key]["vectors"],
            )
            assert state["layers"][key]["vectors"].shape == expected["vectors"].shape


def test_the_layers_are_divided_by_cost(runs):
    include, one, ranks = runs
    owners = ranks[0]["conditioning"]["owner"]
    assert all(found["conditioning"]["owner"] == owners for found in ranks)
    assert one["conditioning"]["owner"] == (0,) * len(keys(include))
    # Costs: a, b and c 1080 = 36 * 30 = 54 * 20, b again 36 * 20, d 81 * 20.
    assert owners == ((1, 1, 1, 0, 0) if len(ranks) == 2 else (0, 1))


def test_every_layer_is_computed_on_one_rank_only(runs):
    include, one, ranks = runs
    parts = [found["computed"] for found in ranks]
    assert sorted(layer for part in parts for layer in part) == one["computed"]
    assert len(one["computed"]) == len(keys(include))
    assert sum(bool(part) for part in parts) == 2


def test_steps_and_added_gradients_are_the_same_on_every_rank(runs):
    include, one, ranks = runs
    for found in ranks:
        got = found["apart"]
        for key in ("weights", "gradients"):
            assert all(map(torch.equal, got[key], ranks[0]["apart"][key]))
            assert close(got[key], one["apart"][key])
        assert got["values"] == pytest.approx(one["apart"]["values"], rel=1e-6)
    assert not all(map(torch.equal, one["apart"]["weights"], weights(net())))
    assert len(one["apart"]["gradients"]) == len(include)


def test_a_state_of_one_process_goes_on_with_more(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found["resumed"]["value"] == pytest.approx(one["conditioning"]["next"], rel=1e-6)
        assert found["resumed"]["step"] == STEPS
        assert_records(found["resumed"]["records"], one["conditioning"]["next records"])


def test_a_state_of_several_processes_goes_on_with_one(runs, tmp_path):
    expected = runs.ranks[-1]["conditioning"]
    torch.save({key: expected[key] for key in ("weights", "state")}, tmp_path / "state.pt")
    got = resumed(runs.include, tmp_path / "state.pt")
    assert got["value"] == pytest.approx(expected["next"], rel=1e-6)
    assert got["step"] == STEPS
    assert_records(got["records"], expected["next records"])


def test_a_layer_left_out_is_known_on_every_rank(runs):
    include, one, ranks = runs
    for found in ranks:
        got = found["skipping"]
        assert got["value"] == pytest.approx(one["skipping"]["value"], rel=1e-6)
        assert_records(got["records"], one["skipping"]["records"])
        assert got["skipped"] == {key: int(key.startswith("c")) for key in keys(include)}


def test_ranks_with_nothing_to_train_keep_step(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found["frozen"]["count"] == one["frozen"]["count"] == 2
        assert found["frozen"]["values"] == pytest.approx(one["frozen"]["values"], rel=1e-6)
        assert close(found["frozen"]["weights"], one["frozen"]["weights"])
    assert len(set(one["frozen"]["values"])) == 3


def test_without_a_group_every_rank_has_everything(runs):
    include, one, ranks = runs
    for found in ranks:
        assert found["alone"]["owner"] == (0,) * len(keys(include))
        assert found["alone"]["value"] == pytest.approx(one["conditioning"]["values"][0], rel=1e-9)
        assert all(found["alone"]["state"]["layers"].values())


# --- division without processes -------------------------------------------------------------------


def test_one_process_needs_no_group():
    division = divide_among_ranks([3.0, 1.0], "default")
    assert (division.group, division.size, division.own) == (None, 1, [0, 1])


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="expected process_group to be 'default', None or a proc"):
        regularizer(net(), process_group="gloo")


# --- weights in pieces ----------------------------------------------------------------------------


@pytest.fixture
def gloo(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHARDED = r"is a DTensor, sharded by FSDP2 .* needs? its whole weight; use DistributedDataParallel"


def shard(*modules: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def test_a_model_sharded_by_fsdp2_is_refused(gloo):
    model = net()
    shard(model)
    with pytest.raises(ValueError, match=rf"^parameter 'a\.weight' {SHARDED}"):
        regularizer(model)


def test_a_model_sharded_by_fsdp2_is_refused_after_a_forward_pass_too(gloo):
    model = net()
    shard(model)
    model(torch.zeros(1, 2, *SIZE, dtype=torch.float64))
    assert not any(hasattr(parameter, "placements") for parameter in model.parameters())
    with pytest.raises(ValueError, match=rf"^parameter 'a\.weight' {SHARDED}"):
        regularizer(model)


def test_a_layer_sharded_by_fsdp2_is_refused(gloo):
    model = net()
    shard(model.c)
    with pytest.raises(ValueError, match=rf"^parameter 'c\.weight' {SHARDED}"):
        regularizer(model)
    assert "c" not in {layer.name for layer in regularizer(model, exclude="c").layers}


def test_convolutions_left_out_of_fsdp2_are_penalised(gloo):
    """As the message says that they may be."""
    model = net()
    shard(model.head)
    assert hasattr(model.head.weight, "placements")
    expected = float(regularizer(net())().detach())
    assert float(regularizer(model)().detach()) == pytest.approx(expected, rel=1e-12)


def test_a_linear_layer_that_is_included_is_refused_too(gloo):
    model = net()
    shard(model.head)
    with pytest.raises(ValueError, match=rf"^parameter 'head\.weight' {SHARDED}"):
        regularizer(model, include=["a", "head"])


class FullyShardedDataParallel(nn.Module):
    """Like the one of FSDP1, which is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_model_wrapped_by_fsdp1_is_refused():
    with pytest.raises(ValueError, match="module '1' is wrapped by FullyShardedDataParallel, who"):
        regularizer(nn.Sequential(nn.Identity(), FullyShardedDataParallel(net())))
