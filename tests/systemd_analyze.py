"""What `systemd-analyze` says of units below a root folder."""

import re
import shutil
import subprocess
from pathlib import Path

# Of `systemd-analyze security`: 0 is closed, 10 is open.
MOST_EXPOSED = {"fedserver": 1.5, "fedagent": 2.0}


def faults(root: Path, unit: str) -> str:
    """What `verify` finds wrong with a service; "" if nothing."""
    for path in Path("/usr/lib/systemd/system").glob("*.target"):  # what the unit names
        kept = root / "usr/lib/systemd/system" / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
    done = _said("verify", f"--root={root}", "--man=no", f"{unit}.service")
    return done.stdout + done.stderr + (f"exit status {done.returncode}" if done.returncode else "")


def exposure(root: Path, unit: str) -> float:
    """The overall exposure level of a service."""
    done = _said("security", "--offline=true", f"--root={root}", f"{unit}.service")
    return exposure_in(done.stdout)


def exposure_in(text: str) -> float:
    """The level that `security` prints."""
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
    assert found is not None, text
    return float(found.group(1))


def _said(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)
