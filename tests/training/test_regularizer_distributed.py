"""SpectralRegularizer on several processes against one process."""

from __future__ import annotations

import multiprocessing
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.ranks import NAMES, STEPS, everything, net, regularizer, resumed, weights, worker
from helpers.training import close

from convspectra.models._rank_division import divide_among_ranks

ALL = {"a@5x6": "a", "b@5x6": "b", "b@5x4": "b", "c@5x4": "c", "d@5x4": "d"}


def keys(include: str) -> list[str]:
    """The layers whose names are in a string."""
    return [key for key, name in ALL.items() if name in include]


# --- the runs to compare --------------------------------------------------------------------------


class Runs(NamedTuple):
    """The same things done by one process and by several."""

    include: str
    one: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[(2, "abcd"), (3, "ac")], ids=["2 of 5", "3 of 2"])
def runs(request, tmp_path_factory) -> Runs:
    """So many ranks with so many layers: in the second case one rank has none."""
    size, include = request.param
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    assert not dist.is_initialized()
    one = everything(include)
    torch.save({key: one["conditioning"][key] for key in ("weights", "state")}, folder / "one.pt")
    # The ranks are forked from a process that has imported torch once, and nothing else.
    multiprocessing.set_forkserver_preload(["torch", "convspectra"])
    mp.start_processes(worker, (size, include, folder), size, start_method="forkserver")
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
    return Runs(include, one, ranks)


def assert_records(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, other in zip(got, expected, strict=True):
        for key, value in other.items():
            number = isinstance(value, float)
            assert mine[key] == (pytest.approx(value, rel=1e-6) if number else value), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_process(runs, name):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found[name]["values"] == pytest.approx(one[name]["values"], rel=1e-6)
        assert found[name]["values"] == ranks[0][name]["values"], "the same on every rank"
        assert found[name]["counts"] == list(range(STEPS))
        for got, expected in zip(found[name]["gradients"], one[name]["gradients"], strict=True):
            assert close(got, expected, 1e-6)
        assert close(found[name]["weights"], one[name]["weights"], 1e-6)
        assert found[name]["next"] == pytest.approx(one[name]["next"], rel=1e-6)


def test_the_penalty_is_a_part_of_these_gradients(runs):
    """Else nothing above would notice a gradient that the ranks lose."""
    one = runs.one
    for first, second in (("conditioning", "frobenius"), ("conditioning", "stein")):
        assert not close(one[first]["gradients"][3], one[second]["gradients"][3], 1e-3)


def test_accumulated_gradients_are_reduced_once(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        got, expected = found["accumulated"], one["conditioning"]
        assert got["counts"] == list(range(STEPS)), "on ranks without a layer too"
        assert got["values"] == pytest.approx(expected["values"], rel=1e-6)
        assert close(got["gradients"][-1], expected["gradients"][-1], 1e-6)
        assert close(got["weights"], expected["weights"], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_report_and_state_are_complete_on_every_rank(runs, name):
    include, one, ranks = runs
    for found in ranks:
        assert_records(found[name]["records"], one[name]["records"])
        assert_records(found[name]["next records"], one[name]["next records"])
        assert found[name]["penalty"] == pytest.approx(one[name]["penalty"], rel=1e-6)
        state = found[name]["state"]
        assert list(state["layers"]) == keys(include)
        assert state["step"] == STEPS - 1
        for key, expected in one[name]["state"]["layers"].items():
            if name != "conditioning":
                assert state["layers"][key] is None or "vectors" not in state["layers"][key]
                continue
            assert torch.equal(
                state["layers"][key]["vectors"],
                ranks[0][name]["state"]["layers"][key]["vectors"],
            )
            assert state["layers"][key]["vectors"].shape == expected["vectors"].shape


def test_the_layers_are_divided_by_cost(runs):
    include, one, ranks = runs
    owners = ranks[0]["conditioning"]["owner"]
    assert all(found["conditioning"]["owner"] == owners for found in ranks)
    assert one["conditioning"]["owner"] == (0,) * len(keys(include))
    # Costs: a, b and c 1080 = 36 * 30 = 54 * 20, b again 36 * 20, d 81 * 20.
    assert owners == ((1, 1, 1, 0, 0) if len(ranks) == 2 else (0, 1))


def test_every_layer_is_computed_on_one_rank_only(runs):
    include, one, ranks = runs
    parts = [found["computed"] for found in ranks]
    assert sorted(layer for part in parts for layer in part) == one["computed"]
    assert len(one["computed"]) == len(keys(include))
    assert sum(bool(part) for part in parts) == 2


def test_steps_and_added_gradients_are_the_same_on_every_rank(runs):
    include, one, ranks = runs
    for found in ranks:
        got = found["apart"]
        for key in ("weights", "gradients"):
            assert all(map(torch.equal, got[key], ranks[0]["apart"][key]))
            assert close(got[key], one["apart"][key], 1e-6)
        assert got["values"] == pytest.approx(one["apart"]["values"], rel=1e-6)
    assert not all(map(torch.equal, one["apart"]["weights"], weights(net())))
    assert len(one["apart"]["gradients"]) == len(include)


def test_a_state_of_one_process_goes_on_with_more(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found["resumed"]["value"] == pytest.approx(one["conditioning"]["next"], rel=1e-6)
        assert found["resumed"]["step"] == STEPS
        assert_records(found["resumed"]["records"], one["conditioning"]["next records"])


def test_a_state_of_several_processes_goes_on_with_one(runs, tmp_path):
    expected = runs.ranks[-1]["conditioning"]
    torch.save({key: expected[key] for key in ("weights", "state")}, tmp_path / "state.pt")
    got = resumed(runs.include, tmp_path / "state.pt")
    assert got["value"] == pytest.approx(expected["next"], rel=1e-6)
    assert got["step"] == STEPS
    assert_records(got["records"], expected["next records"])


def test_a_layer_left_out_is_known_on_every_rank(runs):
    include, one, ranks = runs
    for found in ranks:
        got = found["skipping"]
        assert got["value"] == pytest.approx(one["skipping"]["value"], rel=1e-6)
        assert_records(got["records"], one["skipping"]["records"])
        assert got["skipped"] == {key: int(key.startswith("c")) for key in keys(include)}


def test_ranks_with_nothing_to_train_keep_step(runs):
    one, ranks = runs.one, runs.ranks
    for found in ranks:
        assert found["frozen"]["count"] == one["frozen"]["count"] == 2
        assert found["frozen"]["values"] == pytest.approx(one["frozen"]["values"], rel=1e-6)
        assert close(found["frozen"]["weights"], one["frozen"]["weights"], 1e-6)
    assert len(set(one["frozen"]["values"])) == 3


def test_without_a_group_every_rank_has_everything(runs):
    include, one, ranks = runs
    for found in ranks:
        assert found["alone"]["owner"] == (0,) * len(keys(include))
        assert found["alone"]["value"] == pytest.approx(one["conditioning"]["values"][0], rel=1e-9)
        assert all(found["alone"]["state"]["layers"].values())


# --- division without processes -------------------------------------------------------------------


def test_one_process_needs_no_group():
    division = divide_among_ranks([3.0, 1.0], "default")
    assert (division.group, division.size, division.own) == (None, 1, [0, 1])


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="expected process_group to be 'default', None or a proc"):
        regularizer(net(), process_group="gloo")
