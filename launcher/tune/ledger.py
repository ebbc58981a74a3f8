"""The measurements of each size and what follows from them. Imports no torch, as the driver reads them too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

from launcher.noise import student
from launcher.throughput import Advice, Point, advise
from launcher.tune.operators import Operator

__all__ = ["Ledger", "Size", "Visit", "speed"]

TIGHT = 0.03  # relative half-width of an interval that is good enough


@dataclass(frozen=True)
class Visit:
    """One measurement of a size. `speeds`: samples/s of each block of updates (empty if only memory was measured).

    `stages_ms`: per update, of the critical rank. `memory_bytes`: the maximum over the ranks. `retries`: allocation
    retries of all ranks. `pressed`: it ran, but used more memory than the allowed share. `where`: the phase in which
    memory ran out, else None. `predicted`: predicted to run out of memory, so it was not run. `timing`: it was meant
    to be timed, not only tried for memory. `accumulation`: micro-batches per update, if not as configured.
    """

    size: int
    speeds: tuple[float, ...] = ()
    stages_ms: Mapping[str, float] | None = None
    memory_bytes: int = 0
    retries: int = 0
    pressed: bool = False
    where: str | None = None
    predicted: bool = False
    timing: bool = True
    accumulation: int | None = None

    @property
    def fits(self) -> bool:
        return self.where is None


def speed(speeds: tuple[float, ...]) -> tuple[float, float, float]:
    """Mean, low and high of samples/s, from Student's t on the logarithms, so that low stays above zero."""
    logs = [math.log(value) for value in speeds]
    reach = student(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.log(2.0)
    mean = fmean(logs)
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


@dataclass(frozen=True)
class Size:
    """All measurements of one size."""

    visits: tuple[Visit, ...]

    @property
    def size(self) -> int:
        return self.visits[0].size

    @property
    def fits(self) -> bool:
        return all(visit.fits for visit in self.visits)

    @property
    def comfortable(self) -> bool:
        return self.fits and not any(visit.pressed or visit.retries for visit in self.visits)

    @property
    def predicted(self) -> bool:
        return any(visit.predicted for visit in self.visits)

    @property
    def where(self) -> str | None:
        return next((visit.where for visit in self.visits if visit.where), None)

    @property
    def memory_bytes(self) -> int:
        return max(visit.memory_bytes for visit in self.visits)

    @property
    def retries(self) -> int:
        return sum(visit.retries for visit in self.visits)

    @property
    def speeds(self) -> tuple[float, ...]:
        return tuple(one for visit in self.visits for one in visit.speeds)

    @property
    def asked(self) -> bool:
        """Whether any measurement of this size was meant to be timed."""
        return any(visit.timing for visit in self.visits)

    @property
    def point(self) -> Point:
        return Point(self.size, *speed(self.speeds)) if self.fits else Point(self.size, None)

    @property
    def loose(self) -> bool:
        """Whether the interval of samples/s is still too wide."""
        value, low, high = speed(self.speeds)
        return high - low > 2 * TIGHT * value

    @property
    def stages_ms(self) -> Mapping[str, float]:
        told = [(visit.stages_ms, len(visit.speeds)) for visit in self.visits if visit.stages_ms]
        whole = sum(weight for _, weight in told)
        return {stage: sum(times[stage] * n for times, n in told) / whole for stage in (told[0][0] if told else ())}

    @property
    def ms_per_sample(self) -> Mapping[str, float]:
        """Milliseconds of each stage per sample of one worker's micro-batch."""
        return {stage: ms / self.size for stage, ms in self.stages_ms.items()}


@dataclass(frozen=True)
class Ledger:
    """Every measurement so far, immutable. `synthetic`: those on synthetic data. `notes`: remarks for the user.

    `only`: the sizes that the user named; other sizes tried on the way are not reported. `splits`: measurements of the
    same batch at different accumulation. `operators`: those that make a larger size slower. `closing`: the search has
    finished, and only the follow-ups (`splits`, `operators`) were still running.
    """

    visits: tuple[Visit, ...] = ()
    only: tuple[int, ...] | None = None
    synthetic: tuple[Visit, ...] = ()
    notes: tuple[str, ...] = ()
    splits: tuple[Visit, ...] = ()
    operators: tuple[Operator, ...] = ()
    closing: bool = False

    def plus(self, visit: Visit) -> Ledger:
        return replace(self, visits=(*self.visits, visit))

    def noted(self, note: str) -> Ledger:
        return replace(self, notes=(*self.notes, note))

    def sizes(self) -> list[Size]:
        """All sizes, ascending."""
        return list(_gathered(self.visits))

    def at(self, size: int) -> Size | None:
        return next((one for one in self.sizes() if one.size == size), None)

    def told(self) -> list[Size]:
        """The sizes to report: those that were timed, and the smallest that does not fit."""
        if self.only is not None:
            return [one for one in self.sizes() if one.size in self.only]
        end = min((one.size for one in self.sizes() if not one.fits), default=None)
        return [one for one in self.sizes() if one.size == end or (one.asked and (one.speeds or not one.fits))]

    def points(self) -> list[Point]:
        return [one.point for one in self.told()]

    def works(self) -> int:
        """The largest size that fits comfortably, 0 for none."""
        return max((one.size for one in self.sizes() if one.comfortable), default=0)

    def memory_max(self) -> int | None:
        """The largest size that fits comfortably; if the user named sizes, among those only."""
        named = self.sizes() if self.only is None else self.told()
        return max((one.size for one in named if one.comfortable), default=None)

    def fails(self) -> int | None:
        """The smallest size that does not fit comfortably."""
        return min((one.size for one in self.sizes() if not one.comfortable), default=None)

    def memory(self) -> list[tuple[int, int]]:
        return [(one.size, one.memory_bytes) for one in self.sizes() if one.fits]

    def advice(self) -> Advice | None:
        """The labels and recommendation; None if no size works."""
        points = self.points()
        return advise(points, self.memory_max()) if any(point.samples_per_s for point in points) else None

    def slower(self) -> tuple[Size, Size] | None:
        """The fastest size below the smallest regressed one, and that one; None if none regressed."""
        advice = self.advice()
        labels: Mapping[int, str] = {} if advice is None else advice.labels
        timed = [one for one in self.told() if one.fits and one.speeds]
        large = next((one for one in timed if labels[one.size] == "regressed"), None)
        if large is None:
            return None
        return max((one for one in timed if one.size < large.size), key=lambda one: speed(one.speeds)[0]), large

    def divisions(self) -> list[Size]:
        """The measured splits of the batch, by micro-batch size, largest first."""
        return list(_gathered(self.splits))[::-1]

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Ledger:
        visits, synthetic, splits = (
            tuple(Visit(**{**one, "speeds": tuple(one["speeds"])}) for one in facts[name])
            for name in ("visits", "synthetic", "splits")
        )
        only = None if facts["only"] is None else tuple(facts["only"])
        operators = tuple(Operator(**one) for one in facts["operators"])
        return cls(visits, only, synthetic, tuple(facts["notes"]), splits, operators, facts["closing"])


def _gathered(visits: tuple[Visit, ...]) -> Iterator[Size]:
    for size in sorted({visit.size for visit in visits}):
        yield Size(tuple(visit for visit in visits if visit.size == size))
