"""The `explain` command: a run's bottleneck, and why one run is faster than another, from metrics.jsonl alone."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean, median, stdev
from typing import Any

from launcher.advice import STAGE_WORDS, advice
from launcher.errors import RequestError
from launcher.history import History, Row
from launcher.noise import student
from launcher.reached import Reached, sooner, told
from launcher.sinks.text import count, figure, one_line, plural, rate
from launcher.stages import STAGES

__all__ = ["Profile", "compared", "explained", "profile", "text"]

WARM_ROWS = 10
STAGE_KEYS = tuple((stage, f"stage/{stage}/ms") for stage in STAGES)
_WIDTH = 80
_BAR = 20
_BLOCKS = 10


@dataclass(frozen=True)
class Profile:
    """Averages over a run's updates, without the warmup updates after each start of the workers.

    `stages` is in ms per update, `samples` per update. `spread` is the half-width of the 95 % confidence interval of
    `samples_per_s` relative to it, infinite if unknown. `gaps` maps a stage to (ms on the slowest rank, ms on the
    fastest rank). `noise` is the noise scale's lower bound divided by the global batch, as the median over the second
    half of the run; None without noise rows.
    """

    name: str
    updates: int
    left_out: int
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
    reached: Reached | None = None

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
class Span:
    """A row, the number of updates and samples it averages, and its stages in ms (empty if not measured)."""

    row: Row
    updates: float
    samples: float
    stages: Mapping[str, float]


def profile(run: History) -> Profile:
    """Compute the profile of a run.

    Raises:
        RequestError: no row has stage times.
    """
    spans = [span for span in _spans(run.rows) if span.stages]
    if not spans:
        raise RequestError(f"{run.folder}/metrics.jsonl has no stage times: train for a few more updates")
    timed = list(_warm(spans))
    updates, samples = sum(span.updates for span in timed), sum(span.samples for span in timed)
    stages = {stage: sum(span.updates * span.stages.get(stage, 0.0) for span in timed) / updates for stage in STAGES}
    last = timed[-1].row
    return Profile(
        name=run.name,
        updates=round(updates),
        left_out=round(sum(span.updates for span in spans) - updates),
        world=int(last.get("world", 1)),
        batch=last.get("batch/global", samples / updates),
        samples=samples / updates,
        samples_per_s=_speed(timed) or samples / updates / sum(stages.values()) * 1e3,
        spread=_spread(timed),
        stages=stages,
        worlds=_worlds(timed),
        reached=Reached.of(run.folder),
        **_beside(run, [span.row for span in timed]),
    )


def explained(run: Profile) -> dict[str, Any]:
    """One run as a JSON document."""
    stage = run.bottleneck
    document = {
        "bottleneck": stage,
        "share": run.share(stage),
        "why": f"{STAGE_WORDS[stage]} takes {_percent(run.share(stage))} of an update, "
        f"{figure(run.stages[stage])} of {figure(run.wall_ms)} ms",
        "advice": list(advice(run)),
        "stages": {
            name: {"ms": ms, "share": run.share(name), "ms_per_sample": run.per_sample_ms(name)}
            for name, ms in run.stages.items()
        },
        "run": run.name,
        "updates": run.updates,
        "left_out": run.left_out,
        "world": run.world,
        "samples_per_s": run.samples_per_s,
    }
    return document if run.noise is None else {**document, "noise_dominated": run.noise > 1}


def compared(a: Profile, b: Profile) -> dict[str, Any]:
    """Two runs as a JSON document: the slower run's document plus the comparison. On a tie A counts as the faster."""
    fast, slow, letter = (a, b, "A") if a.samples_per_s >= b.samples_per_s else (b, a, "B")
    ratio = fast.samples_per_s / slow.samples_per_s
    grown = {stage: slow.per_sample_ms(stage) - fast.per_sample_ms(stage) for stage in STAGES}
    grew = max(grown, key=grown.__getitem__)
    within = ratio - 1 <= (fast.spread**2 + slow.spread**2) ** 0.5
    return {
        **explained(slow),
        "why": _why(fast, slow, letter, ratio, grew, within),
        "faster": letter,
        "ratio": ratio,
        "grew": grew,
        "grew_ms_per_sample": grown[grew],
        "within_spread": within,
        **_scaling(a, b),
        **sooner(a.reached, b.reached),
        "runs": {"A": explained(a), "B": explained(b)},
    }


def text(document: Mapping[str, Any]) -> str:
    """Format either document as text of at most 80 columns."""
    runs = document.get("runs", {"": document})
    lines = [line for letter, run in runs.items() for line in _head(letter, run)]
    lines += ["", *(_two_tables(runs["A"], runs["B"]) if "runs" in document else _table(document)), ""]
    lines += textwrap.wrap(f"{document['why'][:1].upper()}{document['why'][1:]}.", _WIDTH, break_on_hyphens=False)
    if "scaling_efficiency" in document:
        lines += [
            f"Scaling efficiency: {_percent(document['scaling_efficiency'])} of the samples/s per worker is kept."
        ]
    if "target" in document:
        lines += textwrap.wrap(told(document["target"]), _WIDTH, break_on_hyphens=False)
    if document["advice"]:
        lines += ["", f"Suggestions{' for ' + _slower(document) if 'runs' in document else ''}:"]
    for line in document["advice"]:
        lines += textwrap.wrap(f"- {line}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _spans(rows: Sequence[Row]) -> Iterator[Span]:
    """Weight each row by its updates: with log.every > 1 a row averages several. The first row counts as one update."""
    updates = samples = None
    for row in rows:
        if updates is None or samples is None:
            yield Span(row, 1, row.get("batch/global", row["samples"]), _stages(row))
        else:
            yield Span(row, row["update"] - updates, row["samples"] - samples, _stages(row))
        updates, samples = row["update"], row["samples"]


def _warm(spans: Sequence[Span]) -> Iterator[Span]:
    """Drop the first rows after each start of the workers, where allocators and caches fill and code is compiled."""
    for _, started in groupby(spans, key=lambda span: span.row.get("generation")):
        part = list(started)
        yield from part[min(WARM_ROWS, -(-len(part) // 4)) if len(part) > 1 else 0 :]


def _stages(row: Row) -> dict[str, float]:
    stages = {stage: row[key] for stage, key in STAGE_KEYS if key in row}
    return stages if sum(stages.values()) > 0 else {}


def _speed(spans: Sequence[Span]) -> float | None:
    """Total samples divided by total seconds over rows with a throughput; an epoch's partial last update has none."""
    known = [(span.samples, span.row.get("throughput/samples_per_s", 0.0)) for span in spans]
    known = [(samples, speed) for samples, speed in known if speed > 0]
    return sum(samples for samples, _ in known) / sum(s / speed for s, speed in known) if known else None


def _spread(spans: Sequence[Span]) -> float:
    """Relative half-width of the 95 % interval; uses blocks of consecutive rows, since neighbours are correlated."""
    size = max(1, len(spans) // _BLOCKS)
    speeds = [_speed(spans[at : at + size]) for at in range(0, len(spans) - size + 1, size)]
    known = [speed for speed in speeds if speed]
    if len(known) < 3:
        return float("inf")
    return student(len(known) - 1) * stdev(known) / len(known) ** 0.5 / fmean(known)


def _beside(run: History, rows: Sequence[Row]) -> dict[str, Any]:
    """The profile's remaining fields: gaps, utilization, memory, noise, loss and recovery."""
    later = rows[len(rows) // 2 :]
    retries = [row["memory/alloc_retries"] for row in rows if "memory/alloc_retries" in row]
    busy = [row["device/utilization"] for row in rows if "device/utilization" in row]
    loading = [row["data/loader_cpu"] for row in rows if "data/loader_cpu" in row]
    losses = [row["train/loss"] for row in later if "train/loss" in row]
    return {
        "gaps": _gaps(rows),
        "slow_rank": _slow_rank(rows),
        "utilization": fmean(busy) if busy else None,
        "loader_cpu": fmean(loading) if loading else None,
        "alloc_retries": int(retries[-1] - retries[0]) if retries else 0,
        "major_faults": _faults(rows),
        "noise": _noise(later),
        "loss": (fmean(losses), stdev(losses)) if len(losses) > 2 else None,
        "recovery_s": sum(row.get("elastic/recovery_s", 0.0) for row in run.all_rows),
        "lost_samples": sum(row.get("elastic/lost_samples", 0.0) for row in run.all_rows),
    }


def _faults(rows: Sequence[Row]) -> float:
    """Major page faults per update; the counter restarts with each process."""
    known = [row for row in rows if "memory/major_faults" in row]
    starts = [list(part) for _, part in groupby(known, key=lambda row: row.get("generation"))]
    pages = sum(part[-1]["memory/major_faults"] - part[0]["memory/major_faults"] for part in starts)
    updates = sum(part[-1]["update"] - part[0]["update"] for part in starts)
    return pages / updates if updates else 0.0


def _gaps(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    gaps = {}
    for stage in STAGES:
        keys = (f"stage/{stage}/ms_max", f"stage/{stage}/ms_min")
        both = [(row[keys[0]], row[keys[1]]) for row in rows if all(key in row for key in keys)]
        if both:
            gaps[stage] = (fmean(slow for slow, _ in both), fmean(quick for _, quick in both))
    return gaps


def _slow_rank(rows: Sequence[Row]) -> int | None:
    """The rank that is critical in at least 75 % of the updates, or None."""
    ranks = Counter(int(row["stage/rank"]) for row in rows if row.get("world", 1) > 1 and "stage/rank" in row)
    if not ranks:
        return None
    [(rank, times)] = ranks.most_common(1)
    return rank if times >= 0.75 * ranks.total() else None


def _noise(rows: Sequence[Row]) -> float | None:
    """Median of the noise scale's lower bound (or the scale itself) divided by the batch."""
    known = [row for row in rows if "batch/global" in row and ("noise/scale_low" in row or "noise/scale" in row)]
    if not known:
        return None
    return median(row.get("noise/scale_low", row.get("noise/scale", 0.0)) / row["batch/global"] for row in known)


def _worlds(spans: Sequence[Span]) -> tuple[tuple[int, float], ...]:
    """Samples/s at each world size; empty if there was only one."""
    sizes = sorted({int(span.row.get("world", 1)) for span in spans})
    speeds = [(size, _speed([span for span in spans if span.row.get("world", 1) == size])) for size in sizes]
    known = tuple((size, speed) for size, speed in speeds if speed)
    return known if len(known) > 1 else ()


def _why(fast: Profile, slow: Profile, letter: str, ratio: float, grew: str, within: bool) -> str:
    if within:
        return f"A and B are equally fast: x{ratio:.2f} is within the measurement noise of their updates"
    other = "B" if letter == "A" else "A"
    before, after = fast.per_sample_ms(grew), slow.per_sample_ms(grew)
    whole = slow.wall_ms / slow.samples - fast.wall_ms / fast.samples
    part = f", {_percent((after - before) / whole)} of the difference" if whole >= after - before else ""
    return (
        f"{letter} is x{ratio:.2f} as fast as {other}: in {other} {STAGE_WORDS[grew]} takes {figure(after * 1e3)} us "
        f"per sample, in {letter} {figure(before * 1e3)} us{part}"
    )


def _scaling(a: Profile, b: Profile) -> dict[str, float]:
    """Scaling efficiency from the smaller to the larger world size, if the global or per-worker batches are similar."""
    alike = any(0.9 < one / other < 1.1 for one, other in ((a.batch, b.batch), (a.batch * b.world, b.batch * a.world)))
    if a.world == b.world or not alike:
        return {}
    small, large = sorted((a, b), key=lambda run: run.world)
    return {"scaling_efficiency": large.samples_per_s / large.world / (small.samples_per_s / small.world)}


def _slower(document: Mapping[str, Any]) -> str:
    return "B" if document["faster"] == "A" else "A"


def _head(letter: str, run: Mapping[str, Any]) -> list[str]:
    label = f"{letter}  " if letter else ""
    workers = plural(run["world"], "worker")
    facts = f"{workers}, {rate(run['samples_per_s'])} samples/s over {count(run['updates'])} updates"
    left_out = f" ({count(run['left_out'])} warmup excluded)" if run["left_out"] else ""
    return textwrap.wrap(f"{label}{one_line(run['run'])}: {facts}{left_out}", _WIDTH, subsequent_indent="   ")


def _table(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'stage':<12}{'ms per update':>15}{'share':>9}"
    for stage, values in run["stages"].items():
        bar = "#" * round(_BAR * values["share"])
        yield f"  {stage:<12}{figure(values['ms']):>15}{_percent(values['share']):>9}  {bar}".rstrip()


def _two_tables(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'us per sample':<16}{'A':>12}{'B':>12}{'B - A':>12}"
    for stage in STAGES:
        one, two = (run["stages"][stage]["ms_per_sample"] * 1e3 for run in (a, b))
        yield f"  {stage:<16}{figure(one):>12}{figure(two):>12}{_signed(two - one):>12}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{figure(value)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else "< 1 %"
