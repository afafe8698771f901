"""Sphinx: ``make docs`` builds this folder into ``docs/_build/html``, with warnings as errors."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path(__file__).parent.resolve()
# Pages of the site that show a file from outside this folder.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/FEATURE_SPACE.md": "evidence_feature_space.md",
    "benchmarks/RESULTS.md": "evidence_step_time.md",
}
LINK = re.compile(r"\]\(([^)\s:#]+\.md)(#[^)]*)?\)")
sys.path.insert(0, str(FOLDER))

from pictures import draw  # noqa: E402

import mmpareto_optim  # noqa: E402

project = "mmpareto-optim"
author = "The mmpareto-optim authors"
copyright = f"2026, {author}"
version = release = mmpareto_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

html_theme = "furo"
pygments_style = "friendly"  # the lines of a diff in red and green
pygments_dark_style = "github-dark"
html_title = f"mmpareto-optim {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def led_inside(text: str, origin: Path, page: str) -> str:
    """Let links to files outside this folder, right in a checkout, be right on the site too.

    ``origin`` is the file that the text is from, ``page`` the one that shows it.
    """
    here = (FOLDER / page).parent

    def inside(link: re.Match[str]) -> str:
        target = (origin.parent / link[1]).resolve()
        shown = SHOWN.get(target.relative_to(FOLDER.parent).as_posix())
        if shown or target.is_relative_to(FOLDER):
            return f"]({os.path.relpath(FOLDER / shown if shown else target, here)})"
        return f"](path:{os.path.relpath(target, here)})"

    return LINK.sub(inside, text)


def read_page(_: Sphinx, page: str, source: list[str]) -> None:
    """Handler of ``source-read``."""
    source[0] = led_inside(source[0], FOLDER / page, page)


def read_included(_: Sphinx, path: Path, page: str, source: list[str]) -> None:
    """Handler of ``include-read``; the path is relative to this folder."""
    source[0] = led_inside(source[0], FOLDER / path, page)


def setup(app: Sphinx) -> None:
    """Draw the pictures with the library itself, so that they cannot differ from what it does."""
    app.connect("builder-inited", lambda _: draw(FOLDER / "_pictures"))
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
