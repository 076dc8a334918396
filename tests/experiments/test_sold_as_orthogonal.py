"""Orthogonal layers as they are applied: claims, dense matrices, and what is written."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convspectra.testing import naive_dense
from experiments.sold_as_orthogonal import __main__ as command
from experiments.sold_as_orthogonal import layers, table

pytest.importorskip("matplotlib")

OTHERS = ("geotorch", "orthogonium", "deel-torchlip")
"""Packages whose rows say where they are not installed."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[table.Row], Path]:
    out = tmp_path_factory.mktemp("sold")
    return command.main(["--quick", "--out", str(out)]), out


def dense_values(weight: torch.Tensor, size: int, padding_mode: str) -> torch.Tensor:
    h, g, taps, _ = weight.shape
    conv = torch.nn.Conv2d(
        g, h, taps, padding=taps // 2, bias=False, dtype=torch.float64, padding_mode=padding_mode
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    return torch.linalg.svdvals(naive_dense(conv, (g, size, size)).detach())


@pytest.mark.parametrize("candidate", layers.CANDIDATES, ids=lambda candidate: candidate.name)
def test_rows_are_those_of_dense_matrices(candidate: layers.Candidate) -> None:
    row = command.audit(candidate, 4, 5, seed=1)
    if row.note:
        pytest.skip(row.note)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weight = candidate.build(4, 5)
    s = dense_values(weight, 5, "zeros")
    assert row.converged
    for found, lower, upper, exact in (
        (row.sigma_max, row.sigma_max_lower, row.sigma_max_upper, float(s[0])),
        (row.sigma_min, row.sigma_min_lower, row.sigma_min_upper, float(s[-1])),
    ):
        assert found == pytest.approx(exact, rel=1e-6)
        assert lower <= exact * (1 + 1e-12)
        assert exact <= upper * (1 + 1e-12)
    wrapped = dense_values(weight, 5, "circular")
    assert row.circular_max == pytest.approx(float(wrapped[0]), rel=1e-9)
    assert row.circular_min == pytest.approx(float(wrapped[-1]), rel=1e-9)


def test_a_kernel_larger_than_the_image_is_wrapped() -> None:
    weight = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0)).double()
    found = layers.circular(weight, 5).sort().values
    identity = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    padded = identity.repeat(1, 1, 3, 3)[:, :, 2:13, 2:13]
    dense = torch.nn.functional.conv2d(padded, weight).flatten(1)
    torch.testing.assert_close(found, torch.linalg.svdvals(dense).sort().values)


def test_claims_are_kept_and_say_little(quick: tuple[list[table.Row], Path]) -> None:
    rows = [row for row in quick[0] if not row.note]
    ours = {c.name for c in layers.CANDIDATES if not c.name.startswith(OTHERS)}
    assert len(ours) == 7
    assert {row.layer for row in rows} >= ours
    tolerances = {candidate.name: candidate.tolerance for candidate in layers.CANDIDATES}
    assert len(quick[0]) == 2 * 3 * len(layers.CANDIDATES)
    for row in rows:
        if not math.isnan(row.claimed_max):
            assert row.claimed_max == pytest.approx(1, abs=tolerances[row.layer])
            assert row.claimed_min == pytest.approx(1, abs=tolerances[row.layer])
    conditions = {
        name: [row.condition for row in rows if row.layer == name]
        for name in {row.layer for row in rows}
    }
    assert max(conditions["delta-orthogonal"]) == pytest.approx(1)
    assert max(conditions["cs.precondition"]) <= 2
    assert min(conditions["nn.init.orthogonal_"]) > 100
    assert min(conditions["block orthogonal (BCOP)"]) > 3


def test_page_csv_and_figure_are_written(quick: tuple[list[table.Row], Path]) -> None:
    rows, out = quick
    text = (out / "sold_as_orthogonal.md").read_text()
    assert f"Made by `python -m experiments.sold_as_orthogonal --quick --out {out}` on " in text
    assert text.count("| nn.init.orthogonal_ |") == 2
    assert (out / "sold_as_orthogonal.png").stat().st_size > 0
    with (out / "sold_as_orthogonal.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(line["sigma_min"]) for line in read if not line["note"]] == [
        row.sigma_min for row in rows if not row.note
    ]


def test_a_layer_that_was_measured_at_one_size_stands_beside_its_own_name() -> None:
    row = table.Row("a", "claim", 2, 5, 0, sigma_max=1.0, sigma_min=0.5, sigma_min_lower=0.5)
    rows = [row, replace(row, layer="b"), replace(row, size=9, layer="b")]
    panels = table.draw(rows).axes
    heights = {round(float(line.get_ydata()[0])) for line in panels[1].lines[:-1]}
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b"]
    assert heights == {-1}  # the last line marks the value 1


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geotorch", None)
    (candidate,) = (c for c in layers.CANDIDATES if c.name == "geotorch.orthogonal")
    row = command.audit(candidate, 2, 5, seed=0)
    assert row.note == "geotorch is not installed"
    assert "| geotorch is not installed |" in table.page([row], "machine", "command")


def test_the_page_says_what_is_singular_and_what_did_not_converge() -> None:
    row = table.Row("layer", "claim", 2, 5, 0, sigma_max=1.0, sigma_min=1e-20, sigma_min_lower=0.0)
    rows = [row, replace(row, seed=1, sigma_max=2.0, converged=True)]
    text = table.page(rows, "machine", "command")
    assert "| inf, 1 not converged |" in text
    assert "| 1 to 2 [" in text
