"""An agent of an earlier version, as bytes: it sends what that version sent, and reads what comes with its classes.

`record.py` made the files, with that version's code: a file an RPC, each message as its bytes and, in words, as what it
meant. Nothing here knows today's messages. Names that differ from federation to federation (runs, digests, tokens) are
put in as bytes of the same length, which leaves the encoding as it was.
"""

import base64
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from fedcore.channel import open_enrollment_channel, open_sync_channel
from fedcore.credential import load_credential
from fedcore.pki import certificates_from_pem
from tests.federation_fixture import PROBE, Federation, noop_plan

# isort: split
import grpc

HERE = Path(__file__).parent
PARAMS = 60
FEDERATION, ENROLLMENT = "/fedcore.v1.Federation/", "/fedcore.v1.Enrollment/"
# Makes the requests of an RPC, in order, from names of this federation.
Make = Callable[[str, dict[str, str]], list[bytes]]


@dataclass(frozen=True)
class Recorded:
    """A message of an earlier version: its bytes and its meaning, fields by name."""

    kind: str
    data: bytes
    meaning: dict[str, Any]


@dataclass(frozen=True)
class Rpc:
    """What went both ways in one RPC."""

    method: str
    requests: tuple[Recorded, ...]
    replies: tuple[Recorded, ...]


@dataclass(frozen=True)
class Version:
    """An earlier version's messages."""

    folder: Path

    @property
    def names(self) -> dict[str, str]:
        """What was called how in the federation that was recorded."""
        return dict(json.loads((self.folder / "names.json").read_text()))

    def rpcs(self) -> dict[str, Rpc]:
        """By full method name."""
        found = {}
        for path in sorted(self.folder.glob("*-*.json")):
            document = json.loads(path.read_text())
            found[document["method"]] = Rpc(
                document["method"],
                *(tuple(map(_message, document[way])) for way in ("requests", "replies")),
            )
        return found

    def make(self, method: str, names: dict[str, str]) -> list[bytes]:
        """The recorded requests of an RPC, with this federation's names in them."""
        made = []
        for request in self.rpcs()[method].requests:
            data = request.data
            for key, name in names.items():
                recorded = self.names[key]
                assert len(recorded) == len(name), f"{key}: {recorded} and {name} differ in length"
                data = data.replace(recorded.encode(), name.encode())
            made.append(data)
        return made

    @cache  # noqa: B019 - a handful of versions
    def descriptors(self) -> descriptor_pb2.FileDescriptorSet:
        """What that version knew of the messages."""
        return descriptor_pb2.FileDescriptorSet.FromString((self.folder / "descriptors.binpb").read_bytes())

    def parse(self, kind: str, data: bytes) -> Any:
        """A message as that version reads it."""
        return _classes(self)[kind].FromString(data)


@cache
def _classes(version: Version) -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for file in version.descriptors().file:
        pool.Add(file)
    return dict(
        message_factory.GetMessageClassesForFiles([file.name for file in version.descriptors().file], pool)
    )


def _message(document: dict[str, Any]) -> Recorded:
    return Recorded(document["kind"], base64.b64decode(document["bytes"]), document["meaning"])


def versions() -> list[Version]:
    """All that were recorded."""
    return [Version(path.parent) for path in sorted(HERE.glob("*/names.json"))]


class OldAgent:
    """Speaks for the site PROBE, in bytes. `said` holds what the coordinator answered, by method."""

    def __init__(self, federation: Federation, make: Make) -> None:
        self._federation = federation
        self._make = make
        self._credential = load_credential_of(federation)
        self._channel = open_sync_channel(self._credential)
        self.said: dict[str, list[bytes]] = {}

    def close(self) -> None:
        self._channel.close()

    def ask(self, name: str, names: dict[str, str]) -> bytes:
        """One question, one answer."""
        method = FEDERATION + name
        (request,) = self._make(method, names)
        reply: bytes = self._channel.unary_unary(method)(request, timeout=20)
        self.said[method] = [reply]
        return reply

    def fetch(self, names: dict[str, str]) -> None:
        method = FEDERATION + "Fetch"
        (request,) = self._make(method, names)
        self.said[method] = list(self._channel.unary_stream(method)(request, timeout=20))

    def deliver(self, names: dict[str, str]) -> None:
        method = FEDERATION + "Deliver"
        parts = self._make(method, names)
        self.said[method] = [self._channel.stream_unary(method)(iter(parts), timeout=20)]

    def enrolment(self, name: str, names: dict[str, str]) -> None:
        """One question on the enrolment port."""
        method = ENROLLMENT + name
        (request,) = self._make(method, names)
        address = f"127.0.0.1:{self._federation.enroll_port}"
        with open_enrollment_channel(address, self._credential.ca_pem) as channel:
            self.said[method] = [channel.unary_unary(method)(request, timeout=20)]

    def directives(self, session: str) -> "Stream":
        return Stream(self, self._channel, session)


class Stream:
    """The directive stream: what is queued goes up, what comes down is kept."""

    def __init__(self, agent: OldAgent, channel: grpc.Channel, session: str) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.method = FEDERATION + "Directives"
        call = channel.stream_stream(self.method)
        self._replies: Iterator[bytes] = call(
            iter(self._outbox.get, None), metadata=(("fedimpres-session", session),), timeout=60
        )
        self._kept = agent.said.setdefault(self.method, [])

    def say(self, message: bytes) -> None:
        self._outbox.put(message)

    def next(self) -> bytes:
        self._kept.append(next(self._replies))
        return self._kept[-1]

    def end(self) -> None:
        self._outbox.put(None)


def load_credential_of(federation: Federation) -> Any:
    from datetime import UTC, datetime

    return load_credential(federation.site_home(PROBE) / "credential", datetime.now(UTC))


def play(
    federation: Federation, agent: OldAgent, make: Make, parse: Callable[[str, bytes], Any], token: Any
) -> dict[str, str]:
    """A whole run of one round as the site PROBE, and an enrolment. Gives the names that were used.

    `parse(kind, bytes)` reads an answer; `token` is an EnrollmentToken for PROBE.
    """
    names = {"token_id": token.id, "token_secret": token.secret}
    agent.enrolment("Enroll", names)
    session = parse("fedcore.v1.HelloReply", agent.ask("Hello", {})).session
    stream = agent.directives(session)

    def directive(kind: str) -> Any:
        while True:
            found = parse("fedcore.v1.Directive", stream.next())
            if found.WhichOneof("directive") == kind:
                return getattr(found, kind)

    directive("stop")
    names["run"] = federation.submit(noop_plan(PARAMS, (PROBE,), rounds=1, name="old-agent"))
    task = directive("train")
    assert task.run == names["run"]
    names["model"] = task.model.digest
    *before, evaluation = make(stream.method, names)
    for message in before:
        stream.say(message)
    agent.fetch(names)
    agent.ask("DeliveryOffset", names)
    agent.deliver(names)
    assert directive("evaluate").run == names["run"]
    stream.say(evaluation)
    federation.wait(names["run"])
    stream.end()
    return names


def serials(pem: str) -> list[int]:
    """Serial numbers of the certificates in a chain."""
    return [certificate.serial_number for certificate in certificates_from_pem(pem.encode(), "chain")]
