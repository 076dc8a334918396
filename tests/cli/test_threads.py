"""How the command's threads wait, and what it says where they lose by it."""

import os
import subprocess
import sys

import pytest

from convspectra.cli._threads import WAIT_VARIABLES, advice, wait_passively, watched

BUSY = {"wall": 110.0, "first": 19.0, "whole": 36.0, "threads": 2}
"""A measured run with spinning threads beside five other jobs."""


def test_spinning_on_a_busy_machine_is_told_with_the_variable_to_set():
    said = advice(**BUSY, environ={})
    assert said is not None
    assert "2 threads had 36 s of processor time in 110 s" in said
    assert said.endswith("set OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE")


def test_a_policy_at_hand_is_not_advised():
    said = advice(**BUSY, environ={"OMP_WAIT_POLICY": "passive"})
    assert said is not None
    assert said.endswith("set OMP_NUM_THREADS=1")


@pytest.mark.parametrize(
    "other",
    [
        {"threads": 1},
        {"wall": 19.5},  # the first thread ran all the time: threads that spin take nothing away
        {"whole": 22.0},  # the others slept
        {"wall": 11.0, "first": 1.9, "whole": 3.6},  # little to save
    ],
)
def test_nothing_is_said_without_a_loss(other):
    assert advice(**(BUSY | other), environ={}) is None


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    return kept | variables


@pytest.mark.parametrize("name", [None, *WAIT_VARIABLES])
def test_the_policy_is_set_before_torch_is_loaded_unless_the_user_has_one(name, tmp_path):
    code = """
import builtins, os, sys
from convspectra.cli import main
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("policy at the door:", os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Finder())
main(["audit", "none.onnx", "--input", "1x2x2"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**({name: "ACTIVE"} if name else {})),
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = {None: "PASSIVE", "OMP_WAIT_POLICY": "ACTIVE"}.get(name)
    assert f"policy at the door: {expected}" in done.stdout


def test_nothing_is_set_where_torch_is_loaded():
    import torch  # noqa: F401

    environ: dict[str, str] = {}
    wait_passively(environ)
    assert environ == {}


def test_a_run_that_lost_nothing_says_nothing():
    said: list[str] = []
    with watched(said.append):
        pass
    assert said == []
