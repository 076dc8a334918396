"""One HTML page of an audit that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import markupsafe

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Certified, Circumstances, Finding, LayerAudit
from convspectra.auditing._table import Column, columns_for
from convspectra.auditing.html._plot import histogram, overview

FINDINGS_SHOWN = 12
"""Findings on the page before the others are folded away. A choice: they fill one screen."""
FIRST_NUMBER = "sigma_max"
"""The column from which on a skipped layer has its reason instead of numbers."""
NOT_ENCLOSED = "no enclosure"
"""The filter for layers with a number that has no enclosure."""


@dataclass(frozen=True)
class _Entry:
    """A layer with its places on the page and what is said of it.

    Attributes
    ----------
    number : int
        From 1, in the order of the audit; the ids are made of it, never of names.
    layer : LayerAudit
    findings : tuple of Finding
    kinds : tuple of str
        Of the findings, and whether a number is not enclosed: what the table is filtered by.
    """

    number: int
    layer: LayerAudit
    findings: tuple[Finding, ...]
    kinds: tuple[str, ...]

    @property
    def alarms(self) -> tuple[str, ...]:
        """The kinds of those findings that call for something to be done."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings if finding.alarm))


def page(
    layers: Sequence[LayerAudit],
    network: Sequence[tuple[str, str]],
    findings: Sequence[Finding],
    circumstances: Circumstances,
    sentences: Sequence[str] = (),
) -> str:
    """The report as one HTML file.

    Everything that comes from outside is escaped; ids and links are made of the numbers of the
    layers. A content security policy in the page forbids all requests and all other scripts.

    Parameters
    ----------
    layers : sequence of LayerAudit
        In the order in which they are shown; skipped ones too.
    network : sequence of (str, str)
        Labels and texts that describe the network as a whole.
    findings : sequence of Finding
        The most urgent ones first.
    circumstances : Circumstances
    sentences : sequence of str
        About what was measured on images.

    Returns
    -------
    str
    """
    environment = _environment()
    columns = columns_for(layers)
    entries = _entries(layers, findings, columns)
    style, script = _source("audit.css"), _source("audit.js")
    return environment.get_template("audit.html").render(
        entries=entries,
        columns=columns,
        first_number=[column.name for column in columns].index(FIRST_NUMBER),
        network=network,
        findings=findings,
        findings_shown=FINDINGS_SHOWN,
        anchors=_anchors(layers),
        kinds=_counts(entries),
        circumstances=circumstances,
        sentences=sentences,
        plot=overview(layers),
        audited=sum(layer.applied is not None for layer in layers),
        with_findings=sum(bool(entry.alarms) for entry in entries),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def fragment(
    layers: Sequence[LayerAudit],
    network: Sequence[tuple[str, str]],
    findings: Sequence[Finding],
    circumstances: Circumstances,
    sentences: Sequence[str] = (),
) -> str:
    """The same page in a frame, for a notebook: its style and script stay inside."""
    text = page(layers, network, findings, circumstances, sentences)
    return _environment().get_template("audit_frame.html").render(page=text)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convspectra.auditing.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": words.number,
        "times": _times,
        "token": _token,
        "key": _key,
        "sentence": _sentence,
    }
    environment.globals |= {
        "words": words,
        "histogram": histogram,
        "value_within": _value_within,
        "px": "{:.1f}".format,
    }
    return environment


def _source(name: str) -> markupsafe.Markup:
    """A style or script of this package: nothing is filled in, so nothing is escaped."""
    path = importlib.resources.files("convspectra.auditing.html") / "templates" / name
    return markupsafe.Markup(path.read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """The hash by which a content security policy names an inline text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _entries(
    layers: Sequence[LayerAudit], findings: Sequence[Finding], columns: Sequence[Column]
) -> list[_Entry]:
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        for name in finding.layers:
            by_name.setdefault(name, []).append(finding)
    found = [by_name.get(layer.label, []) for layer in layers]
    return [
        _Entry(i, layer, tuple(own), _kinds(layer, own, columns))
        for i, (layer, own) in enumerate(zip(layers, found, strict=True), 1)
    ]


def _kinds(
    layer: LayerAudit, findings: Sequence[Finding], columns: Sequence[Column]
) -> tuple[str, ...]:
    kinds = [finding.kind for finding in findings]
    if layer.applied is None:
        kinds.append("skipped")
    elif any(column.flag(layer) for column in columns):
        kinds.append(NOT_ENCLOSED)
    return tuple(dict.fromkeys(kinds))


def _counts(entries: Sequence[_Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in (kind for entry in entries for kind in entry.kinds):
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _anchors(layers: Sequence[LayerAudit]) -> dict[str, int]:
    """Number of the first layer of each name."""
    return {layer.label: i for i, layer in reversed(list(enumerate(layers, 1)))}


def _times(text: str) -> str:
    """Sizes with a multiplication sign."""
    return re.sub(r"(?<=\d)x(?=\d)", "\N{MULTIPLICATION SIGN}", text)


def _sentence(text: str) -> str:
    """A text that begins with a capital, or with the name of a quantity as it is."""
    return text if text.startswith("sigma_") else text[:1].upper() + text[1:]


def _token(kind: str) -> str:
    """A word for a class or a filter."""
    return re.sub(r"[^a-z]+", "-", kind.lower())


def _key(column: Column, layer: LayerAudit) -> str:
    """The key that a cell is sorted by, as text; empty for what sorts last."""
    if column.key is None:
        return column.text(layer)
    value = column.key(layer)
    if value is None or math.isnan(value):
        return ""
    return f"{value:.9g}".replace("inf", "Infinity")


def _value_within(certified: Certified) -> str:
    return words.value_within(certified.value, certified.lower, certified.upper)
