"""Divides the machine's cores and GPUs among the points of a parallel sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.system.formatting import format_plural
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
        names = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
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
        parts = [format_plural(len(self.cores), "core")]
        parts += [format_plural(len(self.gpus), "GPU")] if self.gpus else []
        return " and ".join(parts)


def divide_machine(count: int, configs: Sequence[RunConfig], machine: MachineResources) -> tuple[MachineSlice, ...]:
    """Divide the machine into `count` slices, as even as whole cores and GPUs allow, larger ones first.

    Raises:
        UsageError: a point needs more than the smallest slice; the message names the largest fitting max_parallel.
    """
    slices = make_slices(count, machine)
    for config in configs:
        if (problem := describe_missing_resources(config, slices[-1], machine)) is not None and count > 1:
            fitting = [
                fewer
                for fewer in range(2, count)
                if describe_missing_resources(config, make_slices(fewer, machine)[-1], machine) is None
            ]
            raise UsageError(
                f"sweep.max_parallel={count}: {problem}: type sweep.max_parallel={max(fitting, default=1)}"
            )
    return slices


def describe_missing_resources(config: RunConfig, machine_slice: MachineSlice, machine: MachineResources) -> str | None:
    """Describe the resource a slice lacks for a point, or None if it fits. Each thread and loader needs one core."""
    workers = machine_slice.count_workers(config)
    threads = 1 if config.elastic.exact else config.launch.threads or 1
    cores = workers * (threads + config.data.num_workers)
    on_gpus = bool(machine.gpus) and config.train.device != "cpu"
    if on_gpus and workers > len(machine_slice.gpus):
        return f"each point needs {workers} GPUs but gets {len(machine_slice.gpus)} of {len(machine.gpus)}"
    if cores > len(machine_slice.cores):
        formula = f"launch.workers={workers} x (launch.threads={threads} + data.num_workers={config.data.num_workers})"
        return f"each point needs {cores} cores ({formula}) but gets {len(machine_slice.cores)} of {len(machine.cores)}"
    return None


def make_slices(count: int, machine: MachineResources) -> tuple[MachineSlice, ...]:
    return tuple(
        MachineSlice(tuple(machine.cores[slice(*cores)]), tuple(machine.gpus[slice(*gpus)]))
        for cores, gpus in zip(
            split_into_ranges(len(machine.cores), count), split_into_ranges(len(machine.gpus), count), strict=True
        )
    )


def split_into_ranges(length: int, count: int) -> list[tuple[int, int]]:
    """Split `length` items into `count` contiguous ranges (start, end)."""
    size, rest = divmod(length, count)
    return list(pairwise(index * size + min(index, rest) for index in range(count + 1)))
