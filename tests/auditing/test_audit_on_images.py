"""An audit that also measures signals and gradients on images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import convspectra as cs

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(depth: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(12 if i else 3, 12, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 5))


def prepared() -> nn.Sequential:
    model = network()
    cs.prepare(model, X)
    return model


def test_what_was_measured_stands_beside_the_layers(tmp_path: Path) -> None:
    model = prepared()
    report = cs.audit(model, X[:1], images=X)
    flow = cs.gradient_flow(model, X)
    assert report.flow is not None
    assert (report.flow.verdict, report.flow.sentences) == (flow.verdict, flow.sentences)
    measured = [(layer.name, layer.relative) for layer in flow.layers]
    assert [(layer.name, layer.gradient) for layer in report.layers] == measured
    assert all(sentence in str(report) for sentence in flow.sentences)
    assert "gradient  " in str(report).splitlines()[0]
    report.to_html(tmp_path / "audit.html")
    assert "gradient flow on images" in (tmp_path / "audit.html").read_text().lower()
    report.to_json(tmp_path / "audit.json")
    assert cs.AuditReport.from_json(tmp_path / "audit.json") == report


def test_a_measured_disease_is_the_first_alarm() -> None:
    report = cs.audit(network(16), X[:1], images=X)
    first = report.findings[0]
    assert report.flow is not None
    assert (first.kind, first.alarm, first.layers) == ("gradient flow", True, (report.flow.begins,))
    assert first.advice == report.flow.sentences[2]
    assert not any(finding.kind == "gradient vanishes" for finding in report.findings)
    others = report.judged_for("lipschitz")
    assert others.flow == report.flow
    assert not any(finding.kind == "gradient flow" for finding in others.findings)


def test_a_healthy_network_raises_no_alarm_about_gradients() -> None:
    report = cs.audit(prepared(), X[:1], images=X)
    assert report.flow is not None
    assert report.flow.verdict == "healthy"
    assert not [finding for finding in report.findings if finding.alarm]


def test_without_images_there_is_nothing_measured() -> None:
    report = cs.audit(network(2), X[:1])
    assert report.flow is None
    assert {layer.gradient for layer in report.layers} == {None}
    assert "gradient  " not in str(report).splitlines()[0]


def test_one_image_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least two"):
        cs.audit(network(2), X[:1], images=X[:1])
