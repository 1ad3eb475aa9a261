"""Machines for tests of the deployment: name spaces of their own in which a real systemd is process 1.

A machine has a root of its own over this one's (see boot_machine.sh), and a network of its own: loopback alone, until
`join` lays a cable. Machines made together share /opt, so that a release is unpacked once. When a machine ends,
everything in it has ended. Needs root, systemd and a kernel with overlays.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.federation_fixture import Said, children, wait_until

_BOOT = Path(__file__).with_name("boot_machine.sh")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MEMORY_BYTES = 8_000_000_000
_NAME_SPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")


def why_not() -> str:
    """Why machines can't be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root can make name spaces with an overlay"
    for program in ("unshare", "nsenter", "ip", "nft", "runuser", "/lib/systemd/systemd"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    return "" if _cgroups() else "there is no cgroup2 file system"


class Machine:
    """One machine that runs. `shared` is seen as /mnt in it, `opt` as /opt."""

    def __init__(self, name: str, folder: Path, shared: Path, opt: Path) -> None:
        self.name = name
        self._cgroup = Path(tempfile.mkdtemp(prefix="fedimpres-", dir=_cgroups()))
        with (folder.parent / f"{name}.console").open("wb") as console:
            self._unshare = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAME_SPACES, "--fork", "--kill-child",
                 "--propagation", "private", str(_BOOT), str(folder), str(shared), str(opt)],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
                preexec_fn=lambda: (self._cgroup / "cgroup.procs").write_text("0"),  # noqa: PLW1509
            )  # fmt: skip
        try:
            (self._init,) = wait_until(lambda: children(self._unshare.pid), f"{name} begins to boot")
            wait_until(self._up, f"{name} is up", 60, every_s=0.2)
        except BaseException:
            self.stop()
            raise

    def _up(self) -> bool:
        assert self._unshare.poll() is None, f"{self.name} did not boot; see its console"
        if Path(f"/proc/{self._init}/comm").read_text().strip() != "systemd":
            return False
        return self.run("systemctl", "is-system-running").out.strip() in ("running", "degraded")

    def run(
        self, *words: str, user: str | None = None, stdin: str | None = None, timeout_s: float = 60.0
    ) -> Said:
        """A command in the machine to its end."""
        as_user = () if user is None else ("runuser", "-u", user, "--")
        done = subprocess.run(
            ["nsenter", "--target", str(self._init), *_NAME_SPACES, "env", "-i", "--chdir=/", f"PATH={_PATH}",
             "HOME=/root", "LANG=C.UTF-8", "COLUMNS=200", *as_user, *words],
            input=stdin or "", capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return Said(done.returncode, done.stdout, done.stderr)

    def do(
        self, *words: str, user: str | None = None, stdin: str | None = None, timeout_s: float = 60.0
    ) -> Said:
        """A command that must succeed."""
        said = self.run(*words, user=user, stdin=stdin, timeout_s=timeout_s)
        assert said.code == 0, f"{self.name}: {' '.join(words)}: {said}"
        return said

    def write(self, path: str, text: str, user: str | None = None) -> None:
        """A file in the machine."""
        self.do("tee", path, user=user, stdin=text)

    def property(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.do("systemctl", "show", "--value", f"--property={name}", unit).out.strip()

    def log(self, unit: str) -> str:
        """What the unit's programs have written, from journald."""
        return self.do("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").out

    def join(self, other: "Machine", here: str, there: str, number: int) -> None:
        """A cable to another machine: addresses of the two ends, with prefix length."""
        ends = (f"wire{number}", f"wire{number}")
        make = (
            "ip",
            "link",
            "add",
            ends[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            str(other._init),
        )
        subprocess.run(["nsenter", "--target", str(self._init), "--net", *make], check=True)
        for machine, end, address in ((self, ends[0], here), (other, ends[1], there)):
            machine.do("ip", "address", "add", address, "dev", end)
            machine.do("ip", "link", "set", end, "up")

    def stop(self) -> None:
        """End everything in it."""
        self._unshare.kill()
        self._unshare.wait()
        wait_until(lambda: _emptied(self._cgroup), f"{self.name} has ended", 20)


@contextmanager
def machines(*names: str) -> Iterator[tuple[Path, dict[str, Machine]]]:
    """A shared folder, and machines by name; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedimpres-machines-", dir=_roomy()) as made:
        root = Path(made)
        root.chmod(0o755)
        (root / "shared").mkdir()
        (root / "opt").mkdir()
        running: dict[str, Machine] = {}
        try:
            for name in names:
                (root / name).mkdir()
                running[name] = Machine(name, root / name, root / "shared", root / "opt")
            yield root / "shared", running
        finally:
            for machine in running.values():
                machine.stop()


def _roomy() -> str | None:
    """Memory for the 100,000 files of two releases, if there is enough; else the usual place for what is temporary."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > _MEMORY_BYTES else None


def _cgroups() -> Path | None:
    """Where this machine has its cgroup2 file system."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def _emptied(cgroup: Path) -> bool:
    """Remove a cgroup with those below it, if nobody is in it any more."""
    try:
        for folder in sorted(cgroup.rglob("*/"), reverse=True):
            if folder.is_dir():
                folder.rmdir()
        cgroup.rmdir()
    except OSError:
        return not cgroup.exists()
    return True
