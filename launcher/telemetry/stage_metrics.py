"""The stage times of all ranks, and the metrics of an update made from them.

Rank 0 does this in every update. The times of many ranks are a tensor, since a loop over 10,000 of them in Python takes
milliseconds; those of a few are lists, since a tensor operation takes longer than a loop over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch

from launcher.telemetry.stage_clock import find_critical_rank
from launcher.telemetry.stages import STAGES

__all__ = ["StageTimes", "as_time_tensor", "compute_stage_metrics", "median_of_rows", "stack_times", "sum_stages"]

#: Milliseconds by rank and stage, in the order of STAGES: a tensor of shape (ranks, stages), or nested sequences.
StageTimes = torch.Tensor | Sequence[Sequence[float]]


KEYS = [[f"stage/{stage}/{unit}" for unit in ("ms", "share", "samples_per_s", "ms_min", "ms_max")] for stage in STAGES]


def as_time_tensor(times: StageTimes | Sequence[float]) -> torch.Tensor:
    """The times as float64, in which they are summed and compared."""
    return torch.as_tensor(times, dtype=torch.float64)


def stack_times(times: Sequence[StageTimes]) -> torch.Tensor:
    """The times of several updates as one tensor of shape (updates, ranks, stages)."""
    tensors = [each for each in times if isinstance(each, torch.Tensor)]
    return torch.stack(tensors) if tensors else torch.tensor(times, dtype=torch.float64)


def sum_stages(times_ms: torch.Tensor, stages: Sequence[int]) -> torch.Tensor:
    """Each rank's sum over `stages` (indices of columns), added one by one so that every rank rounds alike."""
    return reduce(add, (times_ms[:, stage] for stage in stages))


def median_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """The median over the first dimension; of an even number of rows, the mean of the middle two."""
    ordered, count = rows.sort(dim=0).values, len(rows)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def compute_stage_metrics(stages_ms: StageTimes, samples: int) -> dict[str, float]:
    """Stage times of the critical rank in an update of `samples`, with the minimum and maximum over all ranks."""
    rank = find_critical_rank(stages_ms)
    own_ms, lowest, highest = read_extremes(stages_ms, rank)
    wall_ms = sum(own_ms) or math.nan
    values: dict[str, float] = {"stage/rank": rank}
    for index, (ms, share, samples_per_s, ms_min, ms_max) in enumerate(KEYS):
        values[ms] = own_ms[index]
        values[share] = own_ms[index] / wall_ms
        if own_ms[index] > 0:
            values[samples_per_s] = samples / own_ms[index] * 1e3
        if len(stages_ms) > 1:
            values[ms_min] = lowest[index]
            values[ms_max] = highest[index]
    return values


def read_extremes(stages_ms: StageTimes, rank: int) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """The times of `rank`, and the least and the largest of each stage over all ranks."""
    if isinstance(stages_ms, torch.Tensor):
        least, largest = torch.aminmax(stages_ms, dim=0)
        return stages_ms[rank].tolist(), least.tolist(), largest.tolist()
    return stages_ms[rank], [*map(min, zip(*stages_ms, strict=True))], [*map(max, zip(*stages_ms, strict=True))]
