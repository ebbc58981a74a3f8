"""Whether a machine is quiet enough to measure on: fixed CPU work beside the runs, and what other processes used.

A measurement on a busy machine has a noise larger than what is measured, and its median looks like a result. So each
run lies between two calibrations, and the CPU time of everything else that ran meanwhile is counted.
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Calibration", "CpuClock", "CpuUse", "Limits", "calibrate", "find_disturbances"]

BLOCK = bytes(1 << 20)
REPEATS = 3


@dataclass(frozen=True)
class Limits:
    """Above any of these a machine is busy."""

    load_per_core: float = 0.5  # load average over a minute, before anything was started
    other_share: float = 0.03  # CPU time of other processes, of all the cores' time
    steal_share: float = 0.01  # time that the hypervisor gave to other machines
    wall_over_cpu: float = 1.05  # of the fixed work: it had to wait for its core
    cpu_over_best: float = 1.10  # of the fixed work, over its fastest: a slower clock, or a neighbour on the same core


@dataclass(frozen=True)
class Calibration:
    """The time of the fixed work, done by as many threads as there are cores at once: of the slowest of them."""

    wall_s: float
    cpu_s: float

    @property
    def wall_over_cpu(self) -> float:
        return self.wall_s / self.cpu_s


@dataclass(frozen=True)
class CpuUse:
    """What all cores did during `wall_s` seconds. `own_s`: CPU time of the measured job and of this process."""

    wall_s: float
    cores: int
    busy_s: float
    steal_s: float
    own_s: float

    @property
    def other_share(self) -> float:
        """CPU time of other processes as a share of all cores' time."""
        return max(0.0, self.busy_s - self.own_s) / (self.wall_s * self.cores)

    @property
    def steal_share(self) -> float:
        return self.steal_s / (self.wall_s * self.cores)


class CpuClock:
    """Measures the `CpuUse` from its creation on. Every process of the job must have ended and been waited for."""

    def __init__(self) -> None:
        self._begin = self._read()

    def read(self) -> CpuUse:
        wall_s, busy_s, steal_s, own_s = (now - before for now, before in zip(self._read(), self._begin, strict=True))
        return CpuUse(wall_s, os.cpu_count() or 1, busy_s, steal_s, own_s)

    @staticmethod
    def _read() -> tuple[float, float, float, float]:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = time.process_time() + children.ru_utime + children.ru_stime
        return time.perf_counter(), (user + nice + system + irq + softirq) * tick_s, steal * tick_s, own_s


def calibrate(cores: int | None = None, blocks: int = 100) -> Calibration:
    """Hash `blocks` MiB on each core at once; of a few repeats the median by wall time."""
    found = [_calibrate_once(cores or len(os.sched_getaffinity(0)), blocks) for _ in range(REPEATS)]
    return sorted(found, key=lambda one: one.wall_s)[REPEATS // 2]


def _calibrate_once(cores: int, blocks: int) -> Calibration:
    times: list[tuple[float, float]] = []

    def work() -> None:  # hashing releases the GIL
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        digest = hashlib.sha256()
        for _ in range(blocks):
            digest.update(BLOCK)
        times.append((time.perf_counter() - wall_s, time.thread_time() - cpu_s))

    threads = [threading.Thread(target=work) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Calibration(*max(times))


def find_disturbances(
    calibrations: Sequence[Calibration], uses: Sequence[CpuUse], best_cpu_s: float, limits: Limits
) -> list[str]:
    """Why measurements made between these calibrations do not count; empty if the machine was quiet.

    `best_cpu_s` is the least CPU time that the fixed work has taken on this machine. The measured values play no part
    in it, so that throwing pairs away favours no result.
    """
    waited = max((one.wall_over_cpu for one in calibrations), default=0.0)
    slowed = max((one.cpu_s / best_cpu_s for one in calibrations), default=0.0)
    other = max((use.other_share for use in uses), default=0.0)
    stolen = max((use.steal_share for use in uses), default=0.0)
    return [
        text
        for value, limit, text in (
            (waited, limits.wall_over_cpu, f"fixed CPU work waited for its core: {waited:.2f} of its CPU time"),
            (slowed, limits.cpu_over_best, f"fixed CPU work took {slowed:.2f} of its best CPU time"),
            (other, limits.other_share, f"other processes used {other:.1%} of the cores"),
            (stolen, limits.steal_share, f"the hypervisor took {stolen:.1%} of the cores"),
        )
        if value > limit
    ]
