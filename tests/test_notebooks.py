"""The notebooks run, and the pages made of them show what they show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import notebooks

    yield notebooks
    sys.modules.pop("notebooks", None)


def notebook(*cells: str) -> dict:
    return {"cells": [{"cell_type": "code", "source": [cell], "outputs": []} for cell in cells]}


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_as_much_as_is_kept(runner, path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    kept = json.loads(path.read_text())
    run = json.loads(path.read_text())
    runner.execute(run)
    for before, after in zip(kept["cells"], run["cells"], strict=True):
        kinds = [
            [sorted(output.get("data", "text")) for output in cell.get("outputs", [])]
            for cell in (before, after)
        ]
        assert kinds[0] == kinds[1], "".join(before["source"])


def test_a_cell_shows_what_it_prints_and_the_value_of_its_last_line(runner):
    cells = notebook("x = 2\nprint('a')\nx + 1", "x", "x = None\nx", "y = 1")
    runner.execute(cells)
    first, second, third, fourth = (cell["outputs"] for cell in cells["cells"])
    assert first[0]["text"] == ["a\n"]
    assert first[1]["data"] == {"text/plain": "3"}
    assert second[0]["data"] == {"text/plain": "2"}
    assert third == fourth == []


def test_an_error_in_a_cell_names_the_cell(runner):
    with pytest.raises(ZeroDivisionError) as failed:
        runner.execute(notebook("x = 1", "x / 0"))
    assert failed.traceback[-1].path == "<cell 2>" or "<cell 2>" in str(failed.traceback[-1])


def test_a_page_has_code_texts_tables_and_pictures(runner):
    kept = json.loads(NOTEBOOKS[-1].read_text())
    page = runner.page(kept, "x.ipynb")
    assert page.startswith("# ")
    assert page.count("```python") == sum(c["cell_type"] == "code" for c in kept["cells"])
    assert "```{raw} html\n<table>" in page
    pictured = runner.page(json.loads(NOTEBOOKS[0].read_text()), "x.ipynb")
    assert 'src="data:image/png;base64,' in pictured
