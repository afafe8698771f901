"""Names of curves that TensorBoard, MLflow and files take."""

import re
from collections.abc import Iterable


def scalar_tags(names: Iterable[str]) -> dict[str, str]:
    """For each name a tag of letters, digits and ``_-. /``, as MLflow takes them, no two the same.

    ``+`` becomes ``-``, any other character ``_``; a tag that is taken gets a number.
    """
    tags: dict[str, str] = {}
    for name in dict.fromkeys(names):
        allowed = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name.replace("+", "-"))
        # A path that leads somewhere else is refused, and so is an empty part of one.
        plain = "/".join(re.sub(r"^(\.\.|\.?$)", "_", part) for part in allowed.split("/"))
        tag, number = plain, 2
        while tag in tags.values():
            tag, number = f"{plain}_{number}", number + 1
        tags[name] = tag
    return tags
