"""Find the rank that slows down the others, from the stage times that the ranks exchange in every update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from launcher.telemetry.stage_metrics import StageTimes, median_of_rows, stack_times, sum_stages
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


@dataclass(frozen=True, eq=False)
class StragglerDetector:
    """The updates since the last check, and the ranks that were reported and have not recovered since.

    `rows` has the stage times of each update: the milliseconds of each rank in each stage.
    """

    rows: tuple[StageTimes, ...] = field(default=())
    reported: frozenset[int] = frozenset()
    seen_ms: float = 0.0

    def with_update(
        self, stages_ms: StageTimes, shares: Sequence[int] = ()
    ) -> tuple[StragglerDetector, Straggler | None]:
        """Add one update (milliseconds by rank and stage, samples by rank); every 20 updates, also return a straggler.

        If 20 updates take less than half a second, the check waits until half a second of training has passed.

        A rank is reported once, and again only after it has recovered. If several are slow, the slowest is reported.
        """
        if len(stages_ms) < 2:
            return self, None
        rows = (*self.rows, stages_ms)
        longest_ms = find_longest_ms(stages_ms)
        # Each update's time is capped: a single long update proves nothing.
        seen_ms = self.seen_ms + min(MIN_TRAINING_MS / STRAGGLER_WINDOW, longest_ms)
        if len(rows) < STRAGGLER_WINDOW or seen_ms < MIN_TRAINING_MS:
            return StragglerDetector(rows, self.reported, seen_ms), None
        by_rank = median_of_rows(stack_times(rows)[..., OWN_WORK_INDICES])
        reported, straggler = find_straggler(by_rank, shares or [1] * len(by_rank), self.reported)
        return StragglerDetector((), reported), straggler


def find_longest_ms(stages_ms: StageTimes) -> float:
    """The time of the update on the rank that took longest."""
    return float(stages_ms.sum(dim=1).max()) if isinstance(stages_ms, torch.Tensor) else max(map(sum, stages_ms))


def find_straggler(
    by_rank: torch.Tensor, shares: Sequence[int], reported: frozenset[int]
) -> tuple[frozenset[int], Straggler | None]:
    """The slowest rank that is not in `reported`, if any is slow; `reported` with it, without the recovered ranks."""
    work_ms = sum_stages(by_rank, range(len(OWN_WORK_INDICES)))
    others_ms = compute_others_medians(work_ms)
    ratios = compute_slowdowns(work_ms, others_ms, shares)
    still_reported = frozenset(rank for rank in reported if ratios[rank] >= RECOVERED_RATIO)
    slow = (ratios > SLOW_RATIO) & (work_ms - others_ms > MIN_DIFFERENCE_MS)
    slow[list(still_reported)] = False
    if not slow.any():
        return still_reported, None
    rank = int(torch.where(slow, ratios, 0.0).argmax())
    return still_reported | {rank}, make_straggler(rank, float(ratios[rank]), by_rank)


def compute_slowdowns(work_ms: torch.Tensor, others_ms: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
    """Ratio of each rank's work to the median of the others; a rank with more samples is allowed more time."""
    samples = torch.as_tensor(shares, dtype=torch.float64)
    usual = compute_others_medians(samples)
    factors = (samples / torch.where(usual == 0, 1.0, usual)).clamp(min=1.0)
    return torch.where(others_ms == 0, 1.0, work_ms / factors / others_ms)


def compute_others_medians(values: torch.Tensor) -> torch.Tensor:
    """For each value, the median of all other values; sorts once and skips the value's own position."""
    ordered, num_others = values.sort().values, len(values) - 1
    positions = torch.searchsorted(ordered, values)
    low, high = (ordered[middle + (middle >= positions).long()] for middle in ((num_others - 1) // 2, num_others // 2))
    return (low + high) / 2


def make_straggler(rank: int, ratio: float, by_rank: torch.Tensor) -> Straggler:
    own = by_rank[rank]
    rest = torch.cat((by_rank[:rank], by_rank[rank + 1 :]))
    others = median_of_rows(rest)
    worst = int((own - others).argmax())
    stages = range(len(OWN_WORK_INDICES))
    return Straggler(
        rank=rank,
        ratio=ratio,
        own_ms=float(sum_stages(by_rank[rank : rank + 1], stages)),
        others_ms=float(median_of_rows(sum_stages(rest, stages))),
        stage=OWN_WORK_STAGES[worst],
        stage_ms=float(own[worst]),
        stage_others_ms=float(others[worst]),
    )
