"""Networks, arms and single runs of the stable-gradients experiment."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import convspectra as cs
from common import peers
from common.networks import as_applied, build, convolutions
from convspectra.models import find_layers
from convspectra.paper.images import ImageSet
from convspectra.testing import naive_dense
from experiments.stable_gradients import training
from experiments.stable_gradients.arms import ARMS, BATCH_NORMALIZATION, PLAIN, Arm, arms_for
from experiments.stable_gradients.training import Record, Run, Settings, gradient_norms, train

SMALL = Settings(
    channels=3,
    steps=4,
    batch_size=8,
    projection_interval=2,
    observations=3,
    gradient_images=16,
)
SHAPE = (2, 8, 6)


def is_here(arm: Arm) -> bool:
    """Whether this convspectra has what the arm needs."""
    if arm.start == "precondition" and not hasattr(cs, "precondition"):
        return False
    try:
        if arm.penalty is not None:
            cs.SpectralRegularizer(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 4, 4), penalty=arm.penalty)
    except ValueError:
        return False
    return True


HERE = list(ARMS)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        "noise",
        torch.randn(40, *SHAPE, generator=generator),
        torch.arange(40) % 4,
        torch.randn(20, *SHAPE, generator=generator),
        torch.arange(20) % 4,
    )


def run(arm: str = PLAIN, network: str = "plain", depth: int = 4, seed: int = 0) -> Run:
    return Run(network, arm, depth, "relu", seed)


def same(one: Record, two: Record) -> bool:
    """Equal but for the time; nan equals nan."""
    return repr(replace(one, seconds=0.0)) == repr(replace(two, seconds=0.0))


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
@pytest.mark.parametrize("network", ["plain", "residual"])
def test_networks_have_the_depth_and_the_kernels_of_their_seed(network: str, depth: int) -> None:
    built = build(network, depth, 3, SHAPE, 4, seed=7)
    torch.manual_seed(7)
    expected = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    found = convolutions(built)
    assert len(found) == depth
    assert torch.equal(found[0].weight, expected.weight)
    for conv in found[1:]:
        expected = nn.Conv2d(3, 3, 3, padding=1)
        assert torch.equal(conv.weight, expected.weight)
    sizes = [layer.input_size for layer in find_layers(built, torch.zeros(1, *SHAPE))]
    assert sizes == [(8, 6)] + [(4, 3)] * (depth - 1)


def test_a_plain_network_is_plain() -> None:
    kinds = [type(module) for module in build("plain", 2, 3, SHAPE, 4, activation="tanh")]
    assert kinds == [nn.Conv2d, nn.Tanh, nn.Conv2d, nn.Tanh, nn.Flatten, nn.Linear]
    kinds = [type(m) for m in build("plain", 1, 3, SHAPE, 4, normalize=True, head="pool")]
    normalized = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*normalized, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


def test_a_residual_block_without_its_body_is_the_identity() -> None:
    network = build("residual", 5, 3, SHAPE, 4).eval()
    stem = convolutions(network)[0]
    for conv in convolutions(network)[1:]:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    x = torch.randn(2, *SHAPE)
    # Batch normalization divides by the root of a variance of 1 + 1e-5.
    expected = network[-1](torch.relu(stem(x)).flatten(1))
    torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"network": "dense"}, r"network to be one of \('plain', 'residual'\), got 'dense'"),
        ({"activation": "gelu"}, "activation to be one of .* got 'gelu'"),
        ({"head": "max"}, "head to be one of .* got 'max'"),
        ({"depth": 0}, "at least one layer and one channel, got depth=0"),
    ],
)
def test_unknown_networks_are_refused(options: dict[str, object], match: str) -> None:
    given = {"network": "plain", "depth": 2, "channels": 3, "image_shape": SHAPE, "classes": 4}
    with pytest.raises(ValueError, match=match):
        build(**{**given, **options})


def test_as_applied_bakes_spectral_norm_and_leaves_the_network_alone() -> None:
    network = build("residual", 4, 3, SHAPE, 4)
    peers.normalize_spectrally(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    applied = as_applied(network)
    assert [type(conv) for conv in convolutions(applied)] == [nn.Conv2d] * 4
    x = torch.randn(2, *SHAPE)
    network.eval()
    torch.testing.assert_close(applied(x.double()).float(), network(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_gradient_norms_are_those_of_autograd(images: ImageSet) -> None:
    network = build("plain", 4, 3, SHAPE, 4, normalize=True)
    running = network[1].running_mean.clone()
    norms = gradient_norms(network, images, 16)
    assert torch.equal(network[1].running_mean, running)
    loss = nn.functional.cross_entropy(network(images.train_images[:16]), images.train_labels[:16])
    loss.backward()
    expected = [conv.weight.grad.norm().item() for conv in convolutions(network)]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_gradients_below_float32_are_recorded(images: ImageSet) -> None:
    network = build("plain", 16, 3, SHAPE, 4, activation="tanh")
    for conv in convolutions(network):
        nn.init.constant_(conv.weight, 1e-5)
        nn.init.zeros_(conv.bias)
    norms = gradient_norms(network, images, 16)
    assert 0 < norms[0] < 1e-46


@pytest.mark.parametrize("name", HERE)
def test_every_arm_is_recorded(images: ImageSet, name: str) -> None:
    record = train(run(name), images, SMALL)
    assert (record.status, record.steps_done) == ("finished", 4)
    assert record.observed_at == [0, 2, 4]
    assert len(record.ratios) == len(record.accuracies) == len(record.losses) == 3
    assert all(0 <= accuracy <= 1 for accuracy in record.accuracies)
    assert all(len(norms) == 4 for norms in (record.gradients_start, record.gradients_end))
    assert record.ratios[0] == record.gradients_start[0] / record.gradients_start[-1]
    assert record.ratios[-1] == record.gradients_end[0] / record.gradients_end[-1]
    assert all(
        0 <= low <= high for low, high in zip(record.sigma_min, record.sigma_max, strict=True)
    )
    assert math.isnan(record.losses[0])
    assert record.seconds > 0


@pytest.mark.parametrize("name", [name for name in HERE if name != PLAIN])
def test_every_arm_differs_from_the_plain_run(images: ImageSet, name: str) -> None:
    plain = train(run(), images, SMALL)
    record = train(run(name), images, SMALL)
    assert record.gradients_end != plain.gradients_end
    arm = ARMS[name]
    changed = arm.start != "default" or arm.normalize or arm.spectral_norm or arm.project
    assert (record.gradients_start != plain.gradients_start) == changed


@pytest.mark.parametrize("name", [PLAIN, "SRIP", "spectral_norm", "stein", "delta-orthogonal"])
def test_a_seed_gives_the_same_record(images: ImageSet, name: str) -> None:
    once = train(run(name), images, SMALL)
    torch.randn(3)  # The global random state is not what a run depends on.
    assert same(train(run(name), images, SMALL), once)
    assert not same(train(run(name, seed=1), images, SMALL), once)


def test_recorded_singular_values_are_those_of_the_layers(images: ImageSet) -> None:
    """No step to speak of, so that the kernels are those of the seed."""
    record = train(run(), images, replace(SMALL, steps=1, learning_rate=1e-12, observations=2))
    network = build("plain", 4, 3, SHAPE, 4, seed=0)
    inputs = [SHAPE] + [(3, 4, 3)] * 3
    for conv, shape, high, low in zip(
        convolutions(network), inputs, record.sigma_max, record.sigma_min, strict=True
    ):
        values = torch.linalg.svdvals(naive_dense(conv.double(), shape).detach())
        assert high == pytest.approx(float(values[0]), rel=1e-5)
        assert low == pytest.approx(float(values[-1]), rel=1e-3)


def test_projection_says_which_layers_it_skips_and_does_the_others(images: ImageSet) -> None:
    settings = replace(SMALL, projection_limit=0.05)
    record = train(run("circular projection"), images, settings)
    assert record.note == "1 strided layer left as it is"
    assert record.sigma_max[0] > 0.5
    assert all(high < 0.3 for high in record.sigma_max[1:])


def test_a_penalty_every_few_steps_counts_as_many_times(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain gradient descent and a penalty that is linear, only the sum matters."""

    def linear(op: cs.ConvOperator) -> torch.Tensor:
        return 1e6 * op.weight.double().sum()

    def gradient_descent(parameters: object, lr: float, weight_decay: float) -> object:
        return torch.optim.SGD(parameters, lr=0.01 * lr)

    monkeypatch.setitem(ARMS, "linear", Arm(penalty=linear))
    monkeypatch.setattr(torch.optim, "Adam", gradient_descent)
    records = [train(run("linear"), images, replace(SMALL, penalty_interval=n)) for n in (1, 2)]
    plain = train(run(), images, SMALL)
    assert records[0].sigma_max != pytest.approx(plain.sigma_max, rel=1e-3)
    assert records[0].sigma_max == pytest.approx(records[1].sigma_max, rel=1e-4)


@pytest.mark.parametrize("name", [PLAIN, "soft orthogonality", "circular projection", "frobenius"])
def test_a_diverged_run_is_a_record(images: ImageSet, name: str) -> None:
    record = train(run(name), images, replace(SMALL, learning_rate=1e37))
    assert record.status == "diverged"
    assert record.steps_done < SMALL.steps
    assert record.observed_at[0] == 0
    assert len(record.observed_at) == len(record.ratios) == len(record.accuracies)
    assert record.gradients_start
    assert record.gradients_end == []


def test_kernels_that_overflow_behind_a_finite_loss_are_a_diverged_run(images: ImageSet) -> None:
    saturated = replace(run("stein"), activation="tanh")
    record = train(saturated, images, replace(SMALL, learning_rate=1e25))
    assert (record.status, record.steps_done) == ("diverged", 1)


def test_a_penalty_that_fails_stops_the_run_with_its_reason(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("plain", 4, 3, SHAPE, 4)[0].weight

    def failing(op: cs.ConvOperator) -> torch.Tensor:
        if op.weight.shape == first.shape and not torch.equal(op.weight, first):
            raise ArithmeticError("singular\nand more")
        return op.weight.double().sum()

    monkeypatch.setitem(ARMS, "failing", Arm(penalty=failing))
    record = train(run("failing"), images, SMALL)
    assert record.status == "stopped"
    assert record.steps_done == 1
    assert record.note == "ArithmeticError: layer '0': singular"
    assert len(record.sigma_max) == 4


def test_other_errors_are_not_results(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "broken", Arm(penalty="no such penalty"))
    with pytest.raises(ValueError, match="no such penalty"):
        train(run("broken"), images, SMALL)


def test_training_restores_denormals(images: ImageSet) -> None:
    train(run(), images, SMALL)
    smallest = torch.tensor([1e-40])
    assert float(smallest / 2) > 0


def test_every_arm_of_a_seed_sees_the_same_batches(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    original = training._Training._next_batch
    for name in (PLAIN, "SRIP", "delta-orthogonal"):

        def recorded(self: object, name: str = name) -> torch.Tensor:
            batch = original(self)
            seen.setdefault(name, []).append(batch.tolist())
            return batch

        monkeypatch.setattr(training._Training, "_next_batch", recorded)
        train(run(name), images, replace(SMALL, steps=7))
    assert seen[PLAIN] == seen["SRIP"] == seen["delta-orthogonal"]
    first_epoch = [index for batch in seen[PLAIN][:5] for index in batch]
    assert sorted(first_epoch) == list(range(40))


def test_batch_normalization_is_no_arm_of_the_residual_network() -> None:
    assert set(ARMS) - set(arms_for("residual")) == {BATCH_NORMALIZATION}
    assert arms_for("plain") == tuple(ARMS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "steps to be at least 1, got 0"),
        ({"observations": 1}, "at least two observations, start and end, got 1"),
    ],
)
def test_settings_are_checked(change: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Settings(**change)
