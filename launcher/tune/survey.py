"""The search over sizes: which are tried, how often, and when to stop. Every rank makes the same decisions."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from launcher.durable import write_whole
from launcher.throughput import label
from launcher.tune.council import Council
from launcher.tune.ledger import Ledger, Visit
from launcher.tune.memory import foreseen_bytes
from launcher.tune.operators import Operator, Profiled
from launcher.tune.probe import Pace, Stand, visit
from launcher.tune.profiling import profiled
from launcher.tune.search import SMALL, between, first, grown, largest_next, refined

__all__ = ["Survey", "Term"]

MOST_ROUNDS = 10
GROWING, LOOKING = 0.5, 0.75  # shares of the search budget at which growing, and finding the largest size, stop
BLOCKS_OF_BUDGET = 400  # a block takes at most 1/400 of the search budget
BESIDE = 0.2  # share of the search budget, added to it, for synthetic data


@dataclass(frozen=True)
class Term:
    """Time budget in seconds, as measured on rank 0. `spent_s`: used by earlier attempts."""

    budget_s: float
    council: Council
    spent_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.monotonic)

    def used_s(self) -> float:
        return self.spent_s + self.clock() - self.began

    def part(self, share: float) -> Term:
        """A new budget of `share` of this one, starting now."""
        return Term(share * self.budget_s, self.council, clock=self.clock, began=self.clock())

    def over(self, share: float = 1.0) -> bool:
        return bool(self.council.of_first(self.used_s() >= share * self.budget_s))


class Survey:
    """The search on one rank; its measurements are the same on all ranks.

    `make` builds the replica; it is rebuilt after running out of memory, as the old one may be in an undefined state.
    `state`: a file of rank 0 to continue from if the workers are restarted.
    """

    def __init__(
        self,
        make: Callable[[], Stand],
        items: Any,
        largest: int,
        allowed_bytes: float | None,
        term: Term,
        ledger: Ledger | None = None,
        state: Path | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self._make = make
        self._stand: Stand | None = None
        self._items = items
        self._largest = largest
        self._allowed = allowed_bytes
        self._term = term
        self._state = state
        self._pace = Pace(block_s=min(Pace().block_s, term.budget_s / BLOCKS_OF_BUDGET))

    def these(self, sizes: Sequence[int]) -> None:
        """Measure exactly these sizes, ascending, so that smaller ones predict the memory of larger ones."""
        self.ledger = replace(self.ledger, only=tuple(sorted(set(sizes))))
        for size in self.ledger.only or ():
            self._measure(size)
        self._rounds()

    def search(self) -> None:
        """Grow from a small size, find the largest working size, then refine around the knee."""
        self._grow()
        self._find_end()
        advice = self.ledger.advice()
        if advice is not None:
            known = [one.size for one in self.ledger.sizes() if one.speeds]
            failed = [one.size for one in self.ledger.sizes() if not one.comfortable]
            for size in refined(advice.knee, known, failed, self._largest):
                if self._term.over():
                    break
                self._measure(size)
        self._rounds()

    def beside(self, sizes: Sequence[int], synthetic: Any) -> None:
        """Measure the sizes on synthetic data of the same shape, which costs nothing to read."""
        for size in sizes:
            if self.ledger.synthetic and self._term.over(1 + BESIDE):
                break
            stood_in = visit(self._ready(), size, synthetic, self._pace, self._allowed)
            self.ledger = replace(self.ledger, synthetic=(*self.ledger.synthetic, stood_in))

    def closing(self) -> None:
        """Start the follow-ups: if a rank is lost in them, the results so far are final."""
        self.ledger = replace(self.ledger, closing=True)
        self._write_state(None)

    def split(self, size: int, accumulation: int) -> None:
        """Measure the batch as `accumulation` micro-batches of `size`, unless memory ran out at that split before."""
        if any(one.size == size and not one.fits for one in self.ledger.splits):
            return
        found = visit(self._ready(), size, self._items, self._pace, self._allowed, accumulation)
        if not found.fits:
            self._throw_away()
        self.ledger = replace(self.ledger, splits=(*self.ledger.splits, found))

    def profile(self, size: int, stage: str) -> Profiled | None:
        """Profile the operators of one stage at a size; None if memory ran out."""
        found = profiled(self._ready(), size, self._items, stage)
        if found is None:
            self._throw_away()
        return found

    def explained(self, operators: tuple[Operator, ...]) -> None:
        self.ledger = replace(self.ledger, operators=operators)

    def _grow(self) -> None:
        size: int | None = first(self._largest)
        while size is not None:
            if not self._measure(size):
                size = None if self.ledger.works() else largest_next(0, size, self._largest)
                continue
            if self._fell(size):
                return
            if self._term.over(GROWING):
                if size < self._largest:
                    self._note(f"no size above {size} was timed: this part of tune.budget_s was used up")
                return
            size = grown(size, self._largest)

    def _fell(self, size: int) -> bool:
        points = [point for point in self.ledger.points() if point.samples_per_s]
        return label(points)[size] == "regressed"

    def _find_end(self) -> None:
        """Find the exact largest working size by trying; memory prediction only excludes sizes."""
        while self.ledger.works():
            size = largest_next(self.ledger.works(), self.ledger.fails(), self._largest)
            if size is None:
                return
            if self._term.over(LOOKING):
                works = self.ledger.works()
                note = f"memory_max={works} is only the largest tried size that works"
                self._note(f"{note}: this part of tune.budget_s was used up")
                return
            self._try(size, None)

    def _rounds(self) -> None:
        """Measure uncertain sizes again, in alternating order, so that drift favours no size."""
        for turn in range(MOST_ROUNDS):
            loose = [one.size for one in self.ledger.sizes() if one.fits and one.speeds and one.loose]
            if not loose:
                return
            for size in loose if turn % 2 else reversed(loose):
                if self._term.over():
                    return
                self._measure(size)

    def _measure(self, size: int) -> bool:
        """Time a size; return whether it fits. On a CPU, intermediate sizes are tried first for their memory."""
        known = self.ledger.works()
        if self._allowed is not None:
            for stone in between(known or SMALL, size) if self.ledger.at(size) is None else ():
                if stone > known and not self._try(stone, None):
                    break
        return self._try(size, self._pace)

    def _try(self, size: int, pace: Pace | None) -> bool:
        seen = self.ledger.at(size)
        if seen is not None and not seen.fits:
            return False
        if self._too_large(size):
            found = Visit(size, where="foreseen", predicted=True)
        else:
            self._write_state(size)
            found = visit(self._ready(), size, self._items, pace, self._allowed)
        if not found.fits:
            self._throw_away()
        self.ledger = self.ledger.plus(replace(found, timing=pace is not None))
        self._write_state(None)
        return found.fits

    def _too_large(self, size: int) -> bool:
        """Whether a size is predicted not to fit on a CPU, where the kernel kills instead of refusing memory."""
        if self._allowed is None:
            return False
        foreseen = foreseen_bytes(size, self.ledger.memory())
        return foreseen is not None and foreseen > self._allowed

    def _ready(self) -> Stand:
        if self._stand is None:
            self._stand = self._make()
        return self._stand

    def _throw_away(self) -> None:
        self._stand = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _note(self, text: str) -> None:
        self.ledger = self.ledger.noted(text)

    def _write_state(self, trying: int | None) -> None:
        if self._state is not None:
            facts = {"ledger": self.ledger.to_facts(), "trying": trying, "spent_s": self._term.used_s()}
            write_whole(self._state, json.dumps(facts))
