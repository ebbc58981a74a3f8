"""Find the rank that slows down the others, from the stage times that the ranks exchange in every update."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from launcher.telemetry.stages import PER_SAMPLE_STAGES, STAGES

__all__ = ["STRAGGLER_WINDOW", "Straggler", "StragglerDetector"]

STRAGGLER_WINDOW = 20
SLOW_RATIO = 1.5
RECOVERED_RATIO = 1.25
MIN_DIFFERENCE_MS = 1.0  # for a smaller difference, the ratio is noise
MIN_TRAINING_MS = 500.0  # minimum training time per check: another program may delay a rank for 20 short updates
OWN_WORK_STAGES = (*PER_SAMPLE_STAGES, "optimizer")
OWN_WORK_INDICES = tuple(STAGES.index(stage) for stage in OWN_WORK_STAGES)


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work takes `ratio` times as long as the others', relative to its share; medians in ms."""

    rank: int
    ratio: float
    own_ms: float
    others_ms: float
    stage: str
    stage_ms: float
    stage_others_ms: float

    @property
    def detail(self) -> str:
        return (
            f"rank {self.rank} is slow, {self.ratio:.1f} times the others: {self.own_ms:.1f} ms of work per update, "
            f"the others {self.others_ms:.1f} ms; the largest difference is in {self.stage}: {self.stage_ms:.1f} ms, "
            f"the others {self.stage_others_ms:.1f} ms"
        )


@dataclass(frozen=True)
class StragglerDetector:
    """The updates since the last check, and the ranks that were reported and have not recovered since."""

    rows: tuple[tuple[tuple[float, ...], ...], ...] = field(default=())
    reported: frozenset[int] = frozenset()
    seen_ms: float = 0.0

    def with_update(
        self, stages_ms: Sequence[Sequence[float]], shares: Sequence[int] = ()
    ) -> tuple[StragglerDetector, Straggler | None]:
        """Add one update (milliseconds by rank and stage, samples by rank); every 20 updates, also return a straggler.

        If 20 updates take less than half a second, the check waits until half a second of training has passed.

        A rank is reported once, and again only after it has recovered. If several are slow, the slowest is reported.
        """
        if len(stages_ms) < 2:
            return self, None
        rows = (*self.rows, tuple(tuple(times[stage] for stage in OWN_WORK_INDICES) for times in stages_ms))
        # Each update's time is capped: a single long update proves nothing.
        seen_ms = self.seen_ms + min(MIN_TRAINING_MS / STRAGGLER_WINDOW, max(map(sum, stages_ms)))
        if len(rows) < STRAGGLER_WINDOW or seen_ms < MIN_TRAINING_MS:
            return StragglerDetector(rows, self.reported, seen_ms), None
        by_rank = [[median(times) for times in zip(*ranks, strict=True)] for ranks in zip(*rows, strict=True)]
        ratios = compute_slowdowns([sum(times) for times in by_rank], shares or [1] * len(by_rank))
        reported = frozenset(rank for rank in self.reported if ratios[rank] >= RECOVERED_RATIO)
        slow = [rank for rank, ratio in enumerate(ratios) if ratio > SLOW_RATIO and rank not in reported]
        for rank in sorted(slow, key=ratios.__getitem__, reverse=True):
            straggler = make_straggler(rank, ratios[rank], by_rank)
            if straggler.own_ms - straggler.others_ms > MIN_DIFFERENCE_MS:
                return StragglerDetector((), reported | {rank}), straggler
        return StragglerDetector((), reported), None


def compute_slowdowns(work_ms: Sequence[float], shares: Sequence[int]) -> list[float]:
    """Ratio of each rank's work to the median of the others; a rank with more samples is allowed more time."""
    medians_ms, median_shares = compute_others_medians(work_ms), compute_others_medians(shares)
    factors = [max(1.0, share / (usual or 1.0)) for share, usual in zip(shares, median_shares, strict=True)]
    rows = zip(work_ms, factors, medians_ms, strict=True)
    return [ms / factor / median_ms if median_ms else 1.0 for ms, factor, median_ms in rows]


def compute_others_medians(values: Sequence[float]) -> list[float]:
    """For each value, the median of all other values; sorts once and skips the value's own position."""
    ordered, num_others = sorted(values), len(values) - 1
    middle_indices = {(num_others - 1) // 2, num_others // 2}
    positions = (bisect_left(ordered, value) for value in values)
    return [fmean(ordered[index + (index >= position)] for index in middle_indices) for position in positions]


def make_straggler(rank: int, ratio: float, by_rank: Sequence[Sequence[float]]) -> Straggler:
    own = by_rank[rank]
    rest = [row for other, row in enumerate(by_rank) if other != rank]
    others = [median(column) for column in zip(*rest, strict=True)]
    worst = max(range(len(own)), key=lambda stage: own[stage] - others[stage])
    return Straggler(
        rank=rank,
        ratio=ratio,
        own_ms=sum(own),
        others_ms=median(sum(row) for row in rest),
        stage=OWN_WORK_STAGES[worst],
        stage_ms=own[worst],
        stage_others_ms=others[worst],
    )
