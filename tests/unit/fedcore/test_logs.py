"""Log lines that a machine can read."""

import errno
import io
import json
import logging

import pytest
import structlog

from fedcore.logs import configure_logs


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], _ = handlers, root.setLevel(level)
    structlog.reset_defaults()


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_events_are_json_lines_above_the_level():
    out = io.StringIO()
    configure_logs("info", out)
    log = structlog.get_logger("x")
    log.debug("left out")
    log.info("site connected", site="clinic-ü", path=object)
    (line,) = lines(out)
    assert (line["event"], line["level"], line["site"]) == ("site connected", "info", "clinic-ü")
    assert str(line["at"]).endswith("Z")


class FullDisk(io.StringIO):
    """Takes nothing while `full`."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_line_that_the_disk_does_not_take_is_lost_and_stops_nobody():
    out = FullDisk()
    configure_logs("info", out)
    structlog.get_logger("x").info("update stored")
    logging.getLogger("library").warning("deprecated")
    out.full = False
    structlog.get_logger("x").info("round finished")
    assert [line["event"] for line in lines(out)] == ["round finished"]


def test_tracebacks_are_kept_on_one_line():
    out = io.StringIO()
    configure_logs("error", out)
    try:
        raise ZeroDivisionError("inner")
    except ZeroDivisionError as error:
        structlog.get_logger().error("rpc failed", exc_info=error)
    (line,) = lines(out)
    assert "ZeroDivisionError: inner" in str(line["exception"])


def test_warnings_of_libraries_come_the_same_way():
    out = io.StringIO()
    configure_logs("debug", out)
    logging.getLogger("asyncio").warning("slow %s", "callback")
    logging.getLogger("asyncio").info("left out")
    (line,) = lines(out)
    assert (line["event"], line["level"]) == ("slow callback", "warning")
