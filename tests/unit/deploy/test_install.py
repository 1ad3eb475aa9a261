"""install.sh below a folder of its own, from a bundle whose wheel is a stub: roles, upgrade, rollback, uninstall."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stub_bundle import stub_bundle
from tests.systemd_analyze import MOST_EXPOSED, exposure, faults

ROOT = Path(__file__).parents[3]
_VENV = ["/usr/bin/python3", "-c", "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"]


def _able() -> bool:
    tools = ("systemd-sysusers", "systemd-tmpfiles", "systemctl", "systemd-analyze", _VENV[0])
    return (
        os.geteuid() == 0
        and all(shutil.which(tool) for tool in tools)
        and subprocess.run(_VENV, capture_output=True, check=False).returncode == 0
    )


able = pytest.mark.skipif(not _able(), reason="needs root, systemd's tools and a system Python with venv")


def install(script: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run([script, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


@able
def test_roles_upgrade_rollback_and_uninstall(tmp_path):
    root, old, new = (
        tmp_path / "root",
        stub_bundle(tmp_path / "old", "1.0"),
        stub_bundle(tmp_path / "new", "1.1"),
    )
    base, units = root / "opt/fedimpres", root / "etc/systemd/system"
    below = ("--root", str(root))

    said = install(old, "coordinator", *below)
    assert "current is release 1.0" in said
    assert "fedserver init" in said
    assert os.readlink(base / "current") == "releases/1.0"
    home = root / "var/lib/fedserver"
    assert (home.stat().st_mode & 0o777, home.stat().st_uid != 0) == (0o700, True)
    # Scripts name the interpreter as it is called once DIR is the root.
    assert (base / "current/bin/fedserver").read_text().startswith("#!/opt/fedimpres/releases/1.0/bin/python")
    assert os.readlink(root / "usr/local/bin/fedctl") == "/opt/fedimpres/current/bin/fedctl"

    made = (base / "releases/1.0").stat().st_mtime_ns
    (home / "fedserver.toml").write_text("kept")
    again = install(old, "coordinator", "--gpu", *below)
    assert "release 1.0 is there already" in again
    assert "Next" not in again
    assert (base / "releases/1.0").stat().st_mtime_ns == made
    assert (units / "fedserver.service.d/gpu.conf").is_file()

    assert "install.sh upgrade first" in install(new, "agent", *below, code=1)
    install(old, "agent", *below)
    for name, most in MOST_EXPOSED.items():
        assert faults(root, name) == ""
        assert exposure(root, name) <= most
    unit = units / "fedagent.service"
    unit.write_text("changed by hand")
    assert "current is release 1.1 (before: 1.0)" in install(new, "upgrade", *below)
    assert unit.read_bytes() == (ROOT / "deploy/systemd/fedagent.service").read_bytes()
    assert (units / "fedserver.service.d/gpu.conf").is_file()

    kept = base / "current/deploy/install.sh"  # a release brings its own
    assert "current is release 1.0 (before: 1.1)" in install(kept, "rollback", *below)
    assert (os.readlink(base / "current"), os.readlink(base / "previous")) == ("releases/1.0", "releases/1.1")
    assert "there is no release 0.9" in install(kept, "rollback", "--release", "0.9", *below, code=1)

    install(kept, "uninstall", "agent", *below)
    assert not unit.exists()
    assert (units / "fedserver.service").exists()
    assert "/var/lib/fedserver is kept" in install(kept, "uninstall", *below)
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}
    assert {path for path in left if path.startswith(("opt", "usr/local", "var", "etc/systemd"))} == {
        "var/lib/fedserver/fedserver.toml"
    }
    install(new, "uninstall", "--purge", *below)
    assert not home.exists()


@able
def test_a_damaged_bundle_changes_nothing(tmp_path):
    script = stub_bundle(tmp_path / "made", "1.0")
    root = tmp_path / "root"
    beside = tmp_path / "made/wheels/torch-9-py3-none-any.whl"
    beside.write_bytes(b"")
    assert "not in SHA256SUMS: ./wheels/torch-9" in install(script, "agent", "--root", str(root), code=1)
    beside.unlink()
    (tmp_path / "made/requirements.txt").write_text("fedimpres\n")
    assert "damaged; nothing was changed" in install(script, "agent", "--root", str(root), code=1)
    assert not list(root.glob("etc/**/fedagent*"))
    assert not list(root.glob("opt/fedimpres/releases/*"))


@pytest.mark.parametrize(
    "words", [(), ("server",), ("agent", "coordinator"), ("agent", "--purge"), ("agent", "--release", "../x")]
)
def test_wrong_usage_is_told_and_ends_with_2(words):
    assert "usage: install.sh" in install(ROOT / "deploy/install.sh", *words, code=2)


def test_the_cuda_manifest_has_the_tested_versions_and_a_cuda_build():
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    locked: dict[str, str] = {}
    for line in (ROOT / "deploy/cuda-requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement, digest = line.split(" --hash=sha256:")
            name, version = requirement.lower().replace("_", "-").split("==")
            locked[name] = version
            assert len(bytes.fromhex(digest)) == 32
    assert {name: version for name, version in locked.items() if name in pinned} == {
        name: pinned[name] for name in locked if name in pinned
    }
    assert {"torch", "grpcio", "cryptography", "nvidia-cudnn-cu13"} <= set(locked)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_the_scripts_are_clean():
    scripts = [*(ROOT / "deploy").glob("*.sh"), *(ROOT / "tests").glob("*.sh")]
    assert len(scripts) >= 3
    subprocess.run(["shellcheck", *scripts], check=True)
