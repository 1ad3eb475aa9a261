"""Follow a run until it has ended, through restarts of the coordinator."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from fedcore.errors import CallTimeoutError, UnreachableError
from fedctl.documents import FINAL_STATES
from fedctl.durations import format_duration

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2
    from fedctl.admin import Admin

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
# A coordinator that stays away so long is somebody's problem, no restart.
GIVE_UP_S = 600.0

T = TypeVar("T")


def follow_run(
    admin: "Admin",
    run: str,
    *,
    on_trouble: Callable[[str], None],
    timeout_s: float | None = None,
    give_up_s: float = GIVE_UP_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator["admin_pb2.Run"]:
    """Yield the run at once and after every change, last in its final state.

    Raises as `follow`.
    """

    def updates(left_s: float | None) -> Iterator["admin_pb2.Run"]:
        from fedcore.v1 import admin_pb2

        return admin.stream(lambda stub: stub.WatchRun, admin_pb2.GetRunRequest(run=run), left_s)

    yield from follow(
        updates, lambda update: update.state in FINAL_STATES, f"run {run}", admin.who,
        on_trouble=on_trouble, timeout_s=timeout_s, give_up_s=give_up_s, now=now, sleep=sleep,
    )  # fmt: skip


def follow(
    updates: Callable[[float | None], Iterator[T]],
    is_last: Callable[[T], bool],
    what: str,
    who: str,
    *,
    on_trouble: Callable[[str], None],
    timeout_s: float | None = None,
    give_up_s: float = GIVE_UP_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[T]:
    """Yield what streams bring until `is_last` of it. `updates(left_s)` opens a stream; it is asked for another
    whenever one ends too early. `what` is followed, `who` answers.

    A lost connection is opened again after a jittered pause; `on_trouble` hears of it, and hears "" once it
    is back. Raises CallTimeoutError after `timeout_s`, UnreachableError after `give_up_s` without a
    coordinator (at once if the first call finds none), and what the coordinator answers otherwise.
    """
    started = heard = now()
    pause_s = FIRST_PAUSE_S
    met = troubled = False
    while True:
        left_s = None if timeout_s is None else started + timeout_s - now()
        if left_s is not None and left_s <= 0:
            raise _timed_out(what, timeout_s)
        reason = "the stream ended"
        try:
            for update in updates(left_s):
                met, heard, pause_s = True, now(), FIRST_PAUSE_S
                if troubled:
                    troubled = False
                    on_trouble("")
                yield update
                if is_last(update):
                    return
        except UnreachableError as error:
            if not met:
                raise
            reason = error.message
        except CallTimeoutError as error:
            if timeout_s is not None and now() - started >= timeout_s - 0.05:
                raise _timed_out(what, timeout_s) from error
            reason = error.message
        if now() - heard > give_up_s:
            raise UnreachableError(
                f"{who}: away for {format_duration(now() - heard)}: {reason}",
                hint="the run goes on when the coordinator is back; look at its log",
            )
        troubled = True
        on_trouble(f"connection lost ({reason}); trying again")
        wait_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        sleep(wait_s if left_s is None else min(wait_s, max(0.0, left_s)))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _timed_out(what: str, timeout_s: float | None) -> CallTimeoutError:
    return CallTimeoutError(
        f"{what} has not ended within {format_duration(timeout_s or 0)}",
        hint="the run goes on; look at it with: fedctl run show",
    )
