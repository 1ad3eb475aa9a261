"""The enrolment token as the operator hands it to a site: one opaque string.

base64url of a JSON object with the token's id and secret, the site it is for, the enrolment port and the root
certificate. The string is a secret until it is used or has expired.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.errors import TokenError
from fedcore.plan import Name

MAX_CHARACTERS = 16_384
_VERSION = 1


@dataclass(frozen=True, slots=True)
class EnrollmentToken:
    """What a token says. `secret` proves that its bearer was given it."""

    id: str
    secret: str = field(repr=False)
    site: str
    port: int
    ca_pem: str = field(repr=False)

    def encode(self) -> str:
        """The opaque string."""
        document = {
            "v": _VERSION,
            "id": self.id,
            "secret": self.secret,
            "site": self.site,
            "port": self.port,
            "ca": self.ca_pem,
        }
        data = json.dumps(document, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(data).decode().rstrip("=")


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    v: int
    id: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    secret: str = Field(min_length=16, max_length=256)
    site: Name
    port: int = Field(ge=1, le=65535)
    ca: str = Field(max_length=8192)


def decode_token(text: str) -> EnrollmentToken:
    """Read a token. Raises TokenError if it is not one (cut off when it was copied, mostly)."""
    hint = "copy the whole token, or ask the operator for a new one: fedctl enroll token create --site SITE"
    compact = "".join(text.split())
    if not compact or len(compact) > MAX_CHARACTERS:
        raise TokenError(f"enrolment token of {len(compact)} characters is not one of ours", hint=hint)
    try:
        data = base64.b64decode(compact + "=" * (-len(compact) % 4), altchars=b"-_", validate=True)
        document = _Document.model_validate(json.loads(data))
    except (binascii.Error, ValueError, ValidationError, RecursionError):
        # The cause may quote the secret: not chained.
        raise TokenError("enrolment token can't be read: it is damaged or cut off", hint=hint) from None
    if document.v != _VERSION:
        raise TokenError(
            f"enrolment token has version {document.v}, this agent reads {_VERSION}",
            hint="update fedimpres at the site",
        )
    return EnrollmentToken(document.id, document.secret, document.site, document.port, document.ca)
