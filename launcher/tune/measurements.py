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
    retries of all ranks. `over_limit`: it ran, but used more memory than the allowed share. `where`: the phase in which
    memory ran out, else None. `predicted`: predicted to run out of memory, so it was not run. `timing`: it was meant
    to be timed, not only tried for memory. `accumulation`: micro-batches per update, if not as configured.
    """

    size: int
    speeds: tuple[float, ...] = ()
    stages_ms: Mapping[str, float] | None = None
    memory_bytes: int = 0
    retries: int = 0
    over_limit: bool = False
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
    mean, half_width = fmean(logs), math.log(2.0)
    if len(logs) > 1:
        half_width = student_t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)


@dataclass(frozen=True)
class SizeResult:
    """All measurements of one size."""

    measurements: tuple[Measurement, ...]

    @property
    def size(self) -> int:
        return self.measurements[0].size

    @property
    def fits(self) -> bool:
        return all(measurement.fits for measurement in self.measurements)

    @property
    def fits_comfortably(self) -> bool:
        return self.fits and not any(measurement.over_limit or measurement.retries for measurement in self.measurements)

    @property
    def predicted(self) -> bool:
        return any(measurement.predicted for measurement in self.measurements)

    @property
    def where(self) -> str | None:
        return next((measurement.where for measurement in self.measurements if measurement.where), None)

    @property
    def memory_bytes(self) -> int:
        return max(measurement.memory_bytes for measurement in self.measurements)

    @property
    def retries(self) -> int:
        return sum(measurement.retries for measurement in self.measurements)

    @property
    def speeds(self) -> tuple[float, ...]:
        return tuple(speed for measurement in self.measurements for speed in measurement.speeds)

    @property
    def timing_requested(self) -> bool:
        """Whether any measurement of this size was meant to be timed."""
        return any(measurement.timing for measurement in self.measurements)

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
        timed = [
            (measurement.stages_ms, len(measurement.speeds))
            for measurement in self.measurements
            if measurement.stages_ms
        ]
        blocks = sum(count for _, count in timed)
        return {
            stage: sum(times[stage] * count for times, count in timed) / blocks
            for stage in (timed[0][0] if timed else ())
        }

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

    measured: tuple[Measurement, ...] = ()
    only: tuple[int, ...] | None = None
    synthetic: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    splits: tuple[Measurement, ...] = ()
    operators: tuple[OperatorGrowth, ...] = ()
    closing: bool = False

    def with_measurement(self, measurement: Measurement) -> Measurements:
        return replace(self, measured=(*self.measured, measurement))

    def with_note(self, note: str) -> Measurements:
        return replace(self, notes=(*self.notes, note))

    def sizes(self) -> list[SizeResult]:
        """All sizes, ascending."""
        return list(_group_by_size(self.measured))

    def find_size(self, size: int) -> SizeResult | None:
        return next((result for result in self.sizes() if result.size == size), None)

    def reported_sizes(self) -> list[SizeResult]:
        """The sizes to report: those that were timed, and the smallest that does not fit."""
        if self.only is not None:
            return [result for result in self.sizes() if result.size in self.only]
        end = min((result.size for result in self.sizes() if not result.fits), default=None)
        return [
            result
            for result in self.sizes()
            if result.size == end or (result.timing_requested and (result.speeds or not result.fits))
        ]

    def points(self) -> list[MeasuredSize]:
        return [result.point for result in self.reported_sizes()]

    def largest_working(self) -> int:
        """The largest size that fits comfortably, 0 for none."""
        return max((result.size for result in self.sizes() if result.fits_comfortably), default=0)

    def memory_max(self) -> int | None:
        """The largest size that fits comfortably; if the user named sizes, among those only."""
        results = self.sizes() if self.only is None else self.reported_sizes()
        return max((result.size for result in results if result.fits_comfortably), default=None)

    def smallest_failing(self) -> int | None:
        """The smallest size that does not fit comfortably."""
        return min((result.size for result in self.sizes() if not result.fits_comfortably), default=None)

    def memory_by_size(self) -> list[tuple[int, int]]:
        return [(result.size, result.memory_bytes) for result in self.sizes() if result.fits]

    def make_advice(self) -> SizeAdvice | None:
        """The labels and recommendation; None if no size works."""
        points = self.points()
        return recommend_sizes(points, self.memory_max()) if any(point.samples_per_s for point in points) else None

    def find_regression(self) -> tuple[SizeResult, SizeResult] | None:
        """The fastest size below the smallest regressed one, and that one; None if none regressed."""
        advice = self.make_advice()
        labels: Mapping[int, str] = {} if advice is None else advice.labels
        timed = [result for result in self.reported_sizes() if result.fits and result.speeds]
        large = next((result for result in timed if labels[result.size] == "regressed"), None)
        if large is None:
            return None
        return max(
            (result for result in timed if result.size < large.size),
            key=lambda result: estimate_throughput(result.speeds)[0],
        ), large

    def split_results(self) -> list[SizeResult]:
        """The measured splits of the batch, by micro-batch size, largest first."""
        return list(_group_by_size(self.splits))[::-1]

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Measurements:
        measured, synthetic, splits = (
            tuple(Measurement(**{**fields, "speeds": tuple(fields["speeds"])}) for fields in facts[name])
            for name in ("measured", "synthetic", "splits")
        )
        only = None if facts["only"] is None else tuple(facts["only"])
        operators = tuple(OperatorGrowth(**fields) for fields in facts["operators"])
        return cls(measured, only, synthetic, tuple(facts["notes"]), splits, operators, facts["closing"])


def _group_by_size(measurements: tuple[Measurement, ...]) -> Iterator[SizeResult]:
    for size in sorted({measurement.size for measurement in measurements}):
        yield SizeResult(tuple(measurement for measurement in measurements if measurement.size == size))
