"""Every layer of a live model: audited as the model applies it, or listed with the reason."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import random
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from convspectra.models._named_operators import NamedOperator, named_operators


class Given(nn.Module):
    """A model with a forward pass given as a function of itself and its inputs."""

    def __init__(self, function, **children) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


floats = functools.partial(random, dtype=torch.float32)


def only(model: nn.Module, example) -> NamedOperator:
    (named,) = named_operators(model, example)
    return named


def settled(norm):
    """Batch normalization with statistics of its own."""
    n = norm.num_features
    norm.running_mean = floats(n, seed=1)
    norm.running_var = floats(n, seed=2).exp()
    if norm.affine:
        norm.weight = nn.Parameter(floats(n, seed=3))
    return norm.eval()


X = floats(1, 3, 6, 5)


# --- one layer is the map that the model applies --------------------------------------------------

LAYERS = [
    (nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=3), (2, 9)),
    (nn.Conv2d(4, 6, (3, 2), groups=2, padding="same", padding_mode="circular"), (4, 5, 6)),
    (nn.Conv2d(2, 2, 4, padding="same"), (2, 6, 5)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    (nn.ConvTranspose1d(2, 3, 4, stride=3, output_padding=2), (2, 5)),
    (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 3)),
    (nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 2, 2, 3)),
    (nn.Linear(5, 3), (5,)),
]


def functional(layer: nn.Module) -> nn.Module:
    """The same layer with a forward pass that no hook sees."""
    return Given(lambda self, x: self.layer.forward(x), layer=layer)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_operator_is_the_layer_without_its_bias(layer, shape):
    x = floats(1, *shape)
    named = only(nn.Sequential(layer), x)
    expected = layer(x) - layer(torch.zeros_like(x))
    torch.testing.assert_close(named.operator.matvec(x), expected)
    assert (named.name, named.type, named.skipped) == ("0", type(layer).__name__, "")
    assert named.notes == ()
    assert not named.operator.weight.requires_grad


@pytest.mark.parametrize(
    ("layer", "shape"), [p for p in LAYERS if getattr(p[0], "padding", 0) != "same"]
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_called_as_a_function_is_named_by_its_weight(layer, shape, inference):
    x = floats(1, *shape)
    model = functional(layer)
    model.forward = torch.inference_mode()(model.forward) if inference else model.forward
    named = only(model, x)
    expected = (layer(x) - layer(torch.zeros_like(x))).detach()
    torch.testing.assert_close(named.operator.matvec(x), expected)
    assert (named.name, named.type) == ("layer", type(layer).__name__)


def test_order_is_that_of_execution_and_sizes_are_separate():
    def forward(self, x):
        return self.a(F.avg_pool2d(self.a(self.b(self.b(x))), 2))

    model = Given(forward, a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 3, 1))
    first, second, third = named_operators(model, X)
    assert [t.name for t in (first, second, third)] == ["b", "a", "a"]
    assert [t.uses for t in (first, second, third)] == [2, 1, 1]
    assert (second.operator.input_shape, third.operator.input_shape) == ((3, 6, 5), (3, 3, 2))


def test_output_size_of_a_transposed_layer_counts():
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2)
    model = Given(lambda self, x: self.up(x, output_size=[14, 12]), up=layer)
    named = only(model, X)
    expected = layer(X, output_size=[14, 12]) - layer.bias[:, None, None]
    torch.testing.assert_close(named.operator.matvec(X), expected)


def test_input_by_keyword_and_without_a_batch():
    model = Given(lambda self, x: self.conv(input=x[0]), conv=nn.Conv2d(3, 2, 3))
    assert only(model, X).operator.input_shape == (3, 6, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types(dtype):
    assert only(nn.Sequential(nn.Linear(3, 2)).to(dtype), X[0, :, 0, :3].to(dtype)).operator


@pytest.mark.parametrize(
    "parametrize",
    [parametrizations.spectral_norm, parametrizations.orthogonal, parametrizations.weight_norm],
)
def test_a_parametrized_weight_is_the_effective_one(parametrize):
    layer = parametrize(nn.Conv2d(3, 4, 2)).eval()
    named = only(nn.Sequential(layer), X)
    expected = layer(X) - layer(torch.zeros_like(X))
    torch.testing.assert_close(named.operator.matvec(X), expected)


def test_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    named = only(nn.Sequential(layer), X[0, :, 0, :3])
    torch.testing.assert_close(named.operator.weight, layer.weight.detach())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    assert only(wrap(nn.Sequential(nn.Conv2d(3, 2, 3))), X).name == "0"


# --- functions ------------------------------------------------------------------------------------


def test_weights_without_a_module():
    def forward(self, x):
        y = F.conv2d(F.pad(x, (1, 2, 0, 1)), self.taps)
        z = y.flatten(1) @ self.head.T
        return F.linear(z, torch.eye(2)), z @ z.T

    model = Given(forward, taps=nn.Parameter(floats(4, 3, 2, 2)), head=nn.Parameter(floats(2, 168)))
    taps, head, third = named_operators(model, X)
    assert [t.name for t in (taps, head, third)] == ["taps", "head", "linear_1"]
    assert taps.notes == ("its padding is that of a separate operation before it (pad)",)
    assert taps.operator.geometry.padding == ((0, 1), (1, 2))
    torch.testing.assert_close(head.operator.weight, model.head.detach())
    assert torch.equal(third.operator.weight, torch.eye(2))


def test_a_product_from_the_left_maps_columns():
    model = Given(lambda self, x: self.mix @ x[0, 0], mix=nn.Parameter(floats(4, 6)))
    assert torch.equal(only(model, X).operator.weight, model.mix.detach())


def test_a_weight_computed_from_a_parameter_says_so():
    model = Given(lambda self, x: F.conv2d(x, self.w * 2), w=nn.Parameter(floats(2, 3, 3, 3)))
    named = only(model, X)
    assert torch.equal(named.operator.weight, 2 * model.w.detach())
    assert named.notes == ("its weight is computed from w",)


def test_a_weight_computed_from_the_input_is_passed_over():
    named = only(Given(lambda self, x: F.conv2d(x, x[:, :, :2, :2])), X)
    assert named.skipped == "its weight is computed from the input"


def test_a_subclass_with_its_own_forward_is_taken_from_its_operations():
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardized(3, 2, 3))
    named = only(model, X)
    expected = model[0].weight - model[0].weight.mean()
    torch.testing.assert_close(named.operator.weight, expected.detach())
    assert named.name == "0"


# --- what is passed over --------------------------------------------------------------------------


class Deaf(nn.Linear):
    """A linear layer whose weight its forward pass does not use."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


SEQUENCE = floats(1, 3, 3)
SKIPPED = [
    (nn.LSTM(3, 2), SEQUENCE, "a recurrence"),
    (nn.GRUCell(3, 2), SEQUENCE[0], "a recurrence"),
    (nn.Bilinear(3, 3, 2), (SEQUENCE,) * 2, "linear in each of two"),
    (nn.Embedding(4, 2), torch.tensor([1]), "looked up"),
    (nn.LazyConv2d(2, 3), X, "lazy"),
    (Deaf(3, 3), SEQUENCE, "reads its weight"),
    (Scaling(), SEQUENCE, "reads its table"),
]


@pytest.mark.parametrize(("layer", "example", "reason"), SKIPPED)
def test_other_modules_are_listed_with_a_reason(layer, example, reason):
    kind = type(layer).__name__  # a lazy module changes its type
    model = Given(lambda self, *x: self.layer(*x), layer=layer)
    named = only(model, example)
    assert (named.name, named.type, named.operator) == ("layer", kind, None)
    assert reason in named.skipped


def test_a_layer_that_is_not_reached():
    model = Given(lambda self, x: self.a(x), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 1, 1))
    used, unused = named_operators(model, X)
    assert used.operator is not None
    assert unused.skipped == "the forward pass of the example input does not reach it"


def test_a_lazy_layer_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(2))
    named_operators(model, X)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_weight_that_is_not_finite():
    layer = nn.Conv2d(3, 2, 3)
    nn.init.constant_(layer.weight, float("inf"))
    assert "finite weight" in only(nn.Sequential(layer), X).skipped


def test_attention_layers_show_their_linear_parts():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    operators = named_operators(model, floats(1, 5, 4))
    into = ["self_attn.query", "self_attn.key", "self_attn.value"]
    assert [t.name for t in operators] == [*into, "self_attn.out_proj", "linear1", "linear2"]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 2}])
def test_attention_is_linear_before_and_after(sizes):
    """With one head and one place to attend to, attention is the product of two of its maps."""
    layer = nn.MultiheadAttention(4, 1, bias=False, **sizes)
    x = [floats(1, n) for n in (4, sizes.get("kdim", 4), sizes.get("vdim", 4))]
    found = {named.name: named for named in named_operators(layer, tuple(x))}
    assert list(found) == ["query", "key", "value", "out_proj"]
    assert {named.type for named in found.values()} == {"Linear"}
    assert found["key"].operator.shape == (4, sizes.get("kdim", 4))
    out = found["out_proj"].operator.matvec(found["value"].operator.matvec(x[2]))
    torch.testing.assert_close(out, layer(*x)[0].detach())


def test_attention_that_is_not_reached():
    model = Given(lambda self, x: x, attention=nn.MultiheadAttention(4, 1))
    named = only(model, X)
    assert (named.name, named.operator) == ("attention", None)
    assert "does not reach it" in named.skipped


def test_parts_of_a_weight_and_what_is_computed_from_it_are_layers_of_their_own():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        stacked, weight = self.stacked, self.layer.weight
        y = F.linear(x, stacked[:4]) + F.linear(x, stacked[4:]) + F.linear(x, stacked[::2])
        y = y + self.layer(x) + F.linear(x, 2 * weight) + F.linear(x, 2 * weight)
        return y + F.linear(x, weight[:, [0, 2, 1, 3]])  # the list takes a freed address, perhaps

    model = Given(forward, layer=nn.Linear(4, 4))
    model.stacked = nn.Parameter(floats(8, 4))
    found = {named.name: named for named in named_operators(model, floats(2, 4))}
    weight = model.layer.weight.detach()
    expected = {
        "stacked[0:4]": model.stacked[:4],
        "stacked[4:8]": model.stacked[4:],
        "stacked[from 0]": model.stacked[::2],
        "layer": weight,
        "layer (2)": 2 * weight,
        "layer (3)": weight[:, [0, 2, 1, 3]],
    }
    assert list(found) == list(expected)
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name].operator.weight, matrix.detach())
    assert [named.uses for named in found.values()] == [1, 1, 1, 1, 2, 1]


def test_weights_computed_one_after_another_have_their_own_names():
    """Each is freed before the next, which may take its address."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight * 2)
        return x

    weights = nn.ParameterList(nn.Parameter(floats(4, 4)) for _ in range(6))
    found = named_operators(Given(forward, weights=weights), floats(2, 4))
    assert [named.name for named in found] == [f"weights.{i}" for i in range(6)]


def test_a_bias_of_relative_positions_is_no_layer():
    """A table that is looked up by constants, and given to attention as a mask."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        bias = self.table[torch.arange(25) % 7].view(5, 5, 2).permute(2, 0, 1).contiguous()
        x = x.view(1, 5, 2, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=bias[None])

    model = Given(forward)
    model.table = nn.Parameter(floats(7, 2))
    assert named_operators(model, floats(1, 5, 4)) == []


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_proj_weight)


def test_attention_with_a_forward_of_its_own_is_taken_from_its_operations():
    *maps, out = named_operators(nn.Sequential(OwnAttention(4, 1)), floats(1, 4))
    assert [named.name for named in maps] == ["0.query", "0.key", "0.value"]
    assert out.name == "0.out_proj"
    assert "does not reach it" in out.skipped
    assert [named.operator.shape for named in maps] == [(4, 4)] * 3


POSITIONS = {
    "a parameter": lambda self, x: self.conv(x).flatten(2).mT + self.place,
    "a part of one": lambda self, x: self.conv(x).flatten(2).mT[:, :7] + self.place[:, :7],
    "a table": lambda self, x: self.conv(x).flatten(2).mT + self.table(torch.arange(30)),
    "resized": lambda self, x: (
        self.conv(x).flatten(2).mT + F.interpolate(self.place.mT, 30, mode="linear").mT
    ),
    "beside": lambda self, x: torch.cat([self.place, self.conv(x).flatten(2).mT], 1),
}


@pytest.mark.parametrize("forward", POSITIONS.values(), ids=POSITIONS)
def test_embeddings_of_positions_are_no_layers(forward):
    model = Given(forward, conv=nn.Conv2d(3, 4, 1))
    model.place = nn.Parameter(torch.zeros(1, 30, 4))
    if "table" in forward.__code__.co_names:
        model.table, model.place = nn.Embedding(30, 4), None
    assert only(model, X).name == "conv"


def test_a_table_that_the_input_chooses_from_is_listed():
    model = Given(lambda self, i: self.linear(self.table(i)), table=nn.Embedding(5, 3))
    model.linear = nn.Linear(3, 2)
    table, linear = named_operators(model, torch.tensor([1, 4]))
    assert (table.name, table.operator) == ("table", None)
    assert linear.operator is not None


class Kept(nn.Module):
    """A parametrization that leaves its result in a buffer, as torchlip's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("result", torch.zeros(4, 3, 3, 3))

    def forward(self, weight: Tensor) -> Tensor:
        self.result = weight / 2
        return self.result if self.training else self.result.view_as(weight)


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


def test_a_layer_with_a_weight_from_elsewhere_has_its_own_name():
    layer = OwnForward(3, 4, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Kept())
    named = only(nn.Sequential(layer), X)
    assert named.name == "0"
    torch.testing.assert_close(named.operator.weight, layer.weight.detach())


def test_the_meta_device_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        named_operators(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"expected model to be a torch.nn.Module, got str"):
        named_operators("model", X)


def test_modes_buffers_and_hooks_are_left():
    def forward(self, x):
        self.count += 1
        return self.norm(self.conv(x))

    model = Given(forward, conv=nn.Conv2d(3, 2, 3), norm=nn.BatchNorm2d(2))
    model.register_buffer("count", torch.zeros(()))
    model.conv.eval()
    before = copy.deepcopy(model.state_dict())
    named_operators(model, X)
    assert (model.training, model.conv.training, model.norm.training) == (True, False, True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_the_model_raises_is_left():
    def forward(self, x):
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        named_operators(Given(forward, conv=nn.Conv2d(3, 2, 3)), X)


# --- batch normalization --------------------------------------------------------------------------

NORMALIZED = [
    (nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), X),
    (nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4, affine=False)), X),
    (nn.Conv2d(3, 4, 3), settled(nn.SyncBatchNorm(4)), X),
    (nn.ConvTranspose1d(3, 2, 3, stride=2), settled(nn.BatchNorm1d(2)), X[..., 0]),
    (nn.Conv3d(3, 2, 1), settled(nn.BatchNorm3d(2)), X[..., None]),
    (nn.Linear(3, 4), settled(nn.BatchNorm1d(4)), X[..., 0, 0]),
]


@pytest.mark.parametrize(("layer", "norm", "x"), NORMALIZED)
def test_scale_is_that_of_the_normalized_model(layer, norm, x):
    model = nn.Sequential(layer, norm).eval()
    named = only(model.train(), x)
    model.eval()
    assert named.batch_norm == "1"
    assert named.scale.dtype == torch.float64
    scaled = named.operator.matvec(x) * named.scale.float().reshape(-1, *(1,) * (x.ndim - 2))
    torch.testing.assert_close(scaled, model(x) - model(torch.zeros_like(x)), atol=1e-5, rtol=1e-5)


def test_functional_normalization_is_named_by_its_buffer():
    def forward(self, x):
        norm = self.norm
        y = F.conv2d(x, self.conv.weight)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    model = Given(forward, conv=nn.Conv2d(3, 4, 3), norm=settled(nn.BatchNorm2d(4)))
    assert only(model, X).batch_norm == "norm"


NOT_ALONE = [
    (lambda self, x: self.norm(y := self.conv(x)) + y, "add"),
    (lambda self, x: (y := self.conv(x), self.norm(y)), "the model's output"),
    (lambda self, x: self.norm(self.conv(x).relu_()), "relu_"),
    (lambda self, x: self.norm(self.pool(y := self.conv(x)) + self.norm(y)), "pool"),
]


@pytest.mark.parametrize(("forward", "other"), NOT_ALONE)
def test_a_normalization_that_is_not_alone_is_not_folded(forward, other):
    model = Given(
        forward,
        conv=nn.Conv2d(3, 4, 3),
        norm=settled(nn.BatchNorm2d(4)),
        pool=nn.AvgPool2d(3, 1, 1),
    )
    named = only(model, X)
    assert (named.scale, named.batch_norm) == (None, "")
    (note,) = named.notes
    assert note.startswith("batch normalization norm is not alone")
    assert other in note


NOT_NORMALIZED = [
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
]


@pytest.mark.parametrize("model", NOT_NORMALIZED)
def test_other_normalizations_are_not_folded(model):
    named = only(model, X)
    assert (named.scale, named.batch_norm, named.notes) == (None, "", ())


def test_uses_with_different_normalizations():
    model = Given(
        lambda self, x: self.a(self.conv(x)) + self.b(self.conv(x)),
        conv=nn.Conv2d(3, 4, 3),
        a=settled(nn.BatchNorm2d(4)),
        b=settled(nn.BatchNorm2d(4)),
    )
    named = only(model, X)
    assert named.scale is None
    assert named.uses == 2
    assert named.notes[0].endswith("the same batch normalization (a or b)")


def test_a_model_that_is_one_layer_is_named_by_its_type():
    named = only(nn.Conv2d(3, 3, 3), X)
    assert (named.name, named.uses) == ("Conv2d", 1)


def test_a_layer_that_is_not_reached_has_no_uses():
    model = Given(lambda self, x: self.a(x), a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 3))
    assert [t.uses for t in named_operators(model, X)] == [1, 0]
