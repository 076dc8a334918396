"""The page of an audit in a browser: what its script does, and that nothing else happens."""

import dataclasses
import io
import re
import shutil
import struct
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.made_up_audit import (
    CIRCUMSTANCES,
    FINDINGS,
    HOSTILE,
    NETWORK,
    hostile_audit,
    small_audit,
)

from convspectra.auditing.html._page import fragment, page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

NAMES = ["stem.conv", "stage1.down", "stage1.conv", "stage2.conv", "up", "head.pool"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a text as a page; at the end, nothing was requested, printed or asked."""
    contexts, events = [], []

    def show(text, **options):
        file = tmp_path / "audit.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: events.append(message.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        tab.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: events.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield show
    for context in contexts:
        context.close()
    assert [event for event in events if not event.endswith("/audit.html")] == []


@pytest.fixture
def report(show):
    return show(page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES), color_scheme="light")


def shown(tab):
    return [link.inner_text() for link in tab.locator("#table tbody tr:visible th a").all()]


def header(tab, label):
    return tab.locator("#table thead button").get_by_text(label, exact=True)


def focused(tab):
    return tab.evaluate("document.activeElement.textContent")


def test_rows_are_in_order_of_the_network(report):
    assert shown(report) == NAMES


def test_sort_by_click(report):
    condition = header(report, "condition")
    condition.click()
    assert shown(report) == ["stage2.conv", "stem.conv", "up", "stage1.conv", *NAMES[1::4]]
    assert report.locator('[aria-sort="ascending"]').all_inner_texts() == ["condition"]
    condition.click()
    assert shown(report)[:2] == ["stage1.down", "stage1.conv"]
    assert shown(report)[-1] == "head.pool", "what was not computed is last in both directions"
    assert report.locator('[aria-sort="descending"]').count() == 1
    assert report.locator('[aria-sort="ascending"]').count() == 0


def test_sort_by_numbers_with_batch_normalization(report):
    folded = report.locator("#table thead button").filter(has_text="folded \u03c3 max")
    folded.click()
    assert shown(report)[0] == "stem.conv", "what was not folded is last"
    folded.click()
    assert shown(report)[0] == "stem.conv"


def test_sort_by_keyboard(report):
    header(report, "name").focus()
    report.keyboard.press("Enter")
    assert shown(report) == sorted(NAMES)
    report.keyboard.press("Space")
    assert shown(report) == sorted(NAMES, reverse=True)


def test_filter_by_text_and_kind(report):
    report.get_by_label("Name or type").fill("STAGE")
    assert shown(report) == NAMES[1:4]
    assert report.get_by_role("status").inner_text() == "3 of 6 shown"
    report.get_by_role("button", name="ill-conditioned 1").click()
    assert shown(report) == ["stage1.conv"]
    report.get_by_label("Name or type").fill("")
    report.get_by_role("button", name="with findings 3").click()
    assert shown(report) == ["stage1.down", "stage1.conv", "stage2.conv"]
    report.get_by_label("Name or type").fill("nothing like it")
    assert shown(report) == []
    expect(report.get_by_text("No layer matches.")).to_be_visible()


def test_pages_of_layers(report):
    report.locator("#row-3 a").click()
    expect(report.get_by_role("heading", name="stage1.conv")).to_be_visible()
    expect(report.locator("#summary")).to_be_hidden()
    expect(report).to_have_title("stage1.conv: Conditioning of PlainNet")
    expect(report.locator("#layer-3 h2")).to_be_focused()
    report.get_by_role("link", name="Next").click()
    expect(report.get_by_role("heading", name="stage2.conv")).to_be_visible()
    expect(report.get_by_role("heading", name="stage1.conv")).to_be_hidden()
    report.get_by_role("link", name="Previous").click()
    expect(report.get_by_role("heading", name="stage1.conv")).to_be_visible()
    report.keyboard.press("Escape")
    expect(report.locator("#summary")).to_be_visible()
    expect(report.locator("#row-3 a")).to_be_focused()
    expect(report).to_have_title("Conditioning of PlainNet")


def test_the_focus_stays_where_it_was_put(report):
    report.locator("#row-3 a").click()
    expect(report.locator("#layer-3 h2")).to_be_focused()
    report.keyboard.press("Escape")
    link = report.locator("#row-3 a")
    expect(link).to_be_focused()
    frames = "new Promise(next => requestAnimationFrame(() => requestAnimationFrame(next)))"
    report.evaluate(frames)
    expect(link).to_be_focused()


def test_the_plot_is_read_with_the_arrow_keys(report):
    report.locator(".mark").first.focus()
    assert report.locator("#readout").inner_text().startswith("1. stem.conv: ")
    assert "max 1.800" in report.locator("#readout").inner_text()
    report.keyboard.press("ArrowRight")
    assert "0 (singular)" in report.locator("#readout").inner_text()
    report.keyboard.press("End")
    assert "not a convolution" in report.locator("#readout").inner_text()
    report.keyboard.press("Enter")
    expect(report.get_by_role("heading", name="head.pool")).to_be_visible()


def test_the_first_tab_leads_past_the_plot(report):
    report.keyboard.press("Tab")
    assert focused(report) == "Skip to the table of layers"
    report.keyboard.press("Enter")
    expect(report).to_have_url(re.compile("#layers$"))


def background(tab):
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark(show):
    text = page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    light = show(text, color_scheme="light")
    paper = background(light)
    light.get_by_role("button", name="Dark").click()
    chosen = background(light)
    assert chosen != paper
    for _ in range(20):
        light.reload()
        if light.evaluate("localStorage.length"):  # A browser may hand it on a little later.
            break
    assert background(light) == chosen, "the choice is remembered"
    assert background(show(text, color_scheme="dark")) == chosen


def test_without_script_layers_still_have_pages(show):
    text = page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    tab = show(text, java_script_enabled=False)
    tab.locator("#row-3 a").click()
    expect(tab.locator("#layer-3")).to_be_visible()
    expect(tab.locator("#summary")).to_be_hidden()


def test_a_narrow_screen_does_not_scroll_sideways(show):
    text = page(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES)
    tab = show(text, viewport={"width": 360, "height": 780})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.goto(tab.url + "#layer-1")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_hostile_names_are_inert(show):
    layers, findings = hostile_audit()
    named = dataclasses.replace(CIRCUMSTANCES, model=HOSTILE[1], command=HOSTILE[0])
    tab = show(page(layers, [(name, name) for name in HOSTILE], findings, named))
    assert shown(tab) == [*HOSTILE, *HOSTILE]
    header(tab, "name").click()
    for number in range(1, len(layers) + 1):
        tab.evaluate(f"location.hash = '#layer-{number}'")
        expect(tab.locator(f"#layer-{number} h2")).to_be_visible()
        assert tab.locator(f"#layer-{number} h2").inner_text() == layers[number - 1].name
    assert tab.locator("script").count() == 1
    assert tab.locator("img").count() == 0


def test_in_a_notebook_the_links_stay_in_the_frame(show):
    tab = show(fragment(small_audit(), NETWORK, FINDINGS, CIRCUMSTANCES))
    frame = tab.frame_locator("iframe")
    frame.locator("#row-3 a").click()
    frame.locator("#layer-3").wait_for(state="visible")
    frame.locator("#layer-3").get_by_role("link", name="Next").click()
    frame.locator("#layer-4").wait_for(state="visible")


def test_the_plot_is_saved_as_a_picture(report):
    with report.expect_download() as download:
        report.locator("#save-png").click()
    assert download.value.suggested_filename == "audit.png"
    data = Path(download.value.path()).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (2240, 728)
    picture = plt.imread(io.BytesIO(data))[..., :3]
    assert len(np.unique((255 * picture).astype(int).reshape(-1, 3), axis=0)) > 50, (
        "it is not blank"
    )
