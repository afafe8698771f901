"""Names of curves that TensorBoard, MLflow and files take."""

import re
from collections.abc import Iterable


def tags_of(names: Iterable[str]) -> dict[str, str]:
    """For each name one that has only letters, digits and ``_-. /``, and no two the same.

    That is what MLflow takes. ``+`` becomes ``-``, all else that is not taken ``_``; a name whose
    tag an earlier one has gets a number.
    """
    tags: dict[str, str] = {}
    for name in names:
        if name in tags:
            continue
        plain = tag = _plain(name)
        number = 2
        while tag in tags.values():
            tag, number = f"{plain}_{number}", number + 1
        tags[name] = tag
    return tags


def _plain(name: str) -> str:
    taken = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name.replace("+", "-"))
    # A path that leads somewhere else is refused, and so is an empty part of one.
    return "/".join(re.sub(r"^(\.\.|\.?$)", "_", part) for part in taken.split("/"))
