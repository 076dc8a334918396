"""The pages: what they show runs, and what is public is on them."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import convspectra
from convspectra import penalties, testing

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
DEPRECATED = [
    "ignore:.torch.jit:DeprecationWarning",
    "ignore:You are using the legacy TorchScript:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
]


def run(page: Path, namespace: dict[str, Any]) -> int:
    """Run the Python blocks of a page in turn, but those that need what is not installed.

    Returns how many there are.
    """
    text, runner = page.read_text(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        needed = (block["needs"] or "").replace(",", " ").split()
        if any(importlib.util.find_spec(package) is None for package in needed):
            continue
        line = text.count("\n", 0, block.start("code"))
        if block["code"].startswith(">>>"):
            parser = doctest.DocTestParser()
            test = parser.get_doctest(block["code"], namespace, page.name, str(page), line)
            out: list[str] = []
            runner.run(test, out=out.append, clear_globs=False)
            namespace.update(test.globs)
            assert not out, "".join(out)
        else:
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
    return len(blocks)


@pytest.mark.filterwarnings(*DEPRECATED)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(page, {"__name__": "__main__"}) == page.read_text().count("```python\n")


def test_a_wrong_answer_on_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\n>>> x + 1\n3\n```\n")
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        run(page, {})
    page.write_text("<!-- needs: no_such_package -->\n```python\nraise ValueError\n```\n")
    assert run(page, {}) == 1


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text()) if "://" not in t]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.fixture
def public_api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extension that lists the names."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    yield importlib.import_module("public_api")
    sys.modules.pop("public_api")


def test_every_public_module_is_on_the_page_of_the_api(public_api: Any) -> None:
    page = (DOCS / "api.rst").read_text()
    described = set(re.findall(r"^\.\. public-api:: (\S+)$", page, re.M))
    inner = [name for name in convspectra.__all__ if inspect.ismodule(getattr(convspectra, name))]
    assert "penalties" in inner
    here = Path(inspect.getfile(convspectra)).parent / "integrations"
    optional = {p.stem for p in here.glob("*.py")} - {"__init__", "_shared"}
    expected = {"convspectra", "convspectra.testing"}
    expected |= {f"convspectra.{name}" for name in inner}
    expected |= {f"convspectra.integrations.{name}" for name in optional}
    assert described == expected


def test_every_public_name_is_described(public_api: Any) -> None:
    found = public_api.names(convspectra)
    inner = {name for name in convspectra.__all__ if inspect.ismodule(getattr(convspectra, name))}
    assert set(found) == set(convspectra.__all__) - inner
    assert set(public_api.names(penalties)) == set(penalties.__all__)
    assert {"naive_dense", "assert_adjoint"} <= set(public_api.names(testing))
    assert found["ConvOperator"] == "autoclass"
    assert found["ConvergenceError"] == "autoexception"
    assert found["svds"] == "autofunction"
