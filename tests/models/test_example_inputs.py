"""One example input, however it is written, at every door that takes one."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

import convspectra as cs
from convspectra.models import example_arguments
from convspectra.training import SpectralRegularizer


class Network(nn.Module):
    """Two layers, of which the second sees the sum with another input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, pixel_values, shift):
        return self.second(torch.tanh(self.first(pixel_values)) + shift)


class ByName(Network):
    """The same, with arguments by keyword alone."""

    def forward(self, *, pixel_values, shift):
        return super().forward(pixel_values, shift)


def _audit(model, x):
    return [(a.name, a.applied.sigma_max, a.applied.sigma_min) for a in cs.audit(model, x).layers]


def _regularizer(model, x):
    return float(SpectralRegularizer(model, x, penalty="frobenius")().detach())


def _precondition(model, x):
    cs.precondition(model, x, condition=50.0)
    return model.first.weight.detach().tolist()


def _prepare(model, x):
    return cs.prepare(model, x).records()


def _gradient_flow(model, x):
    return [(layer.name, layer.gradient) for layer in cs.gradient_flow(model, x).layers]


def _jacobian(model, x):
    return float(cs.svds(cs.JacobianOperator(model, x), 1, "LM").s[0])


def _inner_jacobian(model, x):
    J = cs.JacobianOperator(model, x, start="second")
    return float(cs.svds(J, 1, "LM").s[0])


def _lipschitz(model, x):
    bound = cs.lipschitz_bound(model, x, ascent=2, scaling=2)
    return bound.lower, bound.upper


SINGLE = (_audit, _regularizer, _precondition, _jacobian, _inner_jacobian, _lipschitz)
BATCH = (_prepare, _gradient_flow)


@pytest.mark.parametrize("door", SINGLE + BATCH, ids=lambda door: door.__name__)
def test_every_door_takes_positions_and_names_alike(door) -> None:
    generator = torch.Generator().manual_seed(1)
    count = 3 if door in BATCH else 1
    x = torch.randn(count, 2, 5, 6, generator=generator)
    shift = torch.randn(count, 4, 5, 6, generator=generator)
    by_position = door(Network(), (x, shift))
    by_name = {"pixel_values": x, "shift": shift}
    for model, example in (
        (Network(), by_name),
        (Network(), UserDict(by_name)),  # as BatchFeature and BatchEncoding are
        (ByName(), by_name),
    ):
        assert door(model, example) == by_position


def test_the_report_names_the_arguments() -> None:
    example = {"pixel_values": torch.zeros(1, 2, 5, 6), "shift": torch.zeros(1, 4, 5, 6)}
    shown = cs.audit(Network(), example).circumstances.input_shape
    assert shown == "pixel_values=1x2x5x6, shift=1x4x5x6"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((3, 12, 12), r"a tensor, such as torch.zeros\(1, 3, 12, 12\)"),
        (None, "expected a tensor as the example input, got NoneType; pass a tensor"),
        (torch.zeros(1, 2, 4, 4).numpy(), "got ndarray; pass a tensor"),
        ({}, "mapping of argument names to tensors, got an empty one"),
        ({0: torch.zeros(1)}, "got the key 0"),
    ],
)
def test_what_is_no_example_is_refused(example, message) -> None:
    for door in SINGLE:
        with pytest.raises(ValueError, match=r"expected (x to be )?(a|one sample)"):
            door(nn.Conv2d(2, 2, 3), example)
    with pytest.raises(ValueError, match=message):
        cs.audit(nn.Conv2d(2, 2, 3), example)


def test_arguments_by_keyword_alone_are_asked_for_as_a_dict() -> None:
    x = torch.zeros(1, 2, 5, 6)
    with pytest.raises(ValueError, match=r'give a dict, such as \{"pixel_values": x\}'):
        cs.audit(ByName(), x)
    with pytest.raises(ValueError, match=r"missing a required argument: 'shift'.*a dict by name"):
        cs.audit(Network(), x)
    with pytest.raises(ValueError, match=r"got \['pixels', 'shift'\] by name \(missing"):
        SpectralRegularizer(Network(), {"pixels": x, "shift": x})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_example_of_another_precision_is_told_which(dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).to(dtype)
    with pytest.raises(ValueError, match=rf"got torch.float32; pass x.to\({dtype}\)"):
        cs.audit(model, torch.zeros(1, 2, 5, 5))
    assert cs.audit(model, torch.zeros(1, 2, 5, 5, dtype=dtype)).layers[0].applied is not None


def test_another_error_of_the_forward_pass_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        cs.audit(nn.Conv2d(2, 2, 3), torch.zeros(1, 3, 5, 5))


def test_a_tensor_as_input_size_is_not_printed() -> None:
    with pytest.raises(ValueError, match="a tuple of ints, got a tensor") as caught:
        cs.ConvOperator.from_module(nn.Conv2d(2, 2, 3), torch.zeros(1, 2, 30, 30))
    assert len(str(caught.value)) < 200


def test_the_first_argument_is_replaced_by_position_or_name() -> None:
    assert example_arguments((1.5, torch.zeros(2))).with_first(2.5).args[0] == 2.5
    assert example_arguments({"a": 1.5, "b": torch.zeros(2)}).with_first(2.5).kwargs["a"] == 2.5
    assert example_arguments(()).first is None
