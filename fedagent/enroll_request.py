"""Enrolment without a token: the site makes its key, files a request, and an operator approves or denies it.

    enrolling/tls.key        the key that the request is for, mode 0600
    enrolling/ca.crt         the root, found to be the one that was named by its fingerprint
    enrolling/request.toml   what was asked of whom; written last: without it the folder counts for nothing

The request is known by its key's fingerprint, so a site that is killed meanwhile goes on with the same one. The root comes
from the enrolment port, which shows its whole chain: whatever is between may show another, but not one of this fingerprint.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedagent.config import AgentHome
from fedagent.enroll import Enrolled, finish, keep_credential, proxy_of, refuse_enrolled
from fedagent.line import Line, shown_chain
from fedcore.config import ConfigSection, load_config
from fedcore.credential import join_address, split_address
from fedcore.enrolling import ask_enrollment, checked_reply
from fedcore.errors import (
    CallTimeoutError,
    ConfigError,
    ConflictError,
    FingerprintError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    UnreachableError,
)
from fedcore.identity import is_name
from fedcore.pki import (
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    key_fingerprint,
    key_from_pem,
    key_to_pem,
    make_request,
    new_key,
    normalise_fingerprint,
    verify_chain,
)
from fedcore.plan import Name
from fedcore.private_files import check_private, make_folder, write_file
from fedcore.text import printable
from fedcore.v1 import enrollment_pb2

# What passes by itself: the coordinator is away or busy, or the table of requests is full.
_PASSING = (UnreachableError, CallTimeoutError, OverloadedError)
_ASK_EVERY_S = 5.0
_MAX_ASK_EVERY_S = 60.0


class RequestFile(ConfigSection):
    """request.toml."""

    site: Name
    coordinator: str
    enroll_port: int
    ca_fingerprint: str


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request under way: its terms, its key and the root that the coordinator must be below."""

    terms: RequestFile
    key: ec.EllipticCurvePrivateKey
    root: x509.Certificate

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, hex: what the operator compares."""
        return key_fingerprint(self.key.public_key())

    @property
    def address(self) -> str:
        """HOST:PORT of the enrolment port."""
        return join_address(split_address(self.terms.coordinator)[0], self.terms.enroll_port)


def prepare_request(
    home: Path,
    *,
    site: str,
    coordinator: str,
    ca_fingerprint: str,
    enroll_port: int,
    proxy: str | None = None,
    force: bool = False,
) -> OpenRequest:
    """The request under way in `home`, or a new one: its key made, the coordinator's root fetched and pinned. Nothing of
    this site is sent yet.

    Raises ConflictError if the home is enrolled or another request is under way there (unless `force`), ConfigError,
    FingerprintError, UnreachableError.
    """
    paths = AgentHome(home)
    refuse_enrolled(paths, force=force)
    if not is_name(site):
        raise ConfigError(
            f"{site!r:.80} is not a site name",
            hint="lower-case letters, digits, '.', '_' and '-', 63 at most, first and last a letter or digit",
        )
    split_address(coordinator)
    terms = RequestFile(
        site=site,
        coordinator=coordinator.strip(),
        enroll_port=enroll_port,
        ca_fingerprint=normalise_fingerprint(ca_fingerprint),
    )
    if (paths.enrolling / "request.toml").is_file():
        found = _load(paths.enrolling)
        if found.terms == terms:
            return found
        if not force:
            raise ConflictError(
                f"{home}: another request is under way, of site {found.terms.site} at {found.terms.coordinator}",
                hint="repeat it as it was, or begin anew with --force",
            )
    root = _fetch_root(terms, proxy_of(paths, proxy))
    return _begin(paths, terms, root)


def pursue_request(
    home: Path,
    request: OpenRequest,
    *,
    wait_s: float | None,
    proxy: str | None = None,
    force: bool = False,
    told: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Enrolled:
    """File the request if the coordinator does not know it, and ask until it is decided, for at most `wait_s` seconds
    (None: for ever). `told` gets what it waits for, whenever that changes.

    Raises CallTimeoutError while it is not decided, PermissionDeniedError once it is denied (the key is gone then),
    IdentityError for an answer that is not what was asked for. What passes by itself is waited for.
    """
    paths = AgentHome(home)
    proxy = proxy_of(paths, proxy)
    until = None if wait_s is None else monotonic() + wait_s
    pause_s, last = _ASK_EVERY_S, ""
    while True:
        try:
            state = _ask(request, proxy)
            waits_for = "the operator's decision"
            pause_s = _ASK_EVERY_S
        except _PASSING as error:
            state, waits_for = None, str(error)
            pause_s = min(2 * pause_s, _MAX_ASK_EVERY_S)
        if state is not None and state.state == "approved":
            return _accept(paths, request, state.enrolled, proxy, force=force)
        if state is not None and state.state == "denied":
            shutil.rmtree(paths.enrolling, ignore_errors=True)
            raise PermissionDeniedError(
                f"the request of site {request.terms.site} was denied"
                + (f": {state.reason}" if state.reason else ""),
                hint="talk to the federation's operator; asking again makes a new key",
            )
        if waits_for != last:
            told(f"waiting for {waits_for}" if state is not None else f"not asked yet: {waits_for}")
            last = waits_for
        nap_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        if until is not None and monotonic() + nap_s > until:
            raise CallTimeoutError(
                f"site {request.terms.site} is not let in yet: it waits for {waits_for}",
                hint="the request stands; call the same command again",
            )
        sleep(nap_s)


def _ask(request: OpenRequest, proxy: str | None) -> enrollment_pb2.EnrollmentState:
    """What became of the request; it is filed if the coordinator does not know it (any more)."""
    check = enrollment_pb2.CheckEnrollmentRequest(key_fingerprint=request.fingerprint)
    file = enrollment_pb2.RequestEnrollmentRequest(
        site=request.terms.site, csr_pem=make_request(request.key, request.terms.site).decode()
    )
    try:
        return ask_enrollment(
            request.address, request.root, lambda stub: stub.CheckEnrollment(check), proxy=proxy
        )
    except NotFoundError:
        return ask_enrollment(
            request.address, request.root, lambda stub: stub.RequestEnrollment(file), proxy=proxy
        )


def _accept(
    paths: AgentHome,
    request: OpenRequest,
    reply: enrollment_pb2.EnrollReply,
    proxy: str | None,
    *,
    force: bool,
) -> Enrolled:
    terms = request.terms
    issued = checked_reply(reply, "site", terms.site, request.key, request.root, datetime.now(UTC))
    keep_credential(paths, issued, request.key, terms.coordinator, terms.enroll_port, replace=force)
    shutil.rmtree(paths.enrolling, ignore_errors=True)
    return finish(paths, issued, proxy)


def _fetch_root(terms: RequestFile, proxy: str | None) -> x509.Certificate:
    """The root that the enrolment port shows at the end of its chain, if it is the pinned one and the chain holds.

    Raises UnreachableError, FingerprintError, IdentityError, ProtocolError.
    """
    host, _ = split_address(terms.coordinator)
    where = join_address(host, terms.enroll_port)
    try:
        shown = shown_chain(Line(host, terms.enroll_port, proxy))
    except ValueError as error:
        raise ProtocolError(
            f"enrolment at {where}: shows certificates that can't be read: {error}"
        ) from error
    except OSError as error:
        raise UnreachableError(
            f"enrolment at {where}: {error}",
            hint="is that the coordinator's enrolment port (--enroll-port), and is it open?",
        ) from error
    pinned = [one for one in shown if fingerprint(one) == terms.ca_fingerprint]
    if not pinned:
        last = shown[-1].subject.rfc4514_string() if shown else "nothing"
        raise FingerprintError(
            f"enrolment at {where} shows a chain that ends with {printable(last, 200)!r}, without the root "
            f"{terms.ca_fingerprint}; "
            "nothing was sent",
            hint="compare --ca-fingerprint with the operator ('fedctl cert ca show'; while the CA is replaced, the "
            "previous one's); if it is right, something between opens TLS, or that is another service",
        )
    verify_chain(shown[: shown.index(pinned[0])], pinned[0], f"enrolment at {where}")
    return pinned[0]


def _begin(paths: AgentHome, terms: RequestFile, root: x509.Certificate) -> OpenRequest:
    """Make the key and keep it with the terms, before anything is asked for with it."""
    make_folder(paths.root)
    shutil.rmtree(paths.enrolling, ignore_errors=True)
    make_folder(paths.enrolling)
    key = new_key()
    write_file(paths.enrolling / "tls.key", key_to_pem(key))
    write_file(paths.enrolling / "ca.crt", certificates_to_pem([root]), mode=0o644)
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in terms.model_dump().items())
    write_file(paths.enrolling / "request.toml", "".join(lines).encode(), mode=0o644)
    return OpenRequest(terms, key, root)


def _load(folder: Path) -> OpenRequest:
    """The request under way. Raises ConfigError, IdentityError for files that are missing, malformed or not private."""
    terms = load_config(folder / "request.toml", RequestFile)
    key_path = folder / "tls.key"
    check_private(key_path)
    try:
        key = key_from_pem(key_path.read_bytes(), str(key_path))
        roots = certificates_from_pem((folder / "ca.crt").read_bytes(), str(folder / "ca.crt"))
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read: {error}", hint="begin anew with --force") from error
    if fingerprint(roots[0]) != terms.ca_fingerprint:
        raise FingerprintError(f"{folder}: ca.crt is not the root that request.toml names")
    return OpenRequest(terms, key, roots[0])
