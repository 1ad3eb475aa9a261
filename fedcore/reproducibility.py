"""What must hold in a process before it multiplies its first matrix, so that repeated work gives the same bytes."""

import os


def prepare() -> None:
    """Ask MKL for products whose last bits depend on nothing but their operands.

    MKL reads this at its first product. Without it they depend on where in memory the matrices happen to lie, and a repeated
    round gave other bytes. No torch is imported; what the environment says already stays.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
