"""The experiment on Jacobians: values against automatic differentiation, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import convspectra as cs
from experiments.jacobian_spectrum import __main__ as command

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("start", command.STARTS)
def test_values_are_those_of_automatic_differentiation(start: str) -> None:
    found = command.spectrum("tanh", start, 3)
    model = command.network("tanh", 3)
    x = torch.randn(8, 1, 14, 14)
    if start == "He":
        command.he(model, "tanh")
    if start == "prepare":
        cs.prepare(model, x)
    jacobian = torch.func.jacrev(model.double())(x[:1].double()).reshape(16 * 196, 196)
    true = torch.linalg.svdvals(jacobian.detach())
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), true)
    assert found.stable_rank == pytest.approx(float((true / true[0]).square().sum()))


def test_what_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    spectra = command.main(["--quick", "--out", str(tmp_path)], said.append)
    assert len(spectra) == len(said) == len(command.ACTIVATIONS) * len(command.STARTS)
    page = (tmp_path / "jacobian_spectrum.md").read_text()
    assert page.count("| relu |") == page.count("| tanh |") == len(command.STARTS)
    assert len((tmp_path / "jacobian_spectrum.csv").read_text().splitlines()) == 1 + 6 * 196
    assert (tmp_path / "jacobian_spectrum.png").exists()
