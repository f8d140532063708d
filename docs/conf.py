"""How Sphinx builds these pages; `tools/docs.sh` calls it."""

from pytorch_quant import __version__

project = "pytorch_quant"
author = "The pytorch_quant authors"
project_copyright = "The pytorch_quant authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# Links such as guide.md#descriptors, as GitHub makes them.
myst_heading_anchors = 3

# Docstrings write code between single backticks, as Markdown does. With this role what is a name of
# the package becomes a link, and all else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Without a network nothing can be said of names of other packages; ours have to resolve.
nitpick_ignore_regex = [
    ("py:obj", r"[\s\S]*"),
    ("py:.*", r"(?!pytorch_quant\.).*"),
]

html_theme = "furo"
html_title = f"pytorch_quant {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
