"""Build the JSON document of `tune` from the measurements: labels, recommendation and bottleneck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launcher.analysis.advice import STAGE_DESCRIPTIONS
from launcher.goodput.throughput_model import Estimate, fit, fit_memory
from launcher.system.formatting import format_bytes, format_count, format_number, format_rate
from launcher.tune.measurements import Measurement, Measurements, SizeResult, estimate_throughput
from launcher.tune.operators import find_grown_stage

__all__ = ["find_recommended_point", "make_tune_document"]

MAX_OVERHEAD_SHARE = 0.5  # share of a micro-batch's time above which the constant overhead is reported
HIGH_MEMORY_SHARE = 0.8  # share of memory above which usage is reported


def make_tune_document(measurements: Measurements, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `tune` prints as JSON. `facts`: what was measured and on which machine, included unchanged."""
    advice, told = measurements.make_advice(), measurements.reported_sizes()
    labels: Mapping[int, str] = {} if advice is None else advice.labels
    points = [_make_point(one, labels.get(one.size, "oom"), facts) for one in told]
    found: dict[str, Any] = {
        "points": points,
        "fastest": None,
        "knee": None,
        "recommended": None,
        "memory_max": measurements.memory_max(),
        "bottleneck": None,
        "why": "no size fits into memory: try smaller tune.sizes, a smaller model, or more memory per worker",
        **facts,
        "model": _fit_time_model(measurements, facts["world"]),
        "memory": _fit_memory_model(measurements),
        "synthetic": [_make_synthetic_point(measurement, facts) for measurement in measurements.synthetic],
        "splits": _make_splits(measurements),
        "operators": [asdict(one) for one in measurements.operators],
        "notes": list(measurements.notes),
    }
    if advice is None:
        return found
    names = ("fastest", "knee", "recommended", "memory_max")
    found |= {name: getattr(advice, name) for name in names}
    chosen = next(point for point in points if point["per_device"] == _find_timed_size(points, advice.recommended))
    found["bottleneck"] = _find_bottleneck(chosen)
    found["why"] = _explain_recommendation(found, chosen)
    return found


def find_recommended_point(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of the recommended size; None if no size is recommended or only its memory was measured."""
    return next((point for point in found["points"] if point["per_device"] == found["recommended"]), None)


def _find_timed_size(points: Sequence[Mapping[str, Any]], wanted: int) -> int:
    """The recommended size, or the largest timed one below it, as memory_max may not have been timed."""
    sizes = [point["per_device"] for point in points if point["samples_per_s"]]
    return max((one for one in sizes if one <= wanted), default=sizes[0])


def _make_point(one: SizeResult, label: str, facts: Mapping[str, Any]) -> dict[str, Any]:
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
    value, low, high = estimate_throughput(one.speeds)
    return {
        "per_device": one.size,
        "samples_per_s": value,
        "low": low,
        "high": high,
        "memory_bytes": one.memory_bytes,
        "stages": dict(one.stages_ms),
        "label": label,
        **_compute_times(one.size, value, facts),
        "alloc_retries": one.retries,
        "repeats": len(one.speeds),
    }


def _compute_times(size: int, samples_per_s: float, facts: Mapping[str, Any]) -> dict[str, float]:
    batch = size * facts["world"] * facts["accumulation"]
    return {
        "ms_per_update": 1e3 * batch / samples_per_s,
        "updates_per_epoch": facts["train_samples"] / batch,
        "epoch_s": facts["train_samples"] / samples_per_s,
    }


def _make_synthetic_point(measurement: Measurement, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not measurement.speeds:
        return {"per_device": measurement.size, "samples_per_s": None}
    value, low, high = estimate_throughput(measurement.speeds)
    named = {"per_device": measurement.size, "samples_per_s": value, "low": low, "high": high}
    return {**named, **_compute_times(measurement.size, value, facts)}


def _make_splits(measurements: Measurements) -> list[dict[str, Any]]:
    """Splits by micro-batch size, largest first; empty if there is only one."""
    divisions = measurements.split_results()
    return [_make_split(one) for one in divisions] if len(divisions) > 1 else []


def _make_split(one: SizeResult) -> dict[str, Any]:
    named = {"per_device": one.size, "accumulation": one.measurements[0].accumulation}
    if not one.fits:
        return named | dict.fromkeys(("samples_per_s", "low", "high", "memory_bytes", "sync_ms")) | {"where": one.where}
    value, low, high = estimate_throughput(one.speeds)
    # on a CPU, memory left by earlier measurements only raises the peak, so the minimum is the best estimate
    peak = min(measurement.memory_bytes for measurement in one.measurements)
    times = {"samples_per_s": value, "low": low, "high": high}
    return {**named, **times, "memory_bytes": peak, "sync_ms": one.stages_ms["sync"]}


def _fit_time_model(measurements: Measurements, world: int) -> dict[str, Any] | None:
    """Fit T = alpha + beta m, the time of one worker's micro-batch of m samples, to samples/s over all workers."""
    timed = [point for point in measurements.points() if point.samples_per_s is not None]
    points = [(m, value / world, low / world, high / world) for m, value, low, high in timed if value is not None]
    with suppress(ValueError):
        found = fit(points)
        return {"alpha_s": _make_interval(found.alpha_s), "beta_s": _make_interval(found.beta_s)}
    return None


def _fit_memory_model(measurements: Measurements) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = fit_memory([(float(one), float(peak)) for one, peak in measurements.memory_by_size()]).line
        return {
            "fixed_bytes": _make_interval(line.intercept_estimate),
            "per_sample_bytes": _make_interval(line.slope_estimate),
        }
    return None


def _make_interval(found: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _find_bottleneck(chosen: Mapping[str, Any]) -> str:
    return str(max(chosen["stages"], key=chosen["stages"].__getitem__))


# --- text -----------------------------------------------------------------------------------------------------------


def _explain_recommendation(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The recommended size, its bottleneck and what to try; each clause is based on a measurement."""
    parts = [
        _describe_choice(found, chosen),
        _describe_bottleneck(found, chosen),
        *_describe_regression(found),
        *_describe_memory_pressure(found, chosen),
    ]
    return "; ".join(parts)


def _describe_choice(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    best = next(point for point in found["points"] if point["per_device"] == found["fastest"])
    share = chosen["samples_per_s"] / best["samples_per_s"]
    reached = f"{format_rate(chosen['samples_per_s'])} samples/s"
    if found["recommended"] == found["fastest"]:
        return f"use batch.per_device={found['recommended']}: the fastest, at {reached}"
    return (
        f"use batch.per_device={found['recommended']}: {reached}, {100 * share:.0f} % of what "
        f"{found['fastest']} reaches"
    )


def _describe_bottleneck(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    stage, stages = found["bottleneck"], chosen["stages"]
    share = stages[stage] / max(sum(stages.values()), 1e-9)
    said = f"the bottleneck is {STAGE_DESCRIPTIONS[stage]} ({100 * share:.0f} % of the time)"
    if stage == "data":
        return f"{said}: {_describe_data_wait(found, chosen)}"
    if (
        stage in ("forward", "backward", "optimizer")
        and _compute_overhead_share(found, chosen["per_device"]) > MAX_OVERHEAD_SHARE
    ):
        part = _compute_overhead_share(found, chosen["per_device"])
        overhead = f"{100 * part:.0f} % of a micro-batch's time is overhead that does not grow with the batch"
        return f"{said}, and {overhead}: {SUGGESTIONS_BY_STAGE[stage]}"
    return f"{said}: {SUGGESTIONS_BY_STAGE[stage]}"


SUGGESTIONS_BY_STAGE = {
    "transfer": "transfer smaller types (uint8 images), and set data.num_workers=1 or more, which pins memory",
    "forward": "try train.compile=true, train.precision=bf16 (on a GPU), or more workers",
    "backward": "try train.compile=true, train.precision=bf16 (on a GPU), or more workers",
    "sync": "batch.accumulation=2 halves how often workers wait for each other",
    "optimizer": "raise batch.accumulation, which spreads the step over more samples",
    "checkpoint": "use a longer checkpoint.every",
    "other": "time is spent outside the measured stages, or the machine is busy",
}


def _describe_data_wait(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The speed without waiting for data, and how many loader processes that would need."""
    beside = next((one for one in found["synthetic"] if one["per_device"] == chosen["per_device"]), None)
    if beside is None or (beside["samples_per_s"] or 0.0) <= chosen["samples_per_s"]:  # not faster: noise
        return "raise data.num_workers"
    workers = found["loader_workers"]
    took_ms = chosen["stages"]["data"] if workers == 0 else workers * chosen["ms_per_update"]
    enough = max(1, math.ceil(took_ms / beside["ms_per_update"]))
    speed_without = f"on synthetic data it would be {format_rate(beside['samples_per_s'])} samples/s"
    if enough <= workers:
        return f"{speed_without}; data.num_workers={workers} should keep up, so check the storage"
    return f"{speed_without}; about data.num_workers={enough} would keep up"


def _compute_overhead_share(found: Mapping[str, Any], size: int) -> float:
    """The share of a micro-batch's time that does not depend on its size."""
    model = found["model"]
    if model is None:
        return 0.0
    constant, slope = model["alpha_s"]["value"], model["beta_s"]["value"]
    return float(constant / max(constant + slope * size, 1e-12))


def _describe_regression(found: Mapping[str, Any]) -> list[str]:
    """Name what grew if a larger size is slower; if the user named the sizes, compare the smallest with the largest."""
    points = [point for point in found["points"] if point["samples_per_s"]]
    slower = [point for point in points if point["label"] == "regressed"]
    if slower:
        smaller = [point for point in points if point["per_device"] < slower[0]["per_device"]]
        best = max(smaller, key=lambda point: float(point["samples_per_s"]))
        return [_describe_slower_size(best, slower[0], found["accumulation"])]
    if found["asked"] and len(points) > 1:
        a, b = points[0], points[-1]
        ratio = b["samples_per_s"] / a["samples_per_s"]
        if a["low"] <= b["high"] and b["low"] <= a["high"]:
            return [f"{b['per_device']} and {a['per_device']} are equally fast within measurement error"]
        word = "faster" if ratio > 1 else "slower"
        return [f"{b['per_device']} is {max(ratio, 1 / ratio):.2f} times {word} than {a['per_device']}"]
    return []


def _describe_slower_size(small: Mapping[str, Any], large: Mapping[str, Any], accumulation: int) -> str:
    before, after = (
        {stage: ms / one["per_device"] / accumulation for stage, ms in one["stages"].items()} for one in (small, large)
    )
    stage, grew = find_grown_stage(before, after)
    ratio = small["samples_per_s"] / large["samples_per_s"]
    return (
        f"{large['per_device']} is {ratio:.2f} times slower than {small['per_device']}: {STAGE_DESCRIPTIONS[stage]} takes "
        f"{format_number(1e3 * grew)} us more per sample"
    )


def _describe_memory_pressure(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    if chosen["alloc_retries"]:
        return [f"the allocator retried {format_count(chosen['alloc_retries'])} times: memory is full"]
    limit = found["limit_bytes"]
    if limit and chosen["memory_bytes"] > HIGH_MEMORY_SHARE * limit:
        return [f"it uses {format_bytes(chosen['memory_bytes'])} of {format_bytes(limit)} memory"]
    return []
