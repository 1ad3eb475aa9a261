"""Structured logs on stderr: JSON lines off a terminal, readable lines on one."""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(
    level: str = "info", stream: TextIO | None = None, keep: structlog.typing.Processor | None = None
) -> None:
    """Send structlog's events, and warnings of libraries that use `logging`, to `stream` (stderr if not
    given); structlog's go through `keep` as well.

    Every event has `at` (RFC 3339, UTC) and `level`. A line that can't be written, on a full disk, is lost; logging never
    raises OSError. Call once, at the start of a program.
    """
    out = cast("TextIO", _Forgiving(stream or sys.stderr))
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    pretty = out.isatty()
    ending: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(timestamp_key="at")]
        if pretty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[*shared, *([keep] if keep is not None else []), *ending],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    _route_stdlib(shared, ending, out)


class _Forgiving:
    """A stream that loses what it can't write: whoever logs has other work, which goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _route_stdlib(
    shared: list[structlog.typing.Processor], ending: list[structlog.typing.Processor], out: TextIO
) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
