"""ConvOperator from a module of torch.nn."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.operators import even_same_padding_warns
from helpers.strategies import random, same_pairs
from torch import nn

from convspectra import ConvOperator
from convspectra.testing import assert_adjoint, assert_matches_dense, naive_dense

MODULES = {
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 1, 2, 2), (9,)),
    "Conv2d": (nn.Conv2d(2, 3, (3, 2), (1, 2), (2, 0), (1, 2), padding_mode="reflect"), (4, 6)),
    "Conv3d": (nn.Conv3d(2, 1, 2, padding="same", padding_mode="circular"), (2, 3, 2)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, 3, 1, 2, 2, True, 1), (4,)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, (2, 3), 2, (0, 1), (1, 0)), (3, 2)),
    "ConvTranspose3d": (nn.ConvTranspose3d(1, 2, 2, 1, 0, 1, dilation=2), (2, 1, 2)),
    "Linear": (nn.Linear(5, 7), ()),
    "no bias": (nn.Conv2d(1, 2, 3, bias=False, padding="valid"), (4, 5)),
}


@pytest.mark.parametrize(("module", "size"), MODULES.values(), ids=MODULES.keys())
def test_from_module(module, size):
    op = ConvOperator.from_module(module, size)
    assert op.weight is module.weight
    dense = naive_dense(module, op.input_shape)
    assert_matches_dense(op, dense)
    assert_adjoint(op)
    offset = module(torch.zeros(1, *op.input_shape))
    x = random(2, *op.input_shape, dtype=torch.float32)
    torch.testing.assert_close(op.matvec(x) + offset, module(x))


def test_from_module_of_even_same_padding():
    conv = nn.Conv2d(2, 2, (4, 2), padding="same", dilation=(1, 3))
    op = ConvOperator.from_module(conv, (5, 4))
    with even_same_padding_warns():
        assert_matches_dense(op, naive_dense(conv, (2, 5, 4)))
    assert op.geometry.padding == tuple(same_pairs((4, 2), (1, 3)))


def test_from_module_takes_an_int_for_every_axis():
    assert ConvOperator.from_module(nn.Conv2d(1, 1, 3), 5).shape == (9, 25)


def test_from_module_of_a_parametrized_weight():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1))
    op = ConvOperator.from_module(conv, (4, 3))
    assert_matches_dense(op, naive_dense(conv, (2, 4, 3)))
    op.to_dense().square().sum().backward()
    gradients = [p.grad for name, p in conv.named_parameters() if "parametrizations" in name]
    assert len(gradients) == 2
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("lazy", "shape"),
    [
        (nn.LazyConv1d(2, 3), (3, 5)),
        (nn.LazyConv2d(2, 3), (3, 5, 4)),
        (nn.LazyConvTranspose2d(2, 3), (3, 5, 4)),
        (nn.LazyLinear(2), (3,)),
    ],
    ids=["Conv1d", "Conv2d", "ConvTranspose2d", "Linear"],
)
def test_lazy_modules_need_a_forward_pass(lazy, shape):
    with pytest.raises(ValueError, match=r"got the lazy Lazy.*; run one forward pass first"):
        ConvOperator.from_module(lazy, shape[1:])
    lazy(torch.zeros(1, *shape))
    op = ConvOperator.from_module(lazy, shape[1:])
    assert op.input_shape == shape
    assert_matches_dense(op, naive_dense(lazy, shape))


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.BatchNorm2d(3), nn.Bilinear(2, 2, 2), nn.Sequential(nn.Conv2d(1, 1, 1))],
)
def test_from_module_names_what_it_takes(module):
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"nn.Conv1d, .* nn.Linear, got {name}$"):
        ConvOperator.from_module(module, (4, 4))


def test_from_module_refuses_the_meta_device():
    with pytest.raises(ValueError, match="meta device"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3, device="meta"), (4, 4))


def test_from_module_refuses_a_wrong_number_of_axes():
    with pytest.raises(ValueError, match=r"input_size of 2 integers .* got \(4, 4, 4\)"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3), (4, 4, 4))
    with pytest.raises(ValueError, match="input_size of 2 integers"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="input_size of 0 integers"):
        ConvOperator.from_module(nn.Linear(1, 1), (4,))


# --- weights that are computed before each pass ---------------------------------------------------


def old_style(kind: str) -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        if kind == "weight_norm":
            return torch.nn.utils.weight_norm(conv)
        if kind == "spectral_norm":
            return torch.nn.utils.spectral_norm(conv)
    return torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_weights_of_old_hooks_are_computed_again(kind):
    conv, other = old_style(kind).eval(), old_style(kind).eval()
    conv.load_state_dict(other.state_dict())
    op = ConvOperator.from_module(conv, (5, 4))
    other(torch.zeros(1, 3, 5, 4))  # the hook of a pass sets its weight
    torch.testing.assert_close(op.weight, other.weight)
    op.weight.sum().backward()
    assert all(p.grad is not None for name, p in conv.named_parameters() if name != "bias")
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    ConvOperator.from_module(conv, (5, 4))
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
