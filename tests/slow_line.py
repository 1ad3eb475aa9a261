"""A site's line to the coordinator: an HTTP CONNECT proxy that can stop carrying in the middle of a transfer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE_BYTES = 64 << 10


class SlowLine:
    """Listens on `port` of the loopback interface until it is closed. Carries everything, unless it is held."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._turn = threading.Condition()
        # What may still go up; None: all that comes.
        self._left_bytes: int | None = None
        self._ends: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    @contextmanager
    def held_after(self, num_bytes: int) -> Iterator[None]:
        """Carry this many bytes more from the site to the coordinator, and the rest once this is left."""
        self._allow(num_bytes)
        try:
            yield
        finally:
            self._allow(None)

    def close(self) -> None:
        """End all connections."""
        _shut(self._listener)  # wakes the thread that accepts
        self._listener.close()
        self._allow(None)
        _shut(*self._ends)

    def _allow(self, num_bytes: int | None) -> None:
        with self._turn:
            self._left_bytes = num_bytes
            self._turn.notify_all()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                site, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(site,), daemon=True).start()

    def _serve(self, site: socket.socket) -> None:
        self._ends.add(site)
        with site, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                if not (piece := site.recv(4096)):
                    return
                request += piece
            host, _, port = request.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as coordinator:
                self._ends.add(coordinator)
                site.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                up = threading.Thread(target=self._carry_up, args=(site, coordinator), daemon=True)
                up.start()
                with suppress(OSError):
                    while piece := coordinator.recv(_PIECE_BYTES):
                        site.sendall(piece)
                _shut(site, coordinator)
                up.join()
                self._ends.discard(coordinator)
        self._ends.discard(site)

    def _carry_up(self, site: socket.socket, coordinator: socket.socket) -> None:
        with suppress(OSError):
            while piece := site.recv(_PIECE_BYTES):
                with self._turn:
                    self._turn.wait_for(lambda: self._left_bytes != 0)
                    if self._left_bytes is not None:
                        self._left_bytes = max(0, self._left_bytes - len(piece))
                coordinator.sendall(piece)
        _shut(site, coordinator)


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
