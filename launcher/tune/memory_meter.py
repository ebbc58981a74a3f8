"""Read the peak memory of a measurement: what torch reserved on a GPU, resident memory on a CPU."""

from __future__ import annotations

import torch

from launcher.goodput.throughput_model import MEMORY_SHARE
from launcher.tune.oom import PeakRss

__all__ = ["CudaMemoryMeter", "HostMemoryMeter", "make_memory_meter"]


class CudaMemoryMeter:
    """Memory that torch has reserved on the device, which other programs cannot use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._initial_retries = 0

    def clear(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._initial_retries = self._count_retries()

    def read(self) -> tuple[int, int, bool]:
        """Peak in bytes, allocation retries, and whether the peak exceeds the allowed share of memory."""
        peak = torch.cuda.max_memory_reserved(self._device)
        total = torch.cuda.get_device_properties(self._device).total_memory
        return peak, self._count_retries() - self._initial_retries, peak > MEMORY_SHARE * total

    def _count_retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


class HostMemoryMeter:
    """Resident memory of this process."""

    def __init__(self, allowed_bytes: float | None) -> None:
        self._allowed = allowed_bytes
        self._peak = PeakRss()

    def clear(self) -> None:
        self._peak.clear()

    def read(self) -> tuple[int, int, bool]:
        peak = self._peak.read()
        return peak, 0, self._allowed is not None and peak > self._allowed


def make_memory_meter(device: torch.device, allowed_bytes: float | None) -> CudaMemoryMeter | HostMemoryMeter:
    return CudaMemoryMeter(device) if device.type == "cuda" else HostMemoryMeter(allowed_bytes)
