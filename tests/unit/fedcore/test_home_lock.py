"""One process a home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.errors import ConflictError
from fedcore.home_lock import HomeLock


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with HomeLock(path):
        with (
            pytest.raises(ConflictError, match=f"{tmp_path} is already served by process {os.getpid()}"),
            HomeLock(path),
        ):
            pytest.fail("two hold it")
        assert path.read_text() == f"{os.getpid()}\n"
    with HomeLock(path):
        pass


def test_the_kernel_releases_it_when_its_holder_is_killed(tmp_path: Path) -> None:
    code = "import sys, pathlib; from fedcore.home_lock import HomeLock\n"
    code += "with HomeLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match=f"process {holder.pid}"), HomeLock(tmp_path / "lock"):
            pytest.fail("two hold it")
        holder.kill()
        holder.wait()
        with HomeLock(tmp_path / "lock"):
            pass


def test_a_child_does_not_keep_it_held(tmp_path: Path) -> None:
    """A child that inherited the descriptor would hold the home after its parent is gone."""
    with HomeLock(tmp_path / "lock"):
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        with HomeLock(tmp_path / "lock"):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_words_of_a_longer_number_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999999\n")
    with HomeLock(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
