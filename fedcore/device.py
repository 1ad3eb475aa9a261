"""Where a compute process computes: CPU or CUDA, how many threads, which precision. Needs torch.

On the CPU the same seed, threads and input give the same bytes; on CUDA speed comes first and nothing is
promised.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import nn

from fedcore import reproducibility
from fedcore.errors import ComputeError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_DEFAULT_THREADS = torch.get_num_threads()


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device made ready by `open_device`."""

    device: torch.device
    # "Intel(R) Xeon(R)", "NVIDIA H200".
    name: str
    threads: int

    @property
    def kind(self) -> str:
        """Either "cpu" or "cuda"."""
        return self.device.type

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def place(self, model: ModelT) -> ModelT:
        """Move a model here, its convolutions channels last: faster on tensor cores and on the CPU alike."""
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def low_precision(self, precision: Precision) -> torch.dtype | None:
        """The autocast dtype, None for float32.

        "auto" is float32 on the CPU, and bf16 on a GPU that has it. A CPU takes bf16 if asked: 1.6 times as fast
        where it has such instructions (AVX512-BF16, AMX), and slow elsewhere. It knows no fp16.
        """
        if precision == "fp32" or (not self.is_cuda and precision != "bf16"):
            return None
        if precision == "auto":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if precision == "bf16" else torch.float16

    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        """A context in which the forward pass runs in that precision."""
        dtype = self.low_precision(precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def holds(self, num_bytes: int) -> bool:
        """Whether so many bytes may stay on the device: on CUDA at most half of what is free."""
        return not self.is_cuda or num_bytes <= torch.cuda.mem_get_info(self.device)[0] // 2


def open_device(device: str, threads: int) -> ComputeDevice:
    """Choose and prepare a device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:N".

    `threads` = 0 leaves the number to PyTorch. Changes this process's torch settings: threads, determinism on
    the CPU, TF32 on CUDA. Raises ComputeError if there is no such device.
    """
    reproducibility.prepare()
    torch.set_num_threads(threads or _DEFAULT_THREADS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # The same as use_deterministic_algorithms(True, warn_only=True), without its import of torch._inductor:
        # 70 MB and a second of every compute process.
        torch.set_deterministic_debug_mode("warn")
        # Every tensor here is written before it is read: filling them would only take time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return ComputeDevice(torch.device("cpu"), _cpu_name(), torch.get_num_threads())
    if not torch.cuda.is_available():
        raise ComputeError(
            f"device '{device}' is configured, but PyTorch sees no CUDA device",
            hint="set compute.device to auto or cpu, or check the driver with nvidia-smi",
        )
    chosen = torch.device(device if ":" in device else "cuda:0")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ComputeError(
            f"device '{device}' is configured, but there are {torch.cuda.device_count()} CUDA devices"
        )
    torch.set_deterministic_debug_mode("default")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return ComputeDevice(chosen, torch.cuda.get_device_name(chosen), torch.get_num_threads())


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
