"""The file that an audit goes on from."""

from __future__ import annotations

import math

import pytest

from convspectra.journal import append_to_journal, read_journal
from convspectra.report.audit_record import Certified, Conditioning, LayerAudit

NUMBER = Certified(0.0, 0.0, math.inf, "dense", "none", False)
LAYER = LayerAudit(
    'conv "ü"\n1', "Conv2d", kernel=(3, 3), padding=((1, 1), (0, 2)), shape=(4, 5),
    applied=Conditioning(
        1.0, NUMBER, NUMBER, math.nan, 0.0, math.inf, None, 0.0, -math.inf, 0.0, ""
    ),
)  # fmt: skip


def test_layers_come_back(tmp_path) -> None:
    path = tmp_path / "new" / "audit.journal"
    assert read_journal(path) == {}
    append_to_journal(path, "a", LAYER)
    append_to_journal(path, "b", LayerAudit("other", "Linear", skipped="why"))
    found = read_journal(path)
    assert list(found) == ["a", "b"]
    assert repr(found["a"]) == repr(LAYER)  # nan is not equal to itself


def test_a_line_that_was_cut_short_is_passed_over_and_then_removed(tmp_path) -> None:
    path = tmp_path / "audit.journal"
    append_to_journal(path, "a", LAYER)
    whole = path.read_bytes()
    append_to_journal(path, "b", LAYER)
    for length in range(len(whole), path.stat().st_size):
        path.write_bytes(path.read_bytes()[:length])
        assert list(read_journal(path)) == ["a"]
        append_to_journal(path, "b", LAYER)
        assert list(read_journal(path)) == ["a", "b"]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["{}", "[1]", "no JSON", '{"key": "a", "layer": {"name": "x"}}'])
def test_another_file_is_refused_with_the_line(tmp_path, line) -> None:
    path = tmp_path / "audit.journal"
    append_to_journal(path, "a", LAYER)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"journal, line 2: .*start anew"):
        read_journal(path)
