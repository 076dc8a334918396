"""Layers divided among ranks, with fakes for the process group."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convspectra.models._rank_division import RankDivision, divide_among_ranks, refuse_flat_shards


class FakeGroup:
    """What torch.distributed would say of a group, one process at a time."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size)
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)


def loads(costs: list[float], division: RankDivision) -> list[float]:
    return [
        sum(cost for cost, owner in zip(costs, division.owner, strict=True) if owner == rank)
        for rank in range(division.size)
    ]


def of_each_rank(costs: list[float], size: int) -> list[RankDivision]:
    return [divide_among_ranks(costs, FakeGroup(size, rank)) for rank in range(size)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_layer_has_one_owner_and_all_ranks_agree(size, seed):
    costs = torch.rand(11, generator=torch.Generator().manual_seed(seed)).tolist()
    divisions = of_each_rank(costs, size)
    assert len({division.owner for division in divisions}) == 1
    assert [division.rank for division in divisions] == list(range(size))
    own = [index for division in divisions for index in division.own]
    assert sorted(own) == list(range(len(costs)))
    assert all(division.own == sorted(division.own) for division in divisions)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 3])
def test_the_busiest_rank_has_at_most_four_thirds_of_the_least_possible(size, seed):
    """Graham (1969), against all divisions of seven layers."""
    costs = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    best = min(
        max(sum(c for c, o in zip(costs, owner, strict=True) if o == rank) for rank in range(size))
        for owner in itertools.product(range(size), repeat=len(costs))
    )
    worst = max(loads(costs, divide_among_ranks(costs, FakeGroup(size))))
    assert worst <= (4 / 3 - 1 / (3 * size)) * best + 1e-12


@pytest.mark.parametrize(
    ("costs", "size", "owner"),
    [
        ([1, 1, 1, 1], 2, (0, 1, 0, 1)),
        ([1, 5, 2, 4], 2, (0, 0, 1, 1)),
        ([3, 3, 2, 2, 2], 2, (0, 1, 0, 1, 0)),
        ([7], 3, (0,)),
        ([1, 2, 3], 3, (2, 1, 0)),
        ([], 2, ()),
        ([0, 0], 2, (0, 0)),
    ],
)
def test_the_dearest_first_to_who_has_the_least(costs, size, owner):
    division = divide_among_ranks(costs, FakeGroup(size))
    assert division.owner == owner
    assert division.size == size


def test_one_process_has_everything():
    for group in (None, FakeGroup(1)):
        division = divide_among_ranks([3.0, 1.0], group)
        assert division == RankDivision(None, 0, 1, (0, 0))
        assert division.own == [0, 1]


def test_the_default_group_where_nothing_is_initialized(monkeypatch):
    assert not dist.is_initialized()
    assert divide_among_ranks([3.0, 1.0], "default") == RankDivision(None, 0, 1, (0, 0))
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: pytest.fail("is not there"))
    assert divide_among_ranks([3.0, 1.0], "default") == RankDivision(None, 0, 1, (0, 0))


def test_the_default_group_is_the_world(monkeypatch):
    world = FakeGroup(2, 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d._world, "default_pg", world, raising=False)
    monkeypatch.setattr(type(dist.group), "WORLD", world, raising=False)
    division = divide_among_ranks([3.0, 1.0], "default")
    assert division.group is world
    assert (division.rank, division.own) == (1, [1])


@pytest.mark.parametrize("group", ["world", "", "Default"])
def test_other_names_of_groups_are_refused(group):
    with pytest.raises(
        ValueError, match=f"expected process_group to be 'default', .*got '{group}'"
    ):
        divide_among_ranks([1.0], group)


# --- what ranks exchange --------------------------------------------------------------------------


def test_one_process_exchanges_nothing(monkeypatch):
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("nothing to exchange"))
    division, value, values = divide_among_ranks([1.0], None), torch.ones(2), {"a": 1}
    assert division.total(value) is value
    assert division.gathered(values) is values


def test_totals_leave_the_value_of_this_rank_as_it_was(monkeypatch):
    group = FakeGroup(2, 1)

    def all_reduce(value: Tensor, group: FakeGroup) -> None:
        assert group.size == 2
        value += 10

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    value = torch.ones(2)
    assert divide_among_ranks([1.0], group).total(value).tolist() == [11.0, 11.0]
    assert value.tolist() == [1.0, 1.0]


def test_gathered_is_the_union(monkeypatch):
    group = FakeGroup(3, 1)

    def all_gather_object(parts: list, values: dict, group: FakeGroup) -> None:
        assert len(parts) == group.size
        parts[:] = [{"a": 1}, values, {}]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    assert divide_among_ranks([1.0], group).gathered({"b": 2}) == {"a": 1, "b": 2}


# --- sharded models -------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Sequential):
    """By its name the wrapper of FSDP."""


class Sharded(nn.Parameter):
    """By its placements a DTensor."""

    placements = ("Shard(dim=0)",)


def test_fully_sharded_modules_are_named():
    model = nn.Sequential(nn.ReLU(), FullyShardedDataParallel(nn.Conv2d(2, 2, 3)))
    with pytest.raises(ValueError, match="module '1' is wrapped by FullyShardedDataParallel"):
        refuse_flat_shards(model)
    with pytest.raises(ValueError, match="module '' is wrapped by FullyShardedDataParallel"):
        refuse_flat_shards(model[1])


def test_whole_models_pass():
    layers = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)
    refuse_flat_shards(nn.Sequential(*layers))
    refuse_flat_shards(nn.DataParallel(nn.Conv2d(2, 2, 3)))


# --- shares ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(2, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_rank_has_more_than_a_fair_share_and_one_layer(costs, size):
    division = divide_among_ranks(costs, FakeGroup(size))
    assert len(division.owner) == len(costs)
    assert max(loads(costs, division)) <= sum(costs) / size + max(costs, default=0)
