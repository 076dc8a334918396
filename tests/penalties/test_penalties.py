"""The penalties three ways: the naive sum over Omega, finite differences, gradcheck."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from helpers.strategies import one_thread as one_thread
from hypothesis import given, settings
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator, penalties
from convspectra.penalties import _extremes as extremes
from convspectra.penalties._extremes import CLUSTER_LIMIT, CLUSTER_TOLERANCE

NAMES = ("frobenius", "sigma_min", "conditioning", "stein")
each_penalty = pytest.mark.parametrize("name", NAMES)


def kernel(*taps: float) -> Tensor:
    return torch.tensor(taps, dtype=torch.float64)[None, None]


def identity(channels: int) -> Tensor:
    weight = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    weight[range(channels), range(channels), 1, 1] = 1
    return weight


def value_and_gradient(name: str, layer: Layer, **options: int) -> tuple[float, Tensor]:
    weight = layer.weight.clone().requires_grad_()
    value = getattr(penalties, name)(layer.operator(weight), **options)
    assert value.shape == ()
    assert value.dtype == torch.float64
    value.backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad.dtype == weight.dtype
    return float(value.detach()), weight.grad


# --- the reference: Theorems 2.1-2.3, 3.1 and 3.2 as they stand, entry by entry -------------------


def one_hot(layer: Layer, index: int) -> Tensor:
    """dM / dw of one weight: its ones are the index set Omega of the theorems."""
    weight = torch.zeros(layer.weight.numel(), dtype=torch.float64)
    weight[index] = 1
    return layer.dense(weight.reshape(layer.weight.shape)).detach()


def some_indices(layer: Layer, most: int = 8) -> list[int]:
    count = layer.weight.numel()
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].tolist()


def reference(name: str, dense: Tensor, k: int = 1) -> tuple[float, np.ndarray]:
    """Value, and the derivative by the matrix; that by a weight is its sum over Omega."""
    matrix = dense.numpy()
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    n = len(s)
    frobenius = 0.5 * (matrix**2).sum(), matrix
    if name == "frobenius":
        return frobenius
    if name == "stein":
        value = frobenius[0] - np.log(s).sum() - 0.5 * n
        return value, matrix - (u / s) @ vh
    # The mean of the k smallest, a repeated last one shared by all its copies.
    ascending = s[::-1]
    same = np.abs(s - ascending[k - 1]) <= 1e-9 * s[0]
    below = (s < ascending[k - 1]) & ~same
    share = (below + (k - below.sum()) / same.sum() * same) / k
    smallest = -ascending[:k].mean(), -(u * share) @ vh
    if name == "sigma_min":
        return smallest
    return frobenius[0] + n * smallest[0], matrix + n * smallest[1]


def has_a_gradient(name: str, dense: Tensor, k: int = 1) -> bool:
    """Away from rank deficiency, and from clusters that are neither one value nor several."""
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    if name == "frobenius":
        return True
    if s[-1] <= 1e-6 * s[0]:
        return False
    distance = np.abs(s - s[-k]) / s[0]
    return name == "stein" or not ((distance > 1e-11) & (distance < 1e-5)).any()


def check(name: str, layer: Layer, *, indices: list[int] | None = None, k: int = 1) -> None:
    dense = layer.dense().detach()
    if not has_a_gradient(name, dense, k):
        return
    expected, by_matrix = reference(name, dense, k)
    value, gradient = value_and_gradient(name, layer, **({} if k == 1 else {"k": k}))
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    condition, largest_term = (s[0] / s[-1], 1 / s[-1]) if name == "stein" else (1.0, 1.0)
    assert math.isclose(
        value, expected, rel_tol=1e-11, abs_tol=1e-12 * len(s) * (condition + s[0] ** 2)
    )
    terms = np.abs(dense.numpy()).max() + len(s) + largest_term
    tolerance = 1e-9 * terms * math.sqrt(dense.numel())
    for i in some_indices(layer) if indices is None else indices:
        summed = float((one_hot(layer, i).numpy() * by_matrix).sum())
        assert math.isclose(float(gradient.flatten()[i]), summed, rel_tol=1e-7, abs_tol=tolerance)


@each_penalty
@given(layer=layers())
@settings(max_examples=60)
def test_gradient_is_the_sum_over_omega(name, layer):
    check(name, layer)


@pytest.mark.parametrize("k", [2, 3])
@given(layer=layers())
@settings(max_examples=30)
def test_gradient_of_the_mean_of_several(k, layer):
    if k <= min(layer.operator().shape):
        check("sigma_min", layer, k=k)


# --- finite differences ---------------------------------------------------------------------------


@each_penalty
@given(layer=layers())
@settings(max_examples=40)
def test_gradient_by_central_differences(name, layer):
    dense = layer.dense().detach()
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    simple = len(s) == 1 or s[-2] - s[-1] > 1e-2 * s[0]
    if name != "frobenius" and (s[-1] <= 1e-2 * s[0] or (name != "stein" and not simple)):
        return
    direction = random(*layer.weight.shape, seed=1)
    direction /= direction.norm()
    step = 1e-5 * float(layer.weight.norm())
    ends = [
        float(getattr(penalties, name)(layer.operator(layer.weight + sign * step * direction)))
        for sign in (1, -1)
    ]
    value, gradient = value_and_gradient(name, layer)
    slope = float((gradient * direction).sum())
    scale = float(gradient.norm()) + abs(value) / step * 1e-11
    assert math.isclose((ends[0] - ends[1]) / (2 * step), slope, abs_tol=1e-4 * scale)


CHECKED = {
    "square": Layer(random(2, 2, 3), (4,)),
    "paper": Layer(random(1, 3, 3, 3), (3, 2)),
    "grouped": Layer(random(4, 1, 3), (4,), {"groups": 2}),
    "strided": Layer(random(3, 1, 3), (6,), {"stride": 2, "padding": 1}),
    "dilated": Layer(random(2, 1, 3), (5,), {"dilation": 2}),
    "transposed": Layer(
        random(1, 2, 3), (4,), {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1}
    ),
    "circular": Layer(random(2, 1, 3), (4,), {"padding_mode": "circular"}),
    "reflect": Layer(random(1, 2, 3), (5,), {"padding_mode": "reflect"}),
    "replicate": Layer(random(2, 1, 3), (4,), {"padding_mode": "replicate"}),
    "linear": Layer(random(3, 2), ()),
    "3 axes": Layer(random(1, 1, 2, 2, 2), (2, 3, 2)),
}


@pytest.mark.parametrize("layer", CHECKED.values(), ids=CHECKED.keys())
@each_penalty
def test_gradcheck(name, layer):
    weight = layer.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: getattr(penalties, name)(layer.operator(w)), (weight,), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("layer", CHECKED.values(), ids=CHECKED.keys())
@each_penalty
def test_every_entry_of_the_gradient(name, layer):
    check(name, layer, indices=list(range(layer.weight.numel())))


@pytest.mark.parametrize("layer", [CHECKED["square"], CHECKED["linear"], CHECKED["reflect"]])
def test_frobenius_is_differentiable_twice(layer):
    weight = layer.weight.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: penalties.frobenius(layer.operator(w)), (weight,))


@pytest.mark.parametrize("name", ["sigma_min", "conditioning", "stein"])
@pytest.mark.parametrize("size", [(3, 3), (9, 9)], ids=["dense", "capacitance"])
def test_second_derivatives_that_would_be_wrong_are_refused(name, size):
    weight = random(4, 4, 3, 3).requires_grad_()
    value = getattr(penalties, name)(ConvOperator(weight, size))
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        torch.autograd.grad(gradient.sum(), weight)


@each_penalty
def test_gradients_are_linear_in_the_incoming_one(name):
    layer = CHECKED["square"]
    _, expected = value_and_gradient(name, layer)
    weight = layer.weight.clone().requires_grad_()
    (-2.5 * getattr(penalties, name)(layer.operator(weight))).backward()
    assert torch.allclose(weight.grad, -2.5 * expected, rtol=1e-13)


@each_penalty
def test_weights_without_gradient_are_taken(name):
    layer = CHECKED["square"]
    value = getattr(penalties, name)(layer.operator())
    assert not value.requires_grad
    assert math.isclose(float(value), value_and_gradient(name, layer)[0], rel_tol=1e-12)


# --- repeated and vanishing values ----------------------------------------------------------------

REPEATED = {
    "identity": (Layer(identity(2), (3, 3)), 18),
    "identity, 1 axis": (Layer(kernel(0, 1, 0), (7,)), 7),
    "orthogonal mixing": (
        Layer(torch.linalg.qr(random(3, 3)).Q[..., None, None], (2, 2)),
        12,
    ),
    "kernel 1": (Layer(random(3, 2, 1, 1), (3, 2)), 6),
    "depthwise copies": (Layer(random(1, 1, 3).repeat(3, 1, 1), (5,), {"groups": 3}), 3),
    "symmetric": (
        Layer(
            kernel([0.1, 1, 0.1], [1, 5, 1], [0.1, 1, 0.1]), (4, 4), {"padding_mode": "circular"}
        ),
        1,
    ),
    "circular difference and 3": (Layer(kernel(-1, 3, 1), (8,), {"padding_mode": "circular"}), 2),
    "small copies": (
        Layer(random(1, 1, 3).repeat(2, 1, 1) * 1e-3, (5,), {"groups": 2}),
        2,
    ),
    "capacitance": (
        Layer(
            kernel([0, 1, 0], [1, -5, 1], [0, 1, 0]).repeat(5, 1, 1, 1),
            (8, 8),
            {"groups": 5},
        ),
        5,
    ),
}


@pytest.mark.parametrize(("layer", "copies"), REPEATED.values(), ids=REPEATED.keys())
def test_repeated_values_have_the_mean_over_the_cluster(layer, copies):
    dense = layer.dense().detach()
    s = torch.linalg.svdvals(dense)
    assert int((s <= s[-1] * (1 + 1e-9)).sum()) == copies
    value, gradient = value_and_gradient("sigma_min", layer)
    assert math.isclose(value, -float(s[-1]), rel_tol=1e-12)
    assert gradient.isfinite().all()
    for name in ("sigma_min", "conditioning", "stein"):
        check(name, layer, indices=some_indices(layer, 6))


def test_a_cluster_is_told_from_its_neighbours():
    """Two copies, and a third value that is further away than the tolerance."""
    one = random(1, 1, 3)
    for distance, copies in ((10 * CLUSTER_TOLERANCE, 2), (0.1 * CLUSTER_TOLERANCE, 3)):
        weight = torch.cat([one, one, one * (1 + distance)])
        layer = Layer(weight, (5,), {"groups": 3})
        _, gradient = value_and_gradient("sigma_min", layer)
        shares = gradient.flatten(1).norm(dim=1)
        alone = value_and_gradient("sigma_min", Layer(one, (5,)))[1].norm()
        assert torch.allclose(shares[:copies], alone / copies, rtol=1e-5)
        assert copies == 3 or float(shares[2]) < 1e-6 * float(alone)


def test_small_repeated_values_are_known_only_to_rounding_and_still_one_cluster():
    """At 1e-11 of sigma_max rounding tears two copies apart by far more than the tolerance."""
    one = kernel(1, 2, 1)[0, 0]
    blocks = torch.zeros(3, 3, 3, dtype=torch.float64)
    blocks[0, 0] = blocks[1, 1] = 1e-10 * one
    blocks[2, 2] = kernel(1, 5, 1)[0, 0]
    left, right = (torch.linalg.qr(random(3, 3, seed=seed)).Q for seed in (0, 1))
    layer = Layer(torch.einsum("ab,bcp,cd->adp", left, blocks, right), (9,))
    s = cs.svdvals(layer.operator())
    assert s[-2] / s[-1] - 1 > 10 * CLUSTER_TOLERANCE
    _, gradient = value_and_gradient("sigma_min", layer)
    unmixed = torch.einsum("ba,bcp,dc->adp", left, gradient, right)
    expected = torch.zeros_like(blocks)
    alone = value_and_gradient("sigma_min", Layer(one[None, None], (9,)))[1][0, 0]
    expected[0, 0] = expected[1, 1] = alone / 2
    assert torch.allclose(unmixed, expected, atol=1e-4)


def test_several_values_that_end_inside_a_cluster():
    """k = 3 of the values 1, 2, 2, 2, 3: the copies of 2 share two thirds between them."""
    factors = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    layer = Layer(factors[:, None, None], (1,), {"groups": 5})
    value, gradient = value_and_gradient("sigma_min", layer, k=3)
    assert math.isclose(value, -5 / 3)
    expected = -torch.tensor([3, 2, 2, 2, 0], dtype=torch.float64) / 9
    assert torch.allclose(gradient.flatten(), expected, atol=1e-14)
    value, gradient = value_and_gradient("sigma_min", layer, k=5)
    assert math.isclose(value, -2)
    assert torch.allclose(gradient.flatten(), -torch.full((5,), 0.2, dtype=torch.float64))


def test_a_cluster_larger_than_the_limit_costs_no_more_than_the_limit(monkeypatch):
    """The identity of 400 rows: nn.init.dirac_ makes such layers, of any size."""
    asked = []
    original = extremes.svds
    monkeypatch.setattr(
        extremes,
        "svds",
        lambda op, k, which, **options: asked.append(k) or original(op, k, which, **options),
    )
    layer = Layer(identity(4), (10, 10))
    value, gradient = value_and_gradient("sigma_min", layer)
    assert max(asked) <= 2 * (CLUSTER_LIMIT + 2)
    assert math.isclose(value, -1, rel_tol=1e-12)
    # A subgradient: u'v over the copies at hand, of mean -1 on the center taps together.
    assert math.isclose(float((gradient * identity(4)).sum()), -1, rel_tol=1e-10)
    assert gradient.abs().max() <= 1


@pytest.mark.parametrize("size", [(3, 3), (64, 64)], ids=["small", "large"])
def test_zero_weight(size):
    """Finite everywhere, and no cluster of 32,768 zeros is looked for."""
    layer = Layer(torch.zeros(8, 8, 3, 3).double(), size)
    n = min(layer.operator().shape)
    for name, expected in (("frobenius", 0.0), ("sigma_min", 0.0), ("conditioning", 0.0)):
        value, gradient = value_and_gradient(name, layer)
        assert value == expected
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= (n if name == "conditioning" else 1)
    with pytest.raises(ArithmeticError, match="Stein's loss is infinite: ConvOperator"):
        penalties.stein(layer.operator())


SINGULAR = {
    "copied output": Layer(random(4, 4, 3, 3)[[0, 1, 1, 3]], (5, 5)),
    "copied output, large": Layer(random(4, 4, 3, 3)[[0, 1, 1, 3]], (9, 9)),
    "1 0 1": Layer(kernel(1, 0, 1), (9,)),
    "1 0 1, large": Layer(kernel(1, 0, 1), (291,)),
    "windows that miss": Layer(random(1, 1, 1), (1,), {"padding": 2, "stride": 4}),
}


@pytest.mark.parametrize("layer", SINGULAR.values(), ids=SINGULAR.keys())
def test_singular_layers_have_finite_gradients(layer):
    value, gradient = value_and_gradient("sigma_min", layer)
    assert abs(value) <= 1e-13 * float(layer.weight.norm())
    assert gradient.isfinite().all()
    assert value_and_gradient("conditioning", layer)[1].isfinite().all()
    with pytest.raises(ArithmeticError, match="rank deficient; expected a layer with full rank"):
        penalties.stein(layer.operator(layer.weight.clone().requires_grad_()))


def test_a_step_along_the_gradient_of_a_singular_layer_lifts_it():
    layer = SINGULAR["copied output"]
    _, gradient = value_and_gradient("sigma_min", layer)
    lifted = cs.svds(layer.operator(layer.weight - 1e-3 * gradient), 1, "LM")
    assert lifted.converged
    assert float(gradient.norm()) > 0


# --- the floors -----------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=60)
def test_floors(layer):
    """conditioning >= -n / 2 and stein >= 0, at any scale."""
    op = layer.operator()
    n = min(op.shape)
    for scale in (1e-3, 1 / math.sqrt(1 + float(layer.weight.square().sum())), 1.0):
        scaled = layer.operator(layer.weight * scale)
        assert float(penalties.conditioning(scaled)) >= -0.5 * n * (1 + 1e-12)
        if cs.logabsdet(scaled) > -math.inf:
            assert float(penalties.stein(scaled)) >= -1e-12 * n


ORTHOGONAL = {
    "identity": Layer(identity(3), (4, 4)),
    "identity, large": Layer(identity(4), (9, 9)),
    "minus identity": Layer(-identity(2), (3, 5)),
    "mixing": Layer(torch.linalg.qr(random(4, 4)).Q[..., None], (5,)),
    "mixing, tall": Layer(torch.linalg.qr(random(5, 3)).Q[..., None, None], (2, 3)),
    "mixing, wide": Layer(torch.linalg.qr(random(5, 3)).Q.T.clone(), ()),
    "circular shift": Layer(kernel(0, 0, 1), (6,), {"padding_mode": "circular"}),
    "space to depth": Layer(
        torch.linalg.qr(random(4, 4)).Q.reshape(4, 1, 2, 2), (4, 6), {"stride": 2, "padding": 0}
    ),
}


@pytest.mark.parametrize("layer", ORTHOGONAL.values(), ids=ORTHOGONAL.keys())
def test_floors_are_reached_at_orthogonal_layers(layer):
    n = min(layer.operator().shape)
    value, gradient = value_and_gradient("conditioning", layer)
    assert math.isclose(value, -n / 2, rel_tol=1e-12)
    if n <= CLUSTER_LIMIT:
        assert gradient.abs().max() <= 1e-10 * n, "the mean over all copies is the minimum's"
    value, gradient = value_and_gradient("stein", layer)
    assert abs(value) <= 1e-11 * n
    assert gradient.abs().max() <= 1e-10 * n


def test_conditioning_is_the_sum_of_its_parts():
    for layer in CHECKED.values():
        op = layer.operator()
        parts = penalties.frobenius(op) + min(op.shape) * penalties.sigma_min(op)
        assert torch.equal(penalties.conditioning(op), parts)


# --- dtypes and failures --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_penalty
def test_narrow_weights_are_penalised_in_float64(name, dtype):
    weight = random(3, 2, 3).to(dtype)
    narrow = value_and_gradient(name, Layer(weight, (5,)))
    wide = value_and_gradient(name, Layer(weight.double(), (5,)))
    assert narrow[0] == wide[0]
    assert torch.allclose(narrow[1].double(), wide[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    if name in ("frobenius", "sigma_min"):  # one term, rounded once
        assert torch.equal(narrow[1], wide[1].to(dtype))


def test_kernels_of_the_paper_pass_their_gradient_on():
    taps = random(3, 3, 2, 4).requires_grad_()
    penalties.conditioning(ConvOperator(cs.kernel_to_weight(taps), (3, 4))).backward()
    layer = Layer(cs.kernel_to_weight(taps.detach()), (3, 4))
    expected = value_and_gradient("conditioning", layer)[1]
    assert torch.allclose(taps.grad, cs.weight_to_kernel(expected), atol=1e-12)


@pytest.mark.parametrize("k", [0, -1, 9, True, 1.0, "1", None])
def test_counts_that_cannot_be_are_refused(k):
    with pytest.raises(ValueError, match=r"expected k in 1 to 8 = min\(op.shape\), got"):
        penalties.sigma_min(ConvOperator(random(2, 3, 3), 4), k)


def test_all_the_values_can_be_asked_for():
    op = ConvOperator(random(2, 3, 3), 4)
    assert math.isclose(float(penalties.sigma_min(op, 8)), -float(cs.svdvals(op).mean()))


@each_penalty
@pytest.mark.parametrize("value", [random(2, 2, 3), None])
def test_only_operators_are_taken(name, value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got"):
        getattr(penalties, name)(value)


def test_a_value_that_did_not_converge_is_not_penalised(monkeypatch):
    original = extremes.svds

    def too_few_steps(op: ConvOperator, k: int, which: str, **options) -> cs.SVDResult:
        return original(op, k, which, method="capacitance", maxiter=1, **options)

    monkeypatch.setattr(extremes, "svds", too_few_steps)
    op = ConvOperator(random(4, 4, 3, 3), 9)
    for name in ("sigma_min", "conditioning"):
        with pytest.raises(cs.ConvergenceError, match="the 1 smallest singular values of") as error:
            getattr(penalties, name)(op)
        assert not error.value.result.converged


@each_penalty
def test_global_random_state_is_left_alone(name):
    state = torch.get_rng_state()
    value_and_gradient(name, Layer(random(4, 4, 3, 3), (9, 9)))
    assert torch.equal(torch.get_rng_state(), state)
