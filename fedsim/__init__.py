"""A whole federation in one process, for research: the same rounds, strategies and trainer, no sockets.

    import fedsim
    from fedcore.data.benchmark_sets import load_benchmark

    federation = load_benchmark("digits", sites=4, alpha=0.1, seed=0)
    result = fedsim.run(plan, federation, out=Path("first"))

On the CPU, with the same number of threads, a simulated run gives bit for bit the numbers of the same plan
over gRPC. Importing this package does not import torch; calling `run` does.
"""

from typing import TYPE_CHECKING, Any

from fedcore import reproducibility

if TYPE_CHECKING:
    from fedsim.runs import Result, run

__all__ = ["Result", "run"]

reproducibility.prepare()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    from fedsim import runs

    return getattr(runs, name)
