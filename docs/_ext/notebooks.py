"""Notebooks: run in this process, written with what they show, and read by Sphinx as pages.

``python docs/_ext/notebooks.py --write`` runs all of ``docs/notebooks`` and keeps what they show.
No kernel is needed, which would bring thirty packages: a cell is run as Python, and the value of
its last line is shown.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
DPI = 80
"""Of the pictures that are kept. A choice: they are read on a screen."""


def execute(notebook: dict[str, Any]) -> None:
    """Run the cells one after the other, and put what each shows into its ``outputs``."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        cell["outputs"] = _outputs("".join(cell["source"]), number, namespace)


def _outputs(source: str, number: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree, name = ast.parse(source), f"<cell {number}>"
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        found.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        kind = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        found.append(kind | {"data": _shown(value)})
    return found


def _shown(value: Any) -> dict[str, Any]:
    """A value by kind of content, as a notebook has it."""
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(
            picture, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None}
        )
        data = base64.b64encode(picture.getvalue()).decode()
        return {"image/png": data, "text/plain": "a figure"}
    shown = {"text/plain": repr(value)}
    if hasattr(value, "_repr_html_"):
        shown["text/html"] = value._repr_html_()
    return shown


def page(notebook: dict[str, Any], name: str) -> str:
    """The notebook in MyST Markdown: the code, and what it shows below."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output) for output in cell["outputs"]]
    parts.append(f"This page is the notebook `docs/notebooks/{name}`.")
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text'])}```"
    data = output["data"]
    if "image/png" in data:
        source = f"data:image/png;base64,{data['image/png']}"
        return f'```{{raw}} html\n<img alt="What the cell shows" src="{source}">\n```'
    if "text/html" in data:
        return f"```{{raw}} html\n{data['text/html']}\n```"
    return f"```text\n{data['text/plain']}\n```"


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    from myst_parser.parsers.sphinx_ import MystParser

    class NotebookParser(MystParser):
        """Reads a notebook as the page that it makes."""

        supported = ("notebook",)

        def parse(self, inputstring: str, document: Any) -> None:
            """Called by Sphinx with the text of the file."""
            name = Path(document["source"]).name
            super().parse(page(json.loads(inputstring), name), document)

    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True}


def main() -> None:
    """Run all notebooks, and with ``--write`` keep what they show."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        execute(notebook)
        if write:
            text = json.dumps(notebook, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
