"""How the weight of a penalty changes over the steps of training."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convspectra.training._schedule import Schedule

steps = st.integers(0, 10**6)
schedules = st.builds(
    Schedule,
    warmup=st.integers(0, 1000),
    half_life=st.none() | st.integers(1, 10**4),
    stop=st.none() | st.integers(0, 10**5),
)


@given(steps)
def test_the_default_is_constant(step):
    assert Schedule()(step) == 1.0


def test_warmup():
    assert [Schedule(warmup=4)(step) for step in range(7)] == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [Schedule(warmup=1)(step) for step in range(3)] == [1, 1, 1]


def test_half_life():
    schedule = Schedule(half_life=3)
    assert [schedule(step) for step in (0, 3, 6, 30)] == [1.0, 0.5, 0.25, 2.0**-10]
    assert schedule(1) == pytest.approx(2 ** (-1 / 3))
    assert schedule(10**9) == 0.0


def test_decay_begins_after_the_warmup():
    schedule = Schedule(warmup=2, half_life=5)
    assert [schedule(step) for step in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.5, 0.25]


def test_stop():
    schedule = Schedule(stop=3)
    assert [schedule(step) for step in range(6)] == [1, 1, 1, 0, 0, 0]
    assert Schedule(stop=0)(0) == 0.0
    assert [Schedule(warmup=4, stop=2)(step) for step in range(4)] == [0.25, 0.5, 0, 0]


def test_every():
    schedule = Schedule(every=3)
    assert [schedule(step) for step in range(7)] == [3, 0, 0, 3, 0, 0, 3]
    assert [Schedule(every=2, stop=4)(step) for step in range(7)] == [2, 0, 2, 0, 0, 0, 0]
    assert [Schedule(every=2, warmup=4)(step) for step in range(5)] == [0.5, 0, 1.5, 0, 2]


@given(schedules, st.integers(1, 100), steps)
def test_a_factor_every_so_often_is_as_much_larger(schedule, every, step):
    lazy = dataclasses.replace(schedule, every=every)
    assert lazy(step) == (0.0 if step % every else pytest.approx(every * schedule(step)))


@given(schedules, steps)
def test_a_factor_is_between_0_and_1_and_follows_from_its_parts(schedule, step):
    factor = schedule(step)
    assert 0.0 <= factor <= 1.0
    if schedule.stop is not None and step >= schedule.stop:
        assert factor == 0.0
    elif step < schedule.warmup:
        assert factor == pytest.approx((step + 1) / schedule.warmup)
        assert schedule(step + 1) >= factor or step + 1 == schedule.stop
    else:
        assert schedule(step + 1) <= factor
        if schedule.half_life is None:
            assert factor == 1.0
        elif schedule.stop is None:
            assert schedule(step + schedule.half_life) == pytest.approx(
                0.5 * factor, rel=1e-9, abs=1e-300
            )


@given(schedules)
def test_schedules_are_values(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError, match="warmup"):
        schedule.warmup = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "expected warmup to be an integer >= 0, got -1"),
        ({"warmup": None}, "expected warmup to be an integer >= 0, got None"),
        ({"warmup": 2.0}, r"expected warmup to be an integer >= 0, got 2\.0"),
        ({"warmup": True}, "expected warmup to be an integer >= 0, got True"),
        ({"half_life": 0}, "expected half_life to be an integer >= 1, got 0"),
        ({"half_life": "10"}, "expected half_life to be an integer >= 1, got '10'"),
        ({"stop": -5}, "expected stop to be an integer >= 0, got -5"),
        ({"every": 0}, "expected every to be an integer >= 1, got 0"),
        ({"every": None}, "expected every to be an integer >= 1, got None"),
        ({"stop": False}, "expected stop to be an integer >= 0, got False"),
    ],
)
def test_bad_numbers_of_steps(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
