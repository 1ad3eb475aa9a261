"""Enrolment, seen from the site: a key that never leaves it, a token, a pinned root; in the end a
credential folder.

Nothing is sent before the root in the token has been found to be the one that the operator named by its
fingerprint. Without a token: `fedagent.enroll_request`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedagent.config import AgentConfig, AgentHome
from fedagent.line import Line, explain_foreign_certificate
from fedcore.config import load_config
from fedcore.credential import split_address, write_credential
from fedcore.enrolling import Issued, redeem_token
from fedcore.enrollment_token import EnrollmentToken, decode_token
from fedcore.errors import ConflictError, ForeignCertificateError, TokenError
from fedcore.pki import new_key
from fedcore.private_files import make_folder, write_file

DEFAULT_CONFIG = """\
# What this site does, and what it allows. Checked by: fedagent check-config --home DIR

[data]
# npz | folder | csv | medmnist, or the name of an installed reader.
kind = "npz"
# path = "/srv/images/train.npz"            # `fedagent serve --data PATH` overrides it
# class_names = ["benign", "malignant"]     # what the numbers in an npz file mean
# validation_fraction = 0.1                 # held out where the data has no split of its own
# test_fraction = 0.2

[compute]
device = "auto"          # auto | cpu | cuda | cuda:N
threads = 0              # 0: PyTorch's choice

[policy]
# Counts per class of held-out images would tell the coordinator this site's class histogram.
share_class_metrics = false

[privacy]
# Compare impressions with this site's images, and refuse those that come too near one (docs/privacy.md).
check_impressions = true
"""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What enrolment gave this site."""

    site: str
    federation: str
    not_after: datetime
    credential: Path


def enroll(
    home: Path,
    *,
    coordinator: str,
    token: str,
    ca_fingerprint: str,
    proxy: str | None = None,
    force: bool = False,
) -> Enrolled:
    """Exchange a token for this site's credential in `home`, and write a commented agent.toml if there is
    none.

    Raises ConflictError if the home is enrolled already (unless `force`), TokenError, FingerprintError,
    UnreachableError and IdentityError. Whatever is raised, credential and configuration are as they were.
    """
    paths = AgentHome(home)
    refuse_enrolled(paths, force=force)
    split_address(coordinator)
    parsed = decode_token(token)
    if parsed.operator:
        raise TokenError(
            f"the token is for operator {parsed.operator}, not for a site",
            hint="on that operator's machine: fedctl context enroll NAME --coordinator ... --token ...",
        )
    proxy = proxy_of(paths, proxy)
    was_there = home.exists()
    if not was_there:
        make_folder(home)  # before the token is used up, in case it can't be made
    try:
        key = new_key()
        issued = _redeem(parsed, key, coordinator, ca_fingerprint, proxy)
        keep_credential(paths, issued, key, coordinator, parsed.port, replace=force)
    except BaseException:
        if not was_there and not any(home.iterdir()):
            home.rmdir()
        raise
    return finish(paths, issued, proxy)


def _redeem(
    token: EnrollmentToken,
    key: ec.EllipticCurvePrivateKey,
    coordinator: str,
    ca_fingerprint: str,
    proxy: str | None,
) -> Issued:
    try:
        return redeem_token(
            token,
            key,
            coordinator=coordinator,
            ca_fingerprint=ca_fingerprint,
            now=datetime.now(UTC),
            proxy=proxy,
        )
    except ForeignCertificateError as error:
        line = Line(split_address(coordinator)[0], token.port, proxy)
        raise explain_foreign_certificate(error, line, token.ca_pem.encode()) from error


def refuse_enrolled(paths: AgentHome, *, force: bool) -> None:
    """Raise ConflictError if the home holds a credential, unless `force`."""
    if paths.credential.exists() and not force:
        raise ConflictError(
            f"{paths.root} is enrolled already; nothing was changed",
            hint="use --force to replace its credential",
        )


def proxy_of(paths: AgentHome, proxy: str | None) -> str | None:
    """The proxy that was given, else that of agent.toml if there is one. Raises ConfigError."""
    if proxy is None and paths.config.is_file():
        return load_config(paths.config, AgentConfig).proxy
    return proxy


def keep_credential(
    paths: AgentHome,
    issued: Issued,
    key: ec.EllipticCurvePrivateKey,
    coordinator: str,
    enroll_port: int,
    *,
    replace: bool,
) -> None:
    """Write the credential folder as a whole. Raises ConflictError if it is there and may not be replaced."""
    write_credential(
        paths.credential,
        coordinator=coordinator.strip(),
        subject=issued.subject,
        key=key,
        chain=issued.chain,
        roots=issued.roots,
        enroll_port=enroll_port,
        replace=replace,
    )


def finish(paths: AgentHome, issued: Issued, proxy: str | None) -> Enrolled:
    """Write a commented agent.toml if there is none; say what enrolment gave."""
    if not paths.config.exists():
        write_file(paths.config, _config_toml(proxy).encode())
    subject, until = issued.subject, issued.chain[0].not_valid_after_utc
    return Enrolled(subject.id, subject.federation, until, paths.credential)


def _config_toml(proxy: str | None) -> str:
    line = f'proxy = "{proxy}"\n' if proxy else '# proxy = "http://proxy.example.org:3128"\n'
    head, separator, rest = DEFAULT_CONFIG.partition("\n\n")
    about = "# HTTP CONNECT proxy to the coordinator; the environment's (https_proxy, ...) is never used.\n"
    return head + separator + about + line + "\n" + rest
