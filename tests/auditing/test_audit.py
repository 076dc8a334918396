"""`cs.audit`: the numbers of every layer against dense matrices, and what is kept of them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.strategies import layers
from hypothesis import given, settings
from torch import nn

import convspectra as cs
from convspectra.auditing import _layer_audit as layer_audit
from convspectra.auditing._audit import audit_operators
from convspectra.auditing._layer_audit import AuditOptions, audit_layer
from convspectra.models._named_operators import NamedOperator
from convspectra.spectra import _rank as ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 5),
    ).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2.0)
        model[1].running_var.uniform_(0.1, 3.0)
    return model.eval()


EXAMPLE = torch.zeros(1, 3, 6, 6, dtype=torch.float64)


def dense(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix by applying the module, less its value at 0, to unit vectors."""
    count = math.prod(shape)
    units = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    with torch.no_grad():
        return (module(units) - module(torch.zeros_like(units[:1]))).flatten(1).T


def test_every_layer_agrees_with_its_dense_matrix() -> None:
    model = network()
    report = cs.audit(model, EXAMPLE)
    assert [layer.name for layer in report.layers] == ["0", "3", "4", "6"]
    assert report.circumstances.complete
    for layer in report.layers:
        matrix = dense(model[int(layer.name)], layer.input_shape)
        s = torch.linalg.svdvals(matrix)
        numbers = layer.applied
        assert layer.shape == tuple(matrix.shape)
        assert numbers.frobenius_norm == pytest.approx(float(torch.linalg.matrix_norm(matrix)))
        for certified, true in ((numbers.sigma_max, s[0]), (numbers.sigma_min, s[-1])):
            assert certified.value == pytest.approx(float(true), rel=1e-5)
            assert certified.lower <= float(true) * (1 + 1e-12)
            assert certified.upper >= float(true) * (1 - 1e-12)
        assert numbers.condition == pytest.approx(float(s[0] / s[-1]), rel=1e-5)
        assert numbers.condition_lower <= float(s[0] / s[-1]) <= numbers.condition_upper
        assert numbers.rank == torch.linalg.matrix_rank(matrix)
        assert numbers.log_growth == pytest.approx(float(s.log().mean()), abs=1e-6)


def test_a_batch_normalization_is_folded_in() -> None:
    model = network()
    report = cs.audit(model, EXAMPLE)
    s = torch.linalg.svdvals(dense(model[:2], (3, 6, 6)))
    folded = report.layers[0].folded
    assert report.layers[0].batch_norm == "1"
    assert folded.sigma_max.value == pytest.approx(float(s[0]), rel=1e-5)
    assert folded.sigma_min.value == pytest.approx(float(s[-1]), rel=1e-5)
    assert folded.log_growth == pytest.approx(float(s.log().mean()), abs=1e-6)
    assert all(layer.folded is None for layer in report.layers[1:])
    assert all(layer.folded is None for layer in cs.audit(model, EXAMPLE, fold=False).layers)


@settings(max_examples=60)
@given(layers())
def test_any_layer_agrees_with_its_dense_matrix(layer) -> None:
    op = layer.operator()
    scale = torch.linspace(0.5, 2.0, op.output_shape[0], dtype=torch.float64)
    found = audit_layer(NamedOperator("layer", "Conv", op, scale, "bn"), None, AuditOptions())
    assert found.skipped == ""
    matrix = layer.dense().detach()
    by_row = scale.repeat_interleave(math.prod(op.output_shape[1:]))
    for numbers, m in ((found.applied, matrix), (found.folded, by_row[:, None] * matrix)):
        s = torch.linalg.svdvals(m.detach().double())
        largest = float(s[0])
        assert numbers.sigma_max.value == pytest.approx(largest, rel=1e-5, abs=1e-12)
        assert numbers.sigma_min.value == pytest.approx(float(s[-1]), rel=1e-4, abs=1e-9 * largest)
        if float(s[-1]) > 1e-6 * largest:
            assert numbers.rank == len(s)
            assert numbers.log_growth == pytest.approx(float(s.log().mean()), abs=1e-5)


def test_a_well_conditioned_layer_has_its_exact_growth() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).double()
    torch.manual_seed(0)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.dirac_(conv.weight.data[:, :, 1:2, 1:2])
    report = cs.audit(nn.Sequential(conv), torch.zeros(1, 64, 24, 24, dtype=torch.float64))
    numbers = report.layers[0].applied
    assert numbers.sigma_min.method == "lanczos"
    assert (numbers.log_growth_method, numbers.log_growth_error) == ("capacitance", 0.0)
    density = cs.spectral_density(cs.ConvOperator.from_module(conv, (24, 24)), method="quadrature")
    assert abs(numbers.log_growth - density.mean_log) <= 3 * density.mean_log_error < 0.03


def test_a_singular_layer_says_so() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    with torch.no_grad():
        conv.weight[2] = conv.weight[1]
    report = cs.audit(nn.Sequential(conv), torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    numbers = report.layers[0].applied
    assert numbers.rank == 50
    assert numbers.condition == math.inf
    assert numbers.log_growth == -math.inf
    (found,) = (finding for finding in report.findings if finding.kind == "singular")
    assert "25 directions lost in each" in found.text
    assert not found.alarm
    assert report.judged_for("invertible").findings[0].kind == "singular"


def test_the_rank_of_a_large_layer_is_counted_in_its_blocks() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 16, 1).double()
    with torch.no_grad():
        conv.weight[3:5] = conv.weight[:2] + conv.weight[1:3]
    example = torch.zeros(1, 24, 60, 60, dtype=torch.float64)
    layer = cs.audit(nn.Sequential(conv), example).layers[0]
    assert layer.applied.rank == 14 * 60 * 60
    assert layer.circular.sigma_max == layer.applied.sigma_max.value


@pytest.mark.parametrize("at_most", [4, 2, 1])
def test_the_rank_of_a_large_layer_that_lacks_a_few_directions(
    monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    """``y_i = x_i + a x_{i-1}`` has a singular value of a^-80 for an a above 1, and no other."""
    # As for a layer whose dense matrix takes minutes, at a size that has a reference.
    monkeypatch.setattr(ranks, "EXACT_WORK", 0)
    monkeypatch.setattr(ranks, "LOST_AT_MOST", at_most)
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    before = torch.tensor([3.0, 0.3, 2.0, 0.2], dtype=torch.float64)
    op = cs.ConvOperator(torch.stack([mixing * before, mixing], 2), (80,), padding=[(1, 0)])
    assert torch.linalg.matrix_rank(op.to_dense()) == 4 * 80 - 2
    numbers = layer_audit.conditioning(op, AuditOptions())
    assert numbers.condition == math.inf
    assert numbers.rank == 4 * 80 - 2


def test_a_zero_weight() -> None:
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    numbers = cs.audit(linear, torch.zeros(1, 4)).layers[0].applied
    assert (numbers.rank, numbers.sigma_max.value, numbers.log_growth) == (0, 0.0, -math.inf)


def test_circular_padding_is_shown_beside_the_truth() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    circular.load_state_dict(conv.state_dict())
    found = cs.audit(conv, torch.zeros(1, 4, 8, 8)).layers[0]
    s = torch.linalg.svdvals(dense(circular.double(), (4, 8, 8)))
    assert found.circular.sigma_max == pytest.approx(float(s[0]), rel=1e-3)
    assert found.circular.sigma_min == pytest.approx(float(s[-1]), rel=1e-3)
    assert found.circular.log_growth == pytest.approx(float(s.log().mean()), abs=1e-6)
    assert found.circular.sigma_min > 2 * found.applied.sigma_min.value


def test_the_spectrum_on_demand() -> None:
    model = network()
    assert cs.audit(model, EXAMPLE).layers[1].spectrum is None
    for layer in cs.audit(model, EXAMPLE, spectrum=True).layers:
        spectrum = layer.spectrum
        s = torch.linalg.svdvals(dense(model[int(layer.name)], layer.input_shape))
        counts = torch.histogram(s, torch.tensor(spectrum.edges, dtype=torch.float64)).hist
        assert spectrum.fractions == pytest.approx((counts / len(s)).tolist(), abs=2.1 / len(s))
        assert spectrum.method == "exact"
        if layer.name == "3":
            assert sum(spectrum.circular) == pytest.approx(1.0)


def test_what_cannot_be_audited_is_listed_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    model.add_module("unused", nn.Conv2d(2, 2, 1))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    report = cs.audit(model, torch.zeros(1, 2, 4, 4))
    reasons = {layer.name: layer.skipped for layer in report.layers}
    assert reasons["0"] == ""
    assert "finite" in reasons["2"]
    assert "reach" in reasons["unused"]
    skipped = [name for f in report.findings if f.kind == "skipped" for name in f.layers]
    assert sorted(skipped) == ["2", "unused"]


def test_a_matrix_over_the_limit_goes_another_way_or_is_skipped() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).double()
    found = cs.audit(conv, torch.zeros(1, 8, 16, 16, dtype=torch.float64), max_bytes=1000).layers[0]
    assert found.skipped or not found.applied.sigma_min.method.startswith("capacitance")


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected .* to have layers with weights, got none"):
        cs.audit(nn.ReLU(), torch.zeros(1, 2))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected workers to be a positive integer"):
        cs.audit(nn.Linear(2, 2), torch.zeros(1, 2), workers=0)
    with pytest.raises(ValueError, match="expected a band"):
        cs.audit(nn.Linear(2, 2), torch.zeros(1, 2), band=(2.0, 1.0))


def test_outputs_round_trip(tmp_path: Path) -> None:
    report = cs.audit(network(), EXAMPLE, spectrum=True)
    report.to_json(tmp_path / "a.json")
    assert cs.AuditReport.from_json(tmp_path / "a.json") == report
    report.to_csv(tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5
    report.to_html(tmp_path / "a.html")
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert "&lt;table" in report._repr_html_()
    assert "sigma_min" in str(report)
    data = json.loads((tmp_path / "a.json").read_text())
    data["layers"][0]["applied"]["sigma_max"].pop("lower")
    (tmp_path / "b.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"b\.json: report\.layers\[0\].applied.sigma_max: "):
        cs.AuditReport.from_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"expected version 1 of convspectra\.audit, got 2"):
        cs.AuditReport.from_dict(data | {"version": 2})
    with pytest.raises(ValueError, match="expected an audit report"):
        cs.AuditReport.from_dict([])


def test_progress_comes_with_every_layer_and_ends_at_one() -> None:
    seen: list[tuple[str, float]] = []
    cs.audit(network(), EXAMPLE, progress=lambda layer, part: seen.append((layer.name, part)))
    assert sorted(name for name, _ in seen) == ["0", "3", "4", "6"]
    parts = [part for _, part in seen]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1.0)


def without_times(report: cs.AuditReport) -> list[object]:
    return [vars(layer) | {"seconds": 0.0} for layer in report.layers]


def test_workers_give_the_same_report() -> None:
    alone = cs.audit(network(), EXAMPLE)
    assert without_times(cs.audit(network(), EXAMPLE, workers=2)) == without_times(alone)
    devices = cs.audit(network(), EXAMPLE, devices=("cpu", "cpu"))
    assert without_times(devices) == without_times(alone)


def test_layers_of_the_journal_are_taken_unless_something_changed(tmp_path: Path) -> None:
    journal = tmp_path / "audit.journal"
    model = network()
    first = cs.audit(model, EXAMPLE, journal=journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == 4
    again = cs.audit(model, EXAMPLE, journal=journal)
    assert again.layers == first.layers  # seconds too: nothing was computed
    assert journal.read_text().splitlines() == lines
    journal.write_text("".join(line + "\n" for line in lines[:2]))
    assert without_times(cs.audit(model, EXAMPLE, journal=journal)) == without_times(first)
    with torch.no_grad():
        model[3].weight.mul_(2)
    changed = cs.audit(model, EXAMPLE, journal=journal)
    norms = [r.layers[1].applied.sigma_max.value for r in (first, changed)]
    assert norms[1] == pytest.approx(2 * norms[0])
    assert len(journal.read_text().splitlines()) == 5


def test_a_shared_weight_is_computed_once_and_listed_twice(tmp_path: Path) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    other = nn.Conv2d(2, 2, 3, padding=1)
    other.weight = conv.weight
    journal = tmp_path / "audit.journal"
    report = cs.audit(nn.Sequential(conv, other), torch.zeros(1, 2, 5, 5), journal=journal)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert report.layers[0].applied == report.layers[1].applied
    assert len(journal.read_text().splitlines()) == 1


def test_ctrl_c_keeps_what_is_done() -> None:
    def interrupt(layer: object, part: float) -> None:
        raise KeyboardInterrupt

    report = cs.audit(network(), EXAMPLE, progress=interrupt)
    assert len(report.layers) == 1
    assert not report.circumstances.complete


SLOW = """
import sys, torch, convspectra as cs
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(400)))
cs.audit(model, torch.zeros(1, 4, 9, 9), journal=sys.argv[1])
"""


def test_a_killed_audit_loses_at_most_the_layer_in_hand(tmp_path: Path) -> None:
    journal = tmp_path / "audit.journal"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(journal)])
    try:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_text().count("\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(400)))
    done = journal.read_text().count("\n")
    assert 3 <= done < 400
    report = cs.audit(model, torch.zeros(1, 4, 9, 9), journal=journal)
    assert journal.read_text().count("\n") == 400
    assert len(report.layers) == 400


def test_operators_can_be_audited_by_themselves() -> None:
    op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    report = audit_operators(
        [NamedOperator("second difference", "Conv1d", op)], "model.onnx", "1x50"
    )
    assert report.layers[0].applied.condition == pytest.approx(1053, rel=1e-3)
    assert report.circumstances.model == "model.onnx"
