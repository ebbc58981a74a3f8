"""Find the operators that make a larger batch slower, from profiler times at two sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OperatorGrowth", "OperatorProfile", "choose_stage_to_profile", "find_grown_operators", "find_grown_stage"]

OPERATOR_STAGES = ("forward", "backward", "optimizer")  # stages whose time is spent in operators rather than in waiting
MIN_RELATIVE_GROWTH = 0.1  # relative growth per sample; less is noise over a few updates
MIN_STAGE_TIME_SHARE = 0.01  # share of a stage's time per sample; growth below it explains nothing
MAX_SHOWN_OPERATORS = 3


@dataclass(frozen=True)
class OperatorGrowth:
    """An operator that takes longer per sample at the larger of two sizes. Times are self times, without callees."""

    name: str
    stage: str
    per_device_before: int
    per_device_after: int
    ms_per_sample_before: float
    ms_per_sample_after: float


@dataclass(frozen=True)
class OperatorProfile:
    """Operators of one stage at one size: self time in milliseconds per sample of this worker."""

    size: int
    ms_per_sample: Mapping[str, float]


def find_grown_stage(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, float]:
    """The stage whose time per sample grew most, and by how much."""
    grew = {stage: after[stage] - before[stage] for stage in before}
    stage = max(grew, key=grew.__getitem__)
    return stage, grew[stage]


def choose_stage_to_profile(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """The stage whose time per sample grew most, if its operators may be the cause; else None."""
    stage, grew = find_grown_stage(before, after)
    return stage if stage in OPERATOR_STAGES and grew >= MIN_RELATIVE_GROWTH * before[stage] else None


def find_grown_operators(stage: str, small: OperatorProfile, large: OperatorProfile) -> tuple[OperatorGrowth, ...]:
    """The operators whose time per sample grew most, largest first; empty if none grew beyond noise.

    An operator that is absent at the smaller size counts as zero there.
    """
    least = MIN_STAGE_TIME_SHARE * sum(large.ms_per_sample.values())
    grown = []
    for name, after in large.ms_per_sample.items():
        before = small.ms_per_sample.get(name, 0.0)
        if after - before >= max(MIN_RELATIVE_GROWTH * before, least):
            grown.append(OperatorGrowth(name, stage, small.size, large.size, before, after))
    grown.sort(key=lambda growth: growth.ms_per_sample_before - growth.ms_per_sample_after)
    return tuple(grown[:MAX_SHOWN_OPERATORS])
