"""Examples as a newcomer runs them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
METHODS = {"one joint loss", "uniform", "uniform x 1.5", "conventional Pareto", "MMPareto"}


def run(name: str, output: Path, *options: str) -> dict[str, object]:
    """Runs all methods of an example; what it left as JSON."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(method in done.stdout for method in METHODS)
    (picture,) = output.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (runs,) = output.glob("*.json")
    document: dict[str, object] = json.loads(runs.read_text())
    return document


def refusal(
    main: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    """What an example says when it ends without a traceback; without another interpreter."""
    with pytest.raises(SystemExit) as ended:
        main(list(options))
    assert ended.value.code
    return capsys.readouterr().err + str(ended.value.code)
