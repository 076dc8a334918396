"""Weights in pieces, by FSDP, are refused by SpectralRegularizer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import SIZE, net, regularizer
from torch import Tensor, nn


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


def test_convolutions_left_out_of_fsdp2_are_penalized(gloo):
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
