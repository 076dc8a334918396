"""The stable-gradients experiment in small: what it trains and what it records."""

import json

import pytest
import torch
from torch import nn

import convspectra as cs
from convspectra.operator import seen_operator
from convspectra.paper.images import ImageSet
from convspectra.paper.stable_gradients import (
    ARMS,
    OBSERVATIONS,
    PAPER_PENALTIES,
    Settings,
    compare,
    plain_network,
)

SMALL = Settings(depth=3, deep=5, channels=4, steps=8, batch_size=8, penalty_steps=4)


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


def by_arm(results, depth):
    return {run["name"]: run for run in results["runs"] if run["depth"] == depth}


def kernels(network):
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]


def test_the_network_is_plain_and_in_the_default_initialization():
    network = plain_network(20, Settings(channels=16), (1, 8, 8), 10, "default")
    kinds = [type(module) for module in network]
    head = [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert kinds == [nn.Conv2d, nn.ReLU] * 20 + head
    torch.manual_seed(0)
    default = nn.Conv2d(1, 16, 3, padding=1)
    assert torch.equal(network[0].weight, default.weight)


def test_making_the_network_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    plain_network(3, SMALL, (1, 5, 4), 4, "He")
    assert torch.equal(torch.get_rng_state(), before)


def test_normalized_network_starts_with_the_same_kernels():
    plain, normalized = (
        plain_network(3, SMALL, (1, 5, 4), 4, arm) for arm in ("default", "batch normalization")
    )
    assert sum(isinstance(module, nn.BatchNorm2d) for module in normalized) == 3
    for ours, theirs in zip(kernels(plain), kernels(normalized), strict=True):
        assert torch.equal(ours, theirs)


def test_he_initialization_keeps_the_second_moment():
    network = plain_network(3, Settings(channels=64), (1, 8, 8), 4, "He")
    for kernel in kernels(network)[1:]:
        assert float(kernel.detach().square().sum()) == pytest.approx(2 * 64, rel=0.05)


def test_every_arm_is_recorded_and_is_json(results):
    assert [(run["name"], run["depth"]) for run in results["runs"]] == [
        (arm, depth) for depth in (3, 5) for arm in ARMS
    ]
    assert json.loads(json.dumps(results)) == results
    for run in results["runs"]:
        assert run["steps"] == [0, 2, 4, 6, 8]
        assert len(run["accuracy"]) == len(run["gradient_norms"]) == OBSERVATIONS
        assert all(0 <= value <= 1 for value in run["accuracy"])
        assert all(len(norms) == run["depth"] for norms in run["gradient_norms"])
        assert all(0 <= low <= high for low, high in run["extreme_singular_values"])


def test_only_the_starts_differ_before_training(results):
    for depth in (3, 5):
        runs = by_arm(results, depth)
        start = runs["default"]["gradient_norms"][0]
        for arm in (*PAPER_PENALTIES, "isometry"):
            assert runs[arm]["gradient_norms"][0] == start, arm
        for arm in ("He", "prepare"):
            assert runs[arm]["gradient_norms"][0] != start, arm


def test_the_learning_rate_is_the_same_but_with_normalization(results):
    rates = {name: run["learning_rate"] for name, run in by_arm(results, 3).items()}
    assert rates.pop("batch normalization") == 1e-3
    assert set(rates.values()) == {3.0 / (9 + 36 + 36)}


def test_recorded_gradient_norms_are_those_of_autograd(images, results):
    network = plain_network(3, SMALL, (1, 5, 4), 4, "default")
    loss = nn.functional.cross_entropy(network(images.train_images), images.train_labels)
    loss.backward()
    expected = [kernel.grad.norm().item() for kernel in kernels(network)]
    recorded = by_arm(results, 3)["default"]["gradient_norms"][0]
    assert recorded == pytest.approx(expected, rel=1e-5)


def test_ours_are_better_conditioned_as_signals_see_them(results):
    runs = by_arm(results, 5)
    least = {
        name: min(low for low, _ in run["extreme_singular_values"]) for name, run in runs.items()
    }
    assert least["prepare"] > 0.3
    assert least["isometry"] > 10 * least["default"]


def test_prepared_layers_are_isometric_as_recorded():
    network = plain_network(3, SMALL, (1, 5, 4), 4, "prepare")
    cs.prepare(network, torch.randn(2, 1, 5, 4))
    op = cs.ConvOperator(kernels(network)[1], (5, 4), padding=1)
    seen = seen_operator(op, mirrored_input=True, mirrored_output=True)
    assert cs.sigma_max(seen) == pytest.approx(1.0)
    assert cs.sigma_min(seen) == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_results(images, results):
    assert compare(images, SMALL) == results


def test_progress_ends_at_its_total(images):
    calls = []
    compare(images, SMALL, lambda *call: calls.append(call))
    for depth in (3, 5):
        for arm in ARMS:
            mine = [(done, total) for run, done, total in calls if run == f"{depth} layers, {arm}"]
            assert mine == [(done, SMALL.steps) for done in range(SMALL.steps + 1)]
