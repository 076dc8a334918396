"""`prepare`: all or nothing, healthy at any depth, and honest about what it left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain(activation: type[nn.Module], depth: int, channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i in range(depth):
        modules += [nn.Conv2d(channels if i else 3, channels, 3, padding=1), activation()]
    return nn.Sequential(
        *modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)
    )


@pytest.mark.parametrize("depth", [3, 30, 150])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU])
def test_gradients_are_stable_where_they_vanish_without(
    activation: type[nn.Module], depth: int
) -> None:
    model = plain(activation, depth)
    report = cs.prepare(model, X)
    assert report.healthy, str(report)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert 1e-3 < float(gradient.norm()) < 1e3


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU])
def test_it_says_where_gradients_are_not_stable(activation: type[nn.Module]) -> None:
    """Gains that keep the second moment do not keep the gradient of these."""
    report = cs.prepare(plain(activation, 60), X, mirrored=False)
    assert not report.healthy
    assert "outside 0.1 to 10" in str(report)
    assert report.budget > 10


def test_relu_networks_are_linear_and_isometric() -> None:
    model = plain(nn.ReLU, 5, channels=6).double()
    cs.prepare(model, X.double())
    body = model[:10]
    x = X[:1].double()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: torch.sub(*body(z).chunk(2, dim=1)), x
    ).reshape(3 * 64, 3 * 64)
    s = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(s, torch.ones_like(s))


def test_the_report() -> None:
    model = plain(nn.ReLU, 3)
    report = cs.prepare(model, X)
    assert [layer.note for layer in report.layers] == ["", "", "", "the head"]
    assert [layer.gain for layer in report.layers] == [1.0, 1.0, 1.0, None]
    assert [layer.mirrored for layer in report.layers] == [True, True, True, False]
    assert report.budget == 0.0
    assert report.learning_rate == pytest.approx(min(1e-2, 3.0 / (27 + 72 + 72)))
    text = str(report)
    assert "suggested learning rate (Adam)" in text
    assert "as it was" in text
    assert report.records()[0]["activation"] == "relu"
    assert all(float(m.bias.detach().abs().max()) == 0 for m in model if isinstance(m, nn.Conv2d))


def test_without_mirrored_kernels_the_budget_counts_relus() -> None:
    report = cs.prepare(plain(nn.ReLU, 7), X, mirrored=False)
    assert report.budget == pytest.approx(7.0)
    assert {layer.gain for layer in report.layers[:-1]} == {math.sqrt(2)}


class Residual(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(blocks))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(torch.relu(inner(x)))
        return self.head(x)


def test_residual_branches_are_scaled() -> None:
    model = Residual(16)
    report = cs.prepare(model, X)
    gains = {layer.name: layer.gain for layer in report.layers}
    assert gains["outer.3"] == pytest.approx(0.25)
    assert report.healthy
    assert gains["head"] is None


def test_what_is_left_alone_is_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 5, 1),
    )  # fmt: skip
    model[7].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = cs.prepare(model, X)
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["0"] == notes["3"] == "beside a normalization"
    assert notes["5"] == "its weight is computed by a parametrization"
    assert notes["7"] == "frozen"
    assert notes["11"] == "the head"
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"9.weight", "9.bias"}


def test_a_layer_used_twice_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))

    report = cs.prepare(Shared(), X)
    assert {layer.name: layer.note for layer in report.layers} == {
        "first": "", "twice": "used more than once", "head": "the head",
    }  # fmt: skip


def test_an_odd_number_of_channels() -> None:
    report = cs.prepare(plain(nn.ReLU, 3, channels=7), X, mirrored=True)
    assert [layer.mirrored for layer in report.layers[:3]] == [False] * 3
    assert all("not mirrored" in layer.note for layer in report.layers[:3])
    assert report.layers[0].gain == pytest.approx(math.sqrt(2))


def test_all_or_nothing() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.b(torch.tanh(self.a(x))))
            return y / (self.a.bias.abs().sum() + 0 * y)  # 0 / 0 once biases are 0

    model = Breaks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArithmeticError, match="expected finite signals and gradients"):
        cs.prepare(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected model to be a torch\.nn\.Module"):
        cs.prepare("model", X)
    with pytest.raises(ValueError, match="expected layers to prepare, got none"):
        cs.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), X)
    model = plain(nn.ReLU, 2)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="layer '0': expected a weight that is not zero"):
        cs.prepare(model, X)
