"""One layer for each thing that can go wrong alone, and recorders of what torch does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
from helpers.strategies import Layer, random

# One layer for each thing that can go wrong alone; the random layers mix them.
LAYERS = {
    "paper": Layer(random(3, 2, 3, 3), (5, 4)),
    "even kernel": Layer(random(2, 2, 4, 2), (3, 5)),
    "strided": Layer(random(2, 3, 3, 2), (6, 5), {"stride": (2, 3), "padding": 1}),
    "dilated": Layer(random(2, 1, 3), (7,), {"dilation": 3, "padding": 2}),
    "grouped": Layer(random(6, 2, 2, 2), (3, 4), {"groups": 3}),
    "depthwise": Layer(random(3, 1, 3), (5,), {"groups": 3}),
    "depthwise, multiplier 2": Layer(random(4, 1, 3), (5,), {"groups": 2}),
    "asymmetric": Layer(random(2, 2, 3), (5,), {"padding": [(0, 3)]}),
    "asymmetric, 2 axes": Layer(random(1, 1, 2, 3), (4, 5), {"padding": ((0, 3), (2, 1))}),
    "circular": Layer(random(2, 2, 4, 3), (4, 5), {"padding_mode": "circular"}),
    "circular, wide": Layer(random(1, 1, 3), (2,), {"padding": 2, "padding_mode": "circular"}),
    "reflect": Layer(random(2, 2, 4, 3), (4, 5), {"padding_mode": "reflect"}),
    "reflect, asymmetric": Layer(
        random(2, 1, 3), (4,), {"padding": [(3, 1)], "padding_mode": "reflect", "stride": 2}
    ),
    "replicate": Layer(random(2, 2, 2, 3, 2), (2, 3, 2), {"padding_mode": "replicate"}),
    "replicate, wide": Layer(random(1, 2, 3), (1,), {"padding": 4, "padding_mode": "replicate"}),
    "one pixel": Layer(random(3, 2, 5, 3), (1, 1)),
    "kernel 1": Layer(random(3, 2, 1, 1), (3, 2)),
    "3 axes": Layer(random(2, 1, 2, 2, 1), (3, 2, 4), {"padding": (1, 0, 2)}),
    "transposed": Layer(
        random(2, 3, 3, 2),
        (3, 4),
        {"transposed": True, "stride": 2, "padding": (1, 0), "output_padding": (1, 0)},
    ),
    "transposed, output_padding >= stride": Layer(
        random(2, 1, 2),
        (3,),
        {"transposed": True, "stride": 1, "dilation": 4, "padding": 1, "output_padding": 3},
    ),
    "transposed, grouped": Layer(
        random(4, 3, 3), (3,), {"transposed": True, "groups": 2, "padding": 0, "stride": 2}
    ),
    "transposed, same": Layer(random(2, 2, 4), (5,), {"transposed": True, "padding": "same"}),
    "transposed, asymmetric": Layer(
        random(1, 2, 4), (4,), {"transposed": True, "padding": [(2, 0)], "stride": 3}
    ),
    "linear": Layer(random(4, 3), ()),
    # A stride so long that the last window ends before the input begins, or begins after it.
    "window in the padding before": Layer(random(1, 1, 1), (1,), {"padding": 5, "stride": 20}),
    "window misses the input": Layer(random(2, 2, 2), (1,), {"padding": [(4, 2)], "stride": 9}),
    "window misses on one axis": Layer(
        random(1, 2, 1, 2), (3, 4), {"padding": ((3, 1), (0, 0)), "stride": (9, 1)}
    ),
    "windows after the input": Layer(random(1, 1, 2), (1,), {"padding": [(0, 6)], "stride": 2}),
    "stride jumps over the input": Layer(random(1, 1, 1), (1,), {"padding": 2, "stride": 4}),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@contextlib.contextmanager
def even_same_padding_warns() -> Iterator[None]:
    """PyTorch's warning that its own padding="same" copies the input for even kernels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        yield
