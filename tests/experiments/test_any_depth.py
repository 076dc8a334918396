"""The experiment on plain networks of any depth: tables that grow, best rates, and starts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.idx_files import write_random_set
from torch import nn

import convspectra as cs
from common.growing_tables import code_version
from experiments.any_depth import __main__ as command
from experiments.any_depth.runs import ARMS, Run, Settings, network, started
from experiments.any_depth.starts import tailored_slope


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any_depth")
    write_random_set(path)
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    options = ["--quick", "--depths", "2", "--rates", "1", "--activations", "relu"]
    return ["--data", str(folder), "--out", str(out), *options, *more]


def test_a_table_grows_and_knows_what_it_has(folder: Path, tmp_path: Path) -> None:
    first = command.main(arguments(folder, tmp_path, "--arms", "default", "prepare"))
    assert [row["arm"] for row in first] == ["default", "prepare"]
    every = command.main(arguments(folder, tmp_path, "--arms", *ARMS))
    assert every[:2] == first
    assert sorted(row["arm"] for row in every) == sorted(ARMS)
    assert all(0 <= float(row["accuracy"]) <= 1 and row["code"] for row in every)
    page = (tmp_path / "any_depth.md").read_text()
    assert page.count("| relu |") == len(ARMS)
    assert (tmp_path / "any_depth.png").exists()


def row(arm: str, rate: str, seed: str, accuracy: float) -> dict[str, str]:
    known = dict.fromkeys(command.COLUMNS, "1")
    own = {"arm": arm, "activation": "relu", "rate": rate, "seed": seed, "depth": "20"}
    return {**known, **own, "steps": "150", "accuracy": str(accuracy)}


def test_the_rate_is_chosen_by_the_mean_over_its_seeds() -> None:
    rows = [row("He", "1.0", "0", 0.7), row("He", "1.0", "1", 0.5), row("He", "3.0", "0", 0.65)]
    (best,) = command.best(rows)
    assert (best["test accuracy"], best["seeds"], best["rates tried"]) == ("65.0%", 1, 2)
    rows.append(row("He", "3.0", "1", 0.45))
    (best,) = command.best(rows)
    assert (best["test accuracy"], best["least"], best["seeds"]) == ("60.0%", "50.0%", 2)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("arm", ARMS)
def test_starts(arm: str, activation: str) -> None:
    settings = Settings(channels=4)
    images = torch.randn(8, 1, 8, 8)
    model = network(Run(arm, activation, 3, 1.0, 0), settings, (1, 8, 8), 5)
    default = network(Run("default", activation, 3, 1.0, 0), settings, (1, 8, 8), 5)
    started(model, Run(arm, activation, 3, 1.0, 0), images)
    convs, plain = (
        [m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, default)
    )
    same = [torch.equal(a.weight, b.weight) for a, b in zip(convs, plain, strict=True)]
    as_default = ("default", "isometry", "batch normalization", "OCNN", "SRIP")
    assert all(same) == (arm in as_default)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model) == (arm == "batch normalization")
    if arm == "delta-orthogonal":
        op = cs.ConvOperator.from_module(convs[1], (4, 4))
        gain = math.sqrt(2) if activation == "relu" else 1.0
        assert cs.sigma_max(op) == pytest.approx(gain)
        assert cs.sigma_min(op) == pytest.approx(gain)


@pytest.mark.parametrize("depth", [20, 100])
def test_the_tailored_slope_reaches_its_goal(depth: int) -> None:
    """By the mean over Gaussian pairs of leaky ReLUs, which the closed form is for."""
    slope, cosine = tailored_slope(depth), 0.0
    points, weights = np.polynomial.hermite_e.hermegauss(120)
    x, y = np.meshgrid(points, points)
    mass = np.outer(weights, weights) / (2 * math.pi)

    def leaky(z: np.ndarray) -> np.ndarray:
        return np.where(z > 0, z, slope * z)

    for _ in range(depth):
        second = cosine * x + math.sqrt(max(1 - cosine**2, 0)) * y
        cosine = float((mass * leaky(x) * leaky(second)).sum() * 2 / (1 + slope**2))
    assert cosine == pytest.approx(0.9, abs=0.02)


def test_layers_of_unit_variance_and_networks_that_look_linear() -> None:
    images = torch.randn(64, 1, 8, 8)
    model = network(Run("LSUV", "relu", 4, 1.0, 0), Settings(channels=4), (1, 8, 8), 5)
    started(model, Run("LSUV", "relu", 4, 1.0, 0), images)
    assert 0.5 < float(model[:7](images).detach().var()) < 2  # the input of the last ReLU
    model = network(Run("looks-linear", "relu", 4, 1.0, 0), Settings(channels=4), (1, 8, 8), 5)
    started(model, Run("looks-linear", "relu", 4, 1.0, 0), images)
    inside = model[:7]
    with torch.no_grad():
        together = inside(2 * images[:2] - images[2:4])
        apart = 2 * inside(images[:2]) - inside(images[2:4])
    torch.testing.assert_close(together, apart)


def test_it_names_the_code() -> None:
    assert code_version()
