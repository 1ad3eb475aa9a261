"""The Audit service: the log as it is stored, for auditors to verify themselves."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.audit import Entry
from fedcore.audit_heads import head_to_proto
from fedcore.audit_store import AuditLog
from fedcore.v1 import audit_pb2, audit_pb2_grpc
from fedserver.authorisation import authorise
from fedserver.call_audit import note
from fedserver.grants import Grants
from fedserver.interceptors import caller_of

_METHOD = "/fedcore.v1.Audit/ReadAudit"
_LOOK_EVERY_S = 0.5


class AuditService(audit_pb2_grpc.AuditServicer):
    """Streams the coordinator's audit log."""

    def __init__(self, log: AuditLog, grants: Grants) -> None:
        self._log = log
        self._grants = grants

    async def ReadAudit(  # noqa: N802 - the name in the contract
        self, request: audit_pb2.ReadAuditRequest, context: Any
    ) -> AsyncIterator[audit_pb2.AuditPart]:
        """Send the standing, then the records asked for; with `follow` also those that come, until the role is lost."""
        caller = caller_of(context)
        note("audit", after=request.after, last=request.last, follow=request.follow)
        head = self._log.head()
        position = request.after
        if request.last:
            position = max(position, head.sequence - request.last)
        yield audit_pb2.AuditPart(standing=self._standing())
        while True:
            # A page at a time, so that a long log neither fills memory nor holds the database's reader.
            while page := await asyncio.to_thread(self._log.entries, position):
                for entry in page:
                    yield _part(entry)
                position = page[-1].position
            if not request.follow:
                return
            await asyncio.sleep(_LOOK_EVERY_S)
            authorise(_METHOD, caller, self._grants.roles_of(caller))

    def _standing(self) -> audit_pb2.AuditStanding:
        return audit_pb2.AuditStanding(
            head=head_to_proto(self._log.head()),
            witnesses=[
                audit_pb2.AuditWitness(witness=one.witness, head=head_to_proto(one.head))
                for one in self._log.known()
            ],
            peers=[
                audit_pb2.AuditPeer(
                    peer=one.peer, head=head_to_proto(one.head), at=one.at, went_back=one.went_back
                )
                for one in self._log.peers()
            ],
        )


def _part(entry: Entry) -> audit_pb2.AuditPart:
    return audit_pb2.AuditPart(
        entry=audit_pb2.AuditEntry(position=entry.position, body=entry.body, digest=entry.digest)
    )
