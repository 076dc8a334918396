"""The benchmarks on tiny layers: that what they compare with is right, and that they run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import convspectra as cs
from benchmarks import layers, peers, report, spectra, truth
from benchmarks.random_layers import random_layer
from common import measure
from convspectra.testing import naive_dense


def conv(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64, **options)


def ends(matrix: Tensor) -> dict[str, list[float]]:
    values = torch.linalg.svdvals(matrix.detach())
    return {"sigma_max": [float(values[0])], "sigma_min": [float(values[-1])]}


def assert_same(got: dict[str, list[float]], expected: dict[str, list[float]], rtol: float) -> None:
    assert got.keys() <= expected.keys()
    for what, values in got.items():
        np.testing.assert_allclose(values, expected[what], rtol=rtol)


def test_resnet50_is_torchvisions() -> None:
    found = layers.resnet50()
    assert len(found) == 53
    assert sum(layer.weights for layer in found) == 23_454_912
    last = found[-1]
    assert last.name.endswith("layer4.2.conv3")
    assert last.operator().output_shape == (2048, 7, 7)
    strided = [layer for layer in found if layer.options["stride"] == 2]
    assert len(strided) == 7


def test_weights_come_from_the_seed_and_the_name() -> None:
    layer = layers.SMALL_SQUARE[0]
    assert torch.equal(layer.operator(3).weight, layer.operator(3).weight)
    assert not torch.equal(layer.operator(3).weight, layer.operator(4).weight)


def test_smooth_kernels_have_their_amplitudes() -> None:
    smooth = layers.random_layer(2, 3, 4, 8, smooth=2.0, padding=1)
    plain = replace(smooth, smooth=0.0)
    assert smooth.name == "2->3 4x4 at 8x8, smooth"
    amplitudes = (torch.fft.fft2(layer.operator().weight) for layer in (smooth, plain))
    ratio = torch.div(*amplitudes)
    cycles = [0, 0.25, 0.5, 0.25]
    expected = [[np.exp(-2 * (a + b)) for b in cycles] for a in cycles]
    np.testing.assert_allclose(ratio, np.broadcast_to(expected, ratio.shape), rtol=1e-10)


def test_the_border_of_the_table_has_the_orders_known() -> None:
    assert [layers.border_order(layer) for layer in layers.SQUARE] == [4160, 7232, 7680]


@pytest.mark.parametrize("name", [n for n in peers.PEERS if n not in ("PRIMME LM", "PRIMME SM")])
def test_peers_that_are_exact_agree_with_the_naive_svd(name: str) -> None:
    module = conv(padding=1)
    op = cs.ConvOperator.from_module(module, (6, 5))
    peer = peers.PEERS[name]
    answer = peer.function(op, **peer.options).values
    expected = ends(naive_dense(module, (2, 6, 5)))
    if name in ("circular FFT", "reshaped weight"):
        assert abs(answer["sigma_min"][0] / expected["sigma_min"][0] - 1) > 0.01
    else:
        assert_same(answer, expected, 1e-5 if "float32" in name else 1e-9)


@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_circular_is_exact_for_circular_padding(stride: Any, groups: int) -> None:
    torch.manual_seed(0)
    options = {"stride": stride, "groups": groups, "padding": (2, 1), "dilation": (2, 1)}
    module = nn.Conv2d(2, 4, 3, padding_mode="circular", dtype=torch.float64, **options)
    op = cs.ConvOperator.from_module(module, (6, 4))
    assert_same(peers.circular(op).values, ends(naive_dense(module, (2, 6, 4))), 1e-10)


def test_circular_wraps_a_kernel_longer_than_the_input() -> None:
    torch.manual_seed(0)
    module = nn.Conv1d(2, 2, 5, padding=2, padding_mode="circular", dtype=torch.float64)
    op = cs.ConvOperator.from_module(module, 3)
    assert_same(peers.circular(op).values, ends(naive_dense(module, (2, 3))), 1e-10)


@pytest.mark.parametrize("transposed", [False, True])
def test_reshaped_weight_is_what_spectral_norm_divides_by(transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(2, 3, 3, dtype=torch.float64)
    op = cs.ConvOperator.from_module(module, (4, 4))
    weight = module.weight.detach().clone()
    normalized = spectral_norm(module, n_power_iterations=200).weight.detach()
    norm = torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(normalized)
    assert peers.reshaped_weight(op).values["sigma_max"] == pytest.approx([float(norm)], rel=1e-9)


def test_a_peer_that_fails_is_an_answer_with_the_reason() -> None:
    op = layers.SMALL_SQUARE[0].operator()
    with pytest.raises(ValueError, match="max_bytes=1,000"):
        peers.dense_svd(op, max_bytes=1000)
    asked = {"layer": layers.SMALL_SQUARE[0].name, "peer": "no such peer"}
    answer = measure.call("benchmarks.peers:run", asked, fresh=False)
    assert answer == {"failure": "KeyError: 'no such peer'"}


def test_a_fresh_process_answers_and_is_stopped_in_time() -> None:
    asked = {"layer": layers.SMALL_SQUARE[0].name, "peer": "dense SVD"}
    answer = measure.call("benchmarks.peers:run", asked, seconds=300, threads=1)
    here = peers.run(**asked)
    assert_same(answer["values"], here["values"], 1e-12)
    assert answer["peak_bytes"] > 2**20
    late = measure.call("benchmarks.peers:run", asked, seconds=0.01, threads=1)
    assert late == {"failure": "not done in 0.01 s"}


def test_spectra_gives_rows_for_ours_and_every_peer(tmp_path: Path) -> None:
    run = spectra.Run(spectra.QUICK, 60.0, 1, 0, tmp_path)
    run.one_layer(layers.SMALL_STRIDED[0])
    ours = [row for row in run.rows if row.who == report.OURS]
    smallest, largest, bound = ours
    whats = ["sigma_min", "sigma_max", "upper bound on sigma_max"]
    assert [row.what for row in ours] == whats
    assert all(row.lower <= row.value <= row.upper for row in (smallest, largest))
    assert largest.value <= bound.value
    assert {row.who for row in run.rows} == {report.OURS, *peers.PEERS}
    assert all(row.value is not None or row.note for row in run.rows)
    text, data = report.write_report(tmp_path / "spectra", "Title", {"machine": "m"}, run.rows)
    lines = text.read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == len(run.rows) + 2
    assert len(json.loads(data.read_text())["rows"]) == len(run.rows)
    assert report.plot(tmp_path / "spectra.svg", run.rows, {}).stat().st_size > 0


def test_truth_finds_nothing_wrong_with_auto(tmp_path: Path) -> None:
    truth.main(["--layers", "5", "--workers", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "truth.json").read_text())
    auto = [row for row in found["ways"] if row["way"] in ("LM auto", "SM auto")]
    assert [row["converged"] + row["not converged"] for row in auto] == [5, 5]
    assert all(row["error"] <= 1e-8 and row["missed"] == 0 for row in auto)


def test_truth_sees_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "extended_svdvals", lambda a: 1.0001 * np.linalg.svd(a)[1])
    monkeypatch.setattr(truth, "DOUBTFUL_ERROR", -1.0)
    found = [outcome for outcome in truth.outcomes(1, seed=0) if outcome.compared]
    assert len(found) >= 4
    assert all(outcome.failed and outcome.missed for outcome in found)


def test_extended_precision_resolves_small_singular_values() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    matrix = left * np.geomspace(1, 1e-6, 8) @ right.T
    rounded = truth.extended_svdvals(matrix)
    np.testing.assert_allclose(rounded, np.geomspace(1, 1e-6, 8), rtol=1e-9)
    np.testing.assert_allclose(rounded, truth.extended_svdvals(matrix.T), rtol=1e-12)


def test_random_layers_depend_on_seed_and_index_only() -> None:
    first, again = random_layer(3, 7), random_layer(3, 7)
    assert repr(first) == repr(again)
    assert torch.equal(first.weight, again.weight)
    shapes = {random_layer(0, i).options.get("padding_mode") for i in range(60)}
    assert shapes >= {"zeros", "circular", "reflect", "replicate", None}
