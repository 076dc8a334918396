"""Padding that stands outside of a layer belongs to it, wherever the model came from."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.onnx_graphs import array, evaluated, model, saved
from helpers.strategies import one_thread as one_thread
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor, nn

import convspectra as cs
from convspectra.models import NamedOperator, find_layers, named_operators
from convspectra.models.files import load_operators
from convspectra.operator import outer_padding

SHAPE = (3, 8, 7)
X = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))


class Given(nn.Module):
    """A model with a forward pass given as a function of its layer and its input."""

    def __init__(self, function, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def conv(**options) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(3, 4, 3, **options)


def of(net: nn.Module, x: Tensor = X) -> NamedOperator:
    (named,) = named_operators(net, x)
    return named


# --- the same numbers in every format -------------------------------------------------------------


def eager(net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    return named_operators(net, x)


def traced(net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    path = folder / "net.pt"
    torch.jit.trace(net, x).save(str(path))
    return load_operators(path, [tuple(x.shape[1:])])[1]


def exported(net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)), path)
    return load_operators(path, [tuple(x.shape[1:])])[1]


def decomposed(net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)).run_decompositions(), path)
    return load_operators(path, [tuple(x.shape[1:])])[1]


def onnx_file(net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    path = folder / "net.onnx"
    torch.onnx.export(net, (x,), str(path), dynamo=False)
    return load_operators(path, [tuple(x.shape[1:])])[1]


FORMATS = [eager, traced, exported, decomposed, onnx_file]


def written(write, net: nn.Module, x: Tensor, folder: Path) -> list[NamedOperator]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters
        return write(net.eval(), x, folder)


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    ("mode", "largest", "smallest"),
    [
        ("circular", 1.21628, 0.083446),
        ("reflect", 1.33658, 0.045250),
        ("replicate", 1.50149, 0.050523),
    ],
)
def test_padding_modes_have_the_same_values_in_every_format(
    tmp_path, write, mode, largest, smallest
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    (named,) = written(write, net, torch.zeros(1, 3, 8, 8), tmp_path)
    values = [cs.svds(named.operator, 1, which).s[0] for which in ("LM", "SM")]
    assert [float(v) for v in values] == pytest.approx([largest, smallest], rel=1e-4)
    assert named.operator.geometry.padding_mode == mode
    assert bool(named.notes) == (write is not eager)


def same(layer: nn.Module, x: Tensor) -> Tensor:
    """As TensorFlow pads: the odd pixel after."""
    total = [max(((n + 1) // 2 - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
    (h, w) = total
    return layer(F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2]))


def around(layer: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([x[:, :, -2:], x, x[:, :, :2]], 2)
    return layer(torch.cat([x[..., -2:], x, x[..., :2]], 3))


ARCHITECTURES = {
    "ZeroPad2d": nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), conv()),
    "ReflectionPad2d": nn.Sequential(nn.ReflectionPad2d((1, 0, 2, 1)), conv()),
    "ReplicationPad2d": nn.Sequential(nn.ReplicationPad2d(1), conv(dilation=2)),
    "a ReLU between": nn.Sequential(nn.ReflectionPad2d(1), nn.ReLU(), conv()),
    "functions between": nn.Sequential(nn.ZeroPad2d(1), nn.Hardtanh(), nn.LeakyReLU(0.1), conv()),
    "padded twice": nn.Sequential(nn.ZeroPad2d((1, 0, 0, 0)), nn.ZeroPad2d(1), conv()),
    "padded again by the layer": nn.Sequential(nn.ZeroPad2d((1, 0, 0, 0)), conv(padding=1)),
    "as TensorFlow pads": Given(same, conv(stride=2)),
    "slices and cat": Given(around, conv()),
    "zeros and cat": Given(lambda c, x: c(torch.cat([torch.zeros(1, 3, 2, 7), x], 2)), conv()),
    "cropped and padded": nn.Sequential(nn.ZeroPad2d((-1, 2, 1, 1)), conv()),
    "of two channels": Given(lambda c, x: c(F.pad(x[:, 1:], (1, 1, 1, 1))), nn.Conv2d(2, 2, 3)),
    "groups": nn.Sequential(nn.ReplicationPad2d((0, 2, 1, 1)), nn.Conv2d(3, 6, 3, groups=3)),
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_same_layer_in_every_format(tmp_path, write, name):
    net = ARCHITECTURES[name]
    expected = of(net.eval()).operator
    (named,) = written(write, net, X, tmp_path)
    found = named.operator
    assert (found.geometry, found.groups) == (expected.geometry, expected.groups)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=0.0)
    (note,) = named.notes
    assert note.startswith("its padding is that of a separate operation before it (")


LINEAR = [name for name in ARCHITECTURES if "between" not in name]


@pytest.mark.parametrize("name", LINEAR)
def test_the_layer_is_what_the_network_applies(name):
    net = ARCHITECTURES[name]
    read = X[:, 1:] if "two channels" in name else X[..., 1:] if "cropped" in name else X
    expected = net(X) - net(torch.zeros_like(X))
    torch.testing.assert_close(of(net).operator.matvec(read), expected)


def test_a_causal_layer():
    net = nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(2, 3, 3, dilation=2, bias=False))
    x = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    named = of(net, x)
    assert named.operator.geometry.padding == ((4, 0),)
    torch.testing.assert_close(named.operator.matvec(x), net(x))


def test_channels_as_images():
    """Blurring does this: one kernel for every channel."""
    blur = Given(
        lambda c, x: c(F.pad(x, (1, 1, 1, 1), mode="reflect").view(3, 1, 10, 9)),
        nn.Conv2d(1, 1, 3, bias=False),
    )
    named = of(blur)
    assert named.operator.geometry.padding_mode == "reflect"
    torch.testing.assert_close(named.operator.matvec(X.view(3, 1, 8, 7)), blur(X))


def test_an_array_without_a_batch():
    named = of(nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), conv()), X[0])
    assert named.operator.geometry.padding == ((0, 1), (1, 2))


def test_two_readers_own_the_padding_both():
    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1, 1, 1))
        return self[0](y) + self[1](y)

    found = named_operators(Given(forward, nn.ModuleList([conv(), conv()])), X)
    assert [named.operator.input_shape for named in found] == [SHAPE, SHAPE]


def test_pixels_copied_into_an_empty_array():
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        y = x.new_zeros(1, 3, 10, 9)
        y[:, :, 1:-1, 1:-1] = x
        return layer(y)

    net = Given(forward, conv(bias=False))
    torch.testing.assert_close(of(net).operator.matvec(X), net(X))


# --- what is no padding ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.ReflectionPad2d(0), conv()),
        nn.Sequential(nn.ZeroPad2d(-1), conv()),
        Given(lambda c, x: c(x[:, :, 1:].flip(3)), conv()),
        Given(lambda c, x: c(torch.cat([x, x.relu()], 2)), conv()),
        Given(lambda c, x: c(torch.cat([x[:, :1], x.tanh()[:, :2]], 1)), conv()),
        Given(lambda c, x: c(F.pad(x, (1, 1)).cumsum(3)), conv()),
        Given(lambda c, x: c(F.pad(x, (1, 1)) + x.repeat(1, 1, 1, 2)[..., :9].exp()), conv()),
    ],
)
def test_no_note_where_nothing_is_padded(net):
    assert of(net).notes == ()


RAMP = torch.linspace(0.5, 1, 9)
ROWS = (torch.arange(10) % 3 > 0)[:, None]


def doubled_rows(x: Tensor, p: int) -> Tensor:
    x = x.clone()
    x[:, :, 2 + p : 5 + p] *= 2
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p: x + x,
        lambda x, p: x * x,
        lambda x, p: torch.maximum(x, -x),
        lambda x, p: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x, p: torch.where(ROWS[1 - p : 9 + p], x, 0.0),
        lambda x, p: x.masked_fill(ROWS[1 - p : 9 + p], 0.0),
        lambda x, p: x * RAMP[1 - p : 8 + p],
        lambda x, p: x.addcmul(x, x),
        lambda x, p: x * x.mean((2, 3), keepdim=True).sigmoid(),  # a gate for each channel
        doubled_rows,
    ],
)
def test_functions_of_each_entry_leave_the_padding_where_it_is(function):
    """The function of the padded array is the padded function of the array."""
    net = Given(lambda c, x: c(function(F.pad(x, (1, 1, 1, 1)), 1)), conv(bias=False))
    named = of(net)
    assert named.notes[0].startswith("its padding is that of a separate operation before it (pad")
    scale = 1.0
    if "mean" in function.__code__.co_names:  # of another number of pixels
        scale = F.pad(X, (1, 1, 1, 1)).mean((2, 3), keepdim=True).sigmoid()
    expected = net(X)
    read = X * scale if isinstance(scale, Tensor) else function(X, 0)
    torch.testing.assert_close(named.operator.matvec(read), expected)


def edited(change) -> nn.Module:
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1, 1, 1), mode="replicate")
        change(y, x)
        return layer(y)

    return Given(forward, conv(bias=False))


def test_two_arrays_padded_alike():
    net = Given(lambda c, x: c(F.pad(x, (1, 1)) * F.pad(x.exp(), (1, 1))), conv(bias=False))
    torch.testing.assert_close(of(net).operator.matvec(X * X.exp()), net(X))


def test_a_border_that_is_zeroed_is_zero_padding():
    def change(y: Tensor, x: Tensor) -> None:
        y[:, :, torch.tensor([0, -1])] = 0.0
        y[..., 0] = 0.0
        y[..., -1].zero_()

    net = edited(change)
    assert of(net).operator.geometry.padding_mode == "zeros"
    torch.testing.assert_close(of(net).operator.matvec(X), net(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y[:, :, 1].mul_(2),  # the copy of this row is as it was
        lambda y, x: y[:, :, 4].fill_(0),
        lambda y, x: y[:, :, 1].copy_(x.tanh()[:, :, 0, :1]),
        lambda y, x: y.__setitem__((..., slice(None), 1), y[..., :, 5].clone()),
        lambda y, x: y.index_add_(3, torch.tensor([2]), x.exp().sum((2, 3))[..., None, None]
                                  .expand(1, 3, 10, 1).contiguous()),
        lambda y, x: y.__setitem__((y > 1).nonzero(as_tuple=True), 0.0),
    ],
)  # fmt: skip
def test_what_was_edited_is_said_to_be_no_padding(change):
    """The layer is judged on the array that it reads, and the note says so."""
    named = of(edited(change))
    assert named.operator.input_shape == (3, 10, 9)
    assert "in a way that no padding of a convolution does" in named.notes[0]


def test_arrays_put_beside_a_padded_one():
    """Zeros on the left of two arrays that are computed."""
    net = Given(lambda c, x: c(torch.cat([X.new_zeros(1, 3, 8, 1), x, x.exp()], 3)), conv())
    assert of(net).operator.geometry.padding == ((0, 0), (1, 0))
    named = of(
        Given(lambda c, x: c(torch.cat([F.pad(x, (1, 1)), F.pad(x.exp(), (1, 1))], 3)), conv())
    )
    assert "no padding of a convolution" in named.notes[0]


def test_the_inner_of_two_paddings_where_both_are_none():
    """Zeros inside of a reflection: the layer owns the last one."""
    net = nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d(1), conv())
    named = of(net)
    assert (
        named.operator.geometry
        == of(
            nn.Sequential(nn.ZeroPad2d(1), conv(padding=1, padding_mode="reflect"))
        ).operator.geometry
    )
    assert "judged as if it were not; its padding is that of" in named.notes[0]


def test_a_border_of_another_value_counts_as_bias():
    net = nn.Sequential(nn.ConstantPad2d(1, 2.0), conv())
    named = of(net)
    torch.testing.assert_close(
        named.operator.matvec(X), net(X) - net(torch.zeros_like(X)), atol=1e-5, rtol=1e-5
    )
    assert "another value than 0 counts as a part of the bias" in named.notes[0]
    assert "another value" in of(nn.Sequential(nn.ZeroPad2d(1), nn.Sigmoid(), conv())).notes[0]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Sequential(nn.ReflectionPad2d(1), conv(padding=1)), "no padding of a convolution"),
        (
            nn.Sequential(nn.ReplicationPad2d((1, 1, 0, 0)), nn.ZeroPad2d((0, 0, 1, 1)), conv()),
            "no padding of a convolution",
        ),
        (
            nn.Sequential(nn.ZeroPad2d(1), nn.ConvTranspose2d(3, 4, 3)),
            "transposed convolutions cannot do",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(net, reason):
    named = of(net)
    assert named.operator is not None
    assert reason in named.notes[0]


# --- layers to train ------------------------------------------------------------------------------


def test_layers_that_are_found_own_their_padding():
    net = nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), conv(padding=1))
    (layer,) = find_layers(net, X)
    assert (layer.name, layer.input_size) == ("1", (8, 7))
    assert layer.operator().geometry == of(net).operator.geometry
    assert layer.operator().weight is net[1].weight
    assert layer.operator((5, 4)).geometry.padding == ((1, 2), (2, 3))


# --- tables of indices ----------------------------------------------------------------------------

MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


@given(
    sizes=st.lists(
        st.tuples(*[st.integers(2, 6)] + [st.integers(0, 3)] * 2), min_size=1, max_size=3
    ),
    mode=st.sampled_from(sorted(MODES)),
    rows=st.integers(1, 3),
)
def test_tables_are_those_of_numpy(sizes, mode, rows):
    sizes = [(n, min(a, n - 1), min(b, n - 1)) for n, a, b in sizes]
    shape, pads = [n for n, _, _ in sizes], [(a, b) for _, a, b in sizes]
    index = np.arange(1, rows * np.prod(shape) + 1).reshape(rows, *shape)
    found = outer_padding(np.pad(index, [(0, 0), *pads], mode=MODES[mode]))
    if not any(map(sum, pads)):
        assert found is None
        return
    assert found.input_size == tuple(shape)
    # Several modes and amounts may give one table: what counts is the table.
    again = np.pad(index, [(0, 0), *found.padding], mode=MODES[found.mode])
    np.testing.assert_array_equal(again, np.pad(index, [(0, 0), *pads], mode=MODES[mode]))


# --- programs by chance ---------------------------------------------------------------------------


def copied(x: Tensor, a: int, b: int) -> Tensor:
    y = x.new_zeros(1, 3, x.shape[2] + a + b, x.shape[3])
    y[:, :, a : a + x.shape[2]] = x
    return y


def edited_part(x: Tensor, a: int, b: int) -> Tensor:
    y = x.clone()
    y[:, :, a] *= 3 + b
    return y


def zeroed_part(x: Tensor, a: int, b: int) -> Tensor:
    y = F.pad(x, (1, b, 1, 0), mode="replicate")
    y[:, :, torch.tensor([a])] = 0.0
    y[..., b].zero_()
    return y


MOVES = {
    "with itself": lambda x, a, b: (x + x).addcmul(x, x),
    "mask": lambda x, a, b: torch.where(x < 1 + 0.4 * a, 2.5 * x, x),
    "ramp": lambda x, a, b: x * torch.linspace(1, 2 + a, x.shape[3], dtype=x.dtype),
    "two paddings": lambda x, a, b: F.pad(x, (a, b)) * F.pad(x.abs().sqrt(), (a, b)),
    "edited": edited_part,
    "zeroed": zeroed_part,
    "crop or pad": lambda x, a, b: F.pad(x, (a - 1, b, b - 1, a)),
    "reflect": lambda x, a, b: F.pad(x, (a, b, 0, a), mode="reflect"),
    "replicate": lambda x, a, b: F.pad(x, (a, b, b, a), mode="replicate"),
    "circular": lambda x, a, b: F.pad(x, (a, b, b, 0), mode="circular"),
    "slice": lambda x, a, b: x[:, :, a : x.shape[2] - b, ::2],
    "zeros": lambda x, a, b: torch.cat([x.new_zeros(*x.shape[:3], a), x], 3),
    "itself": lambda x, a, b: torch.cat([x[:, :, -1:], x, x[:, :, :a]], 2),
    "flip": lambda x, a, b: x.flip(2 + a % 2),
    "roll": lambda x, a, b: x.roll(a, 3),
    "copy": copied,
    "relu_": lambda x, a, b: x.clone().relu_(),
    "times two": lambda x, a, b: x * 2,
    "view": lambda x, a, b: x.reshape(3, *x.shape[2:]).view(x.shape),
    "channels": lambda x, a, b: x[:, [1, 0, 2]].contiguous(memory_format=torch.channels_last),
}
steps = st.lists(
    st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=4,
)


@given(program=steps, own=st.integers(0, 1), stride=st.integers(1, 2))
def test_programs_by_chance(program, own, stride):
    """The layer is the matrix from the distinct pixels that it reads, whatever moved them."""

    def moved(x: Tensor) -> Tensor:
        for name, a, b in program:
            x = MOVES[name](x, a, b)
        return x

    layer = nn.Conv2d(3, 2, (2, 3), stride, own, bias=False, dtype=torch.float64)
    x = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    try:
        read = moved(x)
        layer(read)
    except (RuntimeError, ValueError):
        assume(False)  # nothing is left to read, or too little to reflect
    named = of(Given(lambda c, x: c(moved(x)), layer), x)
    assume("judged as if" not in "".join(named.notes))
    # Entries are distinct by chance, so that equal ones are copies of one pixel.
    pixels, place = torch.unique(read, return_inverse=True)
    copies = F.one_hot(place.flatten(), len(pixels)).double()[:, pixels != 0]
    every = torch.eye(read.numel(), dtype=torch.float64).view(-1, *read.shape[1:])
    expected = torch.linalg.svdvals(layer(every).flatten(1).T @ copies)
    found = torch.linalg.svdvals(named.operator.to_dense())
    count = max(len(expected), len(found))
    torch.testing.assert_close(
        F.pad(found, (0, count - len(found))), F.pad(expected, (0, count - len(expected)))
    )


# --- ONNX -----------------------------------------------------------------------------------------


def nodes(*between, pads: list[str] | None = None, **attributes):
    return [
        helper.make_node("Pad", ["x", *(["p"] if pads is None else pads)], ["q"], **attributes),
        *between,
        helper.make_node("Conv", ["r" if between else "q", "w"], ["y"]),
    ]


PADS = np.array([0, 0, 1, 2, 0, 0, 0, 1])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_nodes_belong_to_the_layer(tmp_path, mode):
    content = model(nodes(mode=mode), {"p": PADS, "w": array(2, 3, 3, 2)}, SHAPE)
    content.opset_import[0].version = 19  # the first with "wrap"
    (named,) = load_operators(saved(tmp_path, content), [SHAPE])[1]
    expected = torch.from_numpy(evaluated(content, X.numpy()))
    torch.testing.assert_close(named.operator.matvec(X), expected, atol=1e-5, rtol=1e-5)
    assert named.notes[0].startswith("its padding is that of a separate operation before it (Pad")


@pytest.mark.parametrize("kind", ["Relu", "LeakyRelu", "Identity", "Cast"])
def test_nodes_between_are_looked_through(tmp_path, kind):
    options = {"to": 1} if kind == "Cast" else {}
    content = model(
        nodes(helper.make_node(kind, ["q"], ["r"], **options)),
        {"p": PADS, "w": array(2, 3, 3, 2)},
        SHAPE,
    )
    (named,) = load_operators(saved(tmp_path, content), [SHAPE])[1]
    assert named.operator.geometry.padding == ((1, 0), (2, 1))


def test_a_pad_node_of_an_unknown_amount_is_left(tmp_path):
    content = model(
        [helper.make_node("Shape", ["x"], ["s"]), *nodes(pads=["s"])],
        {"w": array(2, 3, 3, 2)},
        (3, "height", "width"),
    )
    (named,) = load_operators(saved(tmp_path, content), [])[1]
    assert "input size could not be inferred" in named.skipped


@pytest.mark.parametrize(
    ("kind", "options", "absorbed"),
    [
        ("ScatterElements", {"axis": 3}, True),
        ("ScatterElements", {"axis": 3, "reduction": "add"}, False),
        ("ScatterND", {}, False),
    ],
)
def test_edits_of_a_padded_array(tmp_path, kind, options, absorbed):
    """Zeros written over zeros of the border, or added, or written elsewhere."""
    place = np.full((1, 3, 9, 1), 9) if kind == "ScatterElements" else np.array([[0, 0, 4]])
    value = np.zeros(place.shape if kind == "ScatterElements" else (1, 10), dtype=np.float32)
    pads = np.array([0, 0, 0, 0, 0, 0, 1, 3])
    content = model(
        [
            helper.make_node("Pad", ["x", "p"], ["q"]),
            helper.make_node(kind, ["q", "i", "v"], ["r"], **options),
            helper.make_node("Conv", ["r", "w"], ["y"]),
        ],
        {"p": pads, "w": array(2, 3, 3, 2), "i": place, "v": value},
        SHAPE,
    )
    (named,) = load_operators(saved(tmp_path, content), [SHAPE])[1]
    assert ("judged as if it were not" in named.notes[0]) == (not absorbed)
    if absorbed:
        expected = torch.from_numpy(evaluated(content, X.numpy()))
        torch.testing.assert_close(named.operator.matvec(X), expected, atol=1e-5, rtol=1e-5)
