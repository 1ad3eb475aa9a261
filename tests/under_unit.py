"""Run a command under a unit's system call filter and without privileges, where systemd itself does not run.

usage: under_unit.py UNIT DROP_IN... -- COMMAND...

The filter is the unit's own: its SystemCallFilter lines, expanded by `systemd-analyze syscall-filter`, loaded with
libseccomp; what it does not allow fails with EPERM, as SystemCallErrorNumber says. Name spaces (ProtectSystem,
PrivateDevices) are not made.
"""

import ctypes
import ctypes.util
import errno
import os
import subprocess
import sys
from pathlib import Path

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS = 38  # <linux/prctl.h>


def allowed_calls(units: list[Path]) -> set[str]:
    """The system calls that the SystemCallFilter lines of a unit and its drop-ins leave."""
    allowed: set[str] = set()
    for unit in units:
        for line in unit.read_text().splitlines():
            if not line.startswith("SystemCallFilter="):
                continue
            value = line.partition("=")[2]
            names = {call for word in value.removeprefix("~").split() for call in _expanded(word)}
            allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed


def _expanded(word: str) -> set[str]:
    if not word.startswith("@"):
        return {word}
    said = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", word], capture_output=True, text=True, check=True
    )
    # The group's name, what it is, then its members, one a line.
    words = [line.strip() for line in said.stdout.splitlines()[1:] if not line.strip().startswith("#")]
    return {call for word in words if word for call in _expanded(word)}


def confine(calls: set[str]) -> None:
    """Load the filter into this process and those that it starts. Raises OSError."""
    library = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_rule_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    if ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs was refused")
    context = library.seccomp_init(_ERRNO | errno.EPERM)
    for call in sorted(calls):
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # below: of another architecture
            library.seccomp_rule_add(context, _ALLOW, number, 0)
    if (failed := library.seccomp_load(context)) != 0:
        raise OSError(-failed, os.strerror(-failed))


def main() -> None:
    """Confine this process, then become the command."""
    cut = sys.argv.index("--")
    confine(allowed_calls([Path(name) for name in sys.argv[1:cut]]))
    os.execvp(sys.argv[cut + 1], sys.argv[cut + 1 :])


if __name__ == "__main__":
    main()
