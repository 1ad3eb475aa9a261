"""Generate fedcore/v1 from protos/ with grpcio-tools and mypy-protobuf.

`generate.py` writes the stubs into the tree; `generate.py --check` generates them elsewhere and
fails if the committed ones differ.
"""

import argparse
import filecmp
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(target: Path) -> list[Path]:
    """Write the stubs of every .proto below protos/ under `target`; return their paths relative to it."""
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{ROOT / 'protos'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        *map(str, protos),
    ]
    # protoc finds its plugins next to this interpreter even when the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(target) for path in target.rglob("*_pb2*.py*") if path.suffix != ".pyc")


def check() -> None:
    """Exit with a message if the committed stubs are not what protos/ gives."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        stale = [str(p) for p in fresh if not same(Path(folder) / p, ROOT / p)]
        committed = {
            p.relative_to(ROOT) for p in (ROOT / "fedcore/v1").glob("*_pb2*.py*") if p.suffix != ".pyc"
        }
        stale += [f"{p} (no longer generated)" for p in sorted(committed - set(fresh))]
    if stale:
        raise SystemExit(f"stubs out of date: {', '.join(stale)}; run `make protos` and commit")


def same(left: Path, right: Path) -> bool:
    """Whether both files exist with equal bytes."""
    return right.is_file() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed stubs differ")
    if parser.parse_args().check:
        check()
    else:
        generate(ROOT)
