"""The table of Lipschitz constants: its peers against dense norms, and its quick mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import convspectra as cs
from benchmarks import lipschitz


@pytest.mark.parametrize(
    ("stride", "taps", "padding"), [(1, 3, 1), (2, 4, 1), (2, 3, 1), (1, 5, 2), (3, 3, 0)]
)
def test_gram_iterations_are_a_little_above(stride: int, taps: int, padding: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, taps, taps, dtype=torch.float64)
    op = cs.ConvOperator(weight, (12, 12), stride=stride, padding=padding)
    norm = float(torch.linalg.matrix_norm(op.to_dense(), 2))
    assert norm < lipschitz.gram_zero(op) < 1.3 * norm
    around = lipschitz.circular(op).values["sigma_max"][0]
    assert around * (1 - 1e-12) <= lipschitz.gram_circular(op) < 1.1 * around


def test_gram_iteration_of_a_matrix() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = float(torch.linalg.matrix_norm(weight, 2))
    assert norm < lipschitz.gram_zero(cs.ConvOperator(weight, ())) < 1.02 * norm


def test_the_quick_table(tmp_path: Path) -> None:
    rows = lipschitz.main(["--quick", "--out", str(tmp_path)])
    for name in lipschitz.QUICK:
        own = {row.who: row for row in rows if row.layer == name}
        assert set(own) == {
            *lipschitz.PEERS,
            "ECLipsE-Fast",
            "product of exact norms",
            "convspectra",
        }
        ours = own["convspectra"]
        assert ours.lower is not None
        assert ours.upper is not None
        assert ours.lower <= ours.upper
        product = own["product of exact norms"].value
        assert product is not None
        assert ours.upper < product < 1.01 * own["Gram iteration, zero padding (2024)"].value
        # The norm of a reshaped weight is far below that of the layer.
        if "critic" in name:
            assert own["product of reshaped norms"].value < 0.5 * product
    report = json.loads((tmp_path / "lipschitz.json").read_text())
    assert len(report["rows"]) == len(rows)
    assert "| critic, spectral_norm |" in (tmp_path / "lipschitz.md").read_text()
