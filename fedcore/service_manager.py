"""What a service tells systemd: READY, STATUS, WATCHDOG, STOPPING, as datagrams to $NOTIFY_SOCKET.

Without that variable (a terminal, a container) nothing is sent. The variables are taken out of the environment, so
that no child speaks for the service.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import asyncio
import os
import socket
from collections.abc import Callable, MutableMapping

import structlog

from fedcore.text import printable

_MAX_STATUS = 300
log = structlog.get_logger(__name__)


class ServiceManager:
    """`watchdog_s` is how long systemd waits for a sign of life, None if it does not watch. Nothing here ever raises."""

    def __init__(self, address: str, watchdog_s: float | None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> "ServiceManager":
        """The manager that started this process, if one did."""
        address, usec, pid = (
            environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        )
        watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address if address[:1] in ("/", "@") else "", int(usec) / 1e6 if watched else None)

    def ready(self) -> None:
        """The service serves."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """What the service does now: one line for `systemctl status`."""
        self._send(f"STATUS={printable(text, _MAX_STATUS)}")

    def stopping(self) -> None:
        """The service is about to end."""
        self._send("STOPPING=1")

    async def watch(self, stuck: Callable[[], str]) -> None:
        """Give a sign of life thrice in the time that systemd waits, while `stuck` has nothing to say. Until cancelled.

        `stuck` says in words what keeps the service from working; then no sign is given, and systemd starts the
        service again. Returns at once if systemd does not watch.
        """
        if self.watchdog_s is None:
            return
        told = ""
        while True:
            reason = stuck()
            if not reason:
                self._send("WATCHDOG=1")
            elif not told:
                log.error("no sign of life is given to the watchdog", reason=reason)
            told = reason
            await asyncio.sleep(self.watchdog_s / 3)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            log.debug("the service manager can't be told", message=message, error=str(error))
