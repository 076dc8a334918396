"""Networks whose packages keep weights apart from the model: the modules that the weights fill.

Names are those of the state dicts. Each function builds one network for `load_operators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

CREPE_TINY = (1, 128, 16, 16, 16, 32, 64)
"""Channels of CREPE's capacity "tiny", the input first."""


class Crepe(nn.Module):
    """Pitch from 1024 samples at 16 kHz (Kim, Salamon, Li and Bello, ICASSP 2018).

    Zero padding keeps the length up to the stride: 254 on both sides of the first layer, 31 before
    and 32 after the others.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(channels) - 1
        for i, (inputs, outputs) in enumerate(pairwise(channels), 1):
            conv = nn.Conv2d(inputs, outputs, (64, 1), padding="same")
            if i == 1:
                conv = nn.Conv2d(inputs, outputs, (512, 1), stride=(4, 1), padding=(254, 0))
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], 360)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of 360 pitches, (batch, 360)."""
        x = x[:, None, :, None]
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"conv{i}")(x).relu()
            x = self.get_submodule(f"conv{i}_BN")(x)
            x = nn.functional.max_pool2d(x, (2, 1))
        return self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()


class SileroVAD(nn.Module):
    """Whether there is speech in 512 samples at 16 kHz, after 64 samples of context."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The probability, (batch, 1, 1)."""
        x = self.stft_conv(nn.functional.pad(x[:, None], (0, 64), "reflect"))
        real, imaginary = x.chunk(2, dim=1)
        x = torch.hypot(real, imaginary)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        state, _ = self.lstm_cell(x.squeeze(-1))
        return self.final_conv(state.relu()[..., None]).sigmoid()


class Cascade(nn.Module):
    """One stage of MTCNN (Zhang, Zhang, Li and Qiao, 2016): a trunk, and heads that all read it."""

    def __init__(self, trunk: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = list(trunk), list(heads)
        for name, module in (*trunk.items(), *heads.items()):
            self.add_module(name, module)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The answer of each head, before any softmax."""
        for name in self.trunk:
            x = self.get_submodule(name)(x)
        return [self.get_submodule(name)(x) for name in self.heads]


class Columns(nn.Module):
    """Flattens an image column by column, channels last, as the weights of MTCNN expect it."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, h, w) to (batch, w * h * c)."""
        return x.permute(0, 3, 2, 1).flatten(1)


def crepe_tiny() -> nn.Module:
    return Crepe(CREPE_TINY)


def silero_vad() -> nn.Module:
    return SileroVAD()


def pnet() -> nn.Module:
    trunk = {
        "conv1": nn.Conv2d(3, 10, 3),
        "prelu1": nn.PReLU(10),
        "pool1": nn.MaxPool2d(2, 2, ceil_mode=True),
        "conv2": nn.Conv2d(10, 16, 3),
        "prelu2": nn.PReLU(16),
        "conv3": nn.Conv2d(16, 32, 3),
        "prelu3": nn.PReLU(32),
    }
    return Cascade(trunk, {"conv4_1": nn.Conv2d(32, 2, 1), "conv4_2": nn.Conv2d(32, 4, 1)})


def rnet() -> nn.Module:
    trunk = {
        "conv1": nn.Conv2d(3, 28, 3),
        "prelu1": nn.PReLU(28),
        "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv2": nn.Conv2d(28, 48, 3),
        "prelu2": nn.PReLU(48),
        "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv3": nn.Conv2d(48, 64, 2),
        "prelu3": nn.PReLU(64),
        "columns": Columns(),
        "dense4": nn.Linear(576, 128),
        "prelu4": nn.PReLU(128),
    }
    return Cascade(trunk, {"dense5_1": nn.Linear(128, 2), "dense5_2": nn.Linear(128, 4)})


def onet() -> nn.Module:
    trunk = {
        "conv1": nn.Conv2d(3, 32, 3),
        "prelu1": nn.PReLU(32),
        "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv2": nn.Conv2d(32, 64, 3),
        "prelu2": nn.PReLU(64),
        "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv3": nn.Conv2d(64, 64, 3),
        "prelu3": nn.PReLU(64),
        "pool3": nn.MaxPool2d(2, 2, ceil_mode=True),
        "conv4": nn.Conv2d(64, 128, 2),
        "prelu4": nn.PReLU(128),
        "columns": Columns(),
        "dense5": nn.Linear(1152, 256),
        "prelu5": nn.PReLU(256),
    }
    heads = {
        "dense6_1": nn.Linear(256, 2),
        "dense6_2": nn.Linear(256, 4),
        "dense6_3": nn.Linear(256, 10),
    }
    return Cascade(trunk, heads)
