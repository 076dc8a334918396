"""The figures of the README are those of the tables that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.growing_tables import read
from experiments.any_depth.__main__ import COLUMNS, best

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = ROOT / "docs" / "benchmarks"
SQUARE = "64->64 3x3 at 32x32"


def measured(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def spectra(layer: str, what: str, who: str) -> dict[str, Any]:
    rows = measured("spectra")["rows"]
    wanted = [layer, what, who]
    (row,) = (row for row in rows if [row["layer"], row["what"], row["who"]] == wanted)
    return row


def fact(beginning: str) -> str:
    """The line of the table of facts that begins so."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {beginning}"))
    return line


def percent(arm: str, depth: int, activation: str) -> str:
    """Test accuracy, the mean over the seeds, at the best learning rate that was tried."""
    chosen = (
        line
        for line in best(read(ROOT / "docs/experiments/any_depth/any_depth.csv", COLUMNS))
        if (line["arm"], line["depth"], line["activation"]) == (arm, depth, activation)
    )
    return f"{max(float(line['test accuracy'].rstrip('%')) for line in chosen):.0f}%"


def test_random_layers() -> None:
    truth = measured("truth")
    ways = truth["ways"]
    assert len(ways) > 2
    assert [way["missed"] for way in ways] == [0] * len(ways)
    worst = max(way["error"] for way in ways if way["way"].endswith("auto"))
    line = fact(f"{truth['layers']:,} random layers")
    assert f"worst relative error {worst:.1e}" in line


def test_lipschitz_constant_of_a_critic() -> None:
    rows = measured("lipschitz")["rows"]
    by = {row["who"]: row for row in rows if row["layer"] == "critic, spectral_norm"}
    line = fact("[Lipschitz constant](docs/network.md) of a critic")
    ours = by["convspectra"]
    assert f"between {ours['lower']:.3g} and {ours['upper']:.3g} " in line
    assert f"reshaped norms: {by['product of reshaped norms']['value']:.3g};" in line
    assert f"ECLipsE-Fast: at most {by['ECLipsE-Fast']['value']:.3g})" in line


def test_smallest_singular_value() -> None:
    line = fact("smallest singular value of a layer 64 -> 64")
    own, circular = (spectra(SQUARE, "sigma_min", who) for who in ("convspectra", "circular FFT"))
    assert f" {own['seconds']:.2f} s" in line
    assert f"{circular['value'] / own['value']:.0f} times too large" in line
    limit = measured("spectra")["time limit of a peer"]
    for who in ("scipy svds SM", "PRIMME SM"):
        peer = spectra(SQUARE, "sigma_min", who)
        assert peer["value"] is None
        assert limit in line
        assert peer["note"] == f"not done in {limit}"


def test_resnet_50() -> None:
    row = spectra("ResNet-50, 53 convolutions", "all", "convspectra")
    expected = f"{row['seconds']:.0f} s, {row['peak_bytes'] / 2**30:.1f} GiB"
    assert expected in fact("both ends of all 53 convolutions")


def test_plain_networks() -> None:
    line = fact("plain ReLU network of 100 layers")
    for arm, words in (
        ("prepare", "{} after `prepare`"),
        ("isometry", "{} from PyTorch's initialization with isometry steps"),
        ("He", "He {}"),
        ("batch normalization", "batch normalization {}"),
        ("default", "PyTorch {} (chance)"),
    ):
        assert words.format(percent(arm, 100, "relu")) in line
    deeper = fact("[the same](docs/experiments/any_depth/any_depth.md), 1,000 layers")
    assert f"{percent('isometry', 1000, 'relu')} with isometry steps" in deeper
    assert f"{percent('prepare', 10_000, 'relu')} after `prepare`" in deeper


def test_cost_in_training() -> None:
    rows = measured("training")["groups"]["conditioning"]["rows"]
    (ratio,) = (row["ratio"] for row in rows if row["arm"] == "conditioning")
    assert f"adds {100 * (ratio - 1):.1f}%" in fact("the penalty `conditioning`")
