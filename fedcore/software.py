"""Which software a program runs on: what is needed to repeat a run, or to find a fault. Imports none of it."""

import platform
from importlib.metadata import PackageNotFoundError, version

# Those whose version can change a figure or an answer.
_PACKAGES = (
    "torch", "numpy", "safetensors", "pillow", "scikit-learn", "grpcio", "protobuf", "cryptography", "pydantic",
)  # fmt: skip


def software() -> dict[str, object]:
    """Versions by name; packages that are not installed are left out."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "fedimpres": version("fedimpres"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }
