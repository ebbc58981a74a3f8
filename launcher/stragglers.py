"""The rank that holds the others up, named from the stage times that the ranks exchange anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from launcher.stages import STAGES

__all__ = ["WINDOW", "Straggler", "Stragglers"]

WINDOW = 20
SLOW = 1.5
RECOVERED = 1.25
LEAST_MS = 1.0  # below it a ratio is noise
#: A rank's own work; in the others it waits, or does what only rank 0 has to do.
OWN_WORK = ("data", "transfer", "forward", "backward", "optimizer")
OWN = tuple(STAGES.index(stage) for stage in OWN_WORK)


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work takes `ratio` times that of the others, for its share of the batch; medians in ms."""

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
            f"theirs {self.others_ms:.1f} ms; in {self.stage} {self.stage_ms:.1f} and {self.stage_others_ms:.1f} ms"
        )


@dataclass(frozen=True)
class Stragglers:
    """What was seen since the last look, and who has been named and has not recovered since."""

    rows: tuple[tuple[tuple[float, ...], ...], ...] = field(default=())
    named: frozenset[int] = frozenset()

    def observed(
        self, stages_ms: Sequence[Sequence[float]], shares: Sequence[int] = ()
    ) -> tuple[Stragglers, Straggler | None]:
        """With one more update (milliseconds by rank and stage, samples by rank); every 20 updates, who is slow.

        A rank is named once, and again only after it has recovered. Where several are slow the slowest comes first.
        """
        rows = (*self.rows, tuple(tuple(times[stage] for stage in OWN) for times in stages_ms))
        if len(rows) < WINDOW or len(stages_ms) < 2:
            return Stragglers(rows[-WINDOW:], self.named), None
        by_rank = [[median(times) for times in zip(*ranks, strict=True)] for ranks in zip(*rows, strict=True)]
        found = [compared(rank, by_rank, shares or [1] * len(by_rank)) for rank in range(len(by_rank))]
        recovered = {one.rank for one in found if one.ratio < RECOVERED}
        slow = [one for one in found if one.ratio > SLOW and one.own_ms - one.others_ms > LEAST_MS]
        named = self.named - recovered
        worst = max((one for one in slow if one.rank not in named), key=lambda one: one.ratio, default=None)
        return Stragglers((), named | ({worst.rank} if worst else set())), worst


def compared(rank: int, by_rank: Sequence[Sequence[float]], shares: Sequence[int]) -> Straggler:
    """One rank beside the median of the others; more samples than theirs excuse more time."""
    own = by_rank[rank]
    others = [median(column) for column in zip(*(row for r, row in enumerate(by_rank) if r != rank), strict=True)]
    others_ms = median([sum(row) for r, row in enumerate(by_rank) if r != rank])
    usual = median([share for r, share in enumerate(shares) if r != rank])
    excused = max(1.0, shares[rank] / usual) if usual else max(1.0, float(shares[rank]))
    worst = max(range(len(own)), key=lambda stage: own[stage] - others[stage])
    return Straggler(
        rank=rank,
        ratio=sum(own) / excused / others_ms if others_ms else 1.0,
        own_ms=sum(own),
        others_ms=others_ms,
        stage=OWN_WORK[worst],
        stage_ms=own[worst],
        stage_others_ms=others[worst],
    )
