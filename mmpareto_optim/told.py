"""Warnings that point at the user's line."""

import sys
import warnings
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parent)


def warn(message: str) -> None:
    """A ``UserWarning`` at the first line on the way here that is not this package's or torch's."""
    level, frame = 1, sys._getframe(0)
    while _is_inside(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_filename.startswith(PACKAGE) or name.split(".")[0] == "torch"
