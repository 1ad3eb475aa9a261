"""The version of the wire protocol, and who can talk to whom.

Same major version: compatible. A coordinator serves agents of its own minor version or one behind; an agent needs a
coordinator at least as new as itself.
"""

from fedcore.errors import ProtocolError
from fedcore.v1 import federation_pb2

PROTOCOL = federation_pb2.ProtocolVersion(major=1, minor=1)
# Metadata key of Directives that names the session a hello opened.
SESSION_KEY = "fedimpres-session"
# Metadata keys of the answer to a health check: seconds since the epoch, MAJOR.MINOR, the software's version.
TIME_KEY = "fedimpres-time"
PROTOCOL_KEY = "fedimpres-protocol"
VERSION_KEY = "fedimpres-version"


def check_version(other: federation_pb2.ProtocolVersion, who: str) -> None:
    """Check the version that an agent speaks. Raises ProtocolError."""
    oldest = max(0, PROTOCOL.minor - 1)
    if other.major != PROTOCOL.major or not oldest <= other.minor <= PROTOCOL.minor:
        raise ProtocolError(
            f"{who} speaks protocol {other.major}.{other.minor}, this coordinator speaks "
            f"{PROTOCOL.major}.{oldest} to {PROTOCOL.major}.{PROTOCOL.minor}",
            hint="upgrade the coordinator first, then the agents",
        )
