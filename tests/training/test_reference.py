"""When the vectors of a layer are improved."""

import pytest
import torch

from convspectra.training._followed_values import (
    CHANGE_EVERY,
    FOLLOWED_TO,
    LITTLE,
    LONGEST,
    MUCH,
    LastExact,
)


def reference(interval=4):
    return LastExact(torch.zeros(1), [0.0, 0.0], [1.0, 1.0], 3, 3, 0, interval, due=7)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(
    ("part", "interval"), [(0.0, 8), (LITTLE, 8), (0.3, 4), (MUCH, 4), (1.1 * MUCH, 2), (9.0, 2)]
)
def test_what_moves_comes_sooner_and_what_does_not_later(end, part, interval):
    moved = [0.0, 0.0]
    moved[end] = part * FOLLOWED_TO[end] * (1 + 1e-12 if part > MUCH else 1 - 1e-12)
    one = reference()
    one.take_turn(10, *moved, least=2)
    assert (one.interval, one.due) == (interval, 10 + interval)


@pytest.mark.parametrize("least", [1, 3])
def test_the_interval_stays_between_the_least_and_the_longest(least):
    one = reference(least)
    for step in range(5):
        one.take_turn(step, 0.0, 0.0, least)
    assert one.interval == LONGEST * least
    for step in range(5):
        one.take_turn(step, 1.0, 1.0, least)
    assert one.interval == least


def test_the_change_is_followed_in_turns():
    one, seen = reference(), []
    for step in range(4):
        seen.append(one.follows_change)
        one.take_turn(step, 0.0, 0.0, 1)
    assert seen == [step % CHANGE_EVERY == 0 for step in range(4)]
