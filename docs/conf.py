"""Configure Sphinx for the documentation.

    sphinx-build -W --keep-going -b html docs docs/_build

The same versions of the tools write the same bytes on each machine: nothing is computed or timed. Figures and
tables lie in `stored` (`figures.py` makes them), and the outputs of notebooks within them (`execute.py`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sepconvert

project = "sepconvert"
version = release = sepconvert.__version__
html_title = f"sepconvert {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "notebooks"]
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
