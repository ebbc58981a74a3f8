"""Find the operators that make a larger batch slower, from profiler times at two sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Operator", "Profiled", "grown", "stage_grown", "worth_profiling"]

STAGES = ("forward", "backward", "optimizer")  # stages whose time is spent in operators rather than in waiting
GREW = 0.1  # relative growth per sample; less is noise over a few updates
COUNTS = 0.01  # share of a stage's time per sample; growth below it explains nothing
MOST = 3


@dataclass(frozen=True)
class Operator:
    """An operator that takes longer per sample at the larger of two sizes. Times are self times, without callees."""

    name: str
    stage: str
    per_device_before: int
    per_device_after: int
    ms_per_sample_before: float
    ms_per_sample_after: float


@dataclass(frozen=True)
class Profiled:
    """Operators of one stage at one size: self time in milliseconds per sample of this worker."""

    size: int
    ms_per_sample: Mapping[str, float]


def stage_grown(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, float]:
    """The stage whose time per sample grew most, and by how much."""
    grew = {stage: after[stage] - before[stage] for stage in before}
    stage = max(grew, key=grew.__getitem__)
    return stage, grew[stage]


def worth_profiling(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """The stage whose time per sample grew most, if its operators may be the cause; else None."""
    stage, grew = stage_grown(before, after)
    return stage if stage in STAGES and grew >= GREW * before[stage] else None


def grown(stage: str, small: Profiled, large: Profiled) -> tuple[Operator, ...]:
    """The operators whose time per sample grew most, largest first; empty if none grew beyond noise.

    An operator that is absent at the smaller size counts as zero there.
    """
    least = COUNTS * sum(large.ms_per_sample.values())
    found = []
    for name, after in large.ms_per_sample.items():
        before = small.ms_per_sample.get(name, 0.0)
        if after - before >= max(GREW * before, least):
            found.append(Operator(name, stage, small.size, large.size, before, after))
    found.sort(key=lambda one: one.ms_per_sample_before - one.ms_per_sample_after)
    return tuple(found[:MOST])
