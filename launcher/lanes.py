"""Divides the machine's cores and GPUs among the points of a parallel sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.errors import RequestError
from launcher.gpus import count_gpus
from launcher.settings import Run

__all__ = ["Lane", "Machine", "lanes"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Machine:
    """Resources available to this process: core numbers, and GPUs by their names in CUDA_VISIBLE_DEVICES."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @classmethod
    def here(cls, env: Mapping[str, str] = os.environ) -> Machine:
        visible = env.get(VISIBLE)
        count = count_gpus(env)
        names = [name.strip() for name in visible.split(",")] if visible else [str(at) for at in range(count)]
        return cls(tuple(sorted(os.sched_getaffinity(0))), tuple(names[:count]))


@dataclass(frozen=True)
class Lane:
    """The cores and GPUs of one point. CPU affinity and CUDA_VISIBLE_DEVICES hide the rest of the machine."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    def enter(self) -> None:
        """Restrict this process and its children to the slice; worker and thread counts derive from it."""
        os.sched_setaffinity(0, self.cores)
        os.environ[VISIBLE] = ",".join(self.gpus)

    def workers_of(self, run: Run) -> int:
        """`launch.workers`, else one per GPU of the slice, else 1."""
        if run.launch.workers is not None:
            return run.launch.workers
        return 1 if run.train.device == "cpu" else max(1, len(self.gpus))

    def __str__(self) -> str:
        words = [f"{len(self.cores)} core{'s' * (len(self.cores) != 1)}"]
        words += [f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}"] if self.gpus else []
        return " and ".join(words)


def lanes(at_once: int, runs: Sequence[Run], machine: Machine) -> tuple[Lane, ...]:
    """Divide the machine into `at_once` slices, as even as whole cores and GPUs allow, larger ones first.

    Raises:
        RequestError: a point needs more than the smallest slice. The message names the largest sweep.at_once that fits.
    """
    parts = divided(at_once, machine)
    for run in runs:
        if (lack := lacking(run, parts[-1], machine)) is not None and at_once > 1:
            fewer = [count for count in range(2, at_once) if lacking(run, divided(count, machine)[-1], machine) is None]
            raise RequestError(f"sweep.at_once={at_once}: {lack}: type sweep.at_once={max(fewer, default=1)}")
    return parts


def lacking(run: Run, lane: Lane, machine: Machine) -> str | None:
    """Describe the resource a slice lacks for a point, or None if it fits. Each thread and loader needs one core."""
    workers = lane.workers_of(run)
    threads = 1 if run.elastic.exact else run.launch.threads or 1
    cores = workers * (threads + run.data.workers)
    on_gpus = bool(machine.gpus) and run.train.device != "cpu"
    if on_gpus and workers > len(lane.gpus):
        return f"each point needs {workers} GPUs but gets {len(lane.gpus)} of {len(machine.gpus)}"
    if cores > len(lane.cores):
        each = f"launch.workers={workers} x (launch.threads={threads} + data.workers={run.data.workers})"
        return f"each point needs {cores} cores ({each}) but gets {len(lane.cores)} of {len(machine.cores)}"
    return None


def divided(count: int, machine: Machine) -> tuple[Lane, ...]:
    return tuple(
        Lane(tuple(machine.cores[slice(*part)]), tuple(machine.gpus[slice(*gpus)]))
        for part, gpus in zip(split(len(machine.cores), count), split(len(machine.gpus), count), strict=True)
    )


def split(length: int, count: int) -> list[tuple[int, int]]:
    """Split `length` items into `count` contiguous ranges (start, end)."""
    share, more = divmod(length, count)
    ends = [at * share + min(at, more) for at in range(count + 1)]
    return list(pairwise(ends))
