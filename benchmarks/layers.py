"""The layers of the benchmarks, as named records; weights are drawn when an operator is built.

Random weights stand for trained ones here; `benchmarks.networks` measures trained layers.
To list them: ``python -m benchmarks.layers``.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

import convspectra as cs


@dataclass(frozen=True)
class Layer:
    """A layer without its numbers: float64 weights randn * std come from a seed and the name.

    With `smooth` their amplitude at a frequency of f_i cycles a tap is ``exp(-smooth sum |f_i|)``
    times that: training makes such kernels, and their smallest singular values are small.
    """

    name: str
    weight_shape: tuple[int, ...]
    input_size: tuple[int, ...]
    std: float
    options: dict[str, Any] = field(default_factory=dict)
    smooth: float = 0.0

    @property
    def weights(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.weight_shape)

    def operator(self, seed: int = 0) -> cs.ConvOperator:
        """The layer with the weights of this seed."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name}".encode()))
        weight = torch.randn(self.weight_shape, dtype=torch.float64, generator=generator)
        weight = smoothed(weight, self.smooth) if self.smooth else weight
        return cs.ConvOperator(self.std * weight, self.input_size, **self.options)


def smoothed(weight: torch.Tensor, smooth: float) -> torch.Tensor:
    """A weight with the amplitudes of its frequencies damped: see `Layer`."""
    axes = tuple(range(2, weight.ndim))
    frequencies = (torch.fft.fftfreq(n, dtype=torch.float64).abs() for n in weight.shape[2:])
    damping = functools.reduce(torch.add, torch.meshgrid(*frequencies, indexing="ij"))
    amplitudes = torch.fft.fftn(weight, dim=axes) * torch.exp(-smooth * damping)
    return torch.fft.ifftn(amplitudes, dim=axes).real


def random_layer(
    inputs: int, outputs: int, kernel: int, size: int, smooth: float = 0.0, **options: Any
) -> Layer:
    """A two-dimensional layer with standard deviation 1 / sqrt(fan_in), named by its geometry."""
    stride = f" stride {options['stride']}" if options.get("stride", 1) != 1 else ""
    what = ", smooth" if smooth else ""
    return Layer(
        name=f"{inputs}->{outputs} {kernel}x{kernel}{stride} at {size}x{size}{what}",
        weight_shape=(outputs, inputs, kernel, kernel),
        input_size=(size, size),
        std=(inputs * kernel**2) ** -0.5,
        options=options,
        smooth=smooth,
    )


def resnet50(width: int = 64, size: int = 224) -> tuple[Layer, ...]:
    """The 53 convolutions of torchvision's ResNet-50 v1.5 (stride in the 3x3), Kaiming fan_out.

    `width` and `size` scale its channels and its images down; they are 64 and 224 in the original.
    """
    layers = []

    def add(name: str, inputs: int, outputs: int, kernel: int, size: int, stride: int) -> int:
        layers.append(
            Layer(
                name=f"resnet50/{width}/{size}/{name}",
                weight_shape=(outputs, inputs, kernel, kernel),
                input_size=(size, size),
                std=math.sqrt(2 / (outputs * kernel**2)),
                options={"stride": stride, "padding": kernel // 2},
            )
        )
        return (size - 1) // stride + 1

    size = (add("conv1", 3, width, 7, size, 2) - 1) // 2 + 1  # the pooling layer halves it again
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = width * 2**stage
        for block in range(blocks):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            add(f"{name}.conv1", inputs, planes, 1, size, 1)
            smaller = add(f"{name}.conv2", planes, planes, 3, size, stride)
            add(f"{name}.conv3", planes, 4 * planes, 1, smaller, 1)
            if block == 0:
                add(f"{name}.downsample.0", inputs, 4 * planes, 1, size, stride)
            inputs, size = 4 * planes, smaller
    return tuple(layers)


SQUARE = (
    random_layer(64, 64, 3, 32),
    random_layer(64, 64, 3, 56),
    random_layer(512, 512, 3, 7),
)
"""Square layers: as many outputs as inputs."""
STRIDED = (
    random_layer(128, 256, 3, 28, stride=2, padding=1),
    random_layer(3, 64, 7, 112, stride=2, padding=3),
)
"""Layers that skip points, and rectangular ones."""
SMOOTH = (
    random_layer(64, 128, 3, 28, smooth=12.0, padding=1),
    random_layer(64, 128, 3, 28, smooth=12.0, stride=2, padding=1),
)
"""Layers with far smaller values than a random weight has."""
SMALL_SQUARE = (random_layer(4, 4, 3, 8),)
"""The square layer of the quick run."""
SMALL_STRIDED = (random_layer(4, 8, 3, 8, stride=2, padding=1),)
"""The strided layer of the quick run."""


def border_order(layer: Layer) -> int:
    """Order of the border matrix of a square 3x3 layer: channels times the border's points."""
    size = layer.input_size[0]
    return layer.weight_shape[0] * ((size + 1) ** 2 - size**2)


def find(name: str) -> Layer:
    """The layer of this name, among those of the table."""
    every = SQUARE + STRIDED + SMOOTH + SMALL_SQUARE + SMALL_STRIDED
    return {layer.name: layer for layer in every}[name]


def main() -> None:
    for layer in SQUARE + STRIDED + SMOOTH + resnet50():
        print(f"{layer.name:45} {layer.weights:10,} weights, {layer.options}")


if __name__ == "__main__":
    main()
