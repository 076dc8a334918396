"""The table of an audit in a terminal: readable at every width, and nothing in it is obeyed."""

import dataclasses
import io

import pytest
from helpers.made_up_audit import CIRCUMSTANCES, layer, small_audit
from rich.console import Console

from convspectra.auditing._report import report_of
from convspectra.cli._main import main
from convspectra.cli._printing import print_report, print_table, say

LONG = [
    dataclasses.replace(entry, name=f"backbone.encoder.blocks.{i}.{entry.name}")
    for i, entry in enumerate(small_audit())
]
ROWS = [{"name": "conv", "sigma_max": "1.5", "kind": "Conv2d"}]


def console(width):
    return Console(width=width, file=io.StringIO(), color_system=None)


def printed(width, layers=LONG, **changes):
    terminal = console(width)
    circumstances = dataclasses.replace(CIRCUMSTANCES, **changes)
    print_report(report_of(circumstances, layers), terminal)
    return terminal.file.getvalue()


def table(width, rows=ROWS, **options):
    terminal = console(width)
    print_table(terminal, rows, **options)
    return [line.rstrip() for line in terminal.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 110, 160, 240])
def test_names_and_numbers_are_whole(width):
    text = printed(width)
    assert all(len(line) <= width for line in text.splitlines())
    for entry in LONG:
        assert entry.name[-23:] in text
    rows = [line for line in text.splitlines() if "stage1.conv " in line]
    assert {"2.000", "~3.200e-9", "4.999e8"} <= set(rows[0].split())


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [(80, "condition", "gain"), (110, "gain", "kernel"), (160, "note", "seconds")],
)
def test_the_width_decides_on_the_columns(width, shown, left_out):
    text = printed(width)
    heading, remark = text.split("\u2500")[0], text[text.index("not shown: ") :]
    assert shown in heading
    assert left_out not in heading
    assert left_out in remark
    assert "--csv, --html or a wider" in " ".join(remark.split())


def test_a_wide_terminal_has_all():
    assert "not shown" not in printed(300)


def test_numbers_with_and_without_batch_normalization_stand_side_by_side():
    (line,) = (line for line in printed(110).splitlines() if "stem.conv" in line)
    assert {"1.800", "0.02130", "2.400", "0.03000"} <= set(line.split())


def test_columns_are_chosen_by_importance():
    least = ["name   kind", "\u2500" * 13, "conv   Conv2d"]
    assert table(16, importance=("name", "kind"))[:3] == least
    assert table(16)[2] == "conv   1.5"


def test_columns_without_entries_are_left_out():
    assert table(80, [{"name": "conv", "note": "", "rank": "-"}])[0] == "name"
    assert table(80, []) == []


def test_texts_are_wrapped_and_a_long_name_keeps_its_end():
    rows = [{"name": "a" * 20 + "." + "b" * 20, "note": "one two three four five"}]
    lines = table(50, rows, texts=("note",))
    assert lines[2].startswith("\u2026")
    assert lines[2].split()[0].endswith("b" * 20)
    assert len(lines) > 3


def test_control_characters_and_emoji_are_not_obeyed():
    text = printed(110, [layer("a\x1b[2J\nb:smile:[red]", skipped="", uses=5)])
    assert "\x1b" not in text
    assert r"a\x1b[2J\nb:smile:[red]" in text
    terminal = console(80)
    say(terminal, ":smile: \x1b[31m [bold]x")
    assert terminal.file.getvalue() == ":smile: \\x1b[31m [bold]x\n"


def test_an_interrupted_audit_is_said_to_be_incomplete(tmp_path, capsys):
    assert not printed(80).startswith("incomplete")
    assert printed(80, complete=False).startswith("incomplete: the audit was interrupted")
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    cut = dataclasses.replace(CIRCUMSTANCES, complete=False)
    report_of(CIRCUMSTANCES, LONG).to_json(paths[0])
    report_of(cut, LONG[:3]).to_json(paths[1])
    assert main(["show", paths[1]]) == 0
    assert capsys.readouterr().out.startswith("incomplete: ")
    assert main(["compare", *paths]) == 0
    shown = capsys.readouterr().out
    assert "B is incomplete: " in shown
    assert "A is incomplete: " not in shown
    assert str(report_of(cut, LONG)).count("incomplete: ") == 1


def test_a_comparison_is_written_in_full(tmp_path, capsys):
    report, written = tmp_path / "a.json", tmp_path / "new" / "c.csv"
    report_of(CIRCUMSTANCES, LONG).to_json(report)
    assert main(["compare", str(report), str(report), "--csv", str(written)]) == 0
    assert "not shown: " in capsys.readouterr().out
    lines = written.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(LONG)
    assert "folded sigma_min change" in lines[0]


def test_a_name_without_end_takes_no_time_without_end():
    """Quadratic work would take hours here."""
    rows = [{"name": f"{'a.' * 250_000}{i}", "value": "1.000"} for i in range(4)]
    lines = table(80, rows)
    assert [line.split()[0][-5:] for line in lines[2:]] == [f"a.a.{i}" for i in range(4)]
    assert max(map(len, lines)) <= 80
