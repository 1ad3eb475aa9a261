"""What Linux says of a process in /proc: whether it runs, and which signals it has handlers for."""

from pathlib import Path


def process_state(pid: int) -> str:
    """The process's state as one letter (R running, S sleeping, D waiting for a disk, T stopped, Z ended); empty if it
    is gone.
    """
    try:
        # The name stands in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def handles_signal(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal; False if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
