"""One network, by every door: as a module, TorchScript, ``torch.export``, ONNX, a checkpoint."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers.padding_networks import NETWORKS, Network, built
from torch import Tensor, nn

from convspectra.models import NamedOperator, named_operators
from convspectra.models.files import load_operators


def traced(net: nn.Module, x: Tensor, path: Path) -> str | None:
    torch.jit.trace(net, x, check_trace=False).save(str(path))


def exported(net: nn.Module, x: Tensor, path: Path) -> str | None:
    torch.export.save(torch.export.export(net, (x,)), path)


def onnx_by_tracing(net: nn.Module, x: Tensor, path: Path) -> str | None:
    torch.onnx.export(net, (x,), str(path), dynamo=False)


def onnx_by_export(net: nn.Module, x: Tensor, path: Path) -> str | None:
    pytest.importorskip("onnxscript")
    torch.onnx.export(net, (x,), str(path), dynamo=True, verbose=False)


def checkpoint(net: nn.Module, x: Tensor, path: Path) -> str | None:
    torch.save(net.state_dict(), path)
    return "networks_of_this_test:build"


DOORS = {
    "net.pt": traced,
    "net.pt2": exported,
    "traced.onnx": onnx_by_tracing,
    "exported.onnx": onnx_by_export,
    "net.pth": checkpoint,
}


@pytest.fixture
def quiet():
    """The exporters talk."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(level)


def values(named: NamedOperator) -> Tensor:
    """Singular values, by a dense decomposition."""
    return torch.linalg.svdvals(named.operator.to_dense().detach().double())


def through(door: str, name: str, folder: Path, monkeypatch) -> list[NamedOperator]:
    module = types.ModuleType("networks_of_this_test")
    module.build = lambda: built(name)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    net, shape = built(name), NETWORKS[name][1]
    path = folder / door
    factory = DOORS[door](net, torch.randn(1, *shape), path)
    return load_operators(path, [shape], factory=factory)[1]


QUICK = {"net.pt": 20, "net.pt2": 5, "traced.onnx": 12, "exported.onnx": 3, "net.pth": 3}
"""How many networks go by each door in every run; the rest is slow."""

CASES = [
    pytest.param(door, name, marks=[pytest.mark.slow] * (place >= QUICK[door]))
    for door in DOORS
    for place, name in enumerate(NETWORKS)
]


@pytest.mark.parametrize(("door", "name"), CASES)
def test_the_same_numbers_by_every_door(tmp_path, monkeypatch, quiet, door, name):
    expected = named_operators(built(name), torch.randn(1, *NETWORKS[name][1]))
    found = through(door, name, tmp_path, monkeypatch)
    assert [n.skipped for n in found] == [n.skipped for n in expected] == [""] * len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        s = values(theirs)
        torch.testing.assert_close(values(ours), s, rtol=1e-6, atol=1e-6 * float(s[0]))
        # The same is said of it, whatever the operations are called.
        for words in ("judged as if", "transposed convolutions cannot do"):
            assert (words in "".join(ours.notes)) == (words in "".join(theirs.notes))


def test_what_the_network_applies():
    """Eager, which the other doors are compared with, against the networks themselves."""
    for name in ("causal", "as TensorFlow pads", "around", "zeros", "circular"):
        net, shape = built(name), NETWORKS[name][1]
        first = named_operators(net, torch.randn(1, *shape))[0]
        layer = net.get_submodule(first.name)
        layer.bias.data.zero_()
        x, seen = torch.randn(1, *shape), []
        handle = layer.register_forward_hook(lambda module, inputs, out, s=seen: s.append(out))
        with torch.no_grad():
            net(x)
        handle.remove()
        torch.testing.assert_close(first.operator.matvec(x), seen[0])


def test_attention_traced_without_gradients(tmp_path):
    """PyTorch has one operation for a whole layer of a transformer then."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.layer(x)
        return net.attention(x, x, x)[0]

    torch.manual_seed(0)
    net = Network(
        forward,
        layer=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    ).eval()
    x, path = torch.randn(1, 3, 4), tmp_path / "net.pt"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, x).save(str(path))
    found, expected = load_operators(path, [(3, 4)])[1], named_operators(net, x)
    assert len(expected) == 10
    assert [n.name for n in found] == [n.name for n in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.operator.weight, theirs.operator.weight)
