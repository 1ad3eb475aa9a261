"""Training that trains nothing, for benchmarks of everything else: the model `noop` and its update.

Neither torch nor data is touched: the global model's bytes are mapped, one element changes, and the file is
written.
"""

import mmap
import struct
import time

from fedagent.trainer import TrainRequest, TrainResult
from fedcore.compute_worker import Job
from fedcore.errors import PlanError, TensorMismatchError
from fedcore.seeding import derive_seed
from fedcore.tensor_file import read_manifest, write_tensor_file


def train_noop(request: TrainRequest, job: Job) -> TrainResult:
    """Write the global model with another first float32 element, different for every site and round.

    Raises StorageError if the model is damaged, TensorMismatchError if it has no float32 tensor to change, PlanError for a
    coded update.
    """
    began = time.monotonic()
    if request.plan.transfer.updates != "lossless":
        raise PlanError(
            f"{request.who}: the model 'noop' sends its update as it is; leave transfer.updates out"
        )
    job.progress(stage="training", done=0, total=1, loss=None, images_per_s=0.0)
    manifest, payload = read_manifest(request.model)
    offsets = manifest.offsets()
    local = set(request.local_tensors)
    specs = [spec for spec in manifest.tensors if spec.name not in local]
    changed = next((spec for spec in specs if spec.dtype == "F32" and spec.size_bytes), None)
    if changed is None:
        raise TensorMismatchError(f"{request.who}: the model has no float32 tensor to change")
    with request.model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        at = payload + offsets[changed.name][0]
        (value,) = struct.unpack_from("<f", mapped, at)
        struct.pack_into("<f", mapped, at, _moved(value, request))
        with memoryview(mapped) as view:
            tensors = {
                spec.name: (spec, view[payload + start : payload + stop])
                for spec in specs
                for start, stop in [offsets[spec.name]]
            }
            digest = write_tensor_file(request.out, tensors)
            for _, part in tensors.values():
                part.release()
    job.progress(stage="training", done=1, total=1, loss=0.0, images_per_s=0.0)
    return TrainResult(digest, 1, 1, 0.0, 0, time.monotonic() - began)


def _moved(value: float, request: TrainRequest) -> float:
    """`value` plus a step in [0.5, 1), all of a length as the gate wants them; the step alone where it would not show."""
    seed = derive_seed(request.plan.seed, "noop", request.round, request.site)
    step = 0.5 + seed / 2**63 * 0.5
    return value + step if abs(value) < 1000 else step
