"""How Sphinx builds these pages: MyST Markdown, the furo theme, no network."""

import tomllib
from pathlib import Path

_workspace = tomllib.loads(Path(__file__).parent.parent.joinpath("Cargo.toml").read_text("utf-8"))

project = "dicomnode"
project_copyright = "the dicomnode authors"
version = release = _workspace["workspace"]["package"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"dicomnode {version}"
html_copy_source = False
html_show_sphinx = False
