"""How programs talk gRPC: channel options, server and client credentials, and one table of deadlines and
retries.

Every call made through these channels has the deadline of the table unless its caller gives another, and only
idempotent calls are retried (exponential backoff, jittered by grpc), whoever makes them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from fedcore import tls
from fedcore.credential import Credential, load_credential
from fedcore.errors import ConfigError, InternalError
from fedcore.pki import certificates_from_pem, certificates_to_pem, root_of

# isort: split
import grpc

# Chunks are 1 MiB of payload; the rest is room for manifests and framing.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
KEEPALIVE_S = 15
KEEPALIVE_TIMEOUT_S = 10

Options = list[tuple[str, Any]]
Channel = TypeVar("Channel", grpc.Channel, grpc.aio.Channel)

_COMMON_OPTIONS: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

SERVER_OPTIONS: Options = [
    *_COMMON_OPTIONS,
    # A second coordinator must not bind the same port and share its agents.
    ("grpc.so_reuseport", 0),
    # A fixed window bounds what a sender can have in our memory: gRPC's own estimate grew to 16 MiB a connection.
    # 1 MiB carries 20 MB/s a site over a round trip of 50 ms, and the chunk that is waited for comes on top.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
    # A thousand agents that come at once wait their turn; gRPC would cancel who waited for 30 s, and turn away beyond 1,000
    # calls. Every call has its own deadline.
    ("grpc.server_max_unrequested_time_in_server", 600),
    ("grpc.server.max_pending_requests", 5000),
    ("grpc.server.max_pending_requests_hard_limit", 10_000),
    # Else the server answers keepalive pings with GOAWAY too_many_pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
]


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """Terms of one method.

    No deadline: a stream that lives as long as its connection, which keepalive watches.
    """

    deadline_s: float | None
    idempotent: bool = False


_QUICK = CallPolicy(10.0, idempotent=True)
_QUICK_ONCE = CallPolicy(10.0)
_WATCH = CallPolicy(None)
# Both directions resume from an offset, by a new call.
_TRANSFER = CallPolicy(3600.0)

CALLS: dict[str, CallPolicy] = {
    "/fedcore.v1.Federation/Hello": _QUICK,
    "/fedcore.v1.Federation/Directives": _WATCH,
    "/fedcore.v1.Federation/Fetch": _TRANSFER,
    "/fedcore.v1.Federation/DeliveryOffset": _QUICK,
    "/fedcore.v1.Federation/Deliver": _TRANSFER,
    "/fedcore.v1.Enrollment/Enroll": CallPolicy(30.0),
    "/fedcore.v1.Enrollment/RenewEnded": CallPolicy(30.0),
    "/fedcore.v1.Enrollment/RequestEnrollment": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Enrollment/CheckEnrollment": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Membership/CreateOperatorToken": _QUICK_ONCE,
    "/fedcore.v1.Membership/ListEnrollments": _QUICK,
    "/fedcore.v1.Membership/ApproveEnrollment": _QUICK,
    "/fedcore.v1.Membership/DenyEnrollment": _QUICK,
    # An answer that gets lost leaves a certificate that nobody has; asking again makes another.
    "/fedcore.v1.Certificates/Renew": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Certificates/ListCertificates": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Certificates/RevokeCertificates": _QUICK,
    "/fedcore.v1.Certificates/GetAuthority": _QUICK,
    "/fedcore.v1.Certificates/RotateAuthority": CallPolicy(30.0),
    "/fedcore.v1.Admin/WhoAmI": _QUICK,
    "/fedcore.v1.Admin/GetStatus": _QUICK,
    "/fedcore.v1.Admin/CreateToken": _QUICK_ONCE,
    "/fedcore.v1.Admin/ListSites": _QUICK,
    # Validating a plan and resolving its initial model may take a while; repeated by request_id.
    "/fedcore.v1.Admin/SubmitRun": CallPolicy(60.0, idempotent=True),
    "/fedcore.v1.Admin/ListRuns": _QUICK,
    "/fedcore.v1.Admin/GetRun": _QUICK,
    "/fedcore.v1.Admin/WatchRun": _WATCH,
    "/fedcore.v1.Admin/PauseRun": _QUICK_ONCE,
    "/fedcore.v1.Admin/ResumeRun": _QUICK_ONCE,
    "/fedcore.v1.Admin/AbortRun": _QUICK_ONCE,
    "/fedcore.v1.Admin/ListRounds": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Admin/ListModels": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Admin/Download": _TRANSFER,
    "/fedcore.v1.Admin/UploadModel": _TRANSFER,
    # A standing is asked for again without effect; a question to an agent is bounded by the coordinator (8 s).
    "/fedcore.v1.Sites/EnableSite": _QUICK,
    "/fedcore.v1.Sites/DrainSite": _QUICK,
    "/fedcore.v1.Sites/DisableSite": _QUICK,
    "/fedcore.v1.Sites/RemoveSite": _QUICK,
    "/fedcore.v1.Sites/PingSite": CallPolicy(15.0),
    "/fedcore.v1.Sites/ReadSiteLog": CallPolicy(15.0),
    "/fedcore.v1.Audit/ReadAudit": _WATCH,
    # It writes to the database, and waits for that.
    "/fedcore.v1.Operations/GetHealth": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Operations/GetConfig": _QUICK,
    "/fedcore.v1.Operations/SetDrain": _QUICK,
    "/fedcore.v1.Operations/GetSoftware": _QUICK,
    # The model is built to find its size, once the compute process is free.
    "/fedcore.v1.Operations/CheckPlan": CallPolicy(60.0, idempotent=True),
    "/fedcore.v1.Operations/WatchEvents": _WATCH,
    "/fedcore.v1.Operations/CollectBundle": CallPolicy(120.0),
    "/fedcore.v1.Impressions/ListImpressions": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Impressions/GetImpressions": CallPolicy(30.0, idempotent=True),
    "/fedcore.v1.Impressions/PreviewImpressions": _TRANSFER,
    "/fedcore.v1.Impressions/PurgeImpressions": CallPolicy(60.0, idempotent=True),
    "/fedcore.v1.Backup/CreateBackup": _TRANSFER,
    "/fedcore.v1.Access/GrantRole": _QUICK,
    "/fedcore.v1.Access/RevokeRole": _QUICK,
    "/fedcore.v1.Access/ListRoles": _QUICK,
    "/fedcore.v1.Access/CanI": _QUICK,
    "/grpc.health.v1.Health/Check": _QUICK,
    "/grpc.health.v1.Health/List": _QUICK,
    "/grpc.health.v1.Health/Watch": _WATCH,
}


def call_policy(method: str) -> CallPolicy:
    """Terms of a method, given by its full name (/package.Service/Method).

    Raises KeyError for an unknown one.
    """
    return CALLS[method]


def service_config() -> str:
    """The retries of the table, as grpc reads them.

    Not the deadlines: grpc takes the start of a call from the wall clock to find the end of a configured timeout, so that
    after a step back of a minute every call of a minute would be over before it began, until the program is restarted.
    """
    repeated = [method.split("/") for method, policy in CALLS.items() if policy.idempotent]
    retries = {
        "maxAttempts": 3,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": service, "method": name} for _, service, name in repeated]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": retries}]})


def client_options(proxy: str | None = None) -> Options:
    """Options of a channel, through the HTTP CONNECT proxy `proxy` (http://HOST:PORT) if given.

    The environment's proxies are never used: a service must not depend on the shell that started it.
    Raises ConfigError for a malformed proxy.
    """
    options = [
        *_COMMON_OPTIONS,
        ("grpc.service_config", service_config()),
        # 1,000 channels of one process would share a socket otherwise.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_reconnect_backoff_ms", 10_000),
    ]
    if proxy:
        parts = urlsplit(proxy)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise ConfigError(f"proxy {_without_password(proxy)!r} is not of the form http://HOST:PORT")
        options.append(("grpc.http_proxy", proxy))
    else:
        options.append(("grpc.enable_http_proxy", 0))
    return options


def open_channel(credential: Credential | Path, *, proxy: str | None = None) -> grpc.aio.Channel:
    """An asyncio channel to the credential's coordinator, over mutual TLS. Connects with the first call.

    The certificate that the coordinator shows must name the host dialled and lead to the credential's root.
    Raises ConfigError, IdentityError for a credential folder that is not usable.
    """
    loaded = _loaded(credential)
    return with_deadlines(
        grpc.aio.secure_channel(
            loaded.coordinator, _client_credentials(loaded), options=client_options(proxy)
        )
    )


def open_sync_channel(credential: Credential | Path, *, proxy: str | None = None) -> grpc.Channel:
    """The same as `open_channel`, for the synchronous API."""
    loaded = _loaded(credential)
    return with_deadlines(
        grpc.secure_channel(loaded.coordinator, _client_credentials(loaded), options=client_options(proxy))
    )


def open_enrollment_channel(address: str, ca_pem: bytes, *, proxy: str | None = None) -> grpc.Channel:
    """A synchronous channel to the enrolment port, which asks for no client certificate; `ca_pem` is the
    only root.
    """
    return with_deadlines(
        grpc.secure_channel(
            address, grpc.ssl_channel_credentials(root_certificates=ca_pem), options=client_options(proxy)
        )
    )


class _Timed:
    """A method of a stub that has a deadline unless its caller gives another."""

    def __init__(self, call: Callable[..., Any], deadline_s: float) -> None:
        self._call = call
        self._deadline_s = deadline_s

    def __call__(self, *args: Any, timeout: float | None = None, **options: Any) -> Any:
        return self._call(*args, timeout=self._deadline_s if timeout is None else timeout, **options)

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._call, name), timeout=self._deadline_s)  # with_call, future


def with_deadlines(channel: Channel) -> Channel:
    """Have the stubs that are made with a channel keep to the table."""
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        setattr(channel, kind, _timed(getattr(channel, kind)))
    return channel


def _timed(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(method: str, *args: Any, **options: Any) -> Any:
        call, policy = make(method, *args, **options), CALLS.get(method)
        return call if policy is None or policy.deadline_s is None else _Timed(call, policy.deadline_s)

    return made


def server_credentials(credential: Credential, *, require_client_certificate: bool) -> grpc.ServerCredentials:
    """TLS 1.3 for a port of the coordinator's.

    Raises InternalError if this process could still speak TLS 1.2.
    """
    if not tls.is_enforced():
        raise InternalError("grpc was imported before fedcore.tls: TLS 1.2 would be accepted")
    pair = (credential.key_pem, credential.chain_pem)
    if require_client_certificate:
        return grpc.ssl_server_credentials([pair], credential.ca_pem, require_client_auth=True)
    return grpc.ssl_server_credentials([_with_root(credential)])


def renewable_server_credentials(
    current: Callable[[], Credential], *, require_client_certificate: bool
) -> grpc.ServerCredentials:
    """TLS 1.3 for a port, with the credential that `current()` gives at each handshake: one that was renewed is
    served without a restart, and open connections go on. `current` is called in gRPC's threads.

    Raises InternalError if this process could still speak TLS 1.2.
    """
    if not tls.is_enforced():
        raise InternalError("grpc was imported before fedcore.tls: TLS 1.2 would be accepted")

    def configuration(credential: Credential) -> grpc.ServerCertificateConfiguration:
        if require_client_certificate:
            pair = (credential.key_pem, credential.chain_pem)
            return grpc.ssl_server_certificate_configuration([pair], credential.ca_pem)
        return grpc.ssl_server_certificate_configuration([_with_root(credential)], None)

    served = current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        newest = current()
        if newest is served:
            return None
        served = newest
        return configuration(newest)

    # The stubs don't know that None means: as before.
    fetcher = cast(Callable[[], grpc.ServerCertificateConfiguration], fetch)
    return grpc.dynamic_ssl_server_credentials(configuration(served), fetcher, require_client_certificate)


def _with_root(credential: Credential) -> tuple[bytes, bytes]:
    """Key and chain for the enrolment port. The chain ends with the root, for those who know its fingerprint only."""
    chain = certificates_from_pem(credential.chain_pem, "coordinator's chain")
    root = root_of(chain, certificates_from_pem(credential.ca_pem, "roots"))
    return credential.key_pem, certificates_to_pem([*chain, root])


def _client_credentials(credential: Credential) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credential.ca_pem, credential.key_pem, credential.chain_pem)


def _loaded(credential: Credential | Path) -> Credential:
    return load_credential(credential, datetime.now(UTC)) if isinstance(credential, Path) else credential


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
