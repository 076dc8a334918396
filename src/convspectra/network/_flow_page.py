"""The result of `gradient_flow` as HTML: a section for notebooks, and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convspectra.network._flow_report import GradientFlow

STYLE = """
.flow { color-scheme: light dark; --ink: light-dark(#1d2125, #e4e2dc);
  --soft: light-dark(#5d6268, #9ba1a6); --line: light-dark(#e1ded5, #30363c);
  --blue: light-dark(#2b6299, #7fb2e0); --rust: light-dark(#b0491f, #ec9368);
  --band: light-dark(#e9eff5, #1d2730); color: var(--ink); max-width: 72rem; margin: auto;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
.flow h1 { font: 600 1.7rem/1.2 Charter, Cambria, Georgia, serif; margin: 0 0 0.7rem;
  overflow-wrap: anywhere; }
.flow p { margin: 0 0 0.6rem; max-width: 46rem; overflow-wrap: anywhere; }
.flow .soft { color: var(--soft); font-size: 0.85rem; }
.flow svg { display: block; width: 100%; max-width: 52rem; height: auto; margin: 1rem 0 0.2rem; }
.flow svg text { fill: var(--soft); font: 9px system-ui, sans-serif; }
.flow .wide { overflow-x: auto; }
.flow table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
.flow th, .flow td { text-align: right; padding: 0.25rem 0.6rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.flow th:first-child, .flow td:first-child { text-align: left; position: sticky; left: 0;
  background: Canvas; }
.flow td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
.flow th { color: var(--soft); font-weight: 600; }
.flow tr.begins td { color: var(--rust); font-weight: 600; }
@media (max-width: 40rem) { .flow svg text { font-size: 15px; }
  .flow td:first-child { min-width: 8rem; max-width: 9rem; } }
"""
"""The style of the section; nothing outside it is touched."""
WIDTH, HEIGHT, LEFT, BOTTOM = 560.0, 200.0, 48.0, 22.0
"""Size of the figure and of its margins, in units of its own."""


def flow_page(flow: GradientFlow) -> str:
    """A page that loads nothing and runs nothing; whatever comes from outside is escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\"><title>Gradient flow</title>"
        "<style>:root { color-scheme: light dark } body { margin: 0; padding: 1.5rem "
        "clamp(1rem, 3vw, 2.5rem) }</style></head>"
        f"<body>{flow_section(flow)}</body></html>\n"
    )


def flow_section(flow: GradientFlow) -> str:
    """The sentences, a figure of gradients by layer, and the table."""
    rows = flow.rows()
    what, why, todo = (escape(sentence) for sentence in flow.sentences)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in rows[0])
    body = "".join(
        f"<tr{' class=begins' if row['layer'] == flow.begins else ''}>"
        + "".join(f"<td>{escape(text)}</td>" for text in row.values())
        + "</tr>"
        for row in rows
    )
    return (
        f'<section class="flow"><style>{STYLE}</style><h1>Gradient flow: {flow.verdict}</h1>'
        f"<p>{what}</p><p>{why}</p><p>{todo}</p>{_figure(flow)}"
        '<p class="soft">Gradient at each layer over that at the last one except the head: '
        "measured (line), by kernels, slopes and normalizations alone (dashes), and the band from "
        f"{flow.band[0]:g} to {flow.band[1]:g}.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></section>"
    )


def _figure(flow: GradientFlow) -> str:
    """Gradients by layer on a logarithmic axis, as SVG."""
    measured = [_log10(layer.relative) for layer in flow.layers]
    predicted = [_log10(layer.predicted) for layer in flow.layers]
    finite = [v for v in (*measured, *predicted) if v is not None]
    lower, upper = (math.log10(end) for end in flow.band)
    low = math.floor(min([lower, *finite])) - 0.2
    high = math.ceil(max([upper, *finite])) + 0.2
    step = (WIDTH - LEFT) / max(1, len(measured) - 1)
    tall = HEIGHT - BOTTOM

    def across(i: int) -> float:
        return LEFT + i * step * 0.98 + 4

    def down(value: float) -> float:
        return tall * (high - value) / (high - low)

    marks = "".join(
        f'<text x="{LEFT - 6:.0f}" y="{down(d) + 4:.1f}" text-anchor="end">1e{d:+d}</text>'
        for d in range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 7)))
    )
    points = "".join(
        f'<circle cx="{across(i):.1f}" cy="{down(value):.1f}" r="2.5" fill="var(--blue)">'
        f"<title>{escape(layer.name)}: {layer.relative:.3g}</title></circle>"
        for i, (layer, value) in enumerate(zip(flow.layers, measured, strict=True))
        if value is not None
    )
    names = [layer.name for layer in flow.layers]
    begins = ""
    if flow.begins in names:
        x = across(names.index(flow.begins))
        begins = f'<path d="M{x:.1f} 0V{tall:.1f}" stroke="var(--rust)" stroke-width="1.5"/>'
    ends = (
        f'<text x="{LEFT:.0f}" y="{HEIGHT - 6:.0f}">{escape(names[0])}</text>'
        f'<text x="{WIDTH:.0f}" y="{HEIGHT - 6:.0f}" text-anchor="end">{escape(names[-1])}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Gradients by layer">'
        f'<rect x="{LEFT:.0f}" y="{down(upper):.1f}" width="{WIDTH - LEFT:.0f}" '
        f'height="{down(lower) - down(upper):.1f}" fill="var(--band)"/>{marks}{begins}'
        f'<path d="{_line(predicted, across, down)}" fill="none" stroke="var(--rust)" '
        'stroke-dasharray="5 4"/>'
        f'<path d="{_line(measured, across, down)}" fill="none" stroke="var(--blue)" '
        f'stroke-width="1.5"/>{points}{ends}</svg>'
    )


def _line(
    values: Sequence[float | None],
    across: Callable[[int], float],
    down: Callable[[float], float],
) -> str:
    """A path through all values that there are, in one piece where neighbors are there."""
    parts, broken = [], True
    for i, value in enumerate(values):
        if value is not None:
            parts.append(f"{'M' if broken else 'L'}{across(i):.1f} {down(value):.1f}")
        broken = value is None
    return "".join(parts)


def _log10(value: float) -> float | None:
    return math.log10(value) if 0 < value < math.inf else None
