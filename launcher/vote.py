"""What the ranks tell each other, once per update.

One small float64 vector per rank goes round by an all-gather on a gloo group of its own. It is started after the
last micro-batch's forward pass and awaited before the optimizer's step, so that its time hides behind the backward
pass. Nothing else in the loop agrees on anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.shards import tree_sum
from launcher.signals import GO_ON
from launcher.stages import STAGES

__all__ = ["Agreed", "Ballot", "Vote"]


@dataclass(frozen=True)
class Ballot:
    """One rank's word. What a device computed belongs to the previous update: it is read one update late.

    `count` is what the losses of *this* update count (samples, or tokens); the fields from `loss` on and the stages
    (milliseconds) belong to the previous one. `norm`, `spread` and `groups` are those of its `strategies.Step`.
    """

    count: float = 0.0
    stop: float = GO_ON
    save: float = 0.0
    loss: float = 0.0
    loss_count: float = 0.0
    finite: float = 1.0
    norm: float = 0.0
    spread: float = 0.0
    groups: float = 0.0


WORDS = len(fields(Ballot))


@dataclass(frozen=True)
class Agreed:
    """All ranks' ballots and stage times, in rank order: the same on every rank."""

    ballots: tuple[Ballot, ...]
    stages_ms: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> float:
        return float(tree_sum(ballot.count for ballot in self.ballots))

    @property
    def stop(self) -> int:
        return int(max(ballot.stop for ballot in self.ballots))

    @property
    def save(self) -> bool:
        return any(ballot.save for ballot in self.ballots)

    @property
    def loss(self) -> float:
        """The losses of the previous update, over all ranks."""
        return float(tree_sum(ballot.loss for ballot in self.ballots))

    @property
    def loss_count(self) -> float:
        """What the losses of the previous update count."""
        return float(tree_sum(ballot.loss_count for ballot in self.ballots))

    @property
    def norm(self) -> float:
        """Of the previous update's mean gradient; rank 0's word, so that all ranks go by the same bits."""
        return self.ballots[0].norm

    @property
    def spread(self) -> float:
        """The sum of |h|²/c over the groups of the previous update."""
        return float(tree_sum(ballot.spread for ballot in self.ballots))

    @property
    def groups(self) -> int:
        """How many parts of the previous update's batch had their gradients seen by themselves."""
        return int(sum(ballot.groups for ballot in self.ballots))

    @property
    def not_finite(self) -> tuple[int, ...]:
        """The ranks whose own loss of the previous update was NaN or infinite."""
        return tuple(rank for rank, ballot in enumerate(self.ballots) if not math.isfinite(ballot.loss))

    @property
    def finite(self) -> bool:
        """Whether the previous update was applied."""
        return all(ballot.finite for ballot in self.ballots)


#: The name changed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending(Protocol):
    def wait(self) -> Agreed: ...


class Vote:
    """Casts ballots. With one worker there is nobody to ask and no group is made."""

    def __init__(self, world: int, timeout_s: float) -> None:
        self._world = world
        self._words = torch.zeros(WORDS + len(STAGES), dtype=torch.float64)
        self._all = torch.zeros(world * (WORDS + len(STAGES)), dtype=torch.float64)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world > 1 else None

    def cast(self, ballot: Ballot, stages_ms: Sequence[float]) -> Pending:
        """Start the exchange; one ballot at a time is under way, the buffers are reused."""
        self._words[:] = torch.tensor((*astuple(ballot), *stages_ms), dtype=torch.float64)
        if self._group is None:
            self._all[:] = self._words
            return _Round(self._all, None)
        work = all_gather(self._all, self._words, group=self._group, async_op=True)
        return _Round(self._all, work)


@dataclass(frozen=True)
class _Round:
    words: torch.Tensor
    work: dist.Work | None

    def wait(self) -> Agreed:
        if self.work is not None:
            self.work.wait()
        rows = self.words.view(-1, WORDS + len(STAGES)).tolist()
        return Agreed(
            ballots=tuple(Ballot(*row[:WORDS]) for row in rows),
            stages_ms=tuple(tuple(row[WORDS:]) for row in rows),
        )
