"""How tune detects out-of-memory, and predicts it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from launcher.errors import UsageError
from launcher.tune.oom import compute_allowed_bytes, is_out_of_memory, predict_bytes, read_available_bytes

WORDINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("NPU out of memory. Tried to allocate 1.50 GiB (NPU 0; 61.28 GiB total capacity)"),
    RuntimeError("NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc 6291456 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 512 bytes from file: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: f"{type(error).__name__} {str(error)[:30]}")
def test_every_oom_message_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_cpu_allocator_error_is_oom() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)


def test_cause_of_error_counts_as_oom() -> None:
    error = UsageError("sample 3 cannot be read")
    assert not is_out_of_memory(error)
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (20x64 and 65x10)"),
        RuntimeError("Connection closed by peer [127.0.0.1]:1234"),
        ValueError("a dataset called out of memory"),
        KeyError("memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_other_errors_are_not_oom(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_available_bytes_respect_cgroup_limits(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    assert read_available_bytes(proc, groups) == 8000 * 1024
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    (groups / "job" / "memory.max").write_text("5000000\n")
    assert read_available_bytes(proc, groups) == 5_000_000
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/\n")
    (groups / "memory" / "old").mkdir(parents=True)
    (groups / "memory" / "old" / "memory.limit_in_bytes").write_text("3000000\n")
    assert read_available_bytes(proc, groups) == 3_000_000
    assert read_available_bytes(tmp_path / "none", groups) is None
    assert compute_allowed_bytes(1000, 2) == pytest.approx(460)


def test_memory_prediction_needs_two_smaller_sizes() -> None:
    assert predict_bytes(40, [(10, 1100)]) is None
    assert predict_bytes(40, [(10, 1100), (20, 1200)]) == pytest.approx(1400)
    assert predict_bytes(40, [(10, 1100), (20, 1200), (80, 9999)]) == pytest.approx(1400)
