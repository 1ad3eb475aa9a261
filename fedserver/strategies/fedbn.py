"""FedBN: FedAvg whose normalisation layers stay at the sites, against shift of camera, stain and scanner.

The coordinator's model keeps the normalisation layers it started with: each site's own model, the shared
layers with its own normalisation, is what is evaluated and used.

Source: Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
arXiv:2102.07623, Algorithm 1.
"""

from collections.abc import Collection, Sequence
from typing import ClassVar

from fedserver.strategies.fedavg import FedAvg


class FedBN(FedAvg):
    """Federated averaging of everything but the normalisation layers."""

    name: ClassVar[str] = "fedbn"

    def local_tensors(self, names: Sequence[str], norm_names: Collection[str]) -> tuple[str, ...]:
        """Every tensor of a normalisation layer, in the model's order."""
        return tuple(name for name in names if name in norm_names)
