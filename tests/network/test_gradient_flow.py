"""Verdicts on networks that were made to have each disease, and numbers against naive ones."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs
from convspectra.paper.images import load_digits
from convspectra.paper.stable_gradients import Settings, plain_network

DEPTH = 30


def plain(
    activation: type[nn.Module], gain: float | None, depth: int = DEPTH, bias: bool = False
) -> nn.Sequential:
    """A plain CNN of 8 channels; PyTorch's default initialization without a gain."""
    parts: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1)]
    for _ in range(depth - 1):
        parts += [activation(), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*parts)
    for module in model:
        if isinstance(module, nn.Conv2d) and gain is not None:
            nn.init.normal_(module.weight, 0, gain / module.weight[0].numel() ** 0.5)
            if not bias:
                nn.init.zeros_(module.bias)
    return model


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 1, 8, 8)


def isometric(activation: type[nn.Module], depth: int = DEPTH) -> nn.Sequential:
    model = plain(activation, 1.0, depth)
    for module in model[2:]:
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    return model


def test_default_deep_relu_vanishes_by_its_kernels(images: Tensor) -> None:
    flow = cs.gradient_flow(plain(nn.ReLU, None), images)
    assert flow.verdict == "vanishing"
    assert flow.begins in dict(plain(nn.ReLU, None).named_modules())
    assert all(layer.kernel < 0.7 for layer in flow.layers[1:])
    assert flow.causes["kernels"] < -6
    assert min(flow.causes, key=flow.causes.__getitem__) == "kernels"
    assert "gradients change by kernels 10^-" in flow.sentences[1]
    rate = 3 / (9 + 28 * 72)  # the fan-ins of every layer except the last
    assert flow.sentences[2] == (
        "Call cs.prepare(model, images) before training; then train with Adam at a learning rate "
        f"of {rate:.1e}."
    )


def test_large_gain_explodes(images: Tensor) -> None:
    assert cs.gradient_flow(plain(nn.ReLU, 3.0), images).verdict == "exploding"


def test_tanh_of_gain_3_saturates(images: Tensor) -> None:
    flow = cs.gradient_flow(plain(nn.Tanh, 3.0), images)
    assert flow.verdict == "saturated"
    assert flow.begins in {"0", "2", "4"}


def test_dead_units_are_seen(images: Tensor) -> None:
    model = isometric(nn.ReLU, 6)
    nn.init.constant_(model[4].bias, -100.0)
    flow = cs.gradient_flow(model, images)
    assert (flow.verdict, flow.begins) == ("saturated", "4")
    assert next(layer for layer in flow.layers if layer.name == "4").dead == 1.0


def test_images_collapse_where_biases_outweigh_them(images: Tensor) -> None:
    model = isometric(nn.Identity, 8)
    nn.init.constant_(model[6].bias, 100.0)
    flow = cs.gradient_flow(model, images)
    assert (flow.verdict, flow.begins) == ("collapsing", "6")


@pytest.mark.parametrize(("factor", "verdict"), [(1e-3, "vanishing"), (1e3, "exploding")])
def test_a_single_broken_layer_is_named(images: Tensor, factor: float, verdict: str) -> None:
    model = isometric(nn.Identity, 12)
    with torch.no_grad():
        model[12].weight.mul_(factor)
    flow = cs.gradient_flow(model, images)
    assert (flow.verdict, flow.begins) == (verdict, "12")


def test_healthy_networks_are_left_alone(images: Tensor) -> None:
    for model in (isometric(nn.Identity), isometric(nn.LeakyReLU, 3), plain(nn.Tanh, 1.0, 4)):
        flow = cs.gradient_flow(model, images)
        assert (flow.verdict, flow.begins) == ("healthy", "")
        assert flow.sentences[2].startswith("Nothing needs to be done")


def test_numbers_are_those_of_a_naive_pass(images: Tensor) -> None:
    model = plain(nn.Tanh, 1.0, 3)
    flow = cs.gradient_flow(model, images, loss=lambda output: output.square().sum())
    double = copy.deepcopy(model).double()
    z0 = double[0](images.double()).detach().requires_grad_()
    a = torch.tanh(z0)
    z1 = double[2](a)
    a1 = torch.tanh(z1)
    loss = double[4](a1).square().sum()
    g0, ga, g1, gw = torch.autograd.grad(loss, [z0, a, z1, double[2].weight])
    first, second = flow.layers[:2]
    assert first.gradient == pytest.approx(g0.norm().item())
    assert second.weight_gradient == pytest.approx(float(gw.norm()))
    assert second.measured == pytest.approx(float(ga.norm() / g1.norm()))
    assert first.slope == pytest.approx((1 - a**2).square().mean().sqrt().item())
    op = cs.ConvOperator.from_module(double[2], (8, 8))
    matrix = op.to_dense().detach()
    assert second.kernel == pytest.approx(float(matrix.norm()) / matrix.shape[0] ** 0.5)
    assert second.alignment == pytest.approx(second.measured / second.kernel)
    rows = z0.detach().flatten(1)
    assert first.second_moment == pytest.approx(float(rows.square().mean()))
    share = float((rows - rows.mean(0)).square().mean() / rows.square().mean())
    assert first.image_share == pytest.approx(share)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    off = ~torch.eye(len(rows), dtype=torch.bool)
    assert first.cosine == pytest.approx(float(cosines[off].mean()))


def test_in_place_activations_do_not_hide_what_was_before_them(images: Tensor) -> None:
    model = isometric(nn.ReLU, 4)
    expected = cs.gradient_flow(model, images)
    for module in model:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    assert cs.gradient_flow(model, images) == expected


def test_nothing_of_the_model_changes(images: Tensor) -> None:
    model = nn.Sequential(plain(nn.ReLU, 1.0, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    model[1].eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cs.gradient_flow(model, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert sum(hooks) == len(model[0]._forward_hooks) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert images.grad is None
    assert not images.requires_grad


def test_the_report_is_shown_and_written(images: Tensor, tmp_path: Path) -> None:
    flow = cs.gradient_flow(plain(nn.ReLU, None, 5), images)
    assert repr(flow) == "GradientFlow('vanishing', begins='2', 5 layers)"
    lines = str(flow).splitlines()
    assert lines[0].split()[:4] == ["layer", "signal", "differs", "cosine"]
    assert "normalization" not in lines[0]
    assert "saturated" not in lines[0]
    assert lines[-3:] == list(flow.sentences)
    flow.to_html(tmp_path / "flow.html")
    page = (tmp_path / "flow.html").read_text()
    assert page.count("<tr") == 6
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert flow._repr_html_() in page
    flow.to_json(tmp_path / "flow.json")
    written = json.loads((tmp_path / "flow.json").read_text())
    assert written["verdict"] == "vanishing"
    assert written["layers"][0]["kernel"] == flow.layers[0].kernel
    assert written["layers"][-1]["slope"] is None


def test_names_are_escaped_on_the_page(images: Tensor) -> None:
    model = nn.Sequential()
    for name in ("a<b>&", "second", "third"):
        model.add_module(name, nn.Conv2d(1, 1, 3, padding=1))
    page = cs.gradient_flow(model, images)._repr_html_()
    assert "a&lt;b&gt;&amp;" in page
    assert "a<b>" not in page


def test_a_figure_is_drawn(images: Tensor) -> None:
    pytest.importorskip("matplotlib")
    flow = cs.gradient_flow(plain(nn.ReLU, None, 70), images)
    above, below = flow.plot().axes
    relative = [layer.relative for layer in flow.layers]
    assert list(above.lines[0].get_ydata()) == relative
    assert len(below.get_xticklabels()) == 35  # every second name of 70


def test_a_data_frame_has_a_row_for_each_layer(images: Tensor) -> None:
    flow = cs.gradient_flow(plain(nn.ReLU, None, 5), images)
    records = flow.records()
    assert [record["name"] for record in records] == ["0", "2", "4", "6", "8"]
    pytest.importorskip("pandas")
    assert flow.to_dataframe().to_dict("records")[0] == records[0]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().detach()


class Ungraded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


def broken(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), *parts)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3)), r"at least two layers, got \['0'\]"),
        (broken(Noisy()), "without randomness .* from the last operations on"),
        (broken(Noisy(), nn.Conv2d(8, 8, 1)), "without randomness .* from '3' on"),
        (broken(Cut()), "an output that depends on a layer differentiably"),
        (broken(Ungraded()), "got none through '2.layer'"),
        (broken(Two()), "one floating tensor, got tuple with 2; give a loss"),
        (broken(nn.Conv2d(7, 8, 1)), "a forward pass that runs, got RuntimeError"),
    ],
)
def test_models_that_are_refused(images: Tensor, model: nn.Module, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        cs.gradient_flow(model, images)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.zeros(1, 1, 8, 8), "at least two images"),
        (torch.zeros(()), "at least two images"),
        (torch.zeros(3, 1, 8, 8), "images that differ"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), r"images.float\(\) / 255"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.complex64), "real images"),
        (torch.full((3, 1, 8, 8), torch.nan), "finite images"),
        ("digits", "expected images to be a tensor, .* got str"),
        ({}, "got a dict without any"),
        ((), "got a dict without any"),
    ],
)
def test_images_that_are_refused(given: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        cs.gradient_flow(broken(), given)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda y: y.sum() / 0, "expected a finite loss, got -?inf"),
        (lambda y: y, r"one number, got \(16, 8, 4, 4\)"),
        (lambda y: 1.0, "one number, got float"),
    ],
)
def test_losses_that_are_refused(images: Tensor, loss: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        cs.gradient_flow(broken(), images.abs() + 1, loss=loss)


def test_infinite_signals_are_named(images: Tensor) -> None:
    model = broken()
    model[1].weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or Inf in the output, from '1' on"):
        cs.gradient_flow(model, images)


class Named(nn.Module):
    """Takes a dict, as a processor returns it, and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain(nn.ReLU, 1.0, 3)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        output = self.body(pixels)
        return {"logits": output, "hidden": output * 2}


def test_batches_and_dicts(images: Tensor) -> None:
    model = Named()
    expected = cs.gradient_flow(model.body, images)
    labels = torch.arange(16)
    named = cs.gradient_flow(model, {"pixels": images, "labels": labels})
    assert [layer.gradient for layer in named.layers] == [
        layer.gradient for layer in expected.layers
    ]
    assert cs.gradient_flow(model.body, [images, labels]) == expected
    seen = []

    def loss(output: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return output.square().mean()

    cs.gradient_flow(model.body, (images, labels), loss=loss)
    assert torch.equal(seen[0], labels)


class Block(nn.Module):
    def __init__(self, scale: float, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        for conv in (self.first, self.second):
            nn.init.kaiming_normal_(conv.weight)
        with torch.no_grad():
            (self.norm if norm else self.second).weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm(self.second(self.first(x).relu()))).relu()


def residual(scale: float, norm: bool = False, blocks: int = 8) -> nn.Sequential:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    body = [Block(scale, norm) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *body, *head)


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True])
def test_residual_networks_are_healthy(images: Tensor, scale: float, norm: bool) -> None:
    torch.manual_seed(0)
    flow = cs.gradient_flow(residual(scale, norm), images)
    assert flow.verdict == "healthy", str(flow)


def test_a_broken_branch_is_named(images: Tensor) -> None:
    torch.manual_seed(0)
    model = residual(0.3)
    with torch.no_grad():
        model[4].second.weight.mul_(1e3)
    flow = cs.gradient_flow(model, images)
    assert (flow.verdict, flow.begins) == ("exploding", "4.second")
    assert "Scale this layer alone" in flow.sentences[2]
    assert "model.get_submodule('4.second').weight.data.mul_(0.00" in flow.sentences[2]


def test_gradients_through_branches_are_those_of_autograd(images: Tensor) -> None:
    torch.manual_seed(0)
    model = residual(0.3, norm=True, blocks=2)
    flow = cs.gradient_flow(model, images, loss=lambda output: output.square().sum())
    double, kept = copy.deepcopy(model).double(), {}
    for name, module in double.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, a, y, name=name: kept.__setitem__(name, y))
    loss = double(images.double()).square().sum()
    outputs = [kept[layer.name] for layer in flow.layers]
    weights = [double.get_submodule(layer.name).weight for layer in flow.layers]
    found = torch.autograd.grad(loss, [*outputs, *weights])
    norms = [float(g.norm()) for g in found]
    assert [layer.gradient for layer in flow.layers] == pytest.approx(norms[: len(outputs)])
    assert [layer.weight_gradient for layer in flow.layers] == pytest.approx(norms[len(outputs) :])


def test_prepared_networks_are_healthy(images: Tensor) -> None:
    for activation, depth in ((nn.ReLU, 30), (nn.GELU, 30), (nn.Tanh, 8)):
        torch.manual_seed(0)
        model = plain(activation, None, depth)
        report = cs.prepare(model, images)
        flow = cs.gradient_flow(model, images)
        assert flow.verdict == "healthy", str(flow)
        assert f"learning rate of {report.learning_rate:.1e}" in flow.sentences[2]


def test_batch_normalized_networks_take_the_statistics_of_training(images: Tensor) -> None:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1)]
    for _ in range(9):
        parts += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*parts)
    flow = cs.gradient_flow(model, images)
    assert flow.verdict == "healthy"
    assert all(layer.normalization > 1.5 for layer in flow.layers[:-1])
    assert cs.gradient_flow(model.eval(), images).verdict == "vanishing"  # statistics never seen


def test_images_collapse_in_deep_relu_networks(images: Tensor) -> None:
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for width in (64, *[128] * 60):
        layer = nn.Linear(width, 128)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(layer.bias, 0, 0.3)
        parts += [layer, nn.ReLU()]
    flow = cs.gradient_flow(nn.Sequential(*parts), images[:, 0, :, :].flatten(1))
    assert flow.verdict == "collapsing"
    first = next(layer for layer in flow.layers if layer.name == flow.begins)
    assert first.cosine > 0.99
    assert "without any bias images would differ by" in flow.sentences[1]
    assert "mirrored kernels keep images apart" in flow.sentences[2]


def test_a_head_of_zeros_hides_nothing(images: Tensor) -> None:
    model = isometric(nn.Identity, 6)
    expected = cs.gradient_flow(model, images)
    nn.init.zeros_(model[-1].weight)
    flow = cs.gradient_flow(model, images)
    assert flow.verdict == expected.verdict == "healthy"
    model[4].weight.data.mul_(1e-4)
    assert cs.gradient_flow(model, images).begins == "4"


def test_causes_add_up_to_what_is_measured(images: Tensor) -> None:
    torch.manual_seed(0)
    for model in (plain(nn.ReLU, None, 12), residual(0.3, norm=True)):
        flow = cs.gradient_flow(model, images)
        assert set(flow.causes) == {
            "kernels",
            "alignment",
            "activations",
            "biases",
            "normalization",
            "branches",
        }
    flow = cs.gradient_flow(plain(nn.Tanh, 1.0, 8), images)
    layers = flow.layers[:-1]
    total = sum(flow.causes.values())
    assert 10**total == pytest.approx(layers[0].gradient / layers[-1].gradient)
    kernels = torch.tensor([layer.kernel for layer in layers[1:]]).log10().sum()
    assert flow.causes["kernels"] == pytest.approx(float(kernels), rel=1e-5)
    assert flow.causes["biases"] == flow.causes["branches"] == 0


def test_a_computed_weight_has_no_gradient_to_show(images: Tensor) -> None:
    model = isometric(nn.Identity, 3)
    nn.utils.parametrizations.spectral_norm(model[2])
    flow = cs.gradient_flow(model, images)
    assert [layer.weight_gradient > 0 for layer in flow.layers] == [True, False, True]
    assert flow.layers[1].weight_gradient != flow.layers[1].weight_gradient  # nan, not 0


def test_the_band_is_wider_where_layers_are_normalized(images: Tensor) -> None:
    assert cs.gradient_flow(plain(nn.Tanh, 1.0, 3), images).band == (0.1, 10.0)
    flow = cs.gradient_flow(residual(0.3, norm=True), images)
    assert flow.band == (1e-3, 1e3)
    assert "and the band from 0.001 to 1000" in flow._repr_html_()


class Scaled(nn.Module):
    """Pre-activation blocks whose branches are scaled down."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(blocks))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + 0.05 * block(x.tanh())
        return self.head(x.mean((2, 3)))


def test_a_small_factor_is_no_saturation(images: Tensor) -> None:
    torch.manual_seed(0)
    flow = cs.gradient_flow(Scaled(40), images)
    assert flow.verdict == "healthy"
    assert max(layer.saturated for layer in flow.layers) < 0.1
    assert sum(flow.causes.values()) == pytest.approx(0, abs=0.2)


def test_a_saturated_channel_is_seen_beside_others(images: Tensor) -> None:
    model = isometric(nn.Tanh, 4)
    with torch.no_grad():
        model[2].bias[:4] = 3.0
    layer = cs.gradient_flow(model, images).layers[1]
    assert layer.saturated == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("depth", "verdict"), [(5, "healthy"), (8, "exploding")])
def test_directions_are_blamed_where_gains_are_in_order(depth: int, verdict: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(depth)])
    for layer in model:
        nn.init.constant_(layer.weight, 0.25)  # of rank 1, gain 1 and norm 4
    flow = cs.gradient_flow(model, torch.randn(4, 16) + 1)
    assert flow.causes["kernels"] == pytest.approx(0, abs=1e-6)
    assert flow.causes["alignment"] == pytest.approx((depth - 2) * math.log10(4), rel=1e-6)
    assert flow.verdict == verdict
    assert flow.band == (1e-3, 1e3)
    if verdict == "exploding":
        assert flow.sentences[2].startswith("Gains are in order, directions are not: ")


def test_saturated_features_before_the_head_are_no_disease(images: Tensor) -> None:
    model = isometric(nn.Tanh, 5)
    with torch.no_grad():
        model[6].weight.mul_(9)
    flow = cs.gradient_flow(model, images)
    assert flow.layers[3].saturated > 0.25
    assert flow.verdict == "healthy"
    with torch.no_grad():
        model[4].weight.mul_(9)
    assert cs.gradient_flow(model, images).begins == "4"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "verdict"), [("He", "healthy"), ("prepare", "healthy"), ("default", "vanishing")]
)
def test_trained_networks_raise_no_alarm(arm: str, verdict: str) -> None:
    pytest.importorskip("sklearn")
    digits = load_digits()
    model = plain_network(20, Settings(), (1, 8, 8), 10, arm)
    if arm == "prepare":
        cs.prepare(model, digits.train_images[:8])
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3)
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(digits.train_images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(
            model(digits.train_images[chosen]), digits.train_labels[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guesses = model(digits.test_images).argmax(1)
    accuracy = float((guesses == digits.test_labels).double().mean())
    assert (accuracy > 0.85) == (verdict == "healthy")
    assert cs.gradient_flow(model, digits.test_images[:32]).verdict == verdict
