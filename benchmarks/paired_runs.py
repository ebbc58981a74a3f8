"""Runs of several programs in turn: pairs that count, the interval of the median of their ratios, and the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quiet_machine import Calibration, CpuUse, Limits, find_disturbances

__all__ = [
    "CONFIDENCE",
    "Interval",
    "MachineBusyError",
    "Measurement",
    "Pair",
    "Pairs",
    "collect_pairs",
    "compute_interval",
    "compute_ratios",
    "make_table",
    "rotate",
]

CONFIDENCE = 0.95


class MachineBusyError(Exception):
    """Too much else ran on the machine: there is no result."""


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds the true median with a probability of at least 95 %."""

    median: float
    low: float | None  # None: too few values for such an interval
    high: float | None

    def format(self, spec: str = ".3f") -> str:
        if self.low is None or self.high is None:
            return f"{self.median:{spec}} (too few pairs for an interval)"
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def compute_interval(values: Sequence[float]) -> Interval:
    """The median with its distribution-free interval: two order statistics, by the binomial distribution.

    The k-th smallest and k-th largest of n values enclose the median unless fewer than k values lie on one of its
    sides: with probability 1 - 2 P(Binomial(n, 1/2) < k). The largest k with at least 95 % is taken; below six values
    there is none. (David and Nagaraja, Order Statistics, 7.1)
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and outside + 2 * math.comb(n, k) / 2**n <= 1 - CONFIDENCE:
        outside += 2 * math.comb(n, k) / 2**n
        k += 1
    median = statistics.median(ordered)
    return Interval(median, ordered[k - 1], ordered[n - k]) if k else Interval(median, None, None)


@dataclass(frozen=True)
class Measurement:
    """One run of one program. `wall_s` and `cpu_s` are per update, `cpu_s` of all processes of the job."""

    wall_s: float
    cpu_s: float
    start_s: float  # from the command to the end of the first update
    peak_rss_kb: float  # of the rank with the most
    low_rss_kb: float  # the peak of the rank with the least
    updates: int


@dataclass(frozen=True)
class Pair:
    """One run of each program, in turn, and what the machine did meanwhile."""

    case: str
    runs: Mapping[str, Measurement]
    calibrations: Sequence[Calibration]
    uses: Sequence[CpuUse]


def rotate(programs: Sequence[str], number: int) -> list[str]:
    """The order of the programs in pair `number`: each is first, second and last equally often."""
    shift = number % len(programs)
    return [*programs[shift:], *programs[:shift]]


class Pairs:
    """All pairs so far, judged by the best calibration of all: a pair may stop counting when a better one is found."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.all: list[Pair] = []

    @property
    def best_cpu_s(self) -> float:
        return min((one.cpu_s for pair in self.all for one in pair.calibrations), default=math.inf)

    def find_disturbances(self, pair: Pair) -> list[str]:
        return find_disturbances(pair.calibrations, pair.uses, self.best_cpu_s, self._limits)

    def select_quiet(self, case: str | None = None) -> list[Pair]:
        """The pairs that count, of one case or of all."""
        return [pair for pair in self.all if case in (None, pair.case) and not self.find_disturbances(pair)]

    def count_attempts(self, case: str) -> int:
        return sum(pair.case == case for pair in self.all)


def collect_pairs(
    cases: Sequence[str], wanted: int, attempts: int, run_pair: Callable[[str, int], Pair], pairs: Pairs
) -> None:
    """Run pairs of every case in turn until each has `wanted` that were measured on a quiet machine.

    Raises:
        MachineBusyError: a case needed more than `attempts` pairs for that.
    """
    while missing := [case for case in cases if len(pairs.select_quiet(case)) < wanted]:
        for case in missing:
            number = pairs.count_attempts(case)
            if number >= attempts:
                raise MachineBusyError(
                    f"{case}: only {len(pairs.select_quiet(case))} of {number} pairs were measured on a quiet machine, "
                    f"{wanted} are needed; the last one: {'; '.join(pairs.find_disturbances(pairs.all[-1])) or 'quiet'}"
                )
            pairs.all.append(run_pair(case, number))


def compute_ratios(pairs: Sequence[Pair], program: str, base: str, value: str) -> list[float]:
    """The ratio of one of the measured values of two programs within each pair."""
    return [float(getattr(pair.runs[program], value) / getattr(pair.runs[base], value)) for pair in pairs]


def make_table(pairs: Pairs, cases: Mapping[str, str], programs: Sequence[str]) -> list[str]:
    """The Markdown tables: `cases` maps each case to its description; the first program is what others compare with."""
    base, *others = programs
    lines: list[str] = []
    for title, value, scale, unit in (
        ("wall time per update", "wall_s", 1e3, "ms"),
        ("CPU time per update, all processes", "cpu_s", 1e3, "ms"),
        ("peak resident memory of the largest rank", "peak_rss_kb", 1 / 1024, "MiB"),
        ("peak resident memory of the smallest rank", "low_rss_kb", 1 / 1024, "MiB"),
        ("command to the end of the first update", "start_s", 1.0, "s"),
    ):
        heads = [title, "updates per run", f"{base}, {unit}", *(f"{other} / {base}" for other in others)]
        lines += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for case, description in cases.items():
            quiet = pairs.select_quiet(case)
            absolute = statistics.median(getattr(pair.runs[base], value) for pair in quiet) * scale
            ratios = [compute_interval(compute_ratios(quiet, other, base, value)).format() for other in others]
            cells = [description, f"{len(quiet)} × {quiet[0].runs[base].updates}", f"{absolute:.2f}", *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    quiet = pairs.select_quiet()
    ratios = [compute_interval(compute_ratios(quiet, other, base, "start_s")).format() for other in others]
    absolute = statistics.median(pair.runs[base].start_s for pair in quiet)
    lines.append(f"| {' | '.join(['all of them', str(len(quiet)), f'{absolute:.2f}', *ratios])} |")
    return lines[1:]
