"""What an audit's numbers say in words, and what they give together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import convspectra as cs
from convspectra.auditing._findings import NOTHING, PURPOSES, findings, network_facts, summary
from convspectra.auditing._record import Certified, Circular, Conditioning, Finding, LayerAudit
from convspectra.auditing._shape_rank import rank_by_shape
from convspectra.testing import naive_dense


def conditioning(
    sigma_max: float = 2.0, sigma_min: float = 0.5, gain: float = 1.0, **changes: object
) -> Conditioning:
    """The numbers of a matrix with 100 rows."""

    def certified(value: float) -> Certified:
        return Certified(value, value * 0.99, value * 1.01, "dense", "", True)

    condition = sigma_max / sigma_min if sigma_min else math.inf
    numbers = Conditioning(
        10.0 * gain, certified(sigma_max), certified(sigma_min), condition, condition, condition,
        100, 1e-14 * sigma_max, 0.0, 0.0, "dense",
    )  # fmt: skip
    return replace(numbers, **changes)  # type: ignore[arg-type]


def layer(name: str = "conv", applied: Conditioning | None = None, **fields: object) -> LayerAudit:
    return LayerAudit(name, "Conv2d", shape=(100, 100), applied=applied, seconds=1.5, **fields)  # type: ignore[arg-type]


def kinds(*layers: LayerAudit, purpose: str = "training") -> list[tuple[str, bool]]:
    return [(f.kind, f.alarm) for f in findings(layers, purpose)]


def one(*layers: LayerAudit, purpose: str = "training") -> Finding:
    (found,) = findings(layers, purpose)
    return found


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_good_layer_has_nothing_to_say(purpose: str) -> None:
    assert kinds(layer(applied=conditioning(0.9, gain=0.7)), purpose=purpose) == []


HARD = (
    layer("skipped", skipped="Embedding is no convolution"),
    layer("ill", conditioning(sigma_min=1e-6)),
    layer("worse", conditioning(sigma_min=1e-8)),
    layer("big", conditioning(sigma_max=50.0)),
    layer("loud", conditioning(gain=3.0)),
    layer("small", conditioning(gain=0.1)),
    layer("singular", conditioning(sigma_min=0.0, rank=97)),
)


@pytest.mark.parametrize(
    ("purpose", "expected"),
    [
        (
            "training",
            [
                ("exploding", True),
                ("growing", True),
                ("vanishing", True),
                ("singular", False),
                ("ill-conditioned", False),
                ("skipped", False),
            ],
        ),
        ("lipschitz", [("expanding", True), ("skipped", False)]),
        ("invertible", [("singular", True), ("ill-conditioned", True), ("skipped", False)]),
    ],
)
def test_the_purpose_says_what_is_an_alarm(purpose: str, expected: list[tuple[str, bool]]) -> None:
    assert kinds(*HARD, purpose=purpose) == expected


def test_a_line_a_kind_with_its_layers_the_worst_ones_first() -> None:
    layers = [layer(str(i), conditioning(gain=0.30 + 0.002 * i)) for i in range(9)]
    found = one(*reversed(layers))
    assert found.text == "typical gradients shrink to 0.300 to 0.316, in 9 layers"
    assert found.line == f"{found.text}: 0, 1, 2, 3, 4 and 4 more"
    assert found.layers == tuple("012345678")
    assert "cs.precondition" in found.advice
    found = one(layer("a", conditioning(gain=3.0)), layer("b", conditioning(gain=3.0)))
    assert found.line == "typical gradients grow 3.00 times, in 2 layers: a, b"


def test_the_default_initialization_of_a_deep_plain_network_is_said_to_vanish() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
    report = cs.audit(nn.Sequential(*convolutions), torch.zeros(1, 8, 6, 6))
    network, each = (finding for finding in report.findings if finding.alarm)
    assert (network.kind, network.layers) == ("gradient vanishes", ("0",))
    assert (each.kind, sorted(each.layers)) == ("vanishing", ["0", "1", "2", "3"])


def test_circular_padding_is_mentioned_where_it_hides_the_smallest_value() -> None:
    circular = Circular(2.0, 0.5, 0.0, "")
    found = one(layer("ill", conditioning(sigma_min=1e-6), circular=circular))
    assert "a sigma_min up to 5.00e5 times as large" in found.text


def test_a_batch_normalization_counts() -> None:
    entry = layer("conv", conditioning(sigma_max=100.0), folded=conditioning(), batch_norm="bn")
    assert kinds(entry) == []
    entry = layer("conv", conditioning(), folded=conditioning(sigma_max=100.0), batch_norm="bn")
    assert one(entry).kind == "exploding"
    assert "with batch normalization folded in, in 1 layer" in one(entry).text


def test_what_is_not_enclosed_is_uncertain() -> None:
    loose = Certified(0.5, 0.0, 0.5, "lobpcg", "", True)
    entry = layer("a", conditioning(sigma_min=0.5))
    entry = replace(entry, applied=replace(entry.applied, sigma_min=loose))
    assert one(entry).text == "sigma_min has no lower bound, in 1 layer"
    stopped = replace(loose, lower=0.4, converged=False)
    other = replace(entry, name="b", applied=replace(entry.applied, sigma_min=stopped))
    assert [f.line for f in findings([entry, other])] == [
        "sigma_min has no lower bound, in 1 layer: a",
        "sigma_min did not converge, in 1 layer: b",
    ]


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (0, ": 100 directions lost in each, in 1 layer"),
        (99, ": 1 direction lost in each, in 1 layer"),
        (None, "; how many directions are lost was not counted, in 1 layer"),
    ],
)
def test_lost_directions_are_counted_in_words(rank: int | None, text: str) -> None:
    found = one(layer("a", conditioning(sigma_min=0.0, rank=rank)))
    begin = "sigma_min is 0 to working precision, though the shape would allow more"
    assert found.text == begin + text


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match="expected purpose to be one of training, lipschitz, inv"):
        findings([], "fun")
    with pytest.raises(ValueError, match="got 'fun'"):
        cs.audit(nn.Linear(2, 2), torch.zeros(1, 2), purpose="fun")


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Conv2d(3, 8, 3, stride=1, padding=1),
        nn.Conv2d(4, 6, 2, stride=3, padding=1, groups=2),
        nn.Conv2d(2, 2, 3, padding=4),
        nn.Conv2d(3, 2, 2, dilation=3, stride=2),
        nn.Conv2d(2, 9, 1, padding=(0, 2)),
        nn.Conv2d(2, 4, 3, stride=5, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(3, 2, 1, stride=2),
        nn.ConvTranspose2d(4, 4, 2, stride=3, padding=1, output_padding=1, groups=2),
    ],
    ids=str,
)
def test_no_weight_has_a_larger_rank_than_the_shape_allows(module: nn.Module) -> None:
    torch.manual_seed(0)
    dense = naive_dense(module.double(), (module.in_channels, 7, 9)).detach()
    rank = int(torch.linalg.matrix_rank(dense))
    x = torch.zeros(1, module.in_channels, 7, 9, dtype=torch.float64)
    (entry,) = cs.audit(module, x).layers
    bound = rank_by_shape(entry)
    assert rank <= bound <= min(entry.shape)
    if module.kernel_size == (1, 1):
        assert rank == bound


def test_rank_deficient_by_shape_is_a_fact_and_no_alarm() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 1, stride=2)
    nn.init.orthogonal_(conv.weight)
    report = cs.audit(conv, torch.zeros(1, 8, 6, 6))
    assert report.layers[0].applied.rank == 72 < min(report.layers[0].shape) == 144
    assert [(f.kind, f.alarm) for f in report.findings] == [("shape", False)]
    assert "0.500 of the directions are left" in report.findings[0].text
    alarms = {f.kind for f in report.judged_for("invertible").findings if f.alarm}
    assert alarms == {"shape", "not square"}
    with torch.no_grad():
        conv.weight[:, 1] = conv.weight[:, 0]
    found = cs.audit(conv, torch.zeros(1, 8, 6, 6)).findings
    assert [f.kind for f in found] == ["singular", "shape"]
    assert "9 directions lost in each" in found[0].text


def test_the_gain_is_that_of_random_gradients() -> None:
    """More outputs than inputs: most of a gradient lies in the null space of M'."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 16, 3, padding=1, bias=False).double()
    report = cs.audit(conv, torch.zeros(1, 1, 12, 12, dtype=torch.float64))
    x = torch.zeros(400, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(400, 16, 12, 12, dtype=torch.float64)
    conv(x).backward(gradient)
    measured = float(x.grad.norm() / gradient.norm())
    assert report.layers[0].gain == pytest.approx(measured, rel=0.02)
    assert report.network.growth == (pytest.approx(math.log(measured), abs=0.02),)


def test_the_summary_multiplies_norms_and_gains() -> None:
    layers = [
        layer("a", conditioning(sigma_max=10.0, gain=math.e)),
        layer("b", skipped="why not"),
        layer("c", conditioning(1e3, gain=9.0), folded=conditioning(1.0, gain=math.exp(1.5))),
    ]
    network = summary(layers)
    assert (network.audited, network.skipped, network.seconds) == (2, 1, 4.5)
    assert network.log10_product == pytest.approx(4.0)
    assert network.log10_product_folded == pytest.approx(1.0)
    assert network.growth == pytest.approx((2.5, 1.5))
    assert network.leaves_band == "a"
    assert summary(layers, (1e-3, 1e3)).leaves_band is None
    texts = dict(network_facts(network))
    assert texts["product of all sigma_max of the audited layers"] == "1.00e+04"
    label = "typical gain of a gradient back along the audited layers alone"
    assert "at a" in texts[f"{label}, with batch normalization folded in"]


def test_without_batch_normalization_none_is_mentioned() -> None:
    labels = [label for label, _ in network_facts(summary([layer("a", conditioning())]))]
    assert labels == [
        "layers", "product of all sigma_max",
        "typical gain of a gradient back along the layers alone", "time",
    ]  # fmt: skip


def test_a_layer_counts_as_often_as_it_is_called() -> None:
    network = summary([layer("a", conditioning(sigma_max=10.0, gain=math.e), uses=5)])
    assert network.log10_product == pytest.approx(5.0)
    assert network.growth == pytest.approx((5.0,))
    assert network.leaves_band == "a"


def test_a_model_that_is_one_layer_can_leave_the_band() -> None:
    network = summary([layer("", conditioning(gain=1e-3))])
    assert network.leaves_band == "Conv2d"
    label = "typical gain of a gradient back along the layers alone"
    assert dict(network_facts(network))[label] == "leaves 0.1 to 10 at Conv2d"
    nameless = replace(network, leaves_band="")
    assert "leaves" in dict(network_facts(nameless))[label]


def test_a_layer_of_zeros_ends_every_gradient() -> None:
    network = summary([layer("a", conditioning()), layer("b", conditioning(0.0, 0.0, 0.0))])
    assert network.growth == (-math.inf, -math.inf)
    assert network.leaves_band == "b"


def test_of_nothing_nothing_is_known() -> None:
    texts = dict(network_facts(summary([layer("a", skipped="too large")])))
    assert texts["product of all sigma_max of the audited layers"] == NOTHING
    assert texts["typical gain of a gradient back along the audited layers alone"] == NOTHING


def test_a_product_beyond_double_precision() -> None:
    network = summary([layer(str(i), conditioning(sigma_max=1e10)) for i in range(50)])
    assert dict(network_facts(network))["product of all sigma_max"] == "1.00e+500"


@pytest.mark.parametrize("band", [(0.0, 1.0), (2.0, 1.0)])
def test_a_band_that_holds_nothing_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="band of two positive numbers in order"):
        summary([], band)
