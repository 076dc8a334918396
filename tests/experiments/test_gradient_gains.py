"""The experiment on gains of gradients: what is compared, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.gradient_gains import __main__ as command

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def test_vgg_has_the_layers_of_the_paper() -> None:
    layers = [m for m in command.vgg16().modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 13
    assert layers[-1].out_channels == 512


def test_images_are_cut_from_both_photographs() -> None:
    images = command.photographs(16, 2)
    assert images.shape == (4, 3, 16, 16)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_predictions_hold_for_a_wide_network(tmp_path: Path) -> None:
    said: list[str] = []
    flows = command.main(["--quick", "--out", str(tmp_path)], said.append)
    assert len(said) == 1
    for layer in flows["VGG-16"].layers[:-1]:
        assert 0.5 < layer.predicted / layer.relative < 2
    assert "| VGG-16 | 14 |" in (tmp_path / "gradient_gains.md").read_text()
    assert len((tmp_path / "gradient_gains.csv").read_text().splitlines()) == 1 + 14
    assert (tmp_path / "gradient_gains.png").exists()


def test_networks_have_their_layers() -> None:
    pytest.importorskip("transformers")
    assert list(command.networks()) == [
        "VGG-16",
        "ResNet-50",
        "MobileNetV2",
        "ConvNeXt-T",
        "ViT-B/16",
    ]
