"""Configure Sphinx for the documentation.

    sphinx-build -W --keep-going -b html docs docs/_build

Figures and tables are made first, by the code that they describe (`figures.py`).
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import figures

import sepconvert

project = "sepconvert"
version = release = sepconvert.__version__
html_title = f"sepconvert {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["words.css"]

myst_enable_extensions = ["attrs_inline"]  # image classes for light and dark themes
myst_heading_anchors = 3

default_role = "code"  # docstrings mark code as `name`
smartquotes = False  # smart quotes turn -- into a dash
maximum_signature_line_length = 80
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Make the included figures and tables before the pages are read."""
    app.connect("builder-inited", lambda _: figures.make(HERE / "_generated"))
