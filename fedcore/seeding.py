"""One rule for every seed: derived from the plan's seed and what it is for, never from a clock or a process."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for a purpose, the same on every machine: `derive_seed(plan.seed, "train", round, site)`."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
