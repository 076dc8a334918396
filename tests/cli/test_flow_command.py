"""``convspectra flow``: what it writes, prints, refuses and exits with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convspectra.cli._main import main

DIGITS = ["--images", "digits"]


def deep() -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
    for _ in range(11):
        parts += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*parts)


def colored() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


DEEP, COLORED = (["--factory", f"{__name__}:{name}"] for name in ("deep", "colored"))


def test_it_prints_and_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "new" / f"a.{kind}" for kind in ("json", "html", "png")]
    options = [word for path in paths for word in (f"--{path.suffix[1:]}", str(path))]
    assert main(["flow", *DEEP, *DIGITS, *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Vanishing: the gradient at '0' is" in printed
    assert "Call cs.prepare(model, images) before training" in printed
    assert all(path.stat().st_size > 0 for path in paths)
    assert json.loads(paths[0].read_text())["verdict"] == "vanishing"
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_the_exit_status_says_whether_it_is_healthy(tmp_path, capsys):
    assert main(["flow", *DEEP, *DIGITS, "--check"]) == 1
    model = deep()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    torch.save(model.state_dict(), tmp_path / "good.pt")
    weights = ["--weights", str(tmp_path / "good.pt")]
    assert main(["flow", *DEEP, *weights, *DIGITS, "--check"]) == 0
    assert "Healthy" in capsys.readouterr().out


def pictures(folder: Path, sizes: list[tuple[int, ...]]) -> list[str]:
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, size, dtype=np.uint8)
        image.fromarray(pixels).save(folder / str(i % 2) / f"{i}.png")
    return ["--images", str(folder)]


def test_folders_of_images(tmp_path, capsys):
    folder = pictures(tmp_path / "pictures", [(9, 9, 3)] * 5)
    assert main(["flow", *COLORED, *folder, "--count", "4"]) == 0
    training = capsys.readouterr().out
    assert main(["flow", *COLORED, *folder, "--eval", "--count", "4"]) == 0
    assert training != capsys.readouterr().out
    mixed = pictures(tmp_path / "mixed", [(9, 9, 3), (12, 10)])
    assert main(["flow", *COLORED, *mixed]) == 2
    assert "expected images of one size" in capsys.readouterr().err
    assert main(["flow", *COLORED, *mixed, "--input", "3x8x8"]) == 0
    gray = pictures(tmp_path / "gray", [(8, 8)] * 3)
    assert main(["flow", *DEEP, *gray]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--images", "nowhere"], "expected at least two images (.jpg, .jpeg, .png) in the folder"),
        ([*DIGITS, "--count", "1"], "expected --count to be at least 2"),
        ([*DIGITS, "--input", "3x8x8"], "expected 1x8x8 for digits, got 3x8x8"),
        ([".", "--input", "2x8x8"], "expected images of 1 or 3 channels"),
        ([*DIGITS, "--weights", "none.pt"], "none.pt: no such file"),
        ([*DIGITS, "--json", "same", "--html", "same"], "expected a file of its own for --html"),
    ],
)
def test_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    images = ["--images"] if options[0] == "." else []
    assert main(["flow", *DEEP, *images, *options]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_broken_image_is_named(tmp_path, capsys):
    pytest.importorskip("PIL")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    assert main(["flow", *DEEP, "--images", str(tmp_path)]) == 2
    assert f"cannot read the image {tmp_path / 'a.png'}" in capsys.readouterr().err


def test_weights_of_another_kind_are_refused(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07" * 20)
    assert main(["flow", *DEEP, "--weights", str(path), *DIGITS]) == 2
    assert "expected weights, safetensors or a torch.save checkpoint, got onnx" in (
        capsys.readouterr().err
    )
