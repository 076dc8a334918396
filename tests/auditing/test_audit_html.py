"""The page of an audit: complete, self-contained, and inert whatever a layer is called."""

import dataclasses
import html
import os
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.made_up_audit import (
    CIRCUMSTANCES,
    FINDINGS,
    HOSTILE,
    NETWORK,
    certified,
    conditioning,
    hostile_audit,
    layer,
    small_audit,
)

from convspectra.auditing._record import Certified, Finding, Spectrum
from convspectra.auditing.html._page import fragment, page
from convspectra.auditing.html._plot import histogram, overview

GOLDEN = Path(__file__).parent / "golden" / "audit.html"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self.words = []
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, attribute):
        return [a[attribute] for _, a in self.elements if attribute in a]


def parsed(layers=None, network=NETWORK, findings=FINDINGS, circumstances=CIRCUMSTANCES):
    layers = small_audit() if layers is None else layers
    return Page(page(layers, network, findings, circumstances))


def hostile_page():
    layers, findings = hostile_audit()
    name = HOSTILE[1]
    circumstances = dataclasses.replace(
        CIRCUMSTANCES, model=name, input_shape=name, created=name, machine=name, command=name
    )
    return parsed(layers, [(text, text) for text in HOSTILE], findings, circumstances)


def test_golden_page():
    """Set OVERWRITE_GOLDEN=1 to write the file anew, and look at the difference."""
    text = page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    if os.environ.get("OVERWRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [parsed, hostile_page], ids=["small", "hostile"])
def test_nothing_is_loaded_and_nothing_runs_but_the_script(make):
    document = make()
    assert document.open == []
    assert set(document.values("src")) == set()
    assert all(link.startswith("#") or link == "data:," for link in document.values("href"))
    assert {tag for tag, _ in document.elements}.isdisjoint({"img", "iframe", "object", "embed"})
    assert (len(document.of("script")), len(document.of("style"))) == (1, 1)
    names = {name for _, attributes in document.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    assert "javascript:" not in "".join(document.values("href"))


@pytest.mark.parametrize("make", [parsed, hostile_page], ids=["small", "hostile"])
def test_ids_are_unique_and_links_lead_somewhere(make):
    document = make()
    ids = document.values("id")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert {link[1:] for link in document.values("href") if link.startswith("#")} <= set(ids)
    labeled = " ".join(document.values("aria-labelledby")).split()
    assert set(labeled) <= set(ids)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in ids)


def test_hostile_names_are_shown_as_they_are():
    text = hostile_page().text
    assert all(name in text for name in HOSTILE)
    assert "62615533" not in text, "no name is run as a template"


def test_the_policy_forbids_everything_but_the_page_itself():
    (policy,) = (meta["content"] for meta in parsed().of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_every_layer_has_a_row_and_a_page():
    document = parsed()
    rows = [a for a in document.of("tr") if a.get("id", "").startswith("row-")]
    sections = [a for a in document.of("section") if a.get("class") == "layer"]
    assert len(rows) == len(sections) == len(small_audit())
    assert all(audit.name in document.text for audit in small_audit())


@pytest.mark.parametrize(
    "text",
    [
        "1.8000000000 [1.7999999998, 1.8000000002]",
        "84.507042254 [84.507042236, 84.507042271]",
        "0 (singular)",
        "infinite (singular)",
        "[0, 4.001e-9] no enclosure",
        "[12.09, infinite] not converged",
        "1000 of 1024",
        "-0.4321 ± 0.012",
        "not known too large",
        "not computed: not a convolution",
        "With stem.bn folded in",
        "no circular counterpart of reflect padding",
        "residual and inertia",
        "The weight is shared with stage2.conv",
        "0+1\N{MULTIPLICATION SIGN}1",
        "14.55",
        "6 layers: 5 audited, 1 skipped. 3 of them call for a look.",
        "leaves 0.1 to 10 after stage2.conv1",
        "convspectra audit plain.pt",
    ],
)
def test_what_is_known_is_on_the_page(text):
    assert text in parsed().text


def test_findings_lead_to_the_first_layer_of_their_name():
    finding = Finding("singular", "lost", ("a",), "", True)
    document = parsed([layer("b"), layer("a"), layer("a")], findings=[finding])
    assert "#layer-2" in document.values("href")
    assert "2 of them call for a look" in document.text


def test_a_finding_about_no_layer_of_the_table_has_no_link():
    document = parsed(
        [layer("a")], findings=[Finding("skipped", "not found", ("gone",), "", False)]
    )
    assert "Not found. gone" in document.text


def test_a_finding_leads_to_all_its_layers_and_says_what_to_try():
    names = tuple(f"layer{i}" for i in range(9))
    finding = Finding("vanishing", "typical gradients shrink", names, "start anew", True)
    document = parsed([layer(name) for name in names], findings=[finding])
    links = [f"#layer-{i}" for i in range(1, 10)]
    assert set(links) <= set(document.values("href"))
    assert "4 more layers" in document.text
    assert "To try: start anew." in document.text


def test_a_fact_is_told_and_calls_for_nothing():
    fact = Finding("shape", "half of the directions are left", ("a",), "nothing to do", False)
    document = parsed([layer("a")], findings=[fact])
    assert "Half of the directions are left." in document.text
    assert "Note: nothing to do." in document.text
    assert "None calls for a look." in document.text


def test_many_findings_are_folded_away():
    findings = [Finding("singular", f"number {i}", ("a",), "", True) for i in range(30)]
    document = parsed([layer("a")], findings=findings)
    assert "18 more" in document.text
    assert "Number 29" in document.text


def test_no_layers():
    document = parsed([], [], [])
    assert "No layers: the audit found no convolution" in document.text
    assert document.of("table") == []


def test_only_skipped_layers():
    document = parsed(small_audit()[-1:], findings=[])
    assert "1 layer: 0 audited, 1 skipped. None calls for a look." in document.text


def test_an_interrupted_audit_says_so():
    assert "Incomplete." not in parsed().text
    interrupted = dataclasses.replace(CIRCUMSTANCES, complete=False)
    assert "Incomplete." in parsed(circumstances=interrupted).text


def test_a_thousand_layers():
    layers = [
        layer(f"layer{i}", batch_norm="bn", folded=conditioning(certified(2.0), certified(1.0)))
        for i in range(1000)
    ]
    started = time.process_time()
    text = page(layers, NETWORK, FINDINGS, CIRCUMSTANCES)
    assert time.process_time() - started < 5
    assert len(text.encode()) < 15e6


def test_a_fragment_is_the_page_in_a_frame():
    text = fragment(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    (frame,) = Page(text).of("iframe")
    assert frame["srcdoc"] == page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    assert "allow-same-origin" not in frame["sandbox"]
    assert html.unescape(text).count("<!doctype html>") == 1


def test_heights_in_the_overview_follow_the_values():
    plot = overview(small_audit())
    first, singular, uncertain, stopped, _, skipped = plot.marks
    assert plot.top <= first.largest < first.circular < first.smallest < plot.bottom
    assert singular.smallest == plot.zero
    assert uncertain.smallest < plot.zero
    assert uncertain.whiskers.startswith(f"M{uncertain.x - 3:.1f} {plot.zero:.1f}")
    assert stopped.whiskers.endswith(f"V{plot.top:.1f}m-3 0h6")
    assert (skipped.largest, skipped.whiskers) == (None, "")


def test_rounding_noise_does_not_stretch_the_overview():
    noise = Certified(1.7e-26, 0.0, 1e-15, "", "", True)
    singular = layer("a", applied=conditioning(certified(2.0), noise), circular=None)
    plot = overview([singular, layer("b")])
    marked, ordinary = plot.marks
    assert marked.smallest == plot.zero
    assert marked.whiskers == ""
    assert {tick.label for tick in plot.y_ticks} >= {"0.05", "0.1", "1"}
    assert ordinary.smallest < plot.zero - 20


def test_zero_is_explained_where_it_is_drawn():
    assert "What is 0 to working precision is drawn at 0." in parsed().text
    assert "drawn at 0" not in parsed([layer("a")], findings=[]).text


def test_a_layer_without_a_name_is_shown_by_its_type():
    document = parsed([layer("")], findings=[Finding("singular", "lost", ("Conv2d",), "", True)])
    assert document.text.count("Conv2d") >= 4
    assert "#layer-1" in document.values("href")
    assert "1 of them calls for a look" in document.text
    text = page([layer("")], NETWORK, [], CIRCUMSTANCES)
    assert '<a href="#layer-1">Conv2d</a>' in text
    assert '<h2 id="layer-1-name" tabindex="-1">Conv2d</h2>' in text


def test_the_table_has_folded_numbers_where_there_are_any():
    assert "folded \N{GREEK SMALL LETTER SIGMA} max" in parsed().text
    assert "folded \N{GREEK SMALL LETTER SIGMA}" not in parsed([layer("a")], findings=[]).text


def test_the_number_of_calls_is_shown():
    document = parsed([layer("a", uses=5)], findings=[])
    assert "used 5 times" in document.text
    assert "Uses 5" in document.text
    assert "Uses" not in parsed([layer("a")], findings=[]).text


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("exact", "Method: exact."),
        (
            "stochastic Lanczos quadrature, probes 3, steps 40",
            "Method: stochastic Lanczos quadrature, probes 3, steps 40.",
        ),
        ("", "Method: not recorded."),
    ],
)
def test_the_method_of_a_spectrum_is_told(method, text):
    entry = layer("a", spectrum=dataclasses.replace(layer("a").spectrum, method=method))
    assert text in parsed([entry], findings=[]).text


def test_an_overview_without_zeros_has_no_line_for_them():
    plot = overview([layer("a")])
    assert plot.zero is None
    assert [tick.label for tick in plot.x_ticks] == ["a"]
    assert {"0.1", "1"} <= {tick.label for tick in plot.y_ticks}


@pytest.mark.parametrize("count", [0, 1, 24, 25, 26, 60, 1000])
def test_layers_are_numbered_sparsely(count):
    ticks = overview([layer("a")] * count).x_ticks
    assert (count > 0) <= len(ticks) <= 25


def test_names_stand_on_the_axis_where_there_is_room():
    names = [f"backbone.stage{i}.block.conv{i}" for i in range(10)]
    labels = [tick.label for tick in overview([layer(name) for name in names]).x_ticks]
    assert all(name.endswith(label[1:]) for name, label in zip(names, labels, strict=True))
    assert all(label.endswith(f"conv{i}") for i, label in enumerate(labels))
    many = overview([layer(names[0])] * 25).x_ticks
    assert [tick.label for tick in many] == [str(i) for i in range(1, 26)]


def test_equal_singular_values_can_be_drawn():
    one = Certified(1.0, 1.0, 1.0, "", "", True)
    orthogonal = layer(
        "a",
        applied=conditioning(one, one, log_growth=0.0),
        spectrum=Spectrum((1.0, 1.0), (1.0,), (0.0,), (1.0,), "exact"),
    )
    assert "100 %" in parsed([orthogonal]).text


def test_bars_have_heights_per_decade():
    plot = histogram(Spectrum((0.01, 0.1, 10.0), (0.5, 0.5), (0.0, 0.0), (), "exact"))
    tops = [float(re.search(r"V([\d.]+)H", bar.path).group(1)) for bar in plot.bars]
    heights = [plot.bottom - top for top in tops]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)


def test_a_bin_from_zero_has_a_place_of_its_own():
    plot = histogram(Spectrum((0.0, 0.1, 1.0), (0.5, 0.5), (0.1, 0.0), (), "quadrature"))
    assert plot.bars[0].path.startswith(f"M{plot.left:.1f} ")
    assert plot.left < plot.zero < plot.right
    assert all(tick.at > plot.zero + 9 for tick in plot.x_ticks), "clear of the 0"
    assert plot.bars[0].title == "0 to 0.1: 50 ± 10 %"
    assert (plot.bars[0].error_path != "", plot.bars[1].error_path) == (True, "")
