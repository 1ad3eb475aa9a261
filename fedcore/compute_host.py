"""The parent's side of a compute process: start it, give it one command at a time, survive its death.

A process that dies fails the command it had with its last words, and the next command starts a new one. A withdrawn
command frees the device at once: the process is asked to stop, and killed if it has not after a moment.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from fedcore.errors import BY_CODE, ComputeError
from fedcore.process_state import handles_signal
from fedcore.text import wire_value

_LINE_LIMIT_BYTES = 64 << 20
_LAST_WORDS = 15
_DUMP_S = 3.0
_DUMP_PAUSE_S = 0.2
_CANCEL_GRACE_S = 2.0

Progress = Callable[[dict[str, Any]], None]
log = structlog.get_logger(__name__)


class ComputeHost:
    """Owns the compute process `python -m MODULE`. Commands queue; each runs alone."""

    def __init__(self, module: str, *, environment: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._environment = {**os.environ, **(environment or {})}
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._stderr_done: asyncio.Task[None] | None = None
        self._next_id = 0
        # Lines of stderr since a dump of its threads was asked for; None while none was.
        self._dumped: list[str] | None = None
        self.busy_with: str | None = None
        self._heard_at = 0.0

    @property
    def pid(self) -> int | None:
        """Process id of the compute process, None while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def exit_status(self) -> int | None:
        """How the process ended (negative: by that signal); None while it runs, and before it was first started."""
        return self._process.returncode if self._process else None

    def silent_s(self) -> float:
        """Seconds since the process last gave a sign of life; 0 while it has no command."""
        return time.monotonic() - self._heard_at if self.busy_with is not None else 0.0

    def stuck(self, limit_s: float | None) -> str:
        """In words, that the process has been silent during a command for more than `limit_s` seconds; empty if not."""
        silent_s = self.silent_s()
        if limit_s is None or silent_s <= limit_s:
            return ""
        return f"the compute process has been silent for {silent_s:.0f} s during '{self.busy_with}'"

    async def run(
        self, command: str, args: Mapping[str, Any], on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """Perform a command and return its result. Texts in results and errors are valid Unicode.

        Raises the FedimpresError that the process answered, ComputeError if it died. When cancelled, the process has
        stopped working on the command (or has been killed) before CancelledError goes on.
        """
        async with self._turn:
            process = await self._ensure_started()
            self._next_id += 1
            job_id = self._next_id
            self.busy_with = command
            self._heard_at = time.monotonic()
            try:
                return await self._perform(process, job_id, command, args, on_progress)
            except asyncio.CancelledError:
                await self._finish_withdrawing(process, job_id)
                raise
            finally:
                self.busy_with = None

    async def dump_threads(self) -> str:
        """Where the process's threads stand, or why that is not known, in words. What it computes goes on.

        The handler is C's own: a process that is stuck in a library answers as well, a stopped one does not.
        """
        pid = self.pid
        if pid is None:
            return "no compute process runs\n"
        if not handles_signal(pid, signal.SIGUSR1):  # else the signal would end it
            return f"compute process {pid} is still starting\n"
        if self._dumped is not None:
            return "somebody else asks for it at this moment\n"
        self._dumped = []
        try:
            os.kill(pid, signal.SIGUSR1)
            told, waited_s = -1, 0.0
            # The dump has no end mark: it is whole once nothing follows for a moment.
            while waited_s < _DUMP_S and (not self._dumped or len(self._dumped) > told):
                told = len(self._dumped)
                await asyncio.sleep(_DUMP_PAUSE_S)
                waited_s += _DUMP_PAUSE_S
            return "".join(f"{line}\n" for line in self._dumped) or f"no answer within {_DUMP_S:g} s\n"
        except ProcessLookupError:
            return "the compute process has just ended\n"
        finally:
            self._dumped = None

    async def close(self) -> None:
        """End the process: close its stdin, then kill it if it lingers."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _CANCEL_GRACE_S)
        except TimeoutError:
            await self._kill(process)

    async def _ensure_started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._last_words.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
            env=self._environment,
        )
        self._stderr_done = asyncio.create_task(self._drain_stderr(self._process))
        log.info("compute process started", module=self._module, pid=self._process.pid)
        return self._process

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError):  # a line beyond the limit
            async for line in process.stderr:
                text = line.decode(errors="replace").rstrip()
                if self._dumped is not None:
                    self._dumped.append(text)
                    continue
                self._last_words.append(text)
                log.info("compute says", module=self._module, line=text)

    async def _perform(
        self,
        process: asyncio.subprocess.Process,
        job_id: int,
        command: str,
        args: Mapping[str, Any],
        on_progress: Progress | None,
    ) -> dict[str, Any]:
        with contextlib.suppress(ConnectionError):
            await _send(process, {"id": job_id, "command": command, "args": dict(args)})
        while True:
            try:
                message = await self._receive(process, job_id)
            except ValueError as broken:
                await self._kill(process)
                raise ComputeError(
                    f"the compute process broke its protocol during '{command}': {broken}",
                    hint="it is started again for the next command; does a plug-in write to stdout?",
                ) from broken
            if message is None:
                raise await self._death(process, command)
            if "progress" in message:
                if on_progress is not None:
                    on_progress(message["progress"])
            elif "error" in message:
                error = wire_value(message["error"])
                raise BY_CODE.get(error["code"], ComputeError)(error["message"], hint=error["hint"])
            else:
                result: dict[str, Any] = wire_value(message["result"])
                return result

    async def _death(self, process: asyncio.subprocess.Process, command: str) -> ComputeError:
        code = await process.wait()
        if self._stderr_done is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._stderr_done), 1.0)
        words = " | ".join(line for line in list(self._last_words)[-3:] if line) or "no last words"
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return ComputeError(
            f"the compute process died during '{command}' ({how}): {words}",
            hint="it is started again for the next command; signal 9 often means out of memory",
        )

    async def _finish_withdrawing(self, process: asyncio.subprocess.Process, job_id: int) -> None:
        """Withdraw a command to the end, however often the caller is cancelled: the next one reads the same pipe."""
        withdrawing = asyncio.ensure_future(self._withdraw(process, job_id))
        while not withdrawing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(withdrawing)
        withdrawing.result()

    async def _withdraw(self, process: asyncio.subprocess.Process, job_id: int) -> None:
        try:
            await _send(process, {"cancel": job_id})
            async with asyncio.timeout(_CANCEL_GRACE_S):
                while True:
                    message = await self._receive(process, job_id)
                    if message is None or "progress" not in message:
                        return
        except (TimeoutError, ConnectionError, ValueError):
            await self._kill(process)

    async def _receive(self, process: asyncio.subprocess.Process, job_id: int) -> dict[str, Any] | None:
        """The next message of the job; beats and answers to withdrawn jobs are skipped. None at the end of the stream.

        Raises ValueError for a line that is no message.
        """
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if not line.endswith(b"\n"):
                return None  # died in the middle of a line
            message = json.loads(line)
            if not isinstance(message, dict) or not {"progress", "error", "result", "beat"} & message.keys():
                raise ValueError(f"{line[:80]!r} is no message")
            self._heard_at = time.monotonic()
            if message.get("id") == job_id and "beat" not in message:
                return message
        return None

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _send(process: asyncio.subprocess.Process, message: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    await process.stdin.drain()
