"""Networks whose Lipschitz constants are bounded, trained on the digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convspectra.paper.images import load_digits

BATCH = 32
"""Images in a step of training. A choice."""


class Residual(nn.Module):
    """The basic block of a ResNet for CIFAR, with the shortcut that pads channels by zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, and ReLU."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, self.more, self.more)))


def perceptron() -> nn.Module:
    """Four linear layers and ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def critic() -> nn.Module:
    """Four convolutions, each divided by the norm of its reshaped weight, as critics are."""
    normalized = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normalized(nn.Conv2d(1, 16, 3, padding=1)),
        nn.LeakyReLU(0.1),
        normalized(nn.Conv2d(16, 16, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.1),
        normalized(nn.Conv2d(16, 32, 3, padding=1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        normalized(nn.Linear(32 * 16, 1)),
    )


def lenet() -> nn.Module:
    """LeCun et al. (1998) with ReLU and max pooling, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def super_resolution() -> nn.Module:
    """Dong et al. (2014): 9 x 9, 1 x 1 and 5 x 5 taps, 64 and 32 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 9, padding=4),
        nn.ReLU(),
        nn.Conv2d(64, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 1, 5, padding=2),
    )


def vgg() -> nn.Module:
    """Six convolutions in three stages with max pooling, for 16 x 16 pixels."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs in (16, 32, 64):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def resnet(blocks: int = 3) -> nn.Module:
    """The ResNet for CIFAR of 6 blocks + 2 layers, 20 with three blocks a stage."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers.append(nn.ReLU())
    inputs = 16
    for outputs in (16, 32, 64):
        for block in range(blocks):
            stride = 2 if block == 0 and outputs > 16 else 1
            layers.append(Residual(inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "perceptron, 4 layers": (perceptron, 8, "classes"),
    "critic, spectral_norm": (critic, 8, "critic"),
    "LeNet": (lenet, 8, "classes"),
    "super-resolution 9-1-5": (super_resolution, 16, "images"),
    "VGG-like": (vgg, 16, "classes"),
    "ResNet-20": (resnet, 16, "classes"),
}
"""A network, the side of its images, and what it learns."""


def trained(name: str, steps: int, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network after some steps of Adam, in evaluation mode, and four test images.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    steps, seed : int
    """
    make, side, task = NETWORKS[name]
    digits = load_digits()
    images, labels = digits.train_images.float(), digits.train_labels
    images = F.interpolate(images, size=side, mode="bicubic") if side > 8 else images
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,))
            loss = _loss(model, images[chosen], labels[chosen], task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tests = digits.test_images[:4].float()
    return model.eval(), F.interpolate(tests, size=side, mode="bicubic") if side > 8 else tests


def _loss(model: nn.Module, images: Tensor, labels: Tensor, task: str) -> Tensor:
    if task == "classes":
        return F.cross_entropy(model(images), labels)
    if task == "images":  # from every second pixel
        coarse = F.interpolate(images[:, :, ::2, ::2], size=images.shape[2:], mode="bicubic")
        return F.mse_loss(model(coarse), images)
    return model(torch.rand_like(images)).mean() - model(images).mean()
