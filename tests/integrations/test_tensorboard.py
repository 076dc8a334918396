"""A report as scalars, in a list and in the files of TensorBoard."""

import math

import pytest
import torch
from helpers.fakes import FakeReport
from torch import nn

import convspectra as cs
from convspectra.integrations._shared import scalars
from convspectra.integrations.tensorboard import write_report

REPORT = FakeReport(
    step=12,
    numbers={"penalty": 0.5, "failures": 1},
    layers=[
        {"name": "a", "input_size": (8, 8), "sigma_max": 2.0, "sigma_min": None, "age": 3},
        {"name": "b", "input_size": (4, 6), "sigma_max": math.nan, "condition": math.inf},
        {"name": "b", "input_size": (), "sigma_max": 1.0, "lost": True},
    ],
)
AGGREGATES = {"spectral/penalty": 0.5, "spectral/failures": 1.0}


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def test_aggregates_alone_by_default():
    assert scalars(REPORT) == AGGREGATES
    assert all(type(value) is float for value in scalars(REPORT).values())


def test_every_layer_on_demand_without_what_is_unknown():
    assert scalars(REPORT, per_layer=True) == AGGREGATES | {
        "spectral/a/sigma_max": 2.0,
        "spectral/a/age": 3.0,
        "spectral/b[4x6]/condition": math.inf,
        "spectral/b[]/sigma_max": 1.0,
        "spectral/b[]/lost": 1.0,
    }


def test_another_prefix():
    assert set(scalars(REPORT, prefix="")) == {"penalty", "failures"}


@pytest.mark.parametrize(("given", "at"), [(None, 12), (0, 0), (5, 5)])
def test_the_step_is_that_of_the_report_unless_given(given, at):
    writer = Writer()
    write_report(writer, REPORT, given)
    assert writer.rows == [(tag, value, at) for tag, value in AGGREGATES.items()]


def test_something_that_is_no_writer():
    with pytest.raises(ValueError, match=r"expected a writer with add_scalar, got str"):
        write_report("runs", REPORT)


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1))
    reg = cs.SpectralRegularizer(model, torch.zeros(1, 1, 8, 8), penalty="conditioning")
    reg()
    with SummaryWriter(str(tmp_path)) as writer:
        write_report(writer, reg.report(), step=3, per_layer=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    for index, size in ((0, (8, 8)), (1, (6, 6))):
        (event,) = events.Scalars(f"spectral/{index}/sigma_max")
        exact = cs.sigma_max(cs.ConvOperator.from_module(model[index], size))
        assert event.step == 3
        assert event.value == pytest.approx(float(exact), rel=1e-5)
