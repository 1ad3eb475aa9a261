"""What one member, or one address, may take of the coordinator: calls a second, open calls, transfers, failed enrolments.

In memory only: a restart begins with full buckets. What is counted is the verified caller, or the address where there is
none; nobody's refusals cost anybody else.
"""

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from fedcore.channel import CALLS
from fedcore.errors import OverloadedError
from fedserver.config import LimitsConfig

_BURST_S = 5.0
_MAX_KEYS = 4096
# Calls that move tensors: those with a transfer's terms.
TRANSFERS = frozenset(
    method for method, policy in CALLS.items() if policy == CALLS["/fedcore.v1.Federation/Fetch"]
)


class Buckets:
    """A token bucket a key: `per_s` refill it, `burst` fill it. The keys that were used last are kept."""

    def __init__(self, per_s: float, burst: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._monotonic = monotonic
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> float:
        """Take one token: 0 if there was one, else the seconds until there is."""
        now = self._monotonic()
        left, at = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_s)
        taken = left >= 1
        self._left[key] = (left - taken, now)  # the one used last is last
        if len(self._left) > _MAX_KEYS:
            self._left.pop(next(iter(self._left)))
        return 0.0 if taken else (1 - left) / self._per_s


class Limits:
    """The limits of a coordinator. Every refusal is an OverloadedError that names who, what and how much."""

    def __init__(
        self, config: LimitsConfig | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config or LimitsConfig()
        per_s = self._config.requests_per_s
        self._calls = Buckets(per_s, max(1.0, per_s * _BURST_S), monotonic)
        per_min = self._config.failed_enrolments_per_min
        self._failures = Buckets(per_min / 60, max(1.0, per_min), monotonic)
        self._open: Counter[tuple[str, str]] = Counter()

    def called(self, who: str) -> None:
        """Count a call of a member. Raises OverloadedError."""
        if wait_s := self._calls.take(who):
            raise OverloadedError(
                f"{who} makes more than {self._config.requests_per_s:g} calls a second",
                hint=f"try again in {max(wait_s, 0.1):.1f} s; the limit is requests_per_s of [limits] in fedserver.toml",
            )

    @contextmanager
    def open(self, who: str, method: str) -> Iterator[None]:
        """Count a call that lasts, while it is open. Raises OverloadedError."""
        kinds = [("open_streams", "open calls", self._config.open_streams)]
        if method in TRANSFERS:
            kinds.append(("transfers", "transfers", self._config.transfers))
        for name, words, most in kinds:
            if self._open[name, who] >= most:
                raise OverloadedError(
                    f"{who} has {most} {words} already, the limit for one member",
                    hint=f"end some, or try again later; the limit is {name} of [limits] in fedserver.toml",
                )
        for name, _, _ in kinds:
            self._open[name, who] += 1
        try:
            yield
        finally:
            for name, _, _ in kinds:
                self._open[name, who] -= 1
                if not self._open[name, who]:
                    del self._open[name, who]

    def enrolment_failed(self, peer: str) -> None:
        """Count a refused enrolment of an address. Raises OverloadedError, in place of the refusal, once there are many."""
        address = address_of(peer)
        if wait_s := self._failures.take(address):
            raise OverloadedError(
                f"more than {self._config.failed_enrolments_per_min:g} refused enrolments a minute from {address}",
                hint=f"try again in {max(wait_s, 1.0):.0f} s; a good token is taken at any time",
            )


def address_of(peer: str) -> str:
    """Whom a peer of gRPC's ("ipv4:10.0.0.1:5", "ipv6:%5B::1%5D:5") counts as: an IPv4 address, or the /64 that an IPv6
    address is in, since one host may have all of it.
    """
    text = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return peer[:80]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    if address.is_loopback:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
