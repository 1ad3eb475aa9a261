"""A small HTTP CONNECT proxy, for tests: one that lets through, or one that opens TLS as inspecting proxies do.

usage: connect_proxy.py ADDRESS PORT [CERTIFICATE KEY]

With a certificate (a chain that names the host, of whatever CA) it ends TLS itself. Prints a line when it listens and one
for each CONNECT. Only the standard library: it also runs where nothing of fedimpres is installed.
"""

import asyncio
import contextlib
import ssl
import sys


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
    writer.close()


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shown: ssl.SSLContext | None
) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, where, _ = head.split("\r\n", 1)[0].split(" ")
        print(method, where, flush=True)
        host, _, port = where.rpartition(":")
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        beyond, beyond_writer = await asyncio.open_connection(
            host.strip("[]"), int(port), ssl=unverified if shown else None
        )
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        if shown:
            await writer.start_tls(shown)
    except (OSError, ssl.SSLError, ValueError, asyncio.IncompleteReadError):
        writer.close()
        return
    await asyncio.gather(_copy(reader, beyond_writer), _copy(beyond, writer))


async def main(address: str, port: int, certificate: list[str]) -> None:
    """Serve until the process ends."""
    shown = None
    if certificate:
        shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.load_cert_chain(*certificate)
        shown.set_alpn_protocols(["h2"])
    server = await asyncio.start_server(lambda r, w: _serve(r, w, shown), address, port)
    print("listening on", server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
