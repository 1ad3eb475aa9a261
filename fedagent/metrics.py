"""The agent's metrics. Nothing here tells of images but how many are trained on in a second."""

import asyncio
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from fedagent.agent_machine import Task
from fedagent.status_file import AgentStatus
from fedagent.transfer import Transfers
from fedcore.credential import load_credential
from fedcore.errors import FedimpresError
from fedcore.v1 import federation_pb2


@dataclass(frozen=True, slots=True)
class Seen:
    """The parts that are looked at; `home` and `credential` are folders."""

    status: Callable[[], AgentStatus]
    working: Callable[[], Task | None]
    transfers: Transfers
    home: Path
    credential: Path


class AgentMetrics:
    """The gauges. `look` sets them; `said` is told every message to the coordinator."""

    def __init__(self, seen: Seen, registry: CollectorRegistry) -> None:
        self._seen = seen
        self._speed = 0.0

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(f"fedimpres_agent_{name}", says, labels, registry=registry)

        def counter(name: str, says: str) -> Counter:
            return Counter(f"fedimpres_agent_{name}", says, registry=registry)

        self._connected = gauge("connected", "Whether the coordinator's stream is open.")
        self._contact = gauge(
            "last_contact_seconds", "Since the connection was lost, or the start; 0 while connected."
        )
        self._takes_work = gauge("takes_work", "0 while paused, outside working hours, or unable.")
        self._task = gauge("task", "Whether a task of this kind is in progress.", "kind")
        self._speed_shown = gauge(
            "images_per_second", "Training speed, by the newest progress; 0 while not training."
        )
        self._left = gauge("certificate_left_seconds", "Until the site's certificate ends.")
        self._free = gauge("disk_free_bytes", "Room in the agent's home.")
        self._size = gauge("disk_size_bytes", "Size of that file system.")
        self._received = counter("received_bytes", "Payload fetched from the coordinator.")
        self._sent = counter("sent_bytes", "Payload of updates handed to the connection.")
        self._received_before = self._sent_before = 0

    def said(self, message: federation_pb2.AgentMessage) -> None:
        """Take a training's speed from its progress."""
        if message.WhichOneof("message") == "progress":
            speed = message.progress.images_per_s
            self._speed = speed if math.isfinite(speed) else 0.0

    async def look(self) -> None:
        """Set every gauge to what is true now."""
        now, status, working = datetime.now(UTC), self._seen.status(), self._seen.working()
        self._connected.set(status.connected)
        self._contact.set(0.0 if status.connected else max(0.0, (now - status.since).total_seconds()))
        self._takes_work.set(not status.refusal)
        for kind in ("train", "recalibrate", "evaluate"):
            self._task.labels(kind).set(working is not None and working.kind == kind)
        self._speed_shown.set(self._speed if working is not None and working.kind == "train" else 0.0)
        transfers = self._seen.transfers
        self._received.inc(transfers.fetched_bytes - self._received_before)
        self._sent.inc(transfers.delivered_bytes - self._sent_before)
        self._received_before, self._sent_before = transfers.fetched_bytes, transfers.delivered_bytes
        usage = await asyncio.to_thread(shutil.disk_usage, self._seen.home)
        self._free.set(usage.free)
        self._size.set(usage.total)
        try:
            credential = await asyncio.to_thread(
                load_credential, self._seen.credential, now, allow_expired=True
            )
        except FedimpresError:  # being replaced, or damaged: the agent itself says so
            self._left.set(math.nan)
        else:
            self._left.set((credential.certificate.not_valid_after_utc - now).total_seconds())
