"""The flow on digits: densities that are those of the map, and what is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from experiments.digits_flow import __main__ as command

pytest.importorskip("sklearn")


@pytest.mark.parametrize("arm", command.ARMS)
def test_the_density_is_that_of_the_map(arm: str) -> None:
    torch.manual_seed(0)
    flow = command.Flow(arm).double()
    for p in flow.parameters():  # the couplings start as nothing
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 and not p.any() else None
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)

    def noise(image: torch.Tensor) -> torch.Tensor:
        inside = command.MARGIN + (1 - 2 * command.MARGIN) * image
        z = torch.nn.functional.pixel_unshuffle(torch.logit(inside), 2)
        for step in flow.steps:
            z, _ = step(z)
        return z.flatten()

    jacobian = torch.autograd.functional.jacobian(noise, x).reshape(64, 64)
    z = noise(x)
    expected = -0.5 * z.square().sum() - 32 * math.log(2 * math.pi)
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow(x)[0], expected)
    torch.testing.assert_close(flow.sample(z.reshape(1, 4, 4, 4)), x)


def test_what_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    arguments = ["--steps", "2", "--seeds", "1", "--out", str(tmp_path)]
    runs = command.main(arguments, said.append)
    assert len(runs) == len(said) == len(command.ARMS)
    assert all(2 < run.bits < 10 and run.inversion < 1e-3 for run in runs)
    page = (tmp_path / "digits_flow.md").read_text()
    assert all(f"| {arm} |" in page for arm in command.ARMS)
