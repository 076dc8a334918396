"""Weights in pieces, by FSDP2: the same as in one process; by FSDP1 they are refused."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.ranks import SIZE, net, regularizer
from helpers.sharded import NAMES, everything, sharded, worker
from helpers.training import close
from torch import Tensor, nn

import convspectra as cs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process, and two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.set_num_threads(1)
    one = everything()
    multiprocessing.set_forkserver_preload(["torch", "convspectra"])
    mp.start_processes(worker, (2, folder), 2, start_method="forkserver")
    return one, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_one_process(runs: Any, name: str, after_forward: bool) -> None:
    one, ranks = runs
    expected = one[f"{name} {after_forward}"]
    for found in (rank[f"{name} {after_forward}"] for rank in ranks):
        assert found["values"] == pytest.approx(expected["values"], rel=1e-6)
        assert found["count"] == expected["count"]
        for got, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert close(got, wanted, 1e-6)
        assert close(found["weights"], expected["weights"], 1e-6)
        for mine, other in zip(found["records"], expected["records"], strict=True):
            for key, value in other.items():
                number = isinstance(value, float)
                assert mine[key] == (pytest.approx(value, rel=1e-6) if number else value), key


@pytest.mark.parametrize("name", NAMES)
def test_steps_write_to_the_pieces(runs: Any, name: str) -> None:
    one, ranks = runs
    expected = one[f"{name} apart"]
    start = [p.detach() for p in net().parameters()]
    assert not close(expected["weights"], start, 1e-3)
    for found in (rank[f"{name} apart"] for rank in ranks):
        assert found["added"] == pytest.approx(expected["added"], rel=1e-6)
        assert found["count"] == expected["count"]
        assert close(found["weights"], expected["weights"], 1e-6)
        assert close(found["gradients"], expected["gradients"], 1e-6)


@pytest.fixture
def gloo(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_comes_before_sharding_is_named(gloo: None) -> None:
    model, x = sharded(net()), torch.randn(4, 2, *SIZE, dtype=torch.float64)
    for call in (cs.precondition, cs.prepare):
        with pytest.raises(
            ValueError, match=rf"in pieces on several ranks; call cs\.{call.__name__} before"
        ):
            call(model, x)


class FullyShardedDataParallel(nn.Module):
    """Like the one of FSDP1, which is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_model_wrapped_by_fsdp1_is_refused() -> None:
    with pytest.raises(ValueError, match="module '1' is wrapped by FullyShardedDataParallel, who"):
        regularizer(nn.Sequential(nn.Identity(), FullyShardedDataParallel(net())))
