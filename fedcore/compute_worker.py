"""The child's side of a compute process: one JSON command a line in, JSON lines out.

in:  {"id": 1, "command": "train", "args": {...}}   or   {"cancel": 1}
out: {"id": 1, "progress": {...}}  or  {"id": 1, "beat": true}, any number of them, then
     {"id": 1, "result": {...}}  or  {"id": 1, "error": {code, message, hint}}

A beat says every few seconds that the process lives, however long a command computes without progress to tell.
The end of stdin ends the process at once, whatever it computes: nothing outlives its parent. Whatever libraries
print to stdout goes to stderr, so that it can't break the protocol.
"""

import errno
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from fedcore.errors import DiskError, FedimpresError, InternalError

BEAT_S = 5.0
# What a disk answers that is full, beyond a quota or a limit, read-only or failing.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Cancelled(Exception):  # noqa: N818 - an interruption, not an error
    """The command in progress was withdrawn."""


class Job:
    """A command in progress, seen by its handler."""

    def __init__(self, job_id: int, send: Callable[[dict[str, Any]], None]) -> None:
        self._id = job_id
        self._send = send
        self._cancelled = threading.Event()

    def progress(self, **fields: Any) -> None:
        """Tell the parent how far the work is. Raises Cancelled if it was withdrawn."""
        self.check()
        self._send({"id": self._id, "progress": fields})

    def check(self) -> None:
        """Raise Cancelled if the command was withdrawn."""
        if self._cancelled.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Withdraw the command: its next `check` or `progress` raises."""
        self._cancelled.set()


Handler = Callable[[dict[str, Any], Job], dict[str, Any]]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer commands until stdin ends. SIGUSR1 has the stacks of all threads written to stderr, whatever they do."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = _Worker(handlers, out)
    threading.Thread(target=worker.read_commands, args=(sys.stdin,), name="commands", daemon=True).start()
    threading.Thread(target=worker.beat, name="beat", daemon=True).start()
    worker.run()


class _Worker:
    def __init__(self, handlers: Mapping[str, Handler], out: TextIO) -> None:
        self._handlers = handlers
        self._out = out
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._busy_with: int | None = None

    def read_commands(self, lines: TextIO) -> None:
        for line in lines:
            message = json.loads(line)
            if "cancel" in message:
                job = self._jobs.get(message["cancel"])
                if job is not None:
                    job.cancel()
            else:
                self._jobs[message["id"]] = Job(message["id"], self._send)
                self._commands.put(message)
        os._exit(0)

    def run(self) -> None:
        while True:
            message = self._commands.get()
            job_id = int(message["id"])
            self._busy_with = job_id
            answer = self._perform(message, self._jobs[job_id])
            self._busy_with = None
            self._send({"id": job_id, **answer})
            del self._jobs[job_id]

    def beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            if (job_id := self._busy_with) is not None:
                self._send({"id": job_id, "beat": True})

    def _perform(self, message: dict[str, Any], job: Job) -> dict[str, Any]:
        handler = self._handlers.get(message["command"])
        try:
            if handler is None:
                raise InternalError(f"unknown compute command {message['command']!r}")
            job.check()
            return {"result": handler(message["args"], job)}
        except Cancelled:
            return {"error": {"code": "cancelled", "message": "cancelled", "hint": ""}}
        except FedimpresError as error:
            return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        except MemoryError:
            return {"error": {"code": "compute_failed", "message": "out of memory", "hint": ""}}
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in _DISK:
                return {
                    "error": {"code": DiskError.code, "message": text, "hint": "free space or mend the disk"}
                }
            return {
                "error": {"code": "compute_failed", "message": text, "hint": "see the log for the traceback"}
            }

    def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message, separators=(",", ":"))
        with self._lock:
            self._out.write(text + "\n")
            self._out.flush()
