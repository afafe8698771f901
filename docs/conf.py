"""Sphinx: ``make docs`` builds this folder into ``docs/_build/html``, with warnings as errors."""

import os
import re
import sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

FOLDER = Path(__file__).parent.resolve()
# Pages of the site that show a file from outside this folder.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/FEATURE_SPACE.md": "evidence_feature_space.md",
    "benchmarks/MANY_LOSSES.md": "evidence_many_losses.md",
    "benchmarks/RANKS_1GBIT.md": "evidence_ranks_1gbit.md",
    "benchmarks/RANKS_UNLIMITED.md": "evidence_ranks_unlimited.md",
    "benchmarks/RESULTS.md": "evidence_step_time.md",
    "benchmarks/RULES.md": "evidence_rules.md",
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

html_math_renderer = "mathml"
html_theme = "furo"
pygments_style = "friendly"  # the lines of a diff in red and green
pygments_dark_style = "github-dark"
html_title = f"mmpareto-optim {version}"
html_static_path = ["_static", str(files("ziamath.fonts") / "STIXTwoMath-Regular.ttf")]
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


def mathml(formula: str, display: str) -> str:
    """Bars of a norm keep the size of a letter; of two, browsers would stretch but the first."""
    return convert(formula, display=display).replace(
        "<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>'
    )


def visit_inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    """Formulas are MathML, which browsers draw themselves: the pages need no network."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Draw the pictures with the library itself, so that they cannot differ from what it does."""
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_math_block, None))
    app.connect("builder-inited", lambda _: draw(FOLDER / "_pictures"))
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
