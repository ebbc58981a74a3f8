"""How a machine is divided among the points of a sweep that train at the same time."""

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
    """What this process may use: cores by number, GPUs by the names that CUDA_VISIBLE_DEVICES gives them."""

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
    """The part of the machine that one point has. What it does not see, it cannot take from the others."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    def enter(self) -> None:
        """This process and what it starts use this part alone; the number of workers and threads follows from it."""
        os.sched_setaffinity(0, self.cores)
        os.environ[VISIBLE] = ",".join(self.gpus)

    def workers_of(self, run: Run) -> int:
        """`launch.workers`, else one per GPU of the lane, else 1."""
        if run.launch.workers is not None:
            return run.launch.workers
        return 1 if run.train.device == "cpu" else max(1, len(self.gpus))

    def __str__(self) -> str:
        words = [f"{len(self.cores)} core{'s' * (len(self.cores) != 1)}"]
        words += [f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}"] if self.gpus else []
        return " and ".join(words)


def lanes(at_once: int, runs: Sequence[Run], machine: Machine) -> tuple[Lane, ...]:
    """The machine in `at_once` parts, as even as whole cores and GPUs allow, the larger ones first.

    Raises:
        RequestError: one of the runs needs more than the smallest part. The mend is as many as do fit.
    """
    parts = divided(at_once, machine)
    for run in runs:
        if (lack := lacking(run, parts[-1], machine)) is not None and at_once > 1:
            fewer = [count for count in range(2, at_once) if lacking(run, divided(count, machine)[-1], machine) is None]
            raise RequestError(f"sweep.at_once={at_once}: {lack}: type sweep.at_once={max(fewer, default=1)}")
    return parts


def lacking(run: Run, lane: Lane, machine: Machine) -> str | None:
    """What a lane has too little of for a run; None where it fits. A process that computes or loads takes a core."""
    workers = lane.workers_of(run)
    threads = 1 if run.elastic.exact else run.launch.threads or 1
    cores = workers * (threads + run.data.workers)
    on_gpus = bool(machine.gpus) and run.train.device != "cpu"
    if on_gpus and workers > len(lane.gpus):
        return f"a point takes {workers} of {len(machine.gpus)} GPUs, and would have {len(lane.gpus)}"
    if cores > len(lane.cores):
        each = f"launch.workers={workers} x (launch.threads={threads} + data.workers={run.data.workers})"
        return f"a point takes {cores} cores, {each}, and would have {len(lane.cores)} of {len(machine.cores)}"
    return None


def divided(count: int, machine: Machine) -> tuple[Lane, ...]:
    return tuple(
        Lane(tuple(machine.cores[slice(*part)]), tuple(machine.gpus[slice(*gpus)]))
        for part, gpus in zip(split(len(machine.cores), count), split(len(machine.gpus), count), strict=True)
    )


def split(length: int, count: int) -> list[tuple[int, int]]:
    """`length` things in `count` contiguous parts, each (from, to)."""
    share, more = divmod(length, count)
    ends = [at * share + min(at, more) for at in range(count + 1)]
    return list(pairwise(ends))
