"""Runs the tutorial and writes its outputs: into tutorial.md, tutorial.png and tutorial.ipynb.

python docs/notebook.py
"""

from __future__ import annotations

import base64
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "tutorial.md"
PICTURE, NOTEBOOK = PAGE.with_suffix(".png"), PAGE.with_suffix(".ipynb")
# Code, and what it prints if a block of text follows.
CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"^!\[.*\]\(tutorial\.png\)\n", re.MULTILINE)


def executed(page: str) -> tuple[str, bytes]:
    """The page with what its code prints, and the picture that its code makes."""
    namespace: dict[str, Any] = {"__name__": "tutorial"}

    def run(cell: re.Match[str]) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(cell[1], PAGE.name, "exec"), namespace)
        text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        return f"```python\n{cell[1]}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    page, picture = CELL.sub(run, page), io.BytesIO()
    namespace["figure"].savefig(picture, dpi=100, metadata={"Software": None})
    return page, picture.getvalue()


def notebook(page: str, picture: bytes) -> dict[str, Any]:
    """The page as a notebook, with the outputs that it holds."""
    cells: list[dict[str, Any]] = []
    end = 0
    for found in CELL.finditer(page):
        cells += [_prose(page[end : found.start()]), _code(found[1], found[2] or "", picture)]
        end = found.end()
    cells.append(_prose(page[end:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _prose(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(IMAGE.sub("", text))}


def _code(code: str, printed: str, picture: bytes) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed)})
    if "figure = " in code:
        image = {"image/png": base64.b64encode(picture).decode()}
        outputs.append({"data": image, "metadata": {}, "output_type": "display_data"})
        code += "figure\n"  # as a notebook shows it
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}}
    return cell | {"outputs": outputs, "source": _lines(code)}


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def main() -> None:
    """Write page, picture and notebook."""
    page, picture = executed(PAGE.read_text())
    PAGE.write_text(page)
    PICTURE.write_bytes(picture)
    NOTEBOOK.write_text(json.dumps(notebook(page, picture), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
