"""Memory, utilisation and time used by a rank."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch

__all__ = ["ResourceMeter", "measure_utilization", "read_memory_metrics"]


class ResourceMeter:
    """Wall time, memory and utilisation of this rank; memory and utilisation are sampled at most twice a second.

    `before_s`: seconds of training in earlier generations.
    """

    SAMPLE_EVERY_S = 0.5

    def __init__(
        self,
        device: torch.device,
        threads: int,
        before_s: float = 0.0,
        measure_loader_cpu: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self.threads = threads
        self._clock = clock
        self._before_s = before_s
        self._measure_loader_cpu = measure_loader_cpu
        self._values: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Reset the clocks at the start of training."""
        self._start = self._last = self._sampled = self._clock()
        self._busy_s = time.process_time()

    def seconds(self) -> float:
        """Training time so far in seconds, including earlier generations."""
        return self._before_s + self._clock() - self._start

    def measure_wall_s(self) -> float:
        """Seconds since the previous call: the time of one update if called once per update."""
        now = self._clock()
        wall_s, self._last = now - self._last, now
        return wall_s

    def values(self) -> dict[str, float]:
        now = self._clock()
        if not self._values or now - self._sampled >= self.SAMPLE_EVERY_S:
            busy_s = time.process_time()
            utilization = measure_utilization(self.device, busy_s - self._busy_s, now - self._sampled, self.threads)
            self._sampled, self._busy_s = now, busy_s
            optional = {"device/utilization": utilization, "data/loader_cpu": self._measure_loader_cpu()}
            measured = {key: value for key, value in optional.items() if value is not None}
            self._values = read_memory_metrics(self.device) | measured
        return self._values


def read_memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory metrics: on a GPU peak allocated bytes and allocator retries; on a CPU peak RSS and major page faults."""
    if device.type != "cuda":
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"memory/peak_bytes": usage.ru_maxrss * 1024, "memory/major_faults": usage.ru_majflt}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory/peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        "memory/alloc_retries": stats.get("num_alloc_retries", 0),
    }


def measure_utilization(device: torch.device, busy_s: float, wall_s: float, threads: int) -> float | None:
    """Share of time the device was busy: from NVML on a GPU, process time over wall time x threads on a CPU."""
    if device.type == "cuda":
        try:
            return torch.cuda.utilization(device) / 100
        except Exception:  # NVML errors share no base class: omit the value rather than guess
            return None
    return min(1.0, busy_s / (wall_s * threads)) if wall_s > 0 else None
