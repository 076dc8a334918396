"""The directive ``public-api``: autodoc for every public name of a module, from its ``__all__``."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx


def names(module: ModuleType) -> dict[str, str]:
    """The public names that are no modules, and the autodoc directive for each.

    Without an ``__all__`` those are the functions and classes that the module defines.
    """
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    found = {}
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if inspect.isclass(value):
            exception = issubclass(value, BaseException)
            found[name] = "autoexception" if exception else "autoclass"
        elif inspect.isroutine(value):
            found[name] = "autofunction"
        else:
            found[name] = "autodata"
    return found


class PublicApi(Directive):
    """Describe a module and all its public names; a missing optional package is a sentence."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes that autodoc makes."""
        (where,) = self.arguments
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            text = f"{where} is not described here: {error}"
            return [nodes.paragraph("", text)]
        summary = (module.__doc__ or "").partition("\n\n")[0].splitlines()
        lines = [f".. py:module:: {where}", "", *map(escaped, summary), ""]
        for name, directive in names(module).items():
            lines += [f".. {directive}:: {where}.{name}"]
            lines += ["   :members:", ""] if directive == "autoclass" else [""]
        container = nodes.Element()
        self.state.nested_parse(StringList(lines, where), self.content_offset, container)
        return container.children


def escaped(line: str) -> str:
    """A line in which * and | stand for themselves, outside of literals."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


def escape_formulas(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Docstrings are read in an editor: a * or | in them is a product or a norm, not markup."""
    example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[i] = escaped(line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("public-api", PublicApi)
    app.connect("autodoc-process-docstring", escape_formulas, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
