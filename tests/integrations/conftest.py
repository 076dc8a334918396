"""The fake regularizer in the place of the real one."""

import sys

import pytest
from helpers.fakes import FakeRegularizer


@pytest.fixture
def made(monkeypatch):
    """Every regularizer that an integration makes in this test; all are fakes."""
    monkeypatch.setattr(FakeRegularizer, "made", [], raising=False)
    for name in ("lightning", "transformers"):
        module = sys.modules.get(f"convspectra.integrations.{name}")  # imported by its tests
        if module is not None:
            monkeypatch.setattr(module, "SpectralRegularizer", FakeRegularizer)
    return FakeRegularizer.made
