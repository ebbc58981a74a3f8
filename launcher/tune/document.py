"""Build the JSON document of `tune` from the measurements: labels, recommendation and bottleneck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launcher.advice import STAGE_WORDS
from launcher.sinks.text import count, figure, rate, size
from launcher.throughput import Estimate, fit, fit_memory
from launcher.tune.ledger import Ledger, Size, Visit, speed
from launcher.tune.operators import stage_grown

__all__ = ["document", "recommended"]

MOSTLY = 0.5  # share of a micro-batch's time above which the constant overhead is reported
FULL = 0.8  # share of memory above which usage is reported


def document(ledger: Ledger, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `tune` prints as JSON. `facts`: what was measured and on which machine, included unchanged."""
    advice, told = ledger.advice(), ledger.told()
    labels: Mapping[int, str] = {} if advice is None else advice.labels
    points = [_point(one, labels.get(one.size, "oom"), facts) for one in told]
    found: dict[str, Any] = {
        "points": points,
        "fastest": None,
        "knee": None,
        "recommended": None,
        "memory_max": ledger.memory_max(),
        "bottleneck": None,
        "why": "no size fits into memory: try smaller tune.sizes, a smaller model, or more memory per worker",
        **facts,
        "model": _model(ledger, facts["world"]),
        "memory": _memory(ledger),
        "synthetic": [_beside(visit, facts) for visit in ledger.synthetic],
        "splits": _splits(ledger),
        "operators": [asdict(one) for one in ledger.operators],
        "notes": list(ledger.notes),
    }
    if advice is None:
        return found
    names = ("fastest", "knee", "recommended", "memory_max")
    found |= {name: getattr(advice, name) for name in names}
    chosen = next(point for point in points if point["per_device"] == _timed(points, advice.recommended))
    found["bottleneck"] = _bottleneck(chosen)
    found["why"] = _why(found, chosen)
    return found


def recommended(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of the recommended size; None if no size is recommended or only its memory was measured."""
    return next((point for point in found["points"] if point["per_device"] == found["recommended"]), None)


def _timed(points: Sequence[Mapping[str, Any]], wanted: int) -> int:
    """The recommended size, or the largest timed one below it, as memory_max may not have been timed."""
    sizes = [point["per_device"] for point in points if point["samples_per_s"]]
    return max((one for one in sizes if one <= wanted), default=sizes[0])


def _point(one: Size, label: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not one.fits:
        return {
            "per_device": one.size,
            "samples_per_s": None,
            "low": None,
            "high": None,
            "memory_bytes": None,
            "stages": {},
            "label": "oom",
            "predicted": one.predicted,
            "where": one.where,
        }
    value, low, high = speed(one.speeds)
    return {
        "per_device": one.size,
        "samples_per_s": value,
        "low": low,
        "high": high,
        "memory_bytes": one.memory_bytes,
        "stages": dict(one.stages_ms),
        "label": label,
        **_times(one.size, value, facts),
        "alloc_retries": one.retries,
        "repeats": len(one.speeds),
    }


def _times(size: int, samples_per_s: float, facts: Mapping[str, Any]) -> dict[str, float]:
    batch = size * facts["world"] * facts["accumulation"]
    return {
        "ms_per_update": 1e3 * batch / samples_per_s,
        "updates_per_epoch": facts["train_samples"] / batch,
        "epoch_s": facts["train_samples"] / samples_per_s,
    }


def _beside(visit: Visit, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not visit.speeds:
        return {"per_device": visit.size, "samples_per_s": None}
    value, low, high = speed(visit.speeds)
    named = {"per_device": visit.size, "samples_per_s": value, "low": low, "high": high}
    return {**named, **_times(visit.size, value, facts)}


def _splits(ledger: Ledger) -> list[dict[str, Any]]:
    """Splits by micro-batch size, largest first; empty if there is only one."""
    divisions = ledger.divisions()
    return [_split(one) for one in divisions] if len(divisions) > 1 else []


def _split(one: Size) -> dict[str, Any]:
    named = {"per_device": one.size, "accumulation": one.visits[0].accumulation}
    if not one.fits:
        return named | dict.fromkeys(("samples_per_s", "low", "high", "memory_bytes", "sync_ms")) | {"where": one.where}
    value, low, high = speed(one.speeds)
    # on a CPU, memory left by earlier measurements only raises the peak, so the minimum is the best estimate
    peak = min(visit.memory_bytes for visit in one.visits)
    times = {"samples_per_s": value, "low": low, "high": high}
    return {**named, **times, "memory_bytes": peak, "sync_ms": one.stages_ms["sync"]}


def _model(ledger: Ledger, world: int) -> dict[str, Any] | None:
    """Fit T = alpha + beta m, the time of one worker's micro-batch of m samples, to samples/s over all workers."""
    timed = [point for point in ledger.points() if point.samples_per_s is not None]
    points = [(m, value / world, low / world, high / world) for m, value, low, high in timed if value is not None]
    with suppress(ValueError):
        found = fit(points)
        return {"alpha_s": _bounds(found.alpha_s), "beta_s": _bounds(found.beta_s)}
    return None


def _memory(ledger: Ledger) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = fit_memory([(float(one), float(peak)) for one, peak in ledger.memory()]).line
        return {"fixed_bytes": _bounds(line.intercepts), "per_sample_bytes": _bounds(line.slopes)}
    return None


def _bounds(found: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _bottleneck(chosen: Mapping[str, Any]) -> str:
    return str(max(chosen["stages"], key=chosen["stages"].__getitem__))


# --- text -----------------------------------------------------------------------------------------------------------


def _why(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The recommended size, its bottleneck and what to try; each clause is based on a measurement."""
    parts = [_choice(found, chosen), _limit(found, chosen), *_compared(found), *_pressure(found, chosen)]
    return "; ".join(parts)


def _choice(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    best = next(point for point in found["points"] if point["per_device"] == found["fastest"])
    share = chosen["samples_per_s"] / best["samples_per_s"]
    reached = f"{rate(chosen['samples_per_s'])} samples/s"
    if found["recommended"] == found["fastest"]:
        return f"use batch.per_device={found['recommended']}: the fastest, at {reached}"
    return (
        f"use batch.per_device={found['recommended']}: {reached}, {100 * share:.0f} % of what "
        f"{found['fastest']} reaches"
    )


def _limit(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    stage, stages = found["bottleneck"], chosen["stages"]
    share = stages[stage] / max(sum(stages.values()), 1e-9)
    said = f"the bottleneck is {STAGE_WORDS[stage]} ({100 * share:.0f} % of the time)"
    if stage == "data":
        return f"{said}: {_data(found, chosen)}"
    if stage in ("forward", "backward", "optimizer") and _overhead(found, chosen["per_device"]) > MOSTLY:
        part = _overhead(found, chosen["per_device"])
        overhead = f"{100 * part:.0f} % of a micro-batch's time is overhead that does not grow with the batch"
        return f"{said}, and {overhead}: {MENDS[stage]}"
    return f"{said}: {MENDS[stage]}"


MENDS = {
    "transfer": "transfer smaller types (uint8 images), and set data.workers=1 or more, which pins memory",
    "forward": "try train.compile=true, train.precision=bf16 (on a GPU), or more workers",
    "backward": "try train.compile=true, train.precision=bf16 (on a GPU), or more workers",
    "sync": "batch.accumulation=2 halves how often workers wait for each other",
    "optimizer": "raise batch.accumulation, which spreads the step over more samples",
    "checkpoint": "use a longer checkpoint.every",
    "other": "time is spent outside the measured stages, or the machine is busy",
}


def _data(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The speed without waiting for data, and how many loader processes that would need."""
    beside = next((one for one in found["synthetic"] if one["per_device"] == chosen["per_device"]), None)
    if beside is None or (beside["samples_per_s"] or 0.0) <= chosen["samples_per_s"]:  # not faster: noise
        return "raise data.workers"
    workers = found["loader_workers"]
    took_ms = chosen["stages"]["data"] if workers == 0 else workers * chosen["ms_per_update"]
    enough = max(1, math.ceil(took_ms / beside["ms_per_update"]))
    speed_without = f"on synthetic data it would be {rate(beside['samples_per_s'])} samples/s"
    if enough <= workers:
        return f"{speed_without}; data.workers={workers} should keep up, so check the storage"
    return f"{speed_without}; about data.workers={enough} would keep up"


def _overhead(found: Mapping[str, Any], size: int) -> float:
    """The share of a micro-batch's time that does not depend on its size."""
    model = found["model"]
    if model is None:
        return 0.0
    constant, slope = model["alpha_s"]["value"], model["beta_s"]["value"]
    return float(constant / max(constant + slope * size, 1e-12))


def _compared(found: Mapping[str, Any]) -> list[str]:
    """Name what grew if a larger size is slower; if the user named the sizes, compare the smallest with the largest."""
    points = [point for point in found["points"] if point["samples_per_s"]]
    slower = [point for point in points if point["label"] == "regressed"]
    if slower:
        smaller = [point for point in points if point["per_device"] < slower[0]["per_device"]]
        best = max(smaller, key=lambda point: float(point["samples_per_s"]))
        return [_slower(best, slower[0], found["accumulation"])]
    if found["asked"] and len(points) > 1:
        a, b = points[0], points[-1]
        ratio = b["samples_per_s"] / a["samples_per_s"]
        if a["low"] <= b["high"] and b["low"] <= a["high"]:
            return [f"{b['per_device']} and {a['per_device']} are equally fast within measurement error"]
        word = "faster" if ratio > 1 else "slower"
        return [f"{b['per_device']} is {max(ratio, 1 / ratio):.2f} times {word} than {a['per_device']}"]
    return []


def _slower(small: Mapping[str, Any], large: Mapping[str, Any], accumulation: int) -> str:
    before, after = (
        {stage: ms / one["per_device"] / accumulation for stage, ms in one["stages"].items()} for one in (small, large)
    )
    stage, grew = stage_grown(before, after)
    ratio = small["samples_per_s"] / large["samples_per_s"]
    return (
        f"{large['per_device']} is {ratio:.2f} times slower than {small['per_device']}: {STAGE_WORDS[stage]} takes "
        f"{figure(1e3 * grew)} us more per sample"
    )


def _pressure(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    if chosen["alloc_retries"]:
        return [f"the allocator retried {count(chosen['alloc_retries'])} times: memory is full"]
    limit = found["limit_bytes"]
    if limit and chosen["memory_bytes"] > FULL * limit:
        return [f"it uses {size(chosen['memory_bytes'])} of {size(limit)} memory"]
    return []
