"""What an audit's numbers say in words, and what they give together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.short_audit import conditioning, layer

from convspectra.auditing._findings import NOTHING, findings, network_facts, summary
from convspectra.auditing._record import Certified, Circular, LayerAudit


def kinds(*layers: LayerAudit) -> list[tuple[str, str]]:
    return [(f.layer, f.kind) for f in findings(layers)]


def test_a_good_layer_has_nothing_to_say() -> None:
    assert kinds(layer(applied=conditioning())) == []


def test_the_most_urgent_come_first_and_the_worst_of_a_kind() -> None:
    layers = [
        layer("skipped", skipped="Embedding is no convolution"),
        layer("ill", conditioning(sigma_min=1e-6)),
        layer("worse", conditioning(sigma_min=1e-8)),
        layer("big", conditioning(sigma_max=50.0)),
        layer("small", conditioning(growth=-2.0)),
        layer("singular", conditioning(sigma_min=0.0, growth=-math.inf, rank=97)),
    ]
    assert kinds(*layers) == [
        ("singular", "singular"),
        ("big", "exploding"),
        ("small", "vanishing"),
        ("worse", "ill-conditioned"),
        ("ill", "ill-conditioned"),
        ("skipped", "skipped"),
    ]
    assert "3 directions of 100" in findings(layers)[0].text
    assert "Embedding" in findings(layers)[-1].text


def test_circular_padding_is_mentioned_where_it_hides_the_smallest_value() -> None:
    circular = Circular(2.0, 0.5, 0.0, "")
    (found,) = findings([layer("ill", conditioning(sigma_min=1e-6), circular=circular)])
    assert "500,000 times" in found.text


def test_a_batch_normalization_counts() -> None:
    entry = layer("conv", conditioning(sigma_max=100.0), folded=conditioning(), batch_norm="bn")
    assert kinds(entry) == []
    entry = layer("conv", conditioning(), folded=conditioning(sigma_max=100.0), batch_norm="bn")
    assert kinds(entry) == [("conv", "exploding")]
    assert "with its batch normalization" in findings([entry])[0].text


def test_what_is_not_enclosed_is_uncertain() -> None:
    loose = Certified(0.5, 0.0, 0.5, "lobpcg", "", True)
    assert (
        kinds(
            layer(
                "a",
                conditioning(),
            )
        )
        == []
    )
    entry = layer("a", conditioning(sigma_min=0.5))
    entry = replace(entry, applied=replace(entry.applied, sigma_min=loose))
    assert kinds(entry) == [("a", "uncertain")]
    stopped = replace(loose, lower=0.4, converged=False)
    entry = replace(entry, applied=replace(entry.applied, sigma_min=stopped))
    assert "did not converge" in findings([entry])[0].text


def test_the_summary_multiplies_norms_and_adds_growths() -> None:
    layers = [
        layer("a", conditioning(sigma_max=10.0, growth=1.0)),
        layer("b", skipped="why not"),
        layer("c", conditioning(sigma_max=1e3, growth=2.0), folded=conditioning(1.0, growth=1.5)),
    ]
    network = summary(layers)
    assert (network.audited, network.skipped, network.seconds) == (2, 1, 4.5)
    assert network.log10_product == pytest.approx(4.0)
    assert network.log10_product_folded == pytest.approx(1.0)
    assert network.growth == (1.0, 2.5)
    assert network.leaves_band == "c"
    assert summary(layers, (1e-3, 1e3)).leaves_band is None
    texts = dict(network_facts(network))
    assert texts["product of all sigma_max of the audited layers"] == "1.00e+04"
    label = "mean growth along the audited layers, with batch normalization folded in"
    assert "after c" in texts[label]


def test_without_batch_normalization_none_is_mentioned() -> None:
    labels = [label for label, _ in network_facts(summary([layer("a", conditioning())]))]
    assert labels == [
        "layers", "product of all sigma_max", "mean growth along the layers", "time",
    ]  # fmt: skip


def test_a_layer_counts_as_often_as_it_is_called() -> None:
    network = summary([layer("a", conditioning(sigma_max=10.0, growth=1.0), uses=5)])
    assert network.log10_product == pytest.approx(5.0)
    assert network.growth == (5.0,)
    assert network.leaves_band == "a"


def test_a_model_that_is_one_layer_can_leave_the_band() -> None:
    network = summary([layer("", conditioning(growth=-6.9))])
    assert network.leaves_band == "Conv2d"
    text = dict(network_facts(network))["mean growth along the layers"]
    assert text == "leaves 0.1 to 10 after Conv2d"
    nameless = replace(network, leaves_band="")
    assert "leaves" in dict(network_facts(nameless))["mean growth along the layers"]


def test_of_nothing_nothing_is_known() -> None:
    texts = dict(network_facts(summary([layer("a", skipped="too large")])))
    assert texts["product of all sigma_max of the audited layers"] == NOTHING
    assert texts["mean growth along the audited layers"] == NOTHING


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (0, "100 directions of 100 are lost, and no gradient comes back along them"),
        (99, "1 direction of 100 is lost, and no gradient comes back along it"),
        (None, "at least one direction of 100 is lost, and no gradient comes back along it"),
    ],
)
def test_lost_directions_are_counted_in_words(rank: int | None, text: str) -> None:
    entry = layer("a", conditioning(sigma_min=0.0, growth=-math.inf, rank=rank))
    assert findings([entry])[0].text == f"sigma_min is 0 to working precision: {text}"


def test_a_growth_that_is_not_known_is_told_with_the_reason() -> None:
    numbers = conditioning(growth=None, log_growth_method="not known: too large")
    (found,) = findings([layer("a", numbers)])
    assert (found.kind, found.text) == ("uncertain", "mean growth is not known: too large")
    stopped = replace(numbers, sigma_min=replace(numbers.sigma_min, converged=False))
    (found,) = findings([layer("a", stopped)])
    assert "sigma_min did not converge" in found.text


def test_a_product_beyond_double_precision() -> None:
    network = summary([layer(str(i), conditioning(sigma_max=1e10)) for i in range(50)])
    assert dict(network_facts(network))["product of all sigma_max"] == "1.00e+500"


def test_a_growth_that_is_not_known_leaves_no_band() -> None:
    network = summary([layer("a", conditioning(growth=None)), layer("b", conditioning(growth=9.0))])
    assert network.leaves_band is None
    assert "not known" in dict(network_facts(network))["mean growth along the layers"]


@pytest.mark.parametrize("band", [(0.0, 1.0), (2.0, 1.0)])
def test_a_band_that_holds_nothing_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="band of two positive numbers in order"):
        summary([], band)
