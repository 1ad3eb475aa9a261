"""Bare gRPC streams over mutual TLS: what the wire alone costs. A helper of round.py; no disk, no digest.

bare_stream.py server HOME PORT SIZE    serves Up and Down until stdin ends
bare_stream.py client HOME PORT SIZE    does "up" or "down" a line of stdin, answering "ok"
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedcore.channel import SERVER_OPTIONS, client_options
from fedcore.tensor_stream import CHUNK_BYTES

# isort: split
import grpc

_RAW = {"request_serializer": None, "response_deserializer": None}


def chunks(size: int) -> Iterator[bytes]:
    """`size` bytes in chunks."""
    whole = bytes(CHUNK_BYTES)
    for start in range(0, size, CHUNK_BYTES):
        yield whole if size - start >= CHUNK_BYTES else whole[: size - start]


def serve(home: Path, port: int, size: int) -> None:
    """Serve until stdin ends."""

    def up(requests: Iterator[bytes], context: Any) -> bytes:
        return str(sum(map(len, requests))).encode()

    def down(request: bytes, context: Any) -> Iterator[bytes]:
        return chunks(size)

    folder = home / "credential"
    credentials = grpc.ssl_server_credentials(
        [((folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())],
        (folder / "ca.crt").read_bytes(),
        require_client_auth=True,
    )
    server = grpc.server(ThreadPoolExecutor(32), options=SERVER_OPTIONS)
    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Down": grpc.unary_stream_rpc_method_handler(down),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Stream", handlers),))
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    server.start()
    sys.stdin.read()
    server.stop(0)


def call(home: Path, port: int, size: int) -> None:
    """Do what each line of stdin says."""
    folder = home / "operator"
    credentials = grpc.ssl_channel_credentials(
        (folder / "ca.crt").read_bytes(), (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes()
    )
    options = [*client_options(), ("grpc.max_reconnect_backoff_ms", 200)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        print("ok", flush=True)
        for line in sys.stdin:
            if line.strip() == "up":
                assert int(channel.stream_unary("/bare.Stream/Up", **_RAW)(chunks(size))) == size
            else:
                received = channel.unary_stream("/bare.Stream/Down", **_RAW)(b"")
                assert sum(map(len, received)) == size
            print("ok", flush=True)


if __name__ == "__main__":
    role, home, port, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    (serve if role == "server" else call)(home, port, size)
