"""What a notebook shows of a result: short, whole, and nothing of a name taken as markup."""

import dataclasses
import io
from collections import OrderedDict

import torch
from rich.console import Console
from torch import nn

import convspectra as cs
from convspectra.auditing import work_bar


def test_a_singular_value_result_is_short_and_its_table_has_the_interval():
    result = cs.svds(cs.ConvOperator(torch.ones(1, 1, 3, dtype=torch.float64), 50), 8, "LM")
    assert repr(result).startswith("SVDResult(s=[2.996, ")
    assert ", ... 8 values], method='dense', converged=True)" in repr(result)
    page = result._repr_html_()
    assert page.count("<tr>") == 9
    assert f"<td>{result.lower[0].item():.10g}</td>" in page
    lost = dataclasses.replace(result, converged=False)
    assert "not converged" in lost._repr_html_()


def test_a_density_is_short_and_its_table_has_the_bins_that_are_not_empty():
    operator = cs.ConvOperator(torch.ones(1, 1, 3, dtype=torch.float64), 50)
    density = cs.spectral_density(operator, edges=[0, 1, 3, 4])
    assert "3 bins from 0 to 4" in repr(density)
    assert density._repr_html_().count("<tr>") == 3


def test_a_regularizer_report_is_short_and_names_are_escaped():
    model = nn.Sequential(OrderedDict({"<b>": nn.Conv2d(1, 2, 3, padding=1)}))
    reg = cs.SpectralRegularizer(model, torch.zeros(1, 1, 6, 6), penalty="sigma_min")
    reg()
    report = reg.report()
    assert repr(report).startswith("RegularizerReport(step=")
    assert "1 layers, sigma_min=" in repr(report)
    page = report._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_progress_true_changes_nothing_but_the_screen():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    shown = cs.audit(model, torch.zeros(1, 1, 8, 8), progress=True)
    silent = cs.audit(model, torch.zeros(1, 1, 8, 8))
    assert [layer.applied for layer in shown.layers] == [layer.applied for layer in silent.layers]


def test_the_bar_has_the_part_of_the_work_and_the_layer():
    screen = io.StringIO()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with work_bar(Console(file=screen, force_terminal=True, width=100)) as bar:
        cs.audit(model, torch.zeros(1, 1, 8, 8), progress=bar)
    assert "100%" in screen.getvalue()
