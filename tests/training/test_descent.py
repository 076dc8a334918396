"""Algorithms 3.1 to 3.3 against the paper in NumPy loops, and the steps that need no tuning."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import paper_reference as paper
from torch import Tensor

import convspectra as cs

ALGORITHMS = ("3.1", "3.2", "3.3")
PAPER_STEPS = {"3.1": 1e-5, "3.2": 1e-4, "3.3": 1e-5}
LAYERS = [  # kernel, input
    ((3, 3, 2, 1), (5, 5)),
    ((3, 3, 1, 2), (4, 6)),
    ((3, 3, 2, 2), (4, 4)),
    ((2, 2, 1, 2), (5, 4)),
    ((4, 3, 2, 1), (4, 5)),
    ((5, 5, 1, 1), (3, 4)),
    ((3, 2, 1), (9,)),
    ((4, 1, 3), (7,)),
    ((3, 2, 3, 2, 1), (3, 4, 2)),
]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_layer = pytest.mark.parametrize(("shape", "size"), LAYERS)


def kernel(*shape: int, state: int = 1) -> Tensor:
    return torch.from_numpy(cs.matlab.rand(shape, state))


# --- constant steps ------------------------------------------------------------------------------


@each_algorithm
@each_layer
def test_constant_steps_are_those_of_the_paper(shape, size, algorithm):
    start = kernel(*shape)
    result = cs.descend(start, size, algorithm=algorithm, step_size=1e-3, max_iter=4)
    wanted = paper.descend(start.numpy(), size, algorithm, 1e-3, 4)
    for name in ("sigma_max", "sigma_min", "objective"):
        scale = wanted["sigma_max"][0] if name != "objective" else abs(wanted["objective"][0]) + 1
        assert getattr(result, name) == pytest.approx(wanted[name], rel=1e-9, abs=1e-9 * scale)
    best = wanted["kernel"][int(np.argmin(wanted["objective"]))]
    assert result.kernel.numpy() == pytest.approx(best, rel=1e-9, abs=1e-11)
    assert result.kernel.dtype == torch.float64
    assert result.step_size.tolist() == [1e-3] * 4


@each_algorithm
def test_the_papers_steps_are_the_default(algorithm):
    start, step = kernel(3, 3, 1, 2), PAPER_STEPS[algorithm]
    wanted = paper.descend(start.numpy(), (4, 4), algorithm, step, 2)
    for options in ({}, {"step_size": "paper"}, {"step_size": step}):
        result = cs.descend(start, 4, algorithm=algorithm, max_iter=2, **options)
        assert result.step_size.tolist() == [step, step]
        assert result.objective == pytest.approx(wanted["objective"], rel=1e-12)
        # A step of 1e-5 moves the kernel by about 1e-4: the tolerance must see it.
        assert result.kernel.numpy() == pytest.approx(wanted["kernel"][-1], abs=1e-10)


def test_the_kernel_returned_has_the_lowest_objective():
    # Far too long a step for 3.1: |1 - 0.2 * 16| > 1, so that the start is best.
    start = kernel(3, 3, 1, 1)
    result = cs.descend(start, 4, algorithm="3.1", step_size=0.2, max_iter=5)
    assert result.objective[-1] > result.objective[0]
    assert torch.equal(result.kernel, start)


@each_algorithm
@pytest.mark.parametrize("max_iter", [0, 1, 3])
@pytest.mark.parametrize("step_size", ["paper", "auto"])
def test_lengths_of_the_history(algorithm, max_iter, step_size):
    start = kernel(3, 3, 2, 1)
    result = cs.descend(start, 5, algorithm=algorithm, step_size=step_size, max_iter=max_iter)
    assert result.status == "max_iter"
    assert not result.converged
    assert result.iterations == max_iter
    for history in (result.sigma_max, result.sigma_min, result.objective):
        assert history.shape == (max_iter + 1,)
        assert history.dtype == np.float64
    assert result.step_size.shape == (max_iter,)
    assert (result.gap is not None) == (algorithm == "3.3")


def test_the_kernel_given_is_left_alone():
    start = kernel(3, 3, 1, 2).float().requires_grad_()
    before = start.detach().clone()
    result = cs.descend(start, 4, algorithm="3.3", step_size=1e-3, max_iter=3)
    assert start.dtype == torch.float32
    assert torch.equal(start.detach(), before)
    assert start.grad is None
    assert not result.kernel.requires_grad
    # Widened once, at the start: the whole descent is that of the same numbers in float64.
    same = cs.descend(before.double(), 4, algorithm="3.3", step_size=1e-3, max_iter=3)
    assert result.objective.tolist() == same.objective.tolist()
    assert torch.equal(result.kernel, same.kernel)


# --- the step that needs no tuning ---------------------------------------------------------------


def test_auto_step_of_3_1_is_the_best_constant_one():
    counts = [a * b for a, b in itertools.product((3, 4, 3), repeat=2)]  # of the taps at N = 4
    start = kernel(3, 3, 2, 3)
    steps = 6

    def size_after(step_size):
        result = cs.descend(start, 4, algorithm="3.1", step_size=step_size, max_iter=steps, tol=0)
        assert result.iterations == steps
        return float(result.kernel.norm()), result.step_size[0]

    ours, step = size_after("auto")
    assert step == pytest.approx(2 / (min(counts) + max(counts)))
    for factor in (0.8, 0.9, 0.97, 1.03, 1.1):
        assert size_after(factor * step)[0] > ours
    rate = (max(counts) - min(counts)) / (max(counts) + min(counts))
    assert ours <= rate**steps * float(start.norm()) * (1 + 1e-12)


def test_auto_step_of_3_1_ignores_taps_that_are_never_used():
    # 7 taps on 3 pixels: the outer ones read nothing but padding, their |Omega| is 0.
    result = cs.descend(kernel(7, 1, 1), 3, algorithm="3.1", step_size="auto")
    assert result.converged
    assert result.step_size[0] == pytest.approx(2 / (1 + 3))
    assert result.sigma_max[-1] < 1e-4


def test_first_auto_step_of_3_3_is_polyaks_to_the_floor():
    start, size = kernel(3, 3, 2, 1), (4, 4)
    omega = paper.index_sets(start.shape, size)
    dense = paper.matrix(start.numpy(), size, omega)
    slope = paper.gradient("3.3", dense, omega, start.shape)
    gap = paper.objective("3.3", dense) + 16 / 2
    result = cs.descend(start, size, algorithm="3.3", step_size="auto", max_iter=1)
    assert result.step_size == pytest.approx([gap / (slope**2).sum()], rel=1e-9)


@pytest.mark.parametrize("algorithm", ["3.2", "3.3"])
@pytest.mark.parametrize("channels", [(2, 1), (1, 1), (2, 2), (2, 3)])
def test_auto_gets_further_than_the_paper(algorithm, channels):
    start = kernel(3, 3, *channels)
    best = {
        rule: cs.descend(start, 5, algorithm=algorithm, step_size=rule, max_iter=60).objective.min()
        for rule in ("paper", "auto")
    }
    # In a tenth of the iterations, too.
    short = cs.descend(start, 5, algorithm=algorithm, step_size="auto", max_iter=6)
    assert best["auto"] < short.objective.min() < best["paper"]


def test_auto_comes_close_to_the_floor_of_3_3():
    result = cs.descend(kernel(3, 3, 3, 1), 6, algorithm="3.3", step_size="auto", max_iter=150)
    assert result.gap.min() < 0.02 * 36 / 2
    assert cs.sigma_min(cs.ConvOperator(cs.kernel_to_weight(result.kernel), 6)) > 0.95
    assert cs.sigma_max(cs.ConvOperator(cs.kernel_to_weight(result.kernel), 6)) < 1.05


@pytest.mark.parametrize("channels", [1, 2])
def test_auto_goes_on_where_a_fixed_patience_would_stall(channels):
    # Note [Patience]: with 5 misses a halving, both runs stall before 200 steps.
    start = kernel(3, 3, channels, channels)
    result = cs.descend(start, 5, algorithm="3.2", step_size="auto", max_iter=300)
    assert result.status == "max_iter"
    assert result.objective[:200].min() > 1.001 * result.objective.min()


@pytest.mark.parametrize("start", [torch.ones(3, 3, 1, 1), torch.zeros(3, 3, 1, 1)])
def test_auto_starts_from_a_singular_matrix(start):
    # 1 + 2 cos(2 pi / 3) = 0: the matrix of ones is singular at N = 8.
    run = {
        rule: cs.descend(start, 8, algorithm="3.2", step_size=rule, max_iter=30)
        for rule in ("paper", "auto")
    }
    assert run["paper"].sigma_min[0] < 1e-12
    assert run["auto"].sigma_min.max() > 10 * run["paper"].sigma_min.max()


@pytest.mark.parametrize("algorithm", ["3.2", "3.3"])
def test_each_auto_step_starts_from_the_last_kernel_or_the_best(algorithm):
    start, size = kernel(3, 3, 1, 1), (4, 4)
    result = cs.descend(start, size, algorithm=algorithm, step_size="auto", max_iter=20)
    omega = paper.index_sets(start.shape, size)
    known, from_best = [start.numpy()], 0
    for i, step in enumerate(result.step_size):
        reached = {}
        for source in (i, int(np.argmin(result.objective[: i + 1]))):
            dense = paper.matrix(known[source], size, omega)
            there = known[source] - step * paper.gradient(algorithm, dense, omega, start.shape)
            value = paper.objective(algorithm, paper.matrix(there, size, omega))
            reached[abs(value - result.objective[i + 1])] = source, there
        error = min(reached)
        # The steps are long, and amplify rounding errors a few times each.
        assert error < 1e-3
        source, there = reached[error]
        from_best += source != i
        known.append(there)
    assert from_best > 0


def test_the_level_goes_down_twice_as_deep_while_it_is_reached():
    # From zero the objective of 3.2 is linear along the gradient: every level is reached.
    result = cs.descend(torch.zeros(3, 3, 1, 1), 5, algorithm="3.2", step_size="auto", max_iter=8)
    assert result.step_size[1:] == pytest.approx(2 * result.step_size[:-1])


def test_auto_does_not_depend_on_the_scale_of_the_kernel():
    start = kernel(3, 3, 2, 1)
    one = cs.descend(start, 4, algorithm="3.2", step_size="auto", max_iter=8)
    large = cs.descend(2.0**20 * start, 4, algorithm="3.2", step_size="auto", max_iter=8)
    assert large.objective == pytest.approx(2.0**20 * one.objective, rel=1e-9)


# --- when it ends --------------------------------------------------------------------------------


def test_convergence_test_on_the_gradient():
    start, tol = kernel(3, 3, 1, 2), 1e-3
    omega = paper.index_sets(start.shape, (5, 5))
    counts = np.array([len(entries) for entries in omega.values()]).reshape(start.shape)

    def gradient_norm(values):
        return float(np.linalg.norm(counts * values.numpy()))

    result = cs.descend(start, 5, algorithm="3.1", step_size="auto", tol=tol)
    assert result.status == "converged"
    assert result.converged
    assert gradient_norm(result.kernel) <= tol * gradient_norm(start)
    before = cs.descend(
        start, 5, algorithm="3.1", step_size="auto", tol=tol, max_iter=result.iterations - 1
    )
    assert before.status == "max_iter"
    assert gradient_norm(before.kernel) > tol * gradient_norm(start)


def test_convergence_test_on_the_gap_of_3_3():
    start = 0.3 * torch.eye(2, dtype=torch.float64).reshape(1, 1, 2, 2)
    result = cs.descend(start, 4, algorithm="3.3", step_size="auto", tol=1e-5)
    assert result.status == "converged"
    assert result.gap[-1] <= 1e-5 * 32 / 2 < result.gap[-2]
    assert result.sigma_min[-1] == pytest.approx(1, abs=1e-2)


def test_the_floor_is_where_all_singular_values_are_one():
    identity = torch.zeros(3, 3, 2, 2)
    identity[1, 1] = torch.eye(2)
    result = cs.descend(identity, 5, algorithm="3.3")
    assert result.status == "converged"
    assert result.iterations == 0
    assert result.objective == pytest.approx([-25.0], abs=1e-10)
    assert result.gap == pytest.approx([0.0], abs=1e-10)


@each_layer
@pytest.mark.parametrize("step_size", [1e-2, "auto"])
def test_gap_is_what_is_left_to_the_floor_and_never_negative(shape, size, step_size):
    result = cs.descend(kernel(*shape), size, algorithm="3.3", step_size=step_size, max_iter=12)
    floor = -0.5 * math.prod(size) * min(shape[-2:])
    assert result.gap == pytest.approx(result.objective - floor)
    assert (result.gap >= 0).all()


def test_a_level_that_closes_in_without_being_reached_is_a_stall():
    start, tol = kernel(3, 3, 1, 1), 0.3
    result = cs.descend(start, 5, algorithm="3.2", step_size="auto", max_iter=400, tol=tol)
    assert result.status == "stalled"
    assert not result.converged
    assert 0 < result.iterations < 400
    assert len(result.step_size) == result.iterations == len(result.objective) - 1
    finer = cs.descend(start, 5, algorithm="3.2", step_size="auto", max_iter=400, tol=tol / 8)
    assert finer.iterations > result.iterations
    assert finer.objective.min() <= result.objective.min()


# --- callback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", ["paper", "auto"])
def test_callback_gets_each_step_and_its_objective(step_size):
    seen = []
    result = cs.descend(
        kernel(3, 3, 1, 1),
        5,
        step_size=step_size,
        max_iter=12,
        callback=lambda iteration, objective: seen.append((iteration, objective)),
    )
    assert seen == list(zip(range(1, 13), result.objective[1:].tolist(), strict=True))


def test_what_a_callback_raises_reaches_the_caller():
    class MyError(Exception):
        pass

    error = MyError("of my own")

    def callback(iteration, objective):
        if iteration == 2:
            raise error

    with pytest.raises(MyError, match="of my own") as raised:
        cs.descend(kernel(3, 3, 1, 1), 5, callback=callback)
    assert raised.value is error
    assert raised.value.__cause__ is None


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "3.4"}, r"algorithm to be one of \('3.1', '3.2', '3.3'\), got '3.4'"),
        ({"algorithm": 3.1}, r"algorithm to be one of .*, got 3.1"),
        ({"step_size": "fast"}, "step_size to be a positive number, 'paper' or 'auto', got 'fast'"),
        ({"step_size": True}, "a positive number, 'paper' or 'auto', got True"),
        ({"step_size": None}, "a positive number, 'paper' or 'auto', got None"),
        ({"step_size": 1j}, "a positive number, 'paper' or 'auto', got 1j"),
        ({"step_size": 0}, "a positive, finite step_size, got 0"),
        ({"step_size": -1e-3}, "a positive, finite step_size, got -0.001"),
        ({"step_size": math.nan}, "a positive, finite step_size, got nan"),
        ({"step_size": math.inf}, "a positive, finite step_size, got inf"),
        ({"max_iter": -1}, "max_iter to be an integer of at least 0, got -1"),
        ({"max_iter": 2.0}, "max_iter to be an integer of at least 0, got 2.0"),
        ({"max_iter": True}, "max_iter to be an integer of at least 0, got True"),
        ({"tol": -1e-9}, "tol to be a finite number of at least 0, got -1e-09"),
        ({"tol": math.nan}, "tol to be a finite number of at least 0, got nan"),
        ({"tol": math.inf}, "tol to be a finite number of at least 0, got inf"),
        ({"tol": True}, "tol to be a finite number of at least 0, got True"),
        ({"tol": "small"}, "tol to be a finite number of at least 0, got 'small'"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        cs.descend(kernel(3, 3, 1, 1), 5, **options)


@pytest.mark.parametrize(
    ("start", "size", "message"),
    [
        (np.zeros((3, 3, 1, 1)), 5, r"a kernel of shape \(\*taps, g, h\) .*, got ndarray"),
        (torch.zeros(3, 3), 5, r"a kernel of shape \(\*taps, g, h\) .*, got \(3, 3\)"),
        (torch.zeros(2, 2, 2, 2, 1, 1), 5, "with 1 to 3 axes of taps, got"),
        (torch.zeros(3, 3, 0, 1), 5, "a weight with entries"),
        (torch.zeros(3, 3, 1, 1, dtype=torch.int64), 5, "a real floating type, got torch.int64"),
        (torch.full((3, 3, 1, 1), math.nan), 5, "a finite weight, got NaN or Inf"),
        (torch.full((3, 3, 1, 1), math.inf), 5, "a finite weight, got NaN or Inf"),
        (torch.zeros(3, 3, 1, 1), 0, "integers >= 1 for input_size"),
        (torch.zeros(3, 3, 1, 1), (5, 5, 5), "an input_size of 2 integers"),
        (torch.zeros(3, 3, 1, 1), 5.0, "input_size"),
    ],
)
def test_kernels_and_sizes_that_cannot_be(start, size, message):
    with pytest.raises(ValueError, match=message):
        cs.descend(start, size)


def test_numbers_of_numpy_are_numbers():
    result = cs.descend(
        kernel(3, 3, 1, 1), 5, step_size=np.float32(0.5), max_iter=np.int64(2), tol=np.float64(0)
    )
    assert result.step_size.tolist() == [0.5, 0.5]


def test_a_step_that_is_too_long_is_said():
    with pytest.raises(FloatingPointError, match=r"after a step of 1\.000e\+200; use a shorter"):
        cs.descend(kernel(3, 3, 1, 1), 5, algorithm="3.1", step_size=1e200)
