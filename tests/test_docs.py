"""The pages: what they show runs, and what is public is on them."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import convspectra
from convspectra import penalties, testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(inspect.getfile(convspectra)).parent
PROSE = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
PAGES = [
    ROOT / "README.md",
    DOCS / "tutorial.md",
    DOCS / "certainty.md",
    DOCS / "network.md",
    *sorted((DOCS / "howto").glob("*.md")),
]
MOST_LINES_OF_README = 100
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S
)
FOLDERS = "src|tests|docs|examples|benchmarks|common|experiments"
FILE = re.compile(rf"`((?:[\w.]+/)*\w+\.(?:py|toml|txt)|(?:{FOLDERS})/[\w./]+)`")
BRITISH = re.compile(
    r"\b\w*(?:al|ar|tor|im|metr)is(?:e[ds]?|ing|ation)\b|\b\w*(?:colour|avour|eighbour|aviour|centre)\w*",
    re.IGNORECASE,
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


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text()) if "://" not in t]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def named_files(text: str) -> list[str]:
    """The files and folders of the code that a page names in backticks."""
    found = FILE.findall(text)
    return [name for name in found if "/" in name or name.endswith(".py")]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    places = (ROOT, ROOT / "src" / "convspectra")
    named = named_files(page.read_text())
    assert [n for n in named if not any((place / n).exists() for place in places)] == []


SOURCES = sorted((ROOT / "src").rglob("*.py"))
DOTTED = re.compile(r"`convspectra((?:\.\w+)+)`")


@pytest.mark.parametrize("page", [*PROSE, *SOURCES], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    if page in SOURCES:
        named = named_files(text)
        assert [n for n in named if not any((p / n).exists() for p in (ROOT, PACKAGE))] == []
    for dotted in DOTTED.findall(text):
        folder = PACKAGE.joinpath(*dotted.split(".")[1:])
        names = public_names(folder.parent)
        assert folder.is_dir() or folder.with_suffix(".py").exists() or folder.name in names


def public_names(package: Path) -> list[str]:
    """What the door of a package exports."""
    door = package / "__init__.py"
    stub = door.with_suffix(".pyi")
    text = (stub if stub.exists() else door).read_text() if door.exists() else ""
    return re.findall(r'^    "(\w+)",$', text, re.M)


def test_files_are_found_on_a_page() -> None:
    text = "`solvers/_lanczos.py` and `matlab.py`, `tests/helpers`, not `a/b` of a formula or `x`"
    assert named_files(text) == ["solvers/_lanczos.py", "matlab.py", "tests/helpers"]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_formula_of_its_own_begins_a_paragraph(page: Path) -> None:
    # Else its dollars are paired with those of the sentences after it.
    text = re.sub(r"^\$\$\n.*?^\$\$$", "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r"^.+\n\$\$.*", text, re.M) == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_one_spelling_is_used(page: Path) -> None:
    assert BRITISH.findall(page.read_text()) == []


def test_british_spelling_is_found() -> None:
    text = (
        "Normalised, factorises, the colour of a neighbour; raise it likewise, by a rising promise"
    )
    assert BRITISH.findall(text) == ["Normalised", "factorises", "colour", "neighbour"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES_OF_README


def first_column(page: Path) -> set[str]:
    """The names in backticks in the first column of the tables of a page."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}


def is_computing_class(value: object) -> bool:
    """Whether it is a class that is made by users: not a record of results, not an exception."""
    return (
        inspect.isclass(value)
        and not dataclasses.is_dataclass(value)
        and not issubclass(value, BaseException)
    )


def test_every_function_has_its_cost_on_the_page() -> None:
    public = {name: getattr(convspectra, name) for name in convspectra.__all__}
    expected = {name for name, value in public.items() if inspect.isfunction(value)}
    expected |= {name for name, value in public.items() if is_computing_class(value)}
    expected.add("matlab.rand")
    expected |= {f"penalties.{name}" for name in penalties.__all__}
    assert {"svds", "ConvOperator", "SpectralRegularizer"} <= expected
    assert expected - first_column(DOCS / "costs.md") == set()


@pytest.mark.parametrize(
    ("which", "method", "options"),
    [
        ("LM", "dense", {}),
        ("SM", "gram", {}),
        ("LM", "lanczos", {}),
        ("SM", "lanczos", {}),
        ("LM", "davidson", {}),
        ("SM", "davidson", {}),
        ("SM", "capacitance", {}),
        ("SM", "circulant", {"padding_mode": "circular"}),
    ],
)
def test_certificates_are_on_the_page(which: str, method: str, options: dict[str, str]) -> None:
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    op = convspectra.ConvOperator(weight, (12, 12), padding=1, **options)
    result = convspectra.svds(op, 1, which, method=method)
    rows = (DOCS / "certainty.md").read_text().splitlines()
    known = [found[1] for row in rows if (found := re.match(r'\| "([^"]+)" \|', row))]
    assert [start for start in known if result.certificate.startswith(start)] != []


STEP = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.M)


def walks() -> dict[str, list[tuple[str, str]]]:
    """The steps of each walk of the tour, (file, function), by the heading of the walk."""
    sections = (DOCS / "tour.md").read_text().split("\n## ")[1:]
    return {text.splitlines()[0]: STEP.findall(text) for text in sections}


def code_name(file: str, function: str) -> tuple[str, str]:
    """The file and the name under which a profile sees a function, a method, or a class made."""
    tree: ast.AST = ast.parse((PACKAGE / file).read_text())
    for part in function.split("."):
        (tree,) = (
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part
        )
    name = "__init__" if isinstance(tree, ast.ClassDef) else function.split(".")[-1]
    return str(PACKAGE / file), name


def calls(job: Callable[[], object]) -> list[tuple[str, str]]:
    """The functions of the package that a job calls, in order of their first calls."""
    found: dict[tuple[str, str], None] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found.setdefault((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        job()
    finally:
        sys.setprofile(None)
    return [call for call in found if call[0].startswith(str(PACKAGE))]


def smallest_value() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    convspectra.svds(convspectra.ConvOperator.from_module(conv, (16, 16)), 1, "SM")


def audit_page(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    convspectra.audit(model, torch.zeros(1, 1, 8, 8)).to_html(path)


def two_steps() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    reg = convspectra.SpectralRegularizer(model, torch.zeros(1, 1, 8, 8), penalty="conditioning")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        (model(torch.ones(1, 1, 8, 8)).mean() + reg()).backward()
        optimizer.step()


def test_the_tour_walks_where_the_calls_go(tmp_path: Path) -> None:
    jobs = [smallest_value, partial(audit_page, tmp_path / "page.html"), two_steps]
    assert len(walks()) == len(jobs)
    for steps, job in zip(walks().values(), jobs, strict=True):
        expected = [code_name(*step) for step in steps]
        assert len(expected) >= 8
        called = calls(job)
        assert [step for step in expected if step not in called] == []
        assert sorted(expected, key=called.index) == expected


def test_a_weight_comes_to_its_singular_values_in_eight_files() -> None:
    files = {file for file, _ in walks()["From a weight to its smallest singular value"]}
    assert len(files) <= 8


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """What imports a module of ``docs/_ext``."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    imported: list[str] = []

    def load(name: str) -> Any:
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in imported:
        sys.modules.pop(name, None)


@pytest.fixture
def public_api(extension: Callable[[str], Any]) -> Any:
    """The extension that lists the names."""
    pytest.importorskip("sphinx")
    return extension("public_api")


def test_the_table_of_rooms_is_that_of_the_packages(extension: Callable[[str], Any]) -> None:
    table = extension("rooms").table()
    assert "`solvers/`" in table
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert table in page, "run: python docs/_ext/rooms.py --write"


def test_the_picture_of_a_layer_is_drawn_anew(extension: Callable[[str], Any]) -> None:
    drawn = extension("layer_figure").picture()
    kept = (DOCS / "figures" / "layer.svg").read_text()
    marked = re.compile(r'<rect x="[^"]*" y="[^"]*" width="7.20"[^>]*fill="#1f5fa8"')
    assert len(marked.findall(drawn)) == len(marked.findall(kept)) == 13**2  # nonzero entries of M


def test_the_blur_is_undone_better_than_by_fourier_division(
    extension: Callable[[str], Any],
) -> None:
    figure = extension("blur_figure")
    pictures = figure.pictures()
    off = {title: round(figure.error(image), 3) for title, image in pictures.items()}
    page = (DOCS / "howto" / "deblur.md").read_text()
    assert f"off by {off['solve']} a pixel" in page
    assert f"Fourier division by {off['Fourier division']}" in page
    assert off["solve"] < off["Fourier division"]


def test_formulas_are_written_without_a_script(extension: Callable[[str], Any]) -> None:
    pytest.importorskip("sphinx")
    from docutils import nodes

    mathml = extension("mathml")
    written: list[str] = []
    for visit in (mathml.visit_inline, mathml.visit_display):
        with pytest.raises(nodes.SkipNode):
            visit(SimpleNamespace(body=written), nodes.math("", r"\|M\|_F"))
    assert ["<math" in part and "<mi>M</mi>" in part for part in written] == [True, True]
    assert 'display="block"' in written[1]
    assert 'stretchy="false">‖<' in written[0]


def test_the_tasks_on_the_page_of_the_api_have_every_name() -> None:
    page = (DOCS / "api.rst").read_text()
    tasks = page[: page.index(".. public-api:: convspectra\n")]
    assert set(re.findall(r"`([A-Za-z_]+)`", tasks)) == set(convspectra.__all__)


def test_every_public_module_is_on_the_page_of_the_api(public_api: Any) -> None:
    page = (DOCS / "api.rst").read_text()
    described = set(re.findall(r"^\.\. public-api:: (\S+)$", page, re.M))
    inner = [name for name in convspectra.__all__ if inspect.ismodule(getattr(convspectra, name))]
    assert "penalties" in inner
    here = PACKAGE / "integrations"
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
