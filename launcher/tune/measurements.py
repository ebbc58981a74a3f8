"""The measurements of each size and what follows from them. Imports no torch, as the driver reads them too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

from launcher.goodput.throughput_model import MeasuredSize, SizeAdvice, recommend_sizes
from launcher.system.statistics import student_t_quantile
from launcher.tune.operators import OperatorGrowth

__all__ = ["Measurement", "Measurements", "SizeResult", "estimate_throughput"]

MAX_RELATIVE_ERROR = 0.03  # relative half-width of an interval that is good enough


@dataclass(frozen=True)
class Measurement:
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


def estimate_throughput(speeds: tuple[float, ...]) -> tuple[float, float, float]:
    """Mean, low and high of samples/s, from Student's t on the logarithms, so that low stays above zero."""
    logs = [math.log(value) for value in speeds]
    reach = student_t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.log(2.0)
    mean = fmean(logs)
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


@dataclass(frozen=True)
class SizeResult:
    """All measurements of one size."""

    visits: tuple[Measurement, ...]

    @property
    def size(self) -> int:
        return self.visits[0].size

    @property
    def fits(self) -> bool:
        return all(measurement.fits for measurement in self.visits)

    @property
    def fits_comfortably(self) -> bool:
        return self.fits and not any(measurement.pressed or measurement.retries for measurement in self.visits)

    @property
    def predicted(self) -> bool:
        return any(measurement.predicted for measurement in self.visits)

    @property
    def where(self) -> str | None:
        return next((measurement.where for measurement in self.visits if measurement.where), None)

    @property
    def memory_bytes(self) -> int:
        return max(measurement.memory_bytes for measurement in self.visits)

    @property
    def retries(self) -> int:
        return sum(measurement.retries for measurement in self.visits)

    @property
    def speeds(self) -> tuple[float, ...]:
        return tuple(one for measurement in self.visits for one in measurement.speeds)

    @property
    def asked(self) -> bool:
        """Whether any measurement of this size was meant to be timed."""
        return any(measurement.timing for measurement in self.visits)

    @property
    def point(self) -> MeasuredSize:
        return (
            MeasuredSize(self.size, *estimate_throughput(self.speeds)) if self.fits else MeasuredSize(self.size, None)
        )

    @property
    def is_uncertain(self) -> bool:
        """Whether the interval of samples/s is still too wide."""
        value, low, high = estimate_throughput(self.speeds)
        return high - low > 2 * MAX_RELATIVE_ERROR * value

    @property
    def stages_ms(self) -> Mapping[str, float]:
        told = [
            (measurement.stages_ms, len(measurement.speeds)) for measurement in self.visits if measurement.stages_ms
        ]
        whole = sum(weight for _, weight in told)
        return {stage: sum(times[stage] * n for times, n in told) / whole for stage in (told[0][0] if told else ())}

    @property
    def ms_per_sample(self) -> Mapping[str, float]:
        """Milliseconds of each stage per sample of one worker's micro-batch."""
        return {stage: ms / self.size for stage, ms in self.stages_ms.items()}


@dataclass(frozen=True)
class Measurements:
    """Every measurement so far, immutable. `synthetic`: those on synthetic data. `notes`: remarks for the user.

    `only`: the sizes that the user named; other sizes tried on the way are not reported. `splits`: measurements of the
    same batch at different accumulation. `operators`: those that make a larger size slower. `closing`: the search has
    finished, and only the follow-ups (`splits`, `operators`) were still running.
    """

    visits: tuple[Measurement, ...] = ()
    only: tuple[int, ...] | None = None
    synthetic: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    splits: tuple[Measurement, ...] = ()
    operators: tuple[OperatorGrowth, ...] = ()
    closing: bool = False

    def with_measurement(self, measurement: Measurement) -> Measurements:
        return replace(self, visits=(*self.visits, measurement))

    def with_note(self, note: str) -> Measurements:
        return replace(self, notes=(*self.notes, note))

    def sizes(self) -> list[SizeResult]:
        """All sizes, ascending."""
        return list(_group_by_size(self.visits))

    def find_size(self, size: int) -> SizeResult | None:
        return next((one for one in self.sizes() if one.size == size), None)

    def reported_sizes(self) -> list[SizeResult]:
        """The sizes to report: those that were timed, and the smallest that does not fit."""
        if self.only is not None:
            return [one for one in self.sizes() if one.size in self.only]
        end = min((one.size for one in self.sizes() if not one.fits), default=None)
        return [one for one in self.sizes() if one.size == end or (one.asked and (one.speeds or not one.fits))]

    def points(self) -> list[MeasuredSize]:
        return [one.point for one in self.reported_sizes()]

    def largest_working(self) -> int:
        """The largest size that fits comfortably, 0 for none."""
        return max((one.size for one in self.sizes() if one.fits_comfortably), default=0)

    def memory_max(self) -> int | None:
        """The largest size that fits comfortably; if the user named sizes, among those only."""
        named = self.sizes() if self.only is None else self.reported_sizes()
        return max((one.size for one in named if one.fits_comfortably), default=None)

    def smallest_failing(self) -> int | None:
        """The smallest size that does not fit comfortably."""
        return min((one.size for one in self.sizes() if not one.fits_comfortably), default=None)

    def memory_by_size(self) -> list[tuple[int, int]]:
        return [(one.size, one.memory_bytes) for one in self.sizes() if one.fits]

    def make_advice(self) -> SizeAdvice | None:
        """The labels and recommendation; None if no size works."""
        points = self.points()
        return recommend_sizes(points, self.memory_max()) if any(point.samples_per_s for point in points) else None

    def find_regression(self) -> tuple[SizeResult, SizeResult] | None:
        """The fastest size below the smallest regressed one, and that one; None if none regressed."""
        advice = self.make_advice()
        labels: Mapping[int, str] = {} if advice is None else advice.labels
        timed = [one for one in self.reported_sizes() if one.fits and one.speeds]
        large = next((one for one in timed if labels[one.size] == "regressed"), None)
        if large is None:
            return None
        return max(
            (one for one in timed if one.size < large.size), key=lambda one: estimate_throughput(one.speeds)[0]
        ), large

    def split_results(self) -> list[SizeResult]:
        """The measured splits of the batch, by micro-batch size, largest first."""
        return list(_group_by_size(self.splits))[::-1]

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Measurements:
        visits, synthetic, splits = (
            tuple(Measurement(**{**one, "speeds": tuple(one["speeds"])}) for one in facts[name])
            for name in ("visits", "synthetic", "splits")
        )
        only = None if facts["only"] is None else tuple(facts["only"])
        operators = tuple(OperatorGrowth(**one) for one in facts["operators"])
        return cls(visits, only, synthetic, tuple(facts["notes"]), splits, operators, facts["closing"])


def _group_by_size(visits: tuple[Measurement, ...]) -> Iterator[SizeResult]:
    for size in sorted({measurement.size for measurement in visits}):
        yield SizeResult(tuple(measurement for measurement in visits if measurement.size == size))
