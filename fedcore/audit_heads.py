"""Heads of audit logs as they stand in a hello."""

from fedcore.audit import Head, is_digest
from fedcore.errors import ProtocolError
from fedcore.v1 import audit_pb2

_MAX_SEQUENCE = 2**63 - 1


def head_to_proto(head: Head) -> audit_pb2.AuditHead:
    """A head as it goes over the wire."""
    return audit_pb2.AuditHead(sequence=head.sequence, digest=head.digest if head.sequence else "")


def head_from_proto(message: audit_pb2.AuditHead, who: str) -> Head:
    """A head that came over the wire; that of an empty log if it is unset. Raises ProtocolError."""
    if message.sequence == 0 and not message.digest:
        return Head()
    if not 0 < message.sequence <= _MAX_SEQUENCE or not is_digest(message.digest):
        raise ProtocolError(
            f"{who}: audit head {message.sequence}:{message.digest[:80]!r}, expected a number from 1 and a SHA-256"
        )
    return Head(message.sequence, message.digest)
