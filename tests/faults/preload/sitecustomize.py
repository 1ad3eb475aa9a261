"""For programs under libfaketime: their compute processes are not, whose time.sleep it breaks (EINVAL)."""

import os

os.environ.pop("LD_PRELOAD", None)
