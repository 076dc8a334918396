"""Attributes and names of ONNX nodes that do not fit."""

from __future__ import annotations

import pytest
from helpers.onnx_graphs import array, one, saved
from onnx import helper

from convspectra.models.files import LoadError, load_operators
from convspectra.models.files._onnx_options import convolution_options


@pytest.mark.parametrize(
    ("name", "expected", "length"),
    [
        ("pads", 4, 2),
        ("pads", 4, 5),
        ("strides", 2, 3),
        ("dilations", 2, 1),
        ("output_padding", 2, 3),
        ("output_shape", 2, 1),
    ],
)
def test_attributes_of_another_length(name, expected, length):
    given = {name: helper.make_attribute(name, [1] * length)}
    with pytest.raises(ValueError, match=rf"^expected {expected} integers in its {name}, got \[1"):
        convolution_options(given, (5, 5), (3, 3), transposed=True)


def test_names_have_nothing_that_a_terminal_obeys(tmp_path):
    content = one("Conv", array(2, 3, 3), (3, 5))
    content.graph.node[0].name = "\x1b[31mconv\n"
    path = saved(tmp_path, content)
    (named,) = load_operators(path, [(3, 5)])[1]
    assert named.name == r"\x1b[31mconv\n"
    with pytest.raises(LoadError, match=r"x1b\[31mconv\\n. takes 3 channels") as caught:
        load_operators(path, [(4, 5)])
    assert str(caught.value).isprintable()
