"""The environment that grpc reads when it is imported: TLS 1.3 only, and no chatter of the C core on stderr.

Importing this module sets it, so it comes before `import grpc` in every module of ours that imports grpc:

    from fedcore import tls as _tls  # noqa: F401 - before grpc

    # isort: split
    import grpc

Python's grpc has no switch for the least TLS version. Its keys are ECDSA here; naming only a cipher suite
that needs an RSA key leaves TLS 1.2 nothing to agree on, while the suites of TLS 1.3 can't be switched off.
Seen to work with grpcio 1.85 if set before the import, and to do nothing if set after it.
"""

import os
import sys

# TLS 1.2, RSA authentication: never usable with our ECDSA keys.
UNUSABLE_TLS12_SUITE = "ECDHE-RSA-AES128-GCM-SHA256"

_CIPHERS = "GRPC_SSL_CIPHER_SUITES"
_in_time = True


def prepare() -> None:
    """Set the environment that grpc reads when it is imported. Harmless when repeated.

    The cipher suites are ours whatever the shell says; GRPC_VERBOSITY is set only if the shell does not set
    it.
    """
    global _in_time  # noqa: PLW0603 - one fact about this process
    if "grpc" in sys.modules and os.environ.get(_CIPHERS) != UNUSABLE_TLS12_SUITE:
        _in_time = False
    os.environ[_CIPHERS] = UNUSABLE_TLS12_SUITE
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def is_enforced() -> bool:
    """Whether the environment was set before grpc was imported, so that our ports refuse TLS 1.2."""
    return _in_time


prepare()
