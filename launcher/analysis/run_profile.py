"""The typical update of a run: stage times, throughput and their spread, computed from metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from launcher.analysis.time_to_target import TimeToTarget
from launcher.errors import UsageError
from launcher.run_dir.metrics_reader import MetricValues, RunMetrics
from launcher.system.jsonl import JsonlReader
from launcher.system.run_files import EVENTS_FILE
from launcher.system.statistics import student_t_quantile
from launcher.telemetry.free_cores import has_free_cores
from launcher.telemetry.stages import STAGES

__all__ = ["STAGE_TIME_KEYS", "WARMUP_ROWS", "RunProfile", "WeightedRow", "compute_profile"]

WARMUP_ROWS = 10
STAGE_TIME_KEYS = tuple((stage, f"stage/{stage}/ms") for stage in STAGES)
_BLOCK_COUNT = 10


@dataclass(frozen=True)
class RunProfile:
    """Averages over a run's updates, without the warmup updates after each start of the workers.

    `stages` is in ms per update, `samples` per update. `spread` is the half-width of the 95 % confidence interval of
    `samples_per_s` relative to it, infinite if unknown. `gaps` maps a stage to (ms on the slowest rank, ms on the
    fastest rank). `noise` is the noise scale's lower bound divided by the global batch, as the median over the second
    half of the run; None without noise rows.
    """

    name: str
    updates: int
    skipped_updates: int
    world: int
    batch: float
    samples: float
    samples_per_s: float
    spread: float
    stages: Mapping[str, float]
    gaps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    slow_rank: int | None = None
    utilization: float | None = None
    loader_cpu: float | None = None
    alloc_retries: int = 0
    major_faults: float = 0.0
    noise: float | None = None
    loss: tuple[float, float] | None = None
    recovery_s: float = 0.0
    lost_samples: float = 0.0
    worlds: tuple[tuple[int, float], ...] = ()
    reached: TimeToTarget | None = None
    has_free_cores: bool = False

    @property
    def wall_ms(self) -> float:
        return sum(self.stages.values())

    @property
    def bottleneck(self) -> str:
        return max(self.stages, key=self.stages.__getitem__)

    def share(self, stage: str) -> float:
        return self.stages[stage] / self.wall_ms

    def per_sample_ms(self, stage: str) -> float:
        return self.stages[stage] / self.samples


@dataclass(frozen=True)
class WeightedRow:
    """A row, the number of updates and samples it averages, and its stages in ms (empty if not measured)."""

    row: MetricValues
    updates: float
    samples: float
    stages: Mapping[str, float]


def compute_profile(run: RunMetrics) -> RunProfile:
    """Compute the profile of a run.

    Raises:
        UsageError: no row has stage times.
    """
    spans = [span for span in _weight_rows(run.rows) if span.stages]
    if not spans:
        raise UsageError(f"{run.folder}/metrics.jsonl has no stage times: train for a few more updates")
    timed = list(_drop_warmup_rows(spans))
    updates, samples = sum(span.updates for span in timed), sum(span.samples for span in timed)
    stages = {stage: sum(span.updates * span.stages.get(stage, 0.0) for span in timed) / updates for stage in STAGES}
    last = timed[-1].row
    return RunProfile(
        name=run.name,
        updates=round(updates),
        skipped_updates=round(sum(span.updates for span in spans) - updates),
        world=int(last.get("world", 1)),
        batch=last.get("batch/global", samples / updates),
        samples=samples / updates,
        samples_per_s=_compute_throughput(timed) or samples / updates / sum(stages.values()) * 1e3,
        spread=_estimate_relative_error(timed),
        stages=stages,
        worlds=_compute_throughput_by_world(timed),
        reached=TimeToTarget.from_run_dir(run.folder),
        has_free_cores=has_free_cores(_read_start_facts(run.folder)),
        **_compute_remaining_fields(run, [span.row for span in timed]),
    )


def _read_start_facts(folder: Path) -> Mapping[str, Any]:
    """The facts of the last start event; empty without one."""
    facts: Mapping[str, Any] = {}
    with suppress(OSError):
        for event in JsonlReader(folder / EVENTS_FILE, containing='"start"'):
            facts = event if event.get("event") == "start" else facts
    return facts


def _weight_rows(rows: Sequence[MetricValues]) -> Iterator[WeightedRow]:
    """Weight each row by its updates: with log.every > 1 a row averages several. The first row counts as one update."""
    updates = samples = None
    for row in rows:
        if updates is None or samples is None:
            yield WeightedRow(row, 1, row.get("batch/global", row["samples"]), _read_stage_times(row))
        else:
            yield WeightedRow(row, row["update"] - updates, row["samples"] - samples, _read_stage_times(row))
        updates, samples = row["update"], row["samples"]


def _drop_warmup_rows(spans: Sequence[WeightedRow]) -> Iterator[WeightedRow]:
    """Drop the first rows after each start of the workers, where allocators and caches fill and code is compiled."""
    for _, started in groupby(spans, key=lambda span: span.row.get("generation")):
        part = list(started)
        yield from part[min(WARMUP_ROWS, -(-len(part) // 4)) if len(part) > 1 else 0 :]


def _read_stage_times(row: MetricValues) -> dict[str, float]:
    stages = {stage: row[key] for stage, key in STAGE_TIME_KEYS if key in row}
    return stages if sum(stages.values()) > 0 else {}


def _compute_throughput(spans: Sequence[WeightedRow]) -> float | None:
    """Total samples divided by total seconds over rows with a throughput; an epoch's partial last update has none."""
    known = [(span.samples, span.row.get("throughput/samples_per_s", 0.0)) for span in spans]
    known = [(samples, speed) for samples, speed in known if speed > 0]
    return sum(samples for samples, _ in known) / sum(s / speed for s, speed in known) if known else None


def _estimate_relative_error(spans: Sequence[WeightedRow]) -> float:
    """Relative half-width of the 95 % interval; uses blocks of consecutive rows, since neighbours are correlated."""
    size = max(1, len(spans) // _BLOCK_COUNT)
    speeds = [_compute_throughput(spans[at : at + size]) for at in range(0, len(spans) - size + 1, size)]
    known = [speed for speed in speeds if speed]
    if len(known) < 3:
        return float("inf")
    return student_t_quantile(len(known) - 1) * stdev(known) / len(known) ** 0.5 / fmean(known)


def _compute_remaining_fields(run: RunMetrics, rows: Sequence[MetricValues]) -> dict[str, Any]:
    """The profile's remaining fields: gaps, utilization, memory, noise, loss and recovery."""
    later = rows[len(rows) // 2 :]
    retries = [row["memory/alloc_retries"] for row in rows if "memory/alloc_retries" in row]
    busy = [row["device/utilization"] for row in rows if "device/utilization" in row]
    loading = [row["data/loader_cpu"] for row in rows if "data/loader_cpu" in row]
    losses = [row["train/loss"] for row in later if "train/loss" in row]
    return {
        "gaps": _compute_gaps(rows),
        "slow_rank": _find_slow_rank(rows),
        "utilization": fmean(busy) if busy else None,
        "loader_cpu": fmean(loading) if loading else None,
        "alloc_retries": int(retries[-1] - retries[0]) if retries else 0,
        "major_faults": _compute_faults_per_update(rows),
        "noise": _compute_noise_ratio(later),
        "loss": (fmean(losses), stdev(losses)) if len(losses) > 2 else None,
        "recovery_s": sum(row.get("elastic/recovery_s", 0.0) for row in run.all_rows),
        "lost_samples": sum(row.get("elastic/lost_samples", 0.0) for row in run.all_rows),
    }


def _compute_faults_per_update(rows: Sequence[MetricValues]) -> float:
    """Major page faults per update; the counter restarts with each process."""
    known = [row for row in rows if "memory/major_faults" in row]
    starts = [list(part) for _, part in groupby(known, key=lambda row: row.get("generation"))]
    pages = sum(part[-1]["memory/major_faults"] - part[0]["memory/major_faults"] for part in starts)
    updates = sum(part[-1]["update"] - part[0]["update"] for part in starts)
    return pages / updates if updates else 0.0


def _compute_gaps(rows: Sequence[MetricValues]) -> dict[str, tuple[float, float]]:
    gaps = {}
    for stage in STAGES:
        keys = (f"stage/{stage}/ms_max", f"stage/{stage}/ms_min")
        both = [(row[keys[0]], row[keys[1]]) for row in rows if all(key in row for key in keys)]
        if both:
            gaps[stage] = (fmean(slowest for slowest, _ in both), fmean(fastest for _, fastest in both))
    return gaps


def _find_slow_rank(rows: Sequence[MetricValues]) -> int | None:
    """The rank that is critical in at least 75 % of the updates, or None."""
    ranks = Counter(int(row["stage/rank"]) for row in rows if row.get("world", 1) > 1 and "stage/rank" in row)
    if not ranks:
        return None
    [(rank, times)] = ranks.most_common(1)
    return rank if times >= 0.75 * ranks.total() else None


def _compute_noise_ratio(rows: Sequence[MetricValues]) -> float | None:
    """Median of the noise scale's lower bound (or the scale itself) divided by the batch."""
    known = [row for row in rows if "batch/global" in row and ("noise/scale_low" in row or "noise/scale" in row)]
    if not known:
        return None
    return median(row.get("noise/scale_low", row.get("noise/scale", 0.0)) / row["batch/global"] for row in known)


def _compute_throughput_by_world(spans: Sequence[WeightedRow]) -> tuple[tuple[int, float], ...]:
    """Samples/s at each world size; empty if there was only one."""
    sizes = sorted({int(span.row.get("world", 1)) for span in spans})
    speeds = [
        (size, _compute_throughput([span for span in spans if span.row.get("world", 1) == size])) for size in sizes
    ]
    known = tuple((size, speed) for size, speed in speeds if speed)
    return known if len(known) > 1 else ()
