"""How Sphinx builds the pages: ``make docs``, offline, warnings are errors."""

import sys
from pathlib import Path

import convspectra

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "convspectra"
copyright = "the convspectra authors"
version = release = convspectra.__version__

extensions = [
    "mathml",
    "myst_parser",
    "notebooks",
    "public_api",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = f"convspectra {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# A name in single backticks is a link where there is such a name.
default_role = "py:obj"
smartquotes = False  # M' is a transpose
autodoc_typehints = "none"  # the docstrings give types, shapes and units
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True  # else an attribute is described once by its class and once by itself
napoleon_use_rtype = False
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
