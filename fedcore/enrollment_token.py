"""The enrolment token as it is handed to a site's people or to an operator: one opaque string.

base64url of a JSON object with the token's id and secret, the site or the operator it is for, the enrolment port and
the root certificate. The string is a secret until it is used or has expired.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.errors import TokenError
from fedcore.parsing import parse_json
from fedcore.plan import Name

MAX_CHARACTERS = 16_384
_VERSION = 1
# How every token of this version begins: base64url of `{"v":1,"id":"`. Who sees it in a log can take it out.
TOKEN_BEGINNING = "eyJ2IjoxLCJpZCI6"  # noqa: S105 - the same for all


@dataclass(frozen=True, slots=True)
class EnrollmentToken:
    """What a token says. `secret` proves that its bearer was given it. It is for a site or for an operator: the other
    name is empty.
    """

    id: str
    secret: str = field(repr=False)
    site: str
    port: int
    ca_pem: str = field(repr=False)
    operator: str = ""

    def encode(self) -> str:
        """The opaque string."""
        document = {
            "v": _VERSION,
            "id": self.id,
            "secret": self.secret,
            **({"operator": self.operator} if self.operator else {"site": self.site}),
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
    site: Name | Literal[""] = ""
    operator: Name | Literal[""] = ""
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
        document = _Document.model_validate(parse_json(data))
    except (binascii.Error, ValueError, ValidationError):
        # The cause may quote the secret: not chained.
        raise TokenError("enrolment token can't be read: it is damaged or cut off", hint=hint) from None
    if document.v != _VERSION:
        raise TokenError(
            f"enrolment token has version {document.v}, this program reads {_VERSION}",
            hint="update fedimpres here",
        )
    if bool(document.site) == bool(document.operator):
        raise TokenError("enrolment token names neither a site nor an operator, or both", hint=hint)
    return EnrollmentToken(
        document.id, document.secret, document.site, document.port, document.ca, document.operator
    )
