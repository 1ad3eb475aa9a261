"""An update that reads as if it had moved less: what the gate makes of one that is too long to be merged as it is.

Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963, section 4 (norm bounding).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import DTYPE_BYTES, TensorManifest, TensorSpec
from fedserver.robust.norms import kind_of
from fedserver.tensor_source import TensorFile, TensorSource


@dataclass(frozen=True, slots=True)
class Shortened:
    """`update` with the share `kept` of its difference to `model`, by kind of tensors; other kinds stay as they are.

    Of what the model lacks (`aux/...`), the share of itself. Counted in float64, returned in the tensor's own dtype.
    """

    update: TensorSource
    model: TensorFile
    kept: Mapping[str, float]
    parameters: Collection[str]

    @property
    def manifest(self) -> TensorManifest:
        """What the update holds."""
        return self.update.manifest

    def read(self, spec: TensorSpec, first: int, count: int, buffer: bytearray) -> Tensor:
        """Elements `first` to `first + count` of a tensor, flat. Raises StorageError if a file has shrunk."""
        block = self.update.read(spec, first, count, buffer)
        share = self.kept.get(kind_of(spec.name, self.parameters))
        if share is None or not TORCH_DTYPES[spec.dtype].is_floating_point:
            return block
        if spec.name not in self.model.starts:
            return (block.double() * share).to(block.dtype)
        start = self.model.read(spec, first, count, bytearray(count * DTYPE_BYTES[spec.dtype])).double()
        return (start + (block.double() - start) * share).to(block.dtype)

    def whole(self, spec: TensorSpec) -> Tensor:
        """A whole tensor, flat, with its own memory; for small ones."""
        return self.read(spec, 0, spec.size_bytes // DTYPE_BYTES[spec.dtype], bytearray(spec.size_bytes))
