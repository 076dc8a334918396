"""The survey of architectures: rows, doors and budgets, on a small network of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import zoo
from benchmarks.zoo_networks import ARCHITECTURES, Architecture, ByKeyword


def small() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.LSTM(48, 4)
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ARCHITECTURES, "small", Architecture("torch", small, (2, 4, 4)))
    return "small"


def test_a_row_counts_layers_and_says_what_is_passed_over(known: str) -> None:
    row = zoo.surveyed(known, 60.0)
    assert (row["layers"], row["padded outside"], row["no padding of a layer"]) == (1, 1, 0)
    assert row["passed over"] == "1: a recurrence is not a linear map of its input"
    assert (row["audited"], row["not enclosed"]) == ("all", 0)


def test_a_spent_budget_is_told(known: str) -> None:
    assert zoo.surveyed(known, 1e-9)["audited"] == "0 of 1"


def test_without_a_budget_nothing_is_audited(known: str) -> None:
    assert zoo.row(known, 0.0, None, 60.0, 1)["layers"] == "1"
    assert set(zoo.row(known, 0.0, None, 60.0, 1)) == set(zoo.LISTED)


def first_two() -> nn.Module:
    return small()[:2]


DOORS = ["module", "TorchScript", "torch.export", "ONNX", "checkpoint"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_layer(door: str) -> None:
    (named,) = Architecture("torch", first_two, (2, 4, 4), door).operators()
    assert named.operator is not None
    assert named.operator.shape == (48, 32)


def test_an_input_by_keyword() -> None:
    class Named(nn.Module):
        def forward(self, *, values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"answer": 2 * values}

    assert torch.equal(ByKeyword(Named(), "values")(torch.ones(3)), torch.full((3,), 2.0))


def test_what_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows come from processes of their own, which the test leaves out."""
    monkeypatch.setattr(zoo, "call", lambda *args, **options: {"failure": "not there"})
    rows = zoo.main(["--only", "resnet50", "opennsfw", "--out", str(tmp_path)])
    assert [row["passed over"] for row in rows] == ["not there", "not there"]
    assert [row["door"] for row in rows] == ["ONNX", "ONNX"]
    assert "| resnet50 |" in (tmp_path / "architectures.md").read_text()


def test_names_and_sizes_are_those_of_use() -> None:
    assert len(ARCHITECTURES) >= 30
    shapes = {network.input_shape for network in ARCHITECTURES.values()}
    assert {(3, 224, 224), (3, 512, 512), (480_000,)} <= shapes
