"""The file that an audit goes on from."""

from __future__ import annotations

import math

import pytest

from convspectra.auditing._journal import (
    append_to_journal,
    journal_files,
    read_journal,
    remove_journal,
)
from convspectra.auditing._record import Certified, Conditioning, LayerAudit

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


@pytest.mark.parametrize(("old", "new"), [("5]", "6]"), ('"Conv2d"', '"Linear"'), ('"b"', '"c"')])
def test_a_line_that_was_altered_is_refused_with_file_and_line(tmp_path, old, new) -> None:
    path = tmp_path / "audit.journal"
    append_to_journal(path, "a", LAYER)
    append_to_journal(path, "b", LAYER)
    first, second = path.read_text().splitlines()
    assert old in second
    path.write_text(f"{first}\n{second.replace(old, new)}\n")
    with pytest.raises(ValueError, match=r"audit\.journal, line 2: the line was altered"):
        read_journal(path)


def test_a_full_disk_is_named_with_the_journal(tmp_path) -> None:
    (tmp_path / "journal").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device.*journal"):
        append_to_journal(tmp_path / "journal", "a", LAYER)


@pytest.mark.parametrize("line", ["{}", "[1]", "no JSON", '{"key": "a", "layer": {"name": "x"}}'])
def test_another_file_is_refused_with_the_line(tmp_path, line) -> None:
    path = tmp_path / "audit.journal"
    append_to_journal(path, "a", LAYER)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"journal, line 2: .*start anew"):
        read_journal(path)


def test_only_the_files_of_a_journal_are_removed(tmp_path) -> None:
    journal = tmp_path / "audit"
    own = [journal, tmp_path / "audit.0", tmp_path / "audit.12"]
    others = [tmp_path / name for name in ("audit.py", "audit.json", "audit.1.pt", "audits")]
    for path in own:
        append_to_journal(path, "a", LAYER)
    for path in others:
        path.write_text("mine")
    assert journal_files(journal) == own
    remove_journal(journal)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert journal_files(tmp_path / "none" / "audit") == []


@pytest.mark.parametrize(
    "content", [b"mine\n", b"mine", b"{}\n", b"[1]\n", b"\xff\n", b"PK\x03\x04"]
)
@pytest.mark.parametrize("name", ["audit", "audit.3"])
def test_another_file_is_neither_read_nor_removed(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    append_to_journal(tmp_path / "audit.1", "a", LAYER)
    with pytest.raises(ValueError, match=rf"{name}, which is neither"):
        remove_journal(tmp_path / "audit")
    assert (tmp_path / name).read_bytes() == content
    assert (tmp_path / "audit.1").exists()


def test_a_journal_that_was_cut_in_its_first_line_is_one(tmp_path) -> None:
    path = tmp_path / "audit"
    append_to_journal(path, "a", LAYER)
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole)):
        path.write_bytes(whole[:length])
        assert journal_files(path) == [path]


def test_a_folder_is_no_journal(tmp_path) -> None:
    with pytest.raises(ValueError, match="which is neither"):
        journal_files(tmp_path)
