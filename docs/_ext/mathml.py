"""Formulas as MathML, by docutils: pages load no script and can be read without a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

BRACKET = re.compile(r'<mo(?P<open> class="mathopen")?>(?P<sign>[‖|⟨⟩])</mo>')


def mathml(formula: str) -> str:
    r"""A formula of LaTeX in MathML; only brackets after \left and \right grow with what is inside.

    Bars are brackets here, written \lvert and \rvert, never "divides" or "given".
    """

    def fixed(match: re.Match[str]) -> str:
        form = ""
        if match["sign"] == "|":
            form = ' form="prefix"' if match["open"] else ' form="postfix"'
        return f'<mo{form} stretchy="false">{match["sign"]}</mo>'

    return BRACKET.sub(fixed, latex2mathml.tex2mathml(formula))


def visit_inline(translator: Any, node: nodes.Element) -> None:
    """Write an inline formula."""
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_display(translator: Any, node: nodes.Element) -> None:
    """Write a formula on a line of its own."""
    formula = mathml(node.astext()).replace("<math ", '<math display="block" ', 1)
    translator.body.append(f'<div class="math">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    return {"parallel_read_safe": True}
