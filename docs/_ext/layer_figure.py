"""The picture of a layer, its matrix, its torus and its border.

``python docs/_ext/layer_figure.py`` writes docs/figures/layer.svg.
The pattern of M and the singular vector are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import convspectra as cs

OUT = Path(__file__).parents[1] / "figures" / "layer.svg"
SIDE, GAP, TOP = 180.0, 40.0, 30.0
PAPER, LINE, LIGHT, DARK, ACCENT = "#ffffff", "#9aa0a6", "#dbe7f6", "#1f5fa8", "#d9822b"


def panel(number: int, count: int, title: str, color: Callable[[int, int], str]) -> list[str]:
    """A grid of count x count cells under a title."""
    left, cell = GAP / 2 + number * (SIDE + GAP), SIDE / count
    stroke = f'stroke="{LINE}" stroke-width="{0.6 if count < 20 else 0.15}"'
    parts = [f'<text x="{left}" y="{TOP - 10}">{title}</text>']
    for row in range(count):
        for column in range(count):
            x, y = left + column * cell, TOP + row * cell
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
                f'fill="{color(row, column)}" {stroke}/>'
            )
    return parts


def smallest_vector(channels: int, size: int) -> torch.Tensor:
    """The size of the singular vector of sigma_min at each pixel, over the largest."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
    result = cs.svds(cs.ConvOperator.from_module(conv, (size, size)), 1, "SM")
    assert result.v is not None
    norms = result.v[0].square().sum(0).sqrt()
    return norms / norms.max()


def picture() -> str:
    """The four panels as SVG."""
    pattern = cs.ConvOperator(torch.ones(1, 1, 3, 3), (5, 5), padding=1).to_dense() != 0
    vector = smallest_vector(8, 24)

    def image(row: int, column: int) -> str:
        if row in (0, 6) or column in (0, 6):
            return ACCENT if row < 3 and column < 3 else PAPER
        return DARK if row < 3 and column < 3 else LIGHT

    def torus(row: int, column: int) -> str:
        return ACCENT if row == 5 or column == 5 else LIGHT

    def gray(row: int, column: int) -> str:
        level = round(255 * (1 - float(vector[row, column])))
        return f"#{level:02x}{level:02x}{level:02x}"

    parts = [
        *panel(0, 7, "image, padding, one output's taps", image),
        *panel(1, 25, "its matrix M", lambda r, c: DARK if pattern[r, c] else PAPER),
        *panel(2, 6, "its torus: inside, and border", torus),
        *panel(3, 24, "singular vector of sigma_min", gray),
    ]
    width, height = 4 * (SIDE + GAP), TOP + SIDE + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    OUT.write_text(picture())
