"""The parts of the benchmark of `GradientFlowMonitor`, on a small network."""

from __future__ import annotations

import pytest

from benchmarks import flow_monitor


def test_recorded_and_other_steps_are_told_apart() -> None:
    numbers = flow_monitor.measured(flow_monitor.demo_network, (2, 1, 8, 8), 20)
    assert list(numbers) == ["step, ms", "recorded step", "other step", "every 10 steps"]
    assert numbers["step, ms"] > 0
    mixed = 0.1 * numbers["recorded step"] + 0.9 * numbers["other step"]
    assert numbers["every 10 steps"] == pytest.approx(mixed)
