"""``python -m mmpareto_optim``: versions and devices, to paste into a bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mmpareto_optim import __version__

# By the names that pip knows. All optional: the wrapper itself imports none of them.
OPTIONAL = (
    "accelerate",
    "av",
    "lightning",
    "matplotlib",
    "rich",
    "schedulefree",
    "scikit-learn",
    "tensorboard",
    "torchjd",
    "transformers",
)


def report() -> str:
    """What a maintainer asks for first, one fact a line."""
    facts = {
        "mmpareto-optim": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "threads": str(torch.get_num_threads()),
        "cuda": _cuda(),
        "mps": "available" if torch.backends.mps.is_available() else "not available",
    }
    facts |= {name: _version(name) for name in OPTIONAL}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def _version(distribution: str) -> str:
    # From the metadata: importing a library can take seconds, and fail.
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    runtime = torch.version.cuda or f"ROCm {torch.version.hip}"
    devices = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return f"{runtime}: {', '.join(devices)}"


if __name__ == "__main__":
    print(report())
