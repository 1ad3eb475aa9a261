"""Deadlines hold while the wall clock is set back: gRPC's own, of a service config, would all be over at once."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.chaos_federation import COMPILER, compile_world

# A server that answers with the seconds that the caller still waits; both APIs; then the clock is five minutes slow.
CALLS_TWICE = """
import asyncio, os, pathlib, struct
from concurrent.futures import ThreadPoolExecutor
from fedcore.channel import client_options, with_deadlines
import grpc
METHOD = "/fedcore.v1.Admin/WhoAmI"
server = grpc.server(ThreadPoolExecutor(2))
answer = grpc.unary_unary_rpc_method_handler(lambda request, context: str(context.time_remaining()).encode())
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedcore.v1.Admin", {"WhoAmI": answer}),))
address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
server.start()

async def remaining():
    async with with_deadlines(grpc.aio.insecure_channel(address, options=client_options())) as channel:
        stub = channel.unary_unary(METHOD)
        first = await stub(b"")
        pathlib.Path(os.environ["WORLD_CLOCK"]).open("r+b").write(struct.pack("=q", -300))
        return first, await stub(b""), await stub(b"", timeout=77)

with with_deadlines(grpc.insecure_channel(address, options=client_options())) as channel:
    stub = channel.unary_unary(METHOD)
    print(*(float(said) for said in (stub(b""), *asyncio.run(remaining()), stub(b""))))
server.stop(None)
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_calls_are_not_over_before_they_begin_when_the_wall_clock_was_set_back(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_bytes(struct.pack("=q", 0))
    world = {"LD_PRELOAD": str(compile_world(tmp_path)), "WORLD_CLOCK": str(clock)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS_TWICE],
        check=False,
        env={**os.environ, **world},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    sync, before, after, given, sync_after = map(float, done.stdout.split())
    assert all(5 < left < 11 for left in (sync, before, after, sync_after)), done.stdout
    assert 70 < given < 78, "the caller's own goes before"
