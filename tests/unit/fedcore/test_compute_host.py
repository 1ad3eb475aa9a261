"""A compute process that dies, babbles, hangs or is withdrawn; the next command always finds a working one."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fedcore.compute_host import ComputeHost
from fedcore.errors import ComputeError, DataError, InternalError

T = TypeVar("T")
CHILD = """
import os, sys, time
from fedcore.compute_worker import serve
from fedcore.errors import DataError

def echo(args, job):
    print("a library prints to stdout")
    for n in range(args.get("steps", 0)):
        job.progress(done=n + 1)
    return {"echo": args, "pid": os.getpid()}

def obedient(args, job):
    job.progress(stage="begun")
    while True:
        time.sleep(0.01)
        job.check()

def deaf(args, job):
    job.progress(stage="begun")
    time.sleep(60)

def die(args, job):
    print("first", "CUDA error: an illegal memory access", sep="\\n", file=sys.stderr, flush=True)
    os._exit(3)

def suicide(args, job):
    os.kill(os.getpid(), 9)

def babble(args, job):
    os.write(job._send.__self__._out.fileno(), args["text"].encode())
    return {}

def half(args, job):
    babble(args, job)
    os._exit(4)

def wrong(args, job):
    raise DataError("site-1: no images", hint="look again")

def bug(args, job):
    return {"x": 1 / 0}

def named(args, job):
    name = b"\\xfc.png".decode("utf-8", "surrogateescape")
    if args["fail"]:
        raise DataError(f"{name}: broken", hint=f"mend {name}")
    return {"names": [name], name: {"plain": "\u00fc\U0001f600", "n": 1, "none": None}}

def memory(args, job):
    raise MemoryError

if __name__ == "__main__":
    serve({f.__name__: f for f in (echo, obedient, deaf, die, suicide, babble, half, wrong, bug, memory, named)})
"""


@pytest.fixture
def host(tmp_path: Path) -> ComputeHost:
    (tmp_path / "compute_child.py").write_text(textwrap.dedent(CHILD))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return ComputeHost("compute_child", environment={"PYTHONPATH": path})


def go(host: ComputeHost, story: Coroutine[Any, Any, T]) -> T:
    async def closed() -> T:
        try:
            return await asyncio.wait_for(story, 50)  # the deaf sleep for 60
        finally:
            await host.close()
            assert host.pid is None

    return asyncio.run(closed())


def test_commands_are_answered_with_progress_by_one_process(host: ComputeHost) -> None:
    async def story() -> None:
        said: list[dict[str, Any]] = []
        first = await host.run("echo", {"steps": 3, "ü": [1.5, None]}, said.append)
        assert first["echo"] == {"steps": 3, "ü": [1.5, None]}
        assert said == [{"done": 1}, {"done": 2}, {"done": 3}]
        both = await asyncio.gather(*(host.run("echo", {"n": n}) for n in range(2)))
        assert [one["echo"]["n"] for one in both] == [0, 1]
        assert {one["pid"] for one in both} == {first["pid"], host.pid}
        assert host.busy_with is None

    go(host, story())


def test_errors_of_handlers_arrive_as_what_they_are(host: ComputeHost) -> None:
    async def story() -> None:
        with pytest.raises(DataError) as caught:
            await host.run("wrong", {})
        assert (caught.value.message, caught.value.hint) == ("site-1: no images", "look again")
        with pytest.raises(ComputeError, match="ZeroDivisionError: division by zero"):
            await host.run("bug", {})
        with pytest.raises(ComputeError, match="out of memory"):
            await host.run("memory", {})
        with pytest.raises(InternalError, match="unknown compute command 'nonsense'"):
            await host.run("nonsense", {})
        pid = host.pid
        assert (await host.run("echo", {}))["pid"] == pid

    go(host, story())


def test_names_that_are_no_utf8_come_written_out_whole_texts_as_they_are(host: ComputeHost) -> None:
    async def story() -> None:
        with pytest.raises(DataError) as caught:
            await host.run("named", {"fail": True})
        assert (caught.value.message, caught.value.hint) == (r"\udcfc.png: broken", r"mend \udcfc.png")
        assert await host.run("named", {"fail": False}) == {
            "names": [r"\udcfc.png"],
            r"\udcfc.png": {"plain": "\u00fc\U0001f600", "n": 1, "none": None},
        }

    go(host, story())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("die", r"died during 'die' \(exit status 3\): .*first \| CUDA error: an illegal memory access"),
        ("suicide", r"died during 'suicide' \(killed by signal 9\): no last words"),
    ],
)
def test_death_is_told_with_the_last_words_and_a_new_process_answers(
    host: ComputeHost, command: str, words: str
) -> None:
    async def story() -> None:
        before = (await host.run("echo", {}))["pid"]
        await asyncio.sleep(0.05)
        host._last_words.clear()
        with pytest.raises(ComputeError, match=words):
            await host.run(command, {})
        assert (await host.run("echo", {}))["pid"] != before

    go(host, story())


def test_a_process_killed_while_idle_fails_at_most_one_command(host: ComputeHost) -> None:
    async def story() -> None:
        pid = (await host.run("echo", {}))["pid"]
        os.kill(pid, signal.SIGKILL)
        results = await asyncio.gather(*(host.run("echo", {}) for _ in range(2)), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(f, ComputeError) and "killed by signal 9" in f.message for f in failures)
        assert len(failures) <= 1
        assert isinstance(results[1], dict)
        assert results[1]["pid"] != pid

    go(host, story())


@pytest.mark.parametrize(
    "text",
    ["no json\n", "{}\n", "[1]\n", "null\n", '{"id": 1}\n', '{"id": "x", "progress"\n', "\n", "\x00\x01\n"],
)
def test_garbage_on_the_pipe_ends_the_process_not_the_program(host: ComputeHost, text: str) -> None:
    async def story() -> None:
        with pytest.raises(ComputeError, match="broke its protocol during 'babble'"):
            await host.run("babble", {"text": text})
        assert (await host.run("echo", {"n": 1}))["echo"] == {"n": 1}

    go(host, story())


def test_death_in_the_middle_of_a_line_is_a_death(host: ComputeHost) -> None:
    async def story() -> None:
        with pytest.raises(ComputeError, match=r"died during 'half' \(exit status 4\)"):
            await host.run("half", {"text": '{"id": 1, "resu'})
        await host.run("echo", {})

    go(host, story())


@pytest.mark.parametrize(("command", "survives"), [("obedient", True), ("deaf", False)])
def test_a_withdrawn_command_frees_the_device_at_once(
    host: ComputeHost, command: str, survives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not survives:  # no need to wait for it
        monkeypatch.setattr("fedcore.compute_host._CANCEL_GRACE_S", 0.2)

    async def story() -> None:
        before = (await host.run("echo", {}))["pid"]
        begun = asyncio.Event()
        task = asyncio.create_task(host.run(command, {}, lambda fields: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pid = (await host.run("echo", {}))["pid"]
        assert (pid == before) is survives
        assert (await host.run("echo", {"n": 2}))["echo"] == {"n": 2}

    go(host, story())


def test_cancelling_again_and_again_leaves_the_pipe_in_order(
    host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator's loop may withdraw the same command at every tick."""
    monkeypatch.setattr("fedcore.compute_host._CANCEL_GRACE_S", 0.5)

    async def story() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(host.run("deaf", {}, lambda fields: begun.set()))
        await begun.wait()
        waiting = asyncio.create_task(host.run("echo", {"n": 1}))
        while not task.done():
            task.cancel()
            await asyncio.sleep(0.05)
        assert task.cancelled()
        assert (await waiting)["echo"] == {"n": 1}

    go(host, story())


def test_a_command_withdrawn_while_it_waits_for_its_turn_never_runs(host: ComputeHost) -> None:
    async def story() -> None:
        begun = asyncio.Event()
        first = asyncio.create_task(host.run("obedient", {}, lambda fields: begun.set()))
        await begun.wait()
        second = asyncio.create_task(host.run("die", {}))
        await asyncio.sleep(0.02)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        pid = host.pid
        assert (await host.run("echo", {}))["pid"] == pid

    go(host, story())


def test_close_ends_a_process_that_does_not_listen(host: ComputeHost) -> None:
    async def story() -> int:
        begun = asyncio.Event()
        task = asyncio.create_task(host.run("deaf", {}, lambda fields: begun.set()))
        await begun.wait()
        pid = host.pid
        assert pid is not None
        await host.close()
        with pytest.raises(ComputeError, match="died"):
            await task
        return pid

    pid = go(host, story())
    assert not Path(f"/proc/{pid}").exists()


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that waits for a command of its compute process for ever."""
    (tmp_path / "compute_child.py").write_text(textwrap.dedent(CHILD))
    code = """
import asyncio
from fedcore.compute_host import ComputeHost
host = ComputeHost("compute_child")
asyncio.run(host.run("deaf", {}, lambda fields: print(host.pid, flush=True)))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        words = ""
        while not words.strip().isdecimal():
            words = program.stdout.readline()
            assert words, "the program has ended"
        yield program, int(words)
        program.kill()


def test_nothing_outlives_its_parent_even_while_it_computes(
    parent: tuple[subprocess.Popen[str], int],
) -> None:
    program, child = parent
    program.kill()
    program.wait()
    deadline = time.monotonic() + 50
    while _runs(child):
        assert time.monotonic() < deadline, "the compute process outlives its parent"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_listens_to_nobody_still_says_where_its_threads_stand(host: ComputeHost) -> None:
    async def story() -> None:
        assert await host.dump_threads() == "no compute process runs\n"
        begun = asyncio.Event()
        task = asyncio.create_task(host.run("deaf", {}, lambda fields: begun.set()))
        await begun.wait()
        pid = host.pid
        dump = await host.dump_threads()
        assert "in deaf" in dump
        assert "in read_commands" in dump
        assert (host.pid, task.done()) == (pid, False), "and what it does goes on"
        assert "in deaf" in await host.dump_threads()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    go(host, story())


def test_a_process_that_is_still_starting_is_left_alone(host: ComputeHost) -> None:
    async def story() -> None:
        # Without a handler the signal ends a process: a shell that waits has none.
        host._process = await asyncio.create_subprocess_exec(
            "sleep", "60", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        pid = host.pid
        assert await host.dump_threads() == f"compute process {pid} is still starting\n"
        assert host.pid == pid
        host._process.kill()
        await host._process.wait()

    go(host, story())
