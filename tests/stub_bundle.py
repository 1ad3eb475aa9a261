"""A bundle as bundle.sh lays it out, with one wheel whose programs print their place and end."""

import hashlib
import shutil
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def stub_bundle(folder: Path, version: str) -> Path:
    """Make the bundle in a new folder; returns its install.sh."""
    (folder / "wheels").mkdir(parents=True)
    wheel = folder / "wheels" / f"fedimpres-{version}-py3-none-any.whl"
    info = f"fedimpres-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for module in ("torch", "fedserver/cli", "fedagent/cli", "fedctl/app"):
            archive.writestr(f"{module}.py", "def main():\n    print(__file__)\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fedimpres\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/entry_points.txt",
            "[console_scripts]\nfedserver = fedserver.cli:main\nfedagent = fedagent.cli:main\nfedctl = fedctl.app:main\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "requirements.txt").write_text(f"fedimpres=={version} --hash=sha256:{digest}\n")
    (folder / "VERSION").write_text(f"{version}\n")
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  ./{p.relative_to(folder)}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder / "deploy" / "install.sh"
