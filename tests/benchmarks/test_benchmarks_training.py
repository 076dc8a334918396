"""The parts of the training benchmark, on a small network."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks import training
from benchmarks.resnet18 import is_three_by_three, resnet18

EXAMPLE = torch.zeros(1, 3, 8, 8)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return images, torch.tensor([0, 1, 0, 1])


def test_resnet18_has_the_layers_of_the_paper():
    found = [m for name, m in resnet18().named_modules() if is_three_by_three(name, m)]
    assert len(found) == 17
    assert [m.out_channels for m in found[::4]] == [64, 64, 128, 256, 512]


def test_every_arm_trains_from_the_same_start_and_takes_its_turns():
    start = network()
    kept = copy.deepcopy(start.state_dict())
    ours, reg = training.with_conditioning(start, EXAMPLE)
    arms = [
        *ours,
        *training.with_frobenius(start, EXAMPLE)[1:],
        *training.peers_of(start, EXAMPLE)[1:],
    ]
    looks: list[int] = []
    training.run(arms, 7, batch, looks.append)
    assert looks == [1, 2, 3, 4, 5, 6, 7]
    assert all(len(arm.seconds) == 7 for arm in arms)
    assert len({arm.name for arm in arms}) == 12
    assert all(torch.equal(value, kept[name]) for name, value in start.state_dict().items())
    ends = [training.exact(arm.network, EXAMPLE) for arm in arms]
    assert len({tuple(end) for end in map(tuple, ends)}) == 12, "no arm does what another does"
    assert all(largest > smallest > 0 for end in ends for largest, smallest in end)
    checked = training.errors(reg, arms[1].network, EXAMPLE)
    assert checked["outside"] == 0
    assert checked["sigma_max"] < 0.05


def test_the_page_has_every_row():
    row = dict.fromkeys(
        (
            "steps",
            "seconds a step",
            "ratio",
            "standard error",
            "median ratio",
            "first call",
            "sigma_max",
            "sigma_min",
        ),
        1.25,
    )
    result = {
        "machine": "a machine",
        "images": "images",
        "start": "preconditioned",
        "groups": {
            "conditioning": {"command": "a command", "rows": [{"arm": "plain"} | row]},
            "peers": {"command": "another", "rows": [{"arm": "SRIP"} | row]},
        },
        "checks": [
            {"step": 20, **dict(zip(training.ERRORS, (1e-3, 2e-3, 0.01, 0.02), strict=True))}
            | {"outside": 0, "e": 1, "f": 2},
            {"step": 40, **dict(zip(training.ERRORS, (5e-3, 1e-3, 0.03, 0.01), strict=True))}
            | {"outside": 1, "e": 1, "f": 2},
        ],
        "one layer": {"layer": 20.0, "penalty": 10.0},
    }
    lines = training.page(result).splitlines()
    assert "| SRIP" + 8 * " | 1.25" + " |" in lines
    assert "| 20 | 0.001 | 0.002 | 0.01 | 0.02 | 0 | 1 | 2 |" in lines
    worst = (
        "Worst over all 2 checks, in the order of the columns: 0.005, 0.002, 0.03, 0.02; 1 missed."
    )
    assert f"{worst} Some of them:" in lines
    assert "Made by `a command` and `another`." in lines
