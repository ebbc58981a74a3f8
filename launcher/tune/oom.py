"""Detect out-of-memory errors; on a CPU, where the process would be killed instead, predict them."""

from __future__ import annotations

import errno
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.goodput.throughput_model import MEMORY_SHARE, fit_line

__all__ = ["PeakRss", "compute_allowed_bytes", "is_out_of_memory", "predict_bytes", "read_available_bytes"]

#: Out-of-memory messages of drivers, libraries and allocators, in lower case.
OOM_MESSAGES = (
    "out of memory",  # CUDA, HIP, NPU, XPU and MPS, by torch or by their driver
    "outofmemory",
    "cudaerrormemoryallocation",
    "hiperroroutofmemory",
    "_status_alloc_failed",  # cuBLAS, cuSOLVER, cuSPARSE, cuDNN, hipBLAS
    "rocblas_status_memory_error",
    "failed to cuda calloc",  # NCCL
    "can't allocate memory",  # torch's allocator on the CPU
    "cannot allocate memory",  # the kernel
    "unable to allocate",  # numpy
    "std::bad_alloc",
)
_OOM_ERROR_TYPES = (RuntimeError, OSError)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, reports that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if _reports_out_of_memory(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _reports_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, _OOM_ERROR_TYPES) and any(wording in text for wording in OOM_MESSAGES)


class PeakRss:
    """Peak resident memory of this process since the last `clear`."""

    STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def clear(self) -> None:
        with suppress(OSError):  # if the kernel does not allow it, the peak counts from process start
            self.CLEAR.write_text("5")

    def read(self) -> int:
        with suppress(OSError):
            for line in self.STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Available memory of this machine, capped by the cgroup limits; None if unknown."""
    return min(
        [*_read_free_memory(proc / "meminfo"), *_read_cgroup_limits(proc / "self" / "cgroup", cgroups)], default=None
    )


def _read_free_memory(meminfo: Path) -> list[int]:
    with suppress(OSError):
        return [
            int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line[:13] == "MemAvailable:"
        ]
    return []


def _read_cgroup_limits(membership: Path, cgroups: Path) -> list[int]:
    """Memory limits of this process's cgroup and its ancestors, for cgroups v1 and v2."""
    limits: list[int] = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root, name = (cgroups / "memory", "memory.limit_in_bytes") if kinds else (cgroups, "memory.max")
            innermost = root / path.lstrip("/")
            for folder in (innermost, *innermost.parents):
                with suppress(OSError, ValueError):  # "max", or not visible in this container
                    limits.append(int((folder / name).read_text()))
                if folder == root:
                    break
    return limits


def predict_bytes(size: int, probes: Sequence[tuple[int, int]]) -> float | None:
    """Predict a size's memory by a line through the (size, bytes) of smaller sizes; None with fewer than two."""
    smaller = [probe for probe in probes if probe[0] < size]
    if len({probe[0] for probe in smaller}) < 2:
        return None
    sizes, peaks = zip(*smaller, strict=True)
    return fit_line(sizes, peaks, [0.0] * len(smaller)).predict(size).value


def compute_allowed_bytes(available: int | None, local_world: int) -> float | None:
    """The memory that each worker on this machine may use."""
    return None if available is None else MEMORY_SHARE * available / local_world
