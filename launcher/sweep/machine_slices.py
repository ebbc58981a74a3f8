"""Divides the machine's cores and GPUs among the points of a parallel sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.system.gpus import count_gpus

__all__ = ["MachineResources", "MachineSlice", "divide_machine"]

VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class MachineResources:
    """Resources available to this process: core numbers, and GPUs by their names in CUDA_VISIBLE_DEVICES."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> MachineResources:
        visible = env.get(VISIBLE_DEVICES_VARIABLE)
        count = count_gpus(env)
        names = [name.strip() for name in visible.split(",")] if visible else [str(at) for at in range(count)]
        return cls(tuple(sorted(os.sched_getaffinity(0))), tuple(names[:count]))


@dataclass(frozen=True)
class MachineSlice:
    """The cores and GPUs of one point. CPU affinity and CUDA_VISIBLE_DEVICES hide the rest of the machine."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    def apply(self) -> None:
        """Restrict this process and its children to the slice; worker and thread counts derive from it."""
        os.sched_setaffinity(0, self.cores)
        os.environ[VISIBLE_DEVICES_VARIABLE] = ",".join(self.gpus)

    def count_workers(self, config: RunConfig) -> int:
        """`launch.workers`, else one per GPU of the slice, else 1."""
        if config.launch.workers is not None:
            return config.launch.workers
        return 1 if config.train.device == "cpu" else max(1, len(self.gpus))

    def __str__(self) -> str:
        words = [f"{len(self.cores)} core{'s' * (len(self.cores) != 1)}"]
        words += [f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}"] if self.gpus else []
        return " and ".join(words)


def divide_machine(at_once: int, runs: Sequence[RunConfig], machine: MachineResources) -> tuple[MachineSlice, ...]:
    """Divide the machine into `at_once` slices, as even as whole cores and GPUs allow, larger ones first.

    Raises:
        RequestError: a point needs more than the smallest slice. The message names the largest sweep.max_parallel that fits.
    """
    parts = make_slices(at_once, machine)
    for config in runs:
        if (lack := missing_resources(config, parts[-1], machine)) is not None and at_once > 1:
            fewer = [
                count
                for count in range(2, at_once)
                if missing_resources(config, make_slices(count, machine)[-1], machine) is None
            ]
            raise UsageError(f"sweep.max_parallel={at_once}: {lack}: type sweep.max_parallel={max(fewer, default=1)}")
    return parts


def missing_resources(config: RunConfig, machine_slice: MachineSlice, machine: MachineResources) -> str | None:
    """Describe the resource a slice lacks for a point, or None if it fits. Each thread and loader needs one core."""
    workers = machine_slice.count_workers(config)
    threads = 1 if config.elastic.exact else config.launch.threads or 1
    cores = workers * (threads + config.data.num_workers)
    on_gpus = bool(machine.gpus) and config.train.device != "cpu"
    if on_gpus and workers > len(machine_slice.gpus):
        return f"each point needs {workers} GPUs but gets {len(machine_slice.gpus)} of {len(machine.gpus)}"
    if cores > len(machine_slice.cores):
        each = f"launch.workers={workers} x (launch.threads={threads} + data.num_workers={config.data.num_workers})"
        return f"each point needs {cores} cores ({each}) but gets {len(machine_slice.cores)} of {len(machine.cores)}"
    return None


def make_slices(count: int, machine: MachineResources) -> tuple[MachineSlice, ...]:
    return tuple(
        MachineSlice(tuple(machine.cores[slice(*part)]), tuple(machine.gpus[slice(*gpus)]))
        for part, gpus in zip(
            split_into_ranges(len(machine.cores), count), split_into_ranges(len(machine.gpus), count), strict=True
        )
    )


def split_into_ranges(length: int, count: int) -> list[tuple[int, int]]:
    """Split `length` items into `count` contiguous ranges (start, end)."""
    share, more = divmod(length, count)
    ends = [at * share + min(at, more) for at in range(count + 1)]
    return list(pairwise(ends))
