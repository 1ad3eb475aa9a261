"""Every exception that fedimpres raises on purpose.

FedimpresError
├── ConfigError              a configuration file is wrong
│   └── PlanError            a run's plan is wrong
├── DataError                a site's images or labels are wrong
│   └── CorruptImagesError   more unreadable images than the plan allows
├── TransferError            bytes on the wire are wrong
│   ├── TensorMismatchError  a tensor's name, shape, dtype or count is not the expected one
│   ├── NonFiniteError       an update holds NaN or Inf
│   ├── DigestMismatchError  the bytes are not those that the digest names
│   └── TruncatedStreamError the stream ended early or has a gap
├── IdentityError            who is calling is not proved
│   ├── TokenError           an enrolment token is unknown, used, expired or for another site
│   └── FingerprintError     the root certificate is not the pinned one
├── PermissionDeniedError    who is calling may not do this
├── NotFoundError            no such run, round, site or artifact
├── ConflictError            the request contradicts what is already there
├── TermError                a coordinator of an earlier term than is known: it was replaced by a restored one
├── OverloadedError          admission is full; try again later
├── QuotaError               a run would take more of the coordinator's disk than its quota leaves
├── UnreachableError         no connection, or TLS failed
│   ├── ForeignCertificateError  who answers shows a certificate that is not of the federation
│   └── HeldError            a restored coordinator that serves nobody yet
├── CallTimeoutError         the other side did not answer in time
├── ProtocolError            the other side speaks another protocol version, or breaks the protocol
├── EmptyRoundError          nothing to aggregate
├── LearningError            training, aggregation or synthesis can't go on (a NaN loss, say)
├── ComputeError             a compute process died or refused a command
├── AuditError               an audit log was tampered with
├── BackupError              a backup is damaged, cut, or not for this key
├── StorageError             a database or artifact file is damaged, locked or full
│   └── DiskError            the disk took no more: full, read-only or failing
└── InternalError            our own bug

An exception names who, what, expected and got; its `hint` says what to do. `code` is stable and has
a section in docs/errors.md.
"""


class FedimpresError(Exception):
    """Base of all. `code` is the stable name of the error's kind; `hint` says what to do next."""

    code = "internal"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The message, followed by the hint."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(FedimpresError):
    """A configuration file is wrong."""

    code = "config_invalid"


class UsageError(ConfigError):
    """A command was called in a way that it can't be."""

    code = "usage"


class PlanError(ConfigError):
    """A run's plan is wrong."""

    code = "plan_invalid"


class DataError(FedimpresError):
    """A site's images or labels are wrong."""

    code = "data_invalid"


class CorruptImagesError(DataError):
    """More images can't be read than the plan allows."""

    code = "data_corrupt"


class TransferError(FedimpresError):
    """Bytes on the wire are wrong."""

    code = "transfer_invalid"


class TensorMismatchError(TransferError):
    """A tensor's name, shape, dtype or the number of tensors is not the expected one."""

    code = "tensor_mismatch"


class NonFiniteError(TransferError):
    """An update holds NaN or Inf."""

    code = "update_not_finite"


class DigestMismatchError(TransferError):
    """The bytes are not those that the digest names."""

    code = "digest_mismatch"


class TruncatedStreamError(TransferError):
    """A stream ended before all bytes had come, or has a gap."""

    code = "stream_truncated"


class IdentityError(FedimpresError):
    """Who is calling is not proved."""

    code = "unauthenticated"


class TokenError(IdentityError):
    """An enrolment token is unknown, used, expired or for another site."""

    code = "token_refused"


class FingerprintError(IdentityError):
    """The root certificate is not the pinned one."""

    code = "fingerprint_mismatch"


class PermissionDeniedError(FedimpresError):
    """Who is calling may not do this."""

    code = "permission_denied"


class NotFoundError(FedimpresError):
    """No such run, round, site or artifact."""

    code = "not_found"


class ConflictError(FedimpresError):
    """The request contradicts what is already there."""

    code = "conflict"


class TermError(FedimpresError):
    """The coordinator is of an earlier term than one that is known: it was replaced by a restored one."""

    code = "term_over"


class OverloadedError(FedimpresError):
    """Admission is full; the caller may try again later."""

    code = "overloaded"


class QuotaError(FedimpresError):
    """A run would take more of the coordinator's disk than its quota leaves."""

    code = "quota"


class UnreachableError(FedimpresError):
    """No connection to the other side, or TLS failed."""

    code = "unreachable"


class ForeignCertificateError(UnreachableError):
    """Who answers shows a certificate that does not lead to the federation's root."""

    code = "foreign_certificate"


class HeldError(UnreachableError):
    """The coordinator was restored from a backup and serves nobody until revocations made since are given."""

    code = "coordinator_held"


class CallTimeoutError(FedimpresError):
    """The other side did not answer in time."""

    code = "timeout"


class ProtocolError(FedimpresError):
    """The other side speaks another protocol version, or breaks the protocol."""

    code = "protocol"


class EmptyRoundError(FedimpresError):
    """Nothing to aggregate."""

    code = "round_empty"


class LearningError(FedimpresError):
    """Training, aggregation or synthesis can't go on."""

    code = "learning_failed"


class ComputeError(FedimpresError):
    """A compute process died or refused a command."""

    code = "compute_failed"


class AuditError(FedimpresError):
    """An audit log was tampered with, or does not fit what the other side has seen of it."""

    code = "audit_broken"


class BackupError(FedimpresError):
    """A backup is damaged, cut off, or can't be opened with this passphrase or key."""

    code = "backup_invalid"


class StorageError(FedimpresError):
    """A database or an artifact file is damaged, locked or full."""

    code = "storage"


class DiskError(StorageError):
    """The disk took no more: it is full, read-only or failing. What was to be written is not there."""

    code = "disk"


class InternalError(FedimpresError):
    """Our own bug."""

    code = "internal"


def code_of(error: BaseException) -> str:
    """The code of an error of ours, the class of another: what may be told where the message may not."""
    return error.code if isinstance(error, FedimpresError) else type(error).__name__


def all_error_classes() -> list[type[FedimpresError]]:
    """Every exception class below FedimpresError, itself first."""
    found: list[type[FedimpresError]] = [FedimpresError]
    for parent in found:
        found.extend(parent.__subclasses__())
    return found


BY_CODE: dict[str, type[FedimpresError]] = {c.code: c for c in all_error_classes() if c is not FedimpresError}
