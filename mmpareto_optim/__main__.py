"""``python -m mmpareto_optim``: versions and devices, to paste into a bug report."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from mmpareto_optim import __version__

# By the names that pip knows. The wrapper itself imports none of them.
LIBRARIES = ["numpy", "accelerate", "av", "lightning", "matplotlib", "rich", "schedulefree"]
LIBRARIES += ["scikit-learn", "tensorboard", "torchjd", "transformers"]


def report() -> str:
    """What a maintainer asks for first, one fact a line."""
    cuda = "not available"
    if torch.cuda.is_available():
        names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
        cuda = f"{torch.version.cuda or f'ROCm {torch.version.hip}'}: {', '.join(names)}"
    facts = {
        "mmpareto-optim": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cuda": cuda,
        "mps": "available" if torch.backends.mps.is_available() else "not available",
    }
    facts |= dict.fromkeys(LIBRARIES, "not installed")
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):  # importing a library can take seconds, and fail
            facts[library] = version(library)
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    print(report())
