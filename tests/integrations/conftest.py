"""The fake regularizer in the place of the real one."""

import pytest
from helpers.fakes import FakeRegularizer

from convspectra.integrations import _shared as shared


@pytest.fixture
def made(monkeypatch):
    """Every regularizer that an integration makes in this test; all are fakes."""
    monkeypatch.setattr(FakeRegularizer, "made", [], raising=False)
    monkeypatch.setattr(shared, "SpectralRegularizer", FakeRegularizer)
    return FakeRegularizer.made
