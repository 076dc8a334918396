"""Calls spread over processes."""

from __future__ import annotations

import os

import pytest

from convspectra.auditing._workers import answers


def square(number: int, device: str | None) -> tuple[int, int, str | None]:
    if number < 0:
        raise ArithmeticError(f"expected no negative number, got {number}")
    return number * number, os.getpid(), device


def test_one_worker_is_this_process_in_order() -> None:
    found = list(answers(square, [3, 1, 2], [None]))
    assert found == [(i, (n * n, os.getpid(), None)) for i, n in enumerate([3, 1, 2])]


def test_processes_have_a_device_each_and_answer_everything() -> None:
    found = dict(answers(square, list(range(6)), ["meta", "cpu"]))
    assert sorted(found) == list(range(6))
    assert [found[i][0] for i in range(6)] == [n * n for n in range(6)]
    assert os.getpid() not in {pid for _, pid, _ in found.values()}
    devices = {pid: device for _, pid, device in found.values()}
    assert set(devices.values()) <= {"meta", "cpu"}
    assert len(set(devices.values())) == len(devices)


def test_a_failure_reaches_the_caller_as_itself() -> None:
    with pytest.raises(ArithmeticError, match="expected no negative number, got -1"):
        list(answers(square, [1, -1, 2], [None, None]))


def test_nothing_to_do() -> None:
    assert list(answers(square, [], [None, None])) == []
