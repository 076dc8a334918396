"""The experiment on He et al.'s plain networks: their shapes, runs that are stopped, tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from common import images as data
from experiments.degradation import __main__ as command
from experiments.degradation.networks import ARMS, network
from experiments.degradation.runs import Run, Settings, Training, augmented


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images of 12 x 12 pixels of two classes."""
    path = tmp_path_factory.mktemp("degradation")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 4)):
        for label in ("a", "b"):
            (path / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(
                    0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8, device="cpu"
                )
                Image.fromarray(pixels.numpy()).save(path / part / label / f"{i}.png")
    return path


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("depth", [8, 20])
def test_a_network_has_the_layers_and_sizes_of_the_paper(arm: str, depth: int) -> None:
    model = network(arm, depth, 4, 10, 0)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth
    assert [m.stride[0] for m in weighted[:-1] if isinstance(m, nn.Conv2d)].count(2) == 2
    assert weighted[-1].in_features == 16
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (
        arm in ("batch normalization", "residual")
    )


def test_a_depth_that_is_not_of_the_paper() -> None:
    with pytest.raises(ValueError, match=r"6 n \+ 2, got 21"):
        network("He", 21, 4, 10, 0)


def test_shifted_images_are_cuts_of_the_padded_ones() -> None:
    images = torch.arange(1.0, 1 + 2 * 3 * 5 * 6).reshape(2, 3, 5, 6)
    found = augmented(images, torch.Generator().manual_seed(1))
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    for image, original in zip(found, padded, strict=True):
        cuts = [
            side[:, i : i + 5, j : j + 6]
            for side in (original, nn.functional.pad(original[:, 4:9, 4:10].flip(2), (4, 4, 4, 4)))
            for i in range(9)
            for j in range(9)
        ]
        assert any(torch.equal(image, cut) for cut in cuts)


@pytest.mark.parametrize("arm", ["isometry", "prepare, then conditioning", "residual"])
def test_a_run_goes_on_as_if_it_had_not_stopped(arm: str, folder: Path, tmp_path: Path) -> None:
    images = data.load(folder, 40, 8, largest_side=32)
    run, settings = Run(arm, 8, 1.0, 0), Settings(width=4, epochs=2, batch_size=10)
    whole = Training(run, images, settings)
    whole.epoch()
    whole.save(tmp_path / "saved.pt")
    second = whole.epoch()
    resumed = Training(run, images, settings)
    resumed.load(tmp_path / "saved.pt")
    again = resumed.epoch()
    assert (again.epoch, again.loss, again.accuracy) == (2, second.loss, second.accuracy)
    other = Training(Run(arm, 8, 3.0, 0), images, settings)
    with pytest.raises(ValueError, match="to be of"):
        other.load(tmp_path / "saved.pt")


def test_a_table_grows_epoch_by_epoch(folder: Path, tmp_path: Path) -> None:
    def arguments(*more: str) -> list[str]:
        places = ["--out", str(tmp_path), "--checkpoints", str(tmp_path / "checkpoints")]
        return ["--data", str(folder), *places, "--quick", "--depths", "8", *more]

    first = command.main(arguments("--arms", "He", "--rates", "1", "3"))
    assert [row["epoch"] for row in first] == ["1", "2"]
    more = command.main(arguments("--arms", "He", "prepare", "--rates", "1", "3"))
    assert more[:2] == first
    assert len(more) == 4
    assert all(row["code"] and 0 <= float(row["accuracy"]) <= 1 for row in more)
    page = (tmp_path / "degradation.md").read_text()
    assert page.count("| 8 |") == 2
    assert (tmp_path / "degradation.png").exists()
