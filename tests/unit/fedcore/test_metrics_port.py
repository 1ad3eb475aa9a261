"""The metrics' port: what it answers, what it refuses, that it is closed by default, and a port that is taken."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from fedcore.clock import ManualClock
from fedcore.errors import ConfigError
from fedcore.metrics_page import MetricsPage, new_registry
from fedcore.metrics_port import metrics_port
from fedctl.demo_processes import free_ports


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


def served(page: Callable[[], Awaitable[bytes]], *requests: bytes) -> list[bytes]:
    async def run() -> list[bytes]:
        (port,) = free_ports(1)
        async with metrics_port(port, page):
            return [await ask(port, request) for request in requests]

    return asyncio.run(run())


async def page() -> bytes:
    return b"a 1\n"


async def broken() -> bytes:
    raise RuntimeError("a bug")


def test_it_answers_one_path_and_refuses_the_rest() -> None:
    good, query, other, post, long = served(
        page,
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /metrics?a=b HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000,
    )
    assert good.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    assert good.endswith(b"\r\n\r\na 1\n")
    assert query == good
    assert other.startswith(b"HTTP/1.1 404 ")
    assert post.startswith(b"HTTP/1.1 405 ")
    assert long == b""


def test_a_page_that_fails_is_told_as_such() -> None:
    (said,) = served(broken, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 500 ")
    assert b"bug" not in said


def test_without_a_port_nothing_listens() -> None:
    async def run() -> None:
        before = asyncio.all_tasks()
        async with metrics_port(None, page):
            assert asyncio.all_tasks() == before

    asyncio.run(run())


def test_a_port_that_is_taken_is_named() -> None:
    async def run(port: int) -> None:
        async with metrics_port(port, page):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            asyncio.run(run(port))


def test_a_page_is_read_once_in_a_second() -> None:
    looks, clock = [], ManualClock()

    async def look() -> None:
        looks.append(1)

    async def run() -> None:
        shown = MetricsPage(new_registry(), look, clock)
        first = await shown()
        assert b"fedimpres_build_info" in first
        assert await shown() == first
        assert len(looks) == 1
        clock.advance(2)
        await shown()
        assert len(looks) == 2

    asyncio.run(run())
