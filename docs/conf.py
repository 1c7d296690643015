"""Settings of the documentation: `python3 dev.py docs` builds it into build/docs."""

from __future__ import annotations

project = "r2l-nerfstudio"
author = "The r2l-nerfstudio contributors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["README_draft.md", "installation_dry_run.md"]  # the latter is included in a page
html_theme = "furo"
html_title = "r2l-nerfstudio"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
