"""Analyse measured micro-batch sizes: find the knee and regressions, and predict unmeasured sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.system.statistics import Z_95, student_t_quantile

__all__ = [
    "MEMORY_SHARE",
    "Estimate",
    "LinearFit",
    "MeasuredSize",
    "MemoryModel",
    "SizeAdvice",
    "ThroughputModel",
    "fit",
    "fit_line",
    "fit_memory",
    "knee",
    "label",
    "recommend_sizes",
]

KNEE_SHARE = 0.9
MEMORY_SHARE = 0.92
_MIN_PROBES = 3


class MeasuredSize(NamedTuple):
    """A measured size: samples/s with its interval; None if the size did not fit into memory."""

    size: int
    samples_per_s: float | None
    low: float = 0.0
    high: float = 0.0


class Estimate(NamedTuple):
    """A value and its 95 % interval, which is infinite if unknown."""

    value: float
    low: float
    high: float

    def to_facts(self) -> dict[str, float | None]:
        """Return a JSON-serialisable dict, with None for infinity."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


Points = Sequence[tuple[int, float | None, float, float]]


def knee(points: Points, share: float = KNEE_SHARE) -> int:
    """The smallest size with at least `share` of the best samples/s. ValueError if no size works."""
    working = _select_working(points)
    best = max(speed for _, speed, _, _ in working)
    return min(size for size, speed, _, _ in working if speed >= share * best)


def label(points: Points) -> dict[int, str]:
    """Label each size, in ascending order.

    rising: below the knee; knee; regressed: beyond the knee, with an interval entirely below the interval of the
    fastest smaller size; saturated: any other size beyond the knee; oom: did not fit into memory.
    """
    knee_size = knee(points)
    speeds = {size: (speed, low, high) for size, speed, low, high in _select_working(points)}
    labels: dict[int, str] = {}
    for size in sorted(size for size, *_ in points):
        if size not in speeds:
            labels[size] = "oom"
        elif size <= knee_size:
            labels[size] = "knee" if size == knee_size else "rising"
        else:
            best_low = max((speed, low) for smaller, (speed, low, _) in speeds.items() if smaller < size)[1]
            labels[size] = "regressed" if speeds[size][2] < best_low else "saturated"
    return labels


@dataclass(frozen=True)
class SizeAdvice:
    """The sizes that `tune` reports by name; `labels` maps each size to its label."""

    labels: Mapping[int, str]
    fastest: int
    knee: int
    recommended: int
    memory_max: int


def recommend_sizes(points: Points, memory_max: int | None = None) -> SizeAdvice:
    """Recommend the knee, or the largest working size if that is smaller.

    `memory_max`: the largest working size, if it is known from more than these points.
    """
    working, knee_size = _select_working(points), knee(points)
    largest = max(size for size, *_ in working) if memory_max is None else memory_max
    fastest = max(working, key=lambda point: (point[1], -point[0]))[0]
    return SizeAdvice(label(points), fastest, knee_size, min(knee_size, largest), largest)


@dataclass(frozen=True)
class LinearFit:
    """y = intercept + slope x, both at least 0.

    `covariance` holds (variance of the intercept, covariance, variance of the slope); `t_quantile` is the half-width of
    an interval in standard errors.
    """

    intercept: float
    slope: float
    covariance: tuple[float, float, float]
    t_quantile: float

    def predict(self, x: float) -> Estimate:
        var_intercept, covariance, var_slope = self.covariance
        variance = var_intercept + 2 * covariance * x + var_slope * x * x
        return self._make_estimate(self.intercept + self.slope * x, variance)

    @property
    def intercept_estimate(self) -> Estimate:
        return self._make_estimate(self.intercept, self.covariance[0])

    @property
    def slope_estimate(self) -> Estimate:
        return self._make_estimate(self.slope, self.covariance[2])

    def _make_estimate(self, value: float, variance: float) -> Estimate:
        half_width = self.t_quantile * math.sqrt(max(0.0, variance)) if variance < math.inf else math.inf
        return Estimate(value, max(0.0, value - half_width), value + half_width)


def fit_line(xs: Sequence[float], ys: Sequence[float], errors: Sequence[float]) -> LinearFit:
    """Fit a line by weighted least squares, with intercept and slope at least 0.

    `errors` are the standard errors of the values. If one is unknown (0), all values are taken to have the same
    relative error. Errors are scaled up if the scatter around the line is larger than they allow. ValueError for fewer
    than two different x.
    """
    if len(set(xs)) < 2:
        raise ValueError(f"{len(set(xs))} different sizes: a line needs two or more")
    errors_known = all(error > 0 for error in errors)
    weights = [1 / (error if errors_known else y) ** 2 for error, y in zip(errors, ys, strict=True)]
    w, wx, wxx, wy, wxy = (
        math.fsum(weight * x**i * y**j for weight, x, y in zip(weights, xs, ys, strict=True))
        for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
    )
    determinant = w * wxx - wx * wx
    intercept, slope = (wxx * wy - wx * wxy) / determinant, (w * wxy - wx * wy) / determinant
    covariance = (wxx / determinant, -wx / determinant, w / determinant)
    if intercept < 0:
        intercept, slope, covariance = 0.0, wxy / wxx, (0.0, 0.0, 1 / wxx)
    elif slope < 0:
        intercept, slope, covariance = wy / w, 0.0, (1 / w, 0.0, 0.0)
    freedom = len(xs) - 2
    chi2 = math.fsum(weight * (intercept + slope * x - y) ** 2 for weight, x, y in zip(weights, xs, ys, strict=True))
    scatter = chi2 / freedom if freedom else math.inf
    inflation = max(1.0, scatter if freedom else 0.0) if errors_known else scatter
    quantile = Z_95 if errors_known and inflation == 1 else student_t_quantile(max(1, freedom))
    var_intercept, cov, var_slope = (entry * inflation if entry else 0.0 for entry in covariance)
    return LinearFit(intercept, slope, (var_intercept, cov, var_slope), quantile)


@dataclass(frozen=True)
class ThroughputModel:
    """Seconds of a micro-batch of m samples: alpha + beta m. Throughputs are totals over all workers."""

    line: LinearFit

    @property
    def alpha_s(self) -> Estimate:
        """Fixed time of a micro-batch, independent of its size."""
        return self.line.intercept_estimate

    @property
    def beta_s(self) -> Estimate:
        """Additional time per sample."""
        return self.line.slope_estimate

    def predict_time_s(self, size: float) -> Estimate:
        return self.line.predict(size)

    def predict_samples_per_s(self, size: float) -> Estimate:
        value, low, high = self.predict_time_s(size)
        return Estimate(size / value, size / high, size / low if low else math.inf)

    def compute_overhead(self, size: float) -> float:
        """Share of the fixed cost in the time of a micro-batch."""
        return self.line.intercept / self.predict_time_s(size).value

    def find_knee(self, share: float = KNEE_SHARE) -> float:
        """The size that reaches `share` of the asymptotic samples/s; infinite if the time per sample is 0."""
        return share / (1 - share) * self.line.intercept / self.line.slope if self.line.slope else math.inf


def fit(points: Points) -> ThroughputModel:
    """Fit T = alpha + beta m to the working sizes, without regressed ones, which a line does not describe.

    ValueError for fewer than two sizes.
    """
    labels = label(points)
    fitted = [point for point in _select_working(points) if labels[point[0]] != "regressed"]
    sizes = [float(size) for size, *_ in fitted]
    times = [size / speed for size, speed, _, _ in fitted]
    errors = [(size / low - size / high) / (2 * Z_95) if low else 0.0 for size, _, low, high in fitted]
    return ThroughputModel(fit_line(sizes, times, errors))


@dataclass(frozen=True)
class MemoryModel:
    """Bytes at a size: fixed + c x size. The size is in samples, or in samples x height x width for images."""

    line: LinearFit

    def predict_bytes(self, size: float) -> Estimate:
        return self.line.predict(size)

    def find_largest_size(self, limit_bytes: float, share: float = MEMORY_SHARE) -> int | None:
        """The largest size expected to fit within `share` of the limit; 0 if none does, None if memory does not grow.

        It only says which size to probe next; it is never a result.
        """
        if not self.line.slope:
            return None
        return max(0, math.floor((share * limit_bytes - self.line.intercept) / self.line.slope))


def fit_memory(probes: Sequence[tuple[float, float]]) -> MemoryModel:
    """Fit M = M0 + c x size to (size, bytes) of at least three sizes; ValueError for fewer."""
    if len({size for size, _ in probes}) < _MIN_PROBES:
        raise ValueError(f"{len(probes)} memory probes: {_MIN_PROBES} sizes or more are needed")
    sizes, memory = zip(*probes, strict=True)
    return MemoryModel(fit_line(sizes, memory, [0.0] * len(probes)))


def _select_working(points: Points) -> list[tuple[int, float, float, float]]:
    """The points that fit into memory.

    Raises:
        ValueError: a size was measured twice, no size works, or a samples/s value is invalid.
    """
    if len({size for size, *_ in points}) < len(points):
        raise ValueError("a size was measured twice: give one point for each")
    working = [(size, speed, low, high) for size, speed, low, high in points if speed is not None]
    for size, speed, low, high in working:
        if not (0 < low <= speed <= high < math.inf):
            raise ValueError(f"size {size}: {speed} samples/s between {low} and {high} is not a valid measurement")
    if not working:
        raise ValueError("no size works: there is nothing to choose from")
    return working
