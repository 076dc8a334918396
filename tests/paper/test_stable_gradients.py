"""The stable-gradients experiment in small: what it trains and what it records."""

import json

import pytest
import torch
from torch import nn

from convspectra.paper.images import ImageSet
from convspectra.paper.stable_gradients import ARMS, Settings, compare, plain_network

SMALL = Settings(depth=3, channels=3, epochs=2, batch_size=8, penalty_steps=3)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        "noise",
        torch.randn(20, 1, 5, 4, generator=generator),
        torch.arange(20) % 4,
        torch.randn(7, 1, 5, 4, generator=generator),
        torch.arange(7) % 4,
    )


@pytest.fixture(scope="module")
def results(images):
    return compare(images, SMALL)


def test_the_network_is_plain_and_in_the_default_initialization():
    network = plain_network(Settings(depth=20), (1, 8, 8), 10)
    kinds = [type(module) for module in network]
    assert kinds == [nn.Conv2d, nn.ReLU] * 20 + [nn.Flatten, nn.Linear]
    torch.manual_seed(0)
    default = nn.Conv2d(1, 16, 3, padding=1)
    assert torch.equal(network[0].weight, default.weight)


def test_making_the_network_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    plain_network(SMALL, (1, 5, 4), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_normalized_network_starts_with_the_same_kernels():
    plain = plain_network(SMALL, (1, 5, 4), 4)
    normalized = plain_network(SMALL, (1, 5, 4), 4, normalize=True)
    kernels = [m.weight for m in normalized if isinstance(m, nn.Conv2d)]
    assert len(kernels) == 3
    for ours, theirs in zip(
        (m.weight for m in plain if isinstance(m, nn.Conv2d)), kernels, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_every_arm_is_recorded_and_is_json(results):
    assert [run["name"] for run in results["runs"]] == list(ARMS)
    assert json.loads(json.dumps(results)) == results
    for run in results["runs"]:
        assert len(run["accuracy"]) == len(run["gradient_norms"]) == SMALL.epochs + 1
        assert all(0 <= value <= 1 for value in run["accuracy"])
        assert all(len(norms) == SMALL.depth for norms in run["gradient_norms"])
        assert all(0 <= low <= high for low, high in run["extreme_singular_values"])
        for summary in run["singular_values"]:
            assert summary == sorted(summary)
            low, high = run["extreme_singular_values"][run["singular_values"].index(summary)]
            assert summary[0] == pytest.approx(low, rel=1e-6)
            assert summary[-1] == pytest.approx(high, rel=1e-6)


def test_only_penalties_change_the_network_before_training(results):
    runs = {run["name"]: run for run in results["runs"]}
    start = results["gradient_norms_at_start"]
    assert runs["plain"]["gradient_norms"][0] == start
    for name, penalty in ARMS.items():
        if penalty is not None:
            assert runs[name]["gradient_norms"][0] != start, name


def test_recorded_gradient_norms_are_those_of_autograd(images, results):
    network = plain_network(SMALL, (1, 5, 4), 4)
    loss = nn.functional.cross_entropy(network(images.train_images), images.train_labels)
    loss.backward()
    expected = [m.weight.grad.norm().item() for m in network if isinstance(m, nn.Conv2d)]
    assert results["gradient_norms_at_start"] == pytest.approx(expected, rel=1e-5)


def test_stein_raises_the_smallest_singular_values(results):
    runs = {run["name"]: run for run in results["runs"]}
    smallest = [summary[0] for summary in runs["stein"]["singular_values"]]
    start = [summary[0] for summary in results["singular_values_at_start"]]
    assert sum(smallest) > sum(start)


def test_the_same_seed_gives_the_same_results(images, results):
    assert compare(images, SMALL) == results


def test_progress_ends_at_its_total(images):
    calls = []
    compare(images, SMALL, lambda *call: calls.append(call))
    for name, penalty in ARMS.items():
        mine = [(done, total) for run, done, total in calls if run == name]
        total = 2 * 3 + (3 if penalty else 0)
        assert mine == [(done, total) for done in range(total + 1)]
