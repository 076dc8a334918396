"""``convspectra spectra``: one layer by its sizes."""

import numpy as np
import pytest
import torch

import convspectra as cs
from convspectra.cli._main import main


def values(weight: torch.Tensor, size: int, **options: object) -> torch.Tensor:
    """Singular values by the layer applied to the identity."""
    units = torch.eye(weight.shape[1] * size * size, dtype=torch.float64)
    images = units.reshape(-1, weight.shape[1], size, size)
    columns = torch.nn.functional.conv2d(images, weight.double(), **options).flatten(1)
    return torch.linalg.svdvals(columns)


def test_a_random_layer_is_that_of_pytorch(tmp_path, capsys):
    path = tmp_path / "new" / "layer.json"
    words = ["--kernel", "3x2x3x3", "--input", "6x6", "--stride", "2", "--seed", "5"]
    assert main(["spectra", *words, "--json", str(path)]) == 0
    torch.manual_seed(5)
    conv = torch.nn.Conv2d(2, 3, 3, bias=False)
    exact = values(conv.weight.detach(), 6, stride=2, padding=1)
    (layer,) = cs.AuditReport.from_json(path).layers
    assert layer.applied.sigma_max.value == pytest.approx(exact[0].item(), rel=1e-8)
    assert layer.applied.sigma_min.value == pytest.approx(exact[-1].item(), rel=1e-8)
    printed = capsys.readouterr().out
    assert "M is 27x72" in printed
    assert f"{exact[-1]:.4g}"[:4] in printed


def test_a_weight_is_read_and_circular_padding_compared(tmp_path, capsys):
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "w.npy", weight.numpy())
    assert main(["spectra", "--weight", str(tmp_path / "w.npy"), "--input", "8x8"]) == 0
    printed = capsys.readouterr().out
    assert f"{values(weight, 8, padding=1)[0]:.3f}" in printed
    assert "circular padding would give sigma_min" in printed


def test_a_linear_layer_has_no_input_size_and_no_border(capsys):
    assert main(["spectra", "--kernel", "3x5"]) == 0
    printed = capsys.readouterr().out
    assert "M is 3x5" in printed
    assert "circular" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "4"], "expected --kernel as in 64x64x3x3, got 4"),
        (["--kernel", "4x4x3x3"], "expected an input_size of 2 integers"),
        (["--weight", "none.npy", "--input", "4x4"], "No such file"),
        (["--kernel", "4x4x3x3", "--input", "4x4", "--json", "."], "which is a folder"),
    ],
)
def test_what_is_no_layer_is_one_line(capsys, words, said):
    assert main(["spectra", *words]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
