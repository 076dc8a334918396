"""Layers chosen by name or function, inside wrappers, and named in errors."""

from __future__ import annotations

import pytest
import torch
from helpers.models import Branches, X, sizes
from torch import Tensor, nn

from convspectra.models import (
    Layer,
    find_layers,
    is_convolution,
    named,
    selected,
    unwrapped,
)

CONV, LINEAR, RELU = nn.Conv2d(1, 1, 1), nn.Linear(1, 1), nn.ReLU()


@pytest.mark.parametrize(
    ("name", "selection", "expected"),
    [
        ("stem.0", "stem.0", True),
        ("stem.0", "stem", False),
        ("stem.0", "stem.*", True),
        ("stem.0", "*", True),
        ("stem.0", "*.0", True),
        ("stem.0", "stem.?", True),
        ("stem.10", "stem.?", False),
        ("stem.1", "stem.[0-3]", True),
        ("stem.4", "stem.[!0-3]", True),
        ("stem.0", "Stem.*", False),
        ("stemX0", "stem.0", False),
        ("a", ["b", "a"], True),
        ("a", ("b", "c"), False),
        ("a", {"a", "b"}, True),
        ("a", {"a": None}, True),
        ("a", [], False),
        ("a", (), False),
        ("", "", True),
        ("", "*", True),
    ],
)
def test_selections_by_name(name, selection, expected):
    assert selected(name, CONV, selection) is expected
    assert selected(name, LINEAR, selection) is expected
    assert not selected(name, RELU, selection), "a pattern chooses among layers only"


def test_selections_by_function():
    seen = []

    def chosen(name: str, module: nn.Module) -> str:
        seen.append((name, module))
        return "something that is true"

    assert selected("a", RELU, chosen) is True
    assert seen == [("a", RELU)]
    assert selected("a", RELU, lambda *_: None) is False


@pytest.mark.parametrize("selection", [3, None, 1.5, [3], ["a", None], [CONV], ["a", ["b"]]])
def test_what_is_not_a_selection(selection):
    with pytest.raises(ValueError, match="expected a selection of layers to be a name pattern"):
        selected("a", CONV, selection)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "stem.*"}, ["stem.0"]),
        ({"include": "*"}, ["stem.0", "shared", "up", "shared", "head"]),
        ({"include": ["up", "head"]}, ["up", "head"]),
        ({"exclude": "s*"}, ["up"]),
        ({"include": "*", "exclude": ["shared", "h*"]}, ["stem.0", "up"]),
        ({"include": "*", "exclude": is_convolution}, ["head"]),
        ({"exclude": lambda name, module: "." in name}, ["shared", "up", "shared"]),
        ({"exclude": "no such layer"}, ["stem.0", "shared", "up", "shared"]),
    ],
)
def test_include_and_exclude(options, names):
    assert [name for name, _ in sizes(Branches(), X, **options)] == names


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match="expected layers to include in Branches, got none"):
        find_layers(Branches(), X, exclude="*")


class Compiled(nn.Module):
    """As torch.compile hands a model back, without compiling it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        Compiled,
        lambda model: Compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(Compiled(Compiled(model))),
        # What it imports is deprecated.
        pytest.param(torch.compile, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")),
    ],
    ids=["plain", "parallel", "compiled", "compiled parallel", "three times", "torch.compile"],
)
def test_unwrapped(wrap):
    model = Branches()
    assert unwrapped(wrap(model)) is model
    assert sizes(unwrapped(wrap(model)), X) == sizes(model, X)


def test_a_model_whose_own_layer_is_called_module_is_not_unwrapped():
    model = nn.Sequential()
    model.module = nn.Conv2d(3, 3, 1)
    model._orig = nn.ReLU()
    assert unwrapped(model) is model


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("expected less"), "layer 'a.0': expected less"),
        (ArithmeticError("singular"), "layer 'a.0': singular"),
        (RuntimeError("no memory"), "layer 'a.0': no memory"),
        (ValueError(), "layer 'a.0'"),
    ],
)
def test_errors_get_the_name_of_the_layer(error, message):
    with pytest.raises(type(error)) as caught, named(Layer("a.0", CONV, (1, 1))):
        raise error
    assert caught.value is error
    assert str(error) == message


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError) as caught, named(Layer("a.0", CONV, (1, 1))):
        raise KeyError("of a callback")
    assert caught.value.args == ("of a callback",)
