import os
import subprocess
import sys
import threading
import time

import pytest

from fedcore.errors import ConfigError
from fedcore.lifeline import Lifeline, watch

CHILD = """
import os, sys, threading, time
from fedcore.lifeline import watch
fd, grace, stubborn = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "stubborn"
over = threading.Event()
watch(fd, over.set, grace)
print(os.get_inheritable(fd), flush=True)
over.wait()
print("over", flush=True)
if stubborn:
    time.sleep(60)
"""
# Holds a lifeline, starts a child with it and waits; killed, it can tell its child nothing.
PARENT = """
import subprocess, sys, time
from fedcore.lifeline import Lifeline
line = Lifeline()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(line.read_fd), "10", "willing"],
                         pass_fds=[line.read_fd])
print(child.pid, flush=True)
time.sleep(60)
"""


def start(lifeline: Lifeline, grace_s: float, mood: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(lifeline.read_fd), str(grace_s), mood],
        pass_fds=[lifeline.read_fd],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "False\n", "grandchildren must not hold the pipe"
    return child


def test_closing_ends_every_child() -> None:
    with Lifeline() as lifeline:
        children = [start(lifeline, 10, "willing") for _ in range(2)]
        assert all(child.poll() is None for child in children)
    for child in children:
        assert child.communicate(timeout=270)[0] == "over\n"
        assert child.returncode == 0


def test_a_child_that_hangs_is_ended_hard_after_its_grace() -> None:
    lifeline = Lifeline()
    child = start(lifeline, 0.2, "stubborn")
    lifeline.close()
    assert child.communicate(timeout=270)[0] == "over\n"
    assert child.returncode == 1


def test_kill_9_of_the_parent_ends_the_child() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "False\n"
    parent.kill()
    # The child shares the parent's stdout: its end of file is the child's end.
    assert parent.communicate(timeout=270)[0] == "over\n"
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        with open(f"/proc/{child}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.02)


def test_what_is_no_pipe_is_refused() -> None:
    with open("/dev/null") as file, pytest.raises(ConfigError, match="not a pipe"):
        watch(file.fileno(), lambda: None)
    with pytest.raises(ConfigError, match="not an open file descriptor"):
        watch(987654, lambda: None)


def test_bytes_on_the_pipe_are_not_its_end() -> None:
    read_fd, write_fd = os.pipe()
    over = threading.Event()
    watch(read_fd, over.set, grace_s=3600)
    os.write(write_fd, b"hello")
    assert not over.wait(0.1)
    os.close(write_fd)
    assert over.wait(60)
    os.close(read_fd)


def test_closing_twice_is_harmless() -> None:
    lifeline = Lifeline()
    lifeline.close()
    lifeline.close()
