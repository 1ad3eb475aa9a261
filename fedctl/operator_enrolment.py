"""An operator's credential for a token: the key is made on the operator's own machine."""

from datetime import datetime
from pathlib import Path

from fedcore.credential import split_address, write_credential
from fedcore.enrolling import redeem_token
from fedcore.enrollment_token import decode_token
from fedcore.errors import ConflictError, TokenError
from fedcore.identity import Subject
from fedcore.pki import new_key


def enroll_operator(
    folder: Path,
    *,
    coordinator: str,
    token: str,
    ca_fingerprint: str,
    now: datetime,
    proxy: str | None = None,
) -> Subject:
    """Exchange a token for an operator's credential, written to `folder`; gives the operator.

    Raises ConflictError if the folder is there, TokenError (also for a site's token), FingerprintError, UnreachableError
    and IdentityError. Whatever is raised, no credential is left; before anything was sent, the token is still good.
    """
    if folder.exists():
        raise ConflictError(
            f"{folder} is already there; nothing was changed", hint="give another --credential, or remove it"
        )
    split_address(coordinator)
    parsed = decode_token(token)
    if not parsed.operator:
        raise TokenError(
            f"the token is for site {parsed.site}, not for an operator",
            hint="at the site: fedagent enroll; an owner makes an operator's: fedctl enroll token create --operator NAME",
        )
    folder.parent.mkdir(
        mode=0o700, parents=True, exist_ok=True
    )  # before the token is used up, in case it can't be made
    key = new_key()
    issued = redeem_token(
        parsed, key, coordinator=coordinator, ca_fingerprint=ca_fingerprint, now=now, proxy=proxy
    )
    write_credential(
        folder,
        coordinator=coordinator.strip(),
        subject=issued.subject,
        key=key,
        chain=issued.chain,
        roots=issued.roots,
    )
    return issued.subject
