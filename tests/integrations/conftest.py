"""The fake regulariser in the place of the real one."""

import pytest
from fakes import FakeRegularizer

from convspectra.integrations import shared


@pytest.fixture
def made(monkeypatch):
    """Every regulariser that an integration makes in this test; all are fakes."""
    monkeypatch.setattr(FakeRegularizer, "made", [], raising=False)
    monkeypatch.setattr(shared, "SpectralRegularizer", FakeRegularizer)
    return FakeRegularizer.made
