"""Which operators make a larger batch slower: arithmetic on what a profiler saw of two sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Operator", "Profiled", "grown", "stage_grown", "worth_profiling"]

STAGES = ("forward", "backward", "optimizer")  # where operators are what takes time, and nothing is waited for
GREW = 0.1  # per sample; less is noise in a few updates
COUNTS = 0.01  # of a stage's time per sample; an operator that grew by less explains nothing
MOST = 3


@dataclass(frozen=True)
class Operator:
    """One that takes longer per sample in the larger of two sizes. Times are its own, without what it calls."""

    name: str
    stage: str
    per_device_before: int
    per_device_after: int
    ms_per_sample_before: float
    ms_per_sample_after: float


@dataclass(frozen=True)
class Profiled:
    """A size's operators in one stage: milliseconds of their own for each sample of this worker."""

    size: int
    ms_per_sample: Mapping[str, float]


def stage_grown(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, float]:
    """The stage whose time grew most, and by how much; times per sample."""
    grew = {stage: after[stage] - before[stage] for stage in before}
    stage = max(grew, key=grew.__getitem__)
    return stage, grew[stage]


def worth_profiling(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """The stage that grew most, if operators can be what made it grow; times per sample."""
    stage, grew = stage_grown(before, after)
    return stage if stage in STAGES and grew >= GREW * before[stage] else None


def grown(stage: str, small: Profiled, large: Profiled) -> tuple[Operator, ...]:
    """Those that grew most per sample, most first; none where nothing grew beyond noise.

    An operator that the smaller size does without took no time there.
    """
    least = COUNTS * sum(large.ms_per_sample.values())
    found = []
    for name, after in large.ms_per_sample.items():
        before = small.ms_per_sample.get(name, 0.0)
        if after - before >= max(GREW * before, least):
            found.append(Operator(name, stage, small.size, large.size, before, after))
    found.sort(key=lambda one: one.ms_per_sample_before - one.ms_per_sample_after)
    return tuple(found[:MOST])
