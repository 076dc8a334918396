"""The picture of a blur that is undone: ``python docs/_ext/blur_figure.py``.

It writes docs/figures/blur.png: a scene with nothing but black around it, what a camera makes of
it, what `convspectra.solve` gives back, and what dividing Fourier transforms does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import convspectra as cs
from convspectra.figures import new_figure

OUT = Path(__file__).parents[1] / "figures" / "blur.png"
SIZE, NOISE = 48, 0.01


def blur() -> cs.ConvOperator:
    """A Gaussian blur of 5 x 5 pixels, with black outside of the image."""
    line = torch.exp(-0.5 * (torch.arange(-2.0, 3.0, dtype=torch.float64) / 0.65) ** 2)
    kernel = torch.outer(line, line)
    return cs.ConvOperator(kernel[None, None] / kernel.sum(), (SIZE, SIZE), padding=2)


def scene() -> Tensor:
    """A disk and bars that run into the edges, (1, SIZE, SIZE)."""
    y, x = torch.meshgrid(*2 * [torch.arange(SIZE, dtype=torch.float64)], indexing="ij")
    disk = ((x - 30) ** 2 + (y - 20) ** 2 < 144) * (0.5 + 0.5 * torch.sin(x / 2))
    bars = ((y > 36) & (torch.remainder(x, 8) < 4)) * 0.9
    frame = (x < 3) * 0.8 + 0.0 * y
    return torch.stack([torch.maximum(torch.maximum(disk, bars), frame)])


def pictures() -> dict[str, Tensor]:
    """The images by their titles."""
    op, truth = blur(), scene()
    generator = torch.Generator().manual_seed(0)
    seen = op.matvec(truth) + NOISE * torch.randn(truth.shape, generator=generator).double()
    back = cs.solve(op, seen)
    line = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    line[:5, :5] = op.weight[0, 0]
    transfer = torch.fft.fft2(line.roll((-2, -2), (0, 1)))
    circular = torch.fft.ifft2(torch.fft.fft2(seen[0]) / transfer).real[None]
    return {"scene": truth, "camera": seen, "solve": back, "Fourier division": circular}


def error(image: Tensor) -> float:
    """The root mean square difference from the scene."""
    return float((image - scene()).square().mean().sqrt())


if __name__ == "__main__":
    figure = new_figure(9.0, 2.6)
    for place, (title, image) in enumerate(pictures().items(), 1):
        axes = figure.add_subplot(1, 4, place)
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        off = "" if title == "scene" else f", off by {error(image):.3f}"
        axes.set_title(f"{title}{off}", fontsize=9)
        axes.axis("off")
    figure.savefig(OUT, dpi=110)
    print(OUT)
