"""Exceptions, gRPC statuses and exit codes: one table, used by servers, clients and command lines.

On the wire an error is a status, its message, and the trailing metadata `fedimpres-error-code` and
`fedimpres-error-hint` (percent-encoded UTF-8). A client rebuilds the same class from them.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO
from urllib.parse import quote, unquote

from fedcore import errors as e
from fedcore import tls as _tls  # noqa: F401 - before grpc

# isort: split
import grpc

CODE_KEY = "fedimpres-error-code"
HINT_KEY = "fedimpres-error-hint"
# gRPC drops calls whose metadata exceed 8 KiB; both texts go percent-encoded.
_MAX_ENCODED = 3000
_PRINTABLE = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"

EXIT_OK = 0
EXIT_DEGRADED = 8
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """How a class of errors looks outside: status on the wire, exit code of a command.

    `public` replaces the message on the wire where the message may tell what callers should not know.
    """

    status: grpc.StatusCode
    exit_code: int
    public: str | None = None


_S = grpc.StatusCode
_BUG = "the coordinator met an internal error"
TABLE: dict[type[e.FedimpresError], ErrorMapping] = {
    e.FedimpresError: ErrorMapping(_S.INTERNAL, EXIT_BUG, _BUG),
    e.ConfigError: ErrorMapping(_S.FAILED_PRECONDITION, 78),
    e.UsageError: ErrorMapping(_S.INVALID_ARGUMENT, 2),
    e.PlanError: ErrorMapping(_S.INVALID_ARGUMENT, 78),
    e.DataError: ErrorMapping(_S.FAILED_PRECONDITION, 1),
    e.CorruptImagesError: ErrorMapping(_S.FAILED_PRECONDITION, 1),
    e.TransferError: ErrorMapping(_S.INVALID_ARGUMENT, 1),
    e.TensorMismatchError: ErrorMapping(_S.INVALID_ARGUMENT, 1),
    e.NonFiniteError: ErrorMapping(_S.INVALID_ARGUMENT, 1),
    e.DigestMismatchError: ErrorMapping(_S.DATA_LOSS, 1),
    e.TruncatedStreamError: ErrorMapping(_S.DATA_LOSS, 1),
    e.IdentityError: ErrorMapping(_S.UNAUTHENTICATED, 4),
    e.TokenError: ErrorMapping(_S.UNAUTHENTICATED, 4),
    e.FingerprintError: ErrorMapping(_S.UNAUTHENTICATED, 4),
    e.PermissionDeniedError: ErrorMapping(_S.PERMISSION_DENIED, 4),
    e.NotFoundError: ErrorMapping(_S.NOT_FOUND, 6),
    e.ConflictError: ErrorMapping(_S.ALREADY_EXISTS, 7),
    e.TermError: ErrorMapping(_S.FAILED_PRECONDITION, 7),
    e.OverloadedError: ErrorMapping(_S.RESOURCE_EXHAUSTED, 1),
    e.QuotaError: ErrorMapping(_S.FAILED_PRECONDITION, 1),
    e.UnreachableError: ErrorMapping(_S.UNAVAILABLE, 3),
    e.ForeignCertificateError: ErrorMapping(_S.UNAVAILABLE, 3),
    e.HeldError: ErrorMapping(_S.UNAVAILABLE, 3),
    e.CallTimeoutError: ErrorMapping(_S.DEADLINE_EXCEEDED, 5),
    e.ProtocolError: ErrorMapping(_S.UNIMPLEMENTED, 1),
    e.EmptyRoundError: ErrorMapping(_S.FAILED_PRECONDITION, 1),
    e.LearningError: ErrorMapping(_S.ABORTED, 1),
    e.ComputeError: ErrorMapping(_S.ABORTED, 1),
    e.AuditError: ErrorMapping(_S.DATA_LOSS, 1),
    e.BackupError: ErrorMapping(_S.DATA_LOSS, 1),
    e.StorageError: ErrorMapping(_S.INTERNAL, 1, "the coordinator's storage failed; its log says more"),
    e.DiskError: ErrorMapping(_S.INTERNAL, 1, "the coordinator's disk took no more; its log says more"),
    e.InternalError: ErrorMapping(_S.INTERNAL, EXIT_BUG, _BUG),
}

# What a status means that carries no code of ours: grpc itself made it, or a proxy.
_FOREIGN: dict[grpc.StatusCode, type[e.FedimpresError]] = {
    _S.UNAVAILABLE: e.UnreachableError,
    _S.CANCELLED: e.UnreachableError,
    _S.UNKNOWN: e.UnreachableError,
    _S.DEADLINE_EXCEEDED: e.CallTimeoutError,
    _S.UNAUTHENTICATED: e.IdentityError,
    _S.PERMISSION_DENIED: e.PermissionDeniedError,
    _S.NOT_FOUND: e.NotFoundError,
    _S.ALREADY_EXISTS: e.ConflictError,
    _S.RESOURCE_EXHAUSTED: e.OverloadedError,
    _S.UNIMPLEMENTED: e.ProtocolError,
    _S.INVALID_ARGUMENT: e.ProtocolError,
    _S.DATA_LOSS: e.TransferError,
}

# What grpc.aio says when the other side ended a stream, with a status that got lost, while this one was sending.
_CUT = "Internal error from Core"

_FOREIGN_CERTIFICATE = (
    "the other side's certificate is not of this federation: check the address, the credential and whether a proxy "
    "inspects TLS"
)
# Pieces of grpc's texts, and what to do about them. First match wins.
_CONNECTION_HINTS = (
    (
        "certificate has expired",
        "the coordinator's certificate has ended: it renews it by itself while it runs and when it starts, so its log "
        "says what fails; check this clock as well",
    ),
    ("not yet valid", "check this machine's clock"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        _FOREIGN_CERTIFICATE,
    ),
    (
        "Hostname Verification Check failed",
        "the coordinator's certificate does not name this host: dial the name given to 'fedserver init'",
    ),
    ("WRONG_VERSION_NUMBER", "no TLS is spoken there: check the port"),
    ("errors resolving", "the name can't be resolved: check the host's spelling and DNS"),
    ("address lookup failed", "the name can't be resolved: check the host's spelling and DNS"),
    ("Connection refused", "nothing listens there: check host and port, and that fedserver is running"),
    (
        "Socket closed",
        "the coordinator closed the connection: it refuses this certificate (other federation, ended, none), "
        "speaks no TLS 1.3, or was just stopped",
    ),
    (
        "Connection reset",
        "the coordinator closed the connection: it refuses this certificate, or was just stopped",
    ),
)


def mapping_of(error: BaseException) -> ErrorMapping:
    """The table's row for an error; that of InternalError for exceptions that are not ours."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return TABLE[e.InternalError]


def exit_code_of(error: BaseException) -> int:
    """Exit code of a command that ends with this error."""
    return mapping_of(error).exit_code


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str, Metadata]:
    """Status, public message and trailing metadata that tell a caller about an error."""
    row = mapping_of(error)
    known = isinstance(error, e.FedimpresError)
    code = error.code if isinstance(error, e.FedimpresError) else e.InternalError.code
    message = row.public if row.public is not None or not known else error.message  # type: ignore[attr-defined]
    hint = error.hint if isinstance(error, e.FedimpresError) and row.public is None else ""
    metadata: Metadata = ((CODE_KEY, code),)
    if hint:
        metadata += ((HINT_KEY, quote(_clip(hint), safe=_PRINTABLE)),)
    return row.status, _clip(message or _BUG), metadata


def _clip(text: str) -> str:
    """Cut a text so that its percent-encoded form stays within the limit of metadata."""
    if len(quote(text, safe=_PRINTABLE)) <= _MAX_ENCODED:
        return text
    kept, length = [], 0
    for character in text:
        length += len(quote(character, safe=_PRINTABLE))
        if length > _MAX_ENCODED - 12:
            break
        kept.append(character)
    return "".join(kept) + "…"


def from_rpc_error(error: grpc.RpcError, who: str) -> e.FedimpresError:
    """The exception that the other side raised, or what grpc says about the connection to it.

    `who` names the other side and opens messages about the connection. Takes errors of grpc and grpc.aio
    alike.
    """
    status, details = _status_of(error)
    metadata = _text_metadata(error)
    kind = e.BY_CODE.get(metadata.get(CODE_KEY, ""))
    if kind is not None:
        return kind(details or kind.__doc__ or kind.code, hint=unquote(metadata.get(HINT_KEY, "")))
    if details == _CUT:
        return e.TruncatedStreamError(f"{who}: closed the stream while this side was still sending")
    kind = _FOREIGN.get(status, e.InternalError)
    if kind is e.UnreachableError:
        hint = _connection_hint(details)
        kind = e.ForeignCertificateError if hint == _FOREIGN_CERTIFICATE else e.UnreachableError
        return kind(f"{who}: {_useful_part(details)}", hint=hint)
    if kind is e.CallTimeoutError:
        return e.CallTimeoutError(
            f"{who}: no answer in time", hint="try again; 'fedctl status' shows what it is doing"
        )
    if kind is e.ProtocolError:
        return e.ProtocolError(
            f"{who}: {details or status.name}",
            hint="is that the right port, and the same version of fedimpres?",
        )
    return kind(f"{who}: {details or status.name}")


def report(error: BaseException, stream: TextIO | None = None) -> int:
    """Print an error the way every command does, to stderr; give the exit code.

    error[code]: message
    hint: what to do
    """
    stream = stream or sys.stderr
    code = error.code if isinstance(error, e.FedimpresError) else e.InternalError.code
    message = error.message if isinstance(error, e.FedimpresError) else f"{type(error).__name__}: {error}"
    print(f"error[{code}]: {message}", file=stream)
    hint = (
        error.hint if isinstance(error, e.FedimpresError) else "this is a bug of fedimpres: please report it"
    )
    if hint:
        print(f"hint: {hint}", file=stream)
    return exit_code_of(error)


def _status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return error.code(), error.details() or ""
    return _S.UNKNOWN, str(error)


def _text_metadata(error: grpc.RpcError) -> dict[str, str]:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return {}
    pairs: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _useful_part(details: str) -> str:
    """Grpc's text without its nesting: 'failed to connect to all addresses; last error: UNKNOWN: ...'."""
    text = details.rsplit("last error: ", 1)[-1]
    text = re.sub(r"^[A-Z_]+: ", "", text)
    text = re.sub(r":?\s*\(?TSI_PROTOCOL_FAILURE\)?", "", text)
    text = re.sub(r": OK$", "", text)
    return text.strip() or "no connection"


def _connection_hint(details: str) -> str:
    lowered = details.lower()
    for piece, hint in _CONNECTION_HINTS:
        if piece.lower() in lowered:
            return hint
    return "check the address, the network and that fedserver is running"
