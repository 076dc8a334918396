"""``python -m experiments.gradient_gains``: predicted and measured gradients of five networks.

The networks are those of ``transformers`` with random weights, and VGG-16; nothing is downloaded.
The images are crops of the two photographs that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convspectra as cs
from common.measure import machine, timed
from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from convspectra.text import comma_separated, markdown_table

OUT = Path("docs/experiments/gradient_gains")
"""Where the page is written."""
SIDE = 128
"""Pixels a side. A choice: ImageNet's 224 take three times as long."""
CROPS = 4
"""Images that are cut out of each photograph. A choice."""
VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and layers of the stages of VGG-16."""
COLORS = {"relative": "#0072B2", "predicted": "#D55E00"}
"""Two colors of the Okabe-Ito palette."""
PAGE = """# Gradients by layer: predicted and measured

Five networks with random weights, {count} images of {side} x {side} pixels: crops of two
photographs. Measured is the norm of the gradient of a random linear function of the output at each
layer's output, or behind the normalization that reads it, over that behind the last layer except
the head. Predicted is the same by gains alone: ||M||_F / sqrt(rows) of each kernel, root mean
square slopes of what lies between layers, gains of normalizations, and squares that add up where
ways meet. No direction of any gradient enters it.

- command: {command}
- machine: {machine}

{table}
Predicted over measured is taken at every layer whose gradient is not 0. `first layer` is measured.

![Gradients by layer](gradient_gains.png)
"""
"""The page, to be filled in."""

Build = Callable[[], nn.Module]


def vgg16(stages: Sequence[tuple[int, int]] = VGG_STAGES) -> nn.Module:
    """VGG-16 with He et al.'s initialization and one linear layer behind average pooling.

    Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition,
    ICLR 2015, arXiv:1409.1556.
    """
    parts: list[nn.Module] = []
    channels = 3
    for width, count in stages:
        for _ in range(count):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            parts += [conv, nn.ReLU()]
            channels = width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def networks(side: int = SIDE) -> dict[str, Build]:
    """The networks by name.

    Raises
    ------
    ImportError
        Without transformers.
    """
    import transformers as hf

    return {
        "VGG-16": vgg16,
        "ResNet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig()),
        "MobileNetV2": lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()),
        "ConvNeXt-T": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig()),
        "ViT-B/16": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=side)),
    }


def photographs(side: int = SIDE, crops: int = CROPS) -> Tensor:
    """Crops of scikit-learn's two photographs, standardized channel by channel."""
    from sklearn.datasets import load_sample_images

    images = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float()
        generator = torch.Generator().manual_seed(0)
        for _ in range(crops):
            top, left = (
                int(torch.randint(size - side + 1, (), generator=generator))
                for size in pixels.shape[1:]
            )
            images.append(pixels[:, top : top + side, left : left + side])
    stacked = torch.stack(images)
    deviation, mean = torch.std_mean(stacked, (0, 2, 3), keepdim=True)
    return (stacked - mean) / deviation


def measured(build: Build, images: Tensor) -> tuple[cs.GradientFlow, float]:
    """Gradient flow of a network, and the seconds that it took."""
    torch.manual_seed(0)
    model = build()
    given = images if isinstance(model, nn.Sequential) else {"pixel_values": images}
    seconds, flow = timed(lambda: cs.gradient_flow(model, given))
    return flow, seconds


def row(name: str, flow: cs.GradientFlow, seconds: float) -> dict[str, str]:
    """One line of the table."""
    quotients = [
        layer.predicted / layer.relative for layer in flow.layers[:-1] if layer.relative > 0
    ]
    logs = [abs(math.log10(q)) if q > 0 else math.inf for q in quotients]
    worst = quotients[logs.index(max(logs))]
    return {
        "network": name,
        "layers": str(len(flow.layers)),
        "verdict": flow.verdict,
        "first layer": f"{flow.layers[0].relative:.3g}",
        "predicted / measured, median": f"{statistics.median(quotients):.3f}",
        "worst": f"{worst:.3f}",
        "at the first layer": f"{quotients[0]:.3f}",
        "alignment, least and most": "{:.2f}, {:.2f}".format(
            *(f(layer.alignment for layer in flow.layers[1:] if layer.measured) for f in (min, max))
        ),
        "seconds": f"{seconds:.1f}",
    }


def draw(flows: dict[str, cs.GradientFlow]) -> Any:
    """One panel a network: measured as a line, predicted as crosses."""
    figure = new_figure(11.0, 2.2 * -(-len(flows) // 2))
    panels = figure.subplots(-(-len(flows) // 2), 2, squeeze=False).ravel()
    for axes, (name, flow) in zip(panels, flows.items(), strict=False):
        for key, style in (("relative", "-"), ("predicted", "x")):
            values = [getattr(layer, key) or math.nan for layer in flow.layers]
            axes.semilogy(
                range(1, len(values) + 1), values, style, color=COLORS[key], linewidth=1.2,
                markersize=3.5, label="measured" if key == "relative" else "predicted",
            )  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylabel("gradient")
        plain_axes(axes)
    panels[0].legend(fontsize=8, frameon=False)
    for axes in panels[len(flows) :]:
        axes.set_visible(False)
    return figure


def main(
    argv: Sequence[str] | None = None, progress: Callable[[str], None] = print
) -> dict[str, cs.GradientFlow]:
    """Parse the arguments, measure all networks and write CSV, page and figure; returns them."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gradient_gains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="VGG-16 alone, on small images")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args(arguments)
    side = 32 if args.quick else SIDE
    chosen = {"VGG-16": vgg16} if args.quick else networks()
    images = photographs(side)
    flows, rows = {}, []
    for name, build in chosen.items():
        flows[name], seconds = measured(build, images)
        rows.append(row(name, flows[name], seconds))
        progress(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    page = PAGE.format(
        count=len(images),
        side=side,
        command=shlex.join(["python", "-m", "experiments.gradient_gains", *arguments]),
        machine=machine(),
        table=markdown_table(list(rows[0]), rows),
    )
    records = [
        {"network": name, **record} for name, flow in flows.items() for record in flow.records()
    ]
    texts = {
        "gradient_gains.csv": comma_separated(list(records[0]), records),
        "gradient_gains.md": page,
    }
    write_texts(texts, args.out)
    save_figure(draw(flows), args.out / "gradient_gains")
    return flows


if __name__ == "__main__":
    main()
