"""Build the JSON document of `tune` from the measurements: labels, recommendation and bottleneck."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launcher.analysis.advice import STAGE_DESCRIPTIONS
from launcher.goodput.throughput_model import fit, fit_memory
from launcher.system.formatting import format_bytes, format_count, format_number, format_rate
from launcher.telemetry.free_cores import has_free_cores
from launcher.tune.measurements import Measurement, Measurements, SizeResult, estimate_throughput
from launcher.tune.operators import find_grown_stage
from launcher.tune.report.progress import describe_progress, find_better_size

__all__ = ["explain_recommendation", "find_recommended_point", "make_tune_document"]

MAX_OVERHEAD_SHARE = 0.5  # share of a micro-batch's time above which the constant overhead is reported
HIGH_MEMORY_SHARE = 0.8  # share of memory above which usage is reported


def make_tune_document(measurements: Measurements, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `tune` prints as JSON. `facts`: what was measured and on which machine, included unchanged."""
    advice = measurements.make_advice()
    labels: Mapping[int, str] = {} if advice is None else advice.labels
    points = [_make_point(result, labels.get(result.size, "oom"), facts) for result in measurements.reported_sizes()]
    document: dict[str, Any] = {
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
        "operators": [asdict(growth) for growth in measurements.operators],
        "notes": list(measurements.notes),
    }
    if advice is None:
        return document
    names = ("fastest", "knee", "recommended", "memory_max")
    document |= {name: getattr(advice, name) for name in names}
    document["bottleneck"] = _find_bottleneck(_find_timed_point(document))
    document["why"] = explain_recommendation(document)
    return document


def find_recommended_point(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of the recommended size; None if no size is recommended or only its memory was measured."""
    return next((point for point in document["points"] if point["per_device"] == document["recommended"]), None)


def _find_timed_point(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point of the recommended size, or of the largest timed one below it: memory_max may not have been timed."""
    timed = [point for point in document["points"] if point["samples_per_s"]]
    below = [point for point in timed if point["per_device"] <= document["recommended"]]
    return max(below, key=lambda point: int(point["per_device"])) if below else timed[0]


def _make_point(result: SizeResult, label: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not result.fits:
        return {
            "per_device": result.size,
            "samples_per_s": None,
            "low": None,
            "high": None,
            "memory_bytes": None,
            "stages": {},
            "label": "oom",
            "predicted": result.predicted,
            "where": result.where,
        }
    value, low, high = estimate_throughput(result.speeds)
    return {
        "per_device": result.size,
        "samples_per_s": value,
        "low": low,
        "high": high,
        "memory_bytes": result.memory_bytes,
        "stages": dict(result.stages_ms),
        "label": label,
        **_compute_times(result.size, value, facts),
        "alloc_retries": result.retries,
        "repeats": len(result.speeds),
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
    """Splits by micro-batch size, largest first; empty if there is only result."""
    results = measurements.split_results()
    return [_make_split(result) for result in results] if len(results) > 1 else []


def _make_split(result: SizeResult) -> dict[str, Any]:
    named = {"per_device": result.size, "accumulation": result.measurements[0].accumulation}
    if not result.fits:
        return (
            named | dict.fromkeys(("samples_per_s", "low", "high", "memory_bytes", "sync_ms")) | {"where": result.where}
        )
    value, low, high = estimate_throughput(result.speeds)
    # on a CPU, memory left by earlier measurements only raises the peak, so the minimum is the best estimate
    peak = min(measurement.memory_bytes for measurement in result.measurements)
    times = {"samples_per_s": value, "low": low, "high": high}
    return {**named, **times, "memory_bytes": peak, "sync_ms": result.stages_ms["sync"]}


def _fit_time_model(measurements: Measurements, world: int) -> dict[str, Any] | None:
    """Fit T = alpha + beta m, the time of one worker's micro-batch of m samples, to samples/s over all workers."""
    timed = [point for point in measurements.points() if point.samples_per_s is not None]
    points = [(m, value / world, low / world, high / world) for m, value, low, high in timed if value is not None]
    with suppress(ValueError):
        model = fit(points)
        return {"alpha_s": model.alpha_s.to_facts(), "beta_s": model.beta_s.to_facts()}
    return None


def _fit_memory_model(measurements: Measurements) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = fit_memory([(float(size), float(peak)) for size, peak in measurements.memory_by_size()]).line
        return {
            "fixed_bytes": line.intercept_estimate.to_facts(),
            "per_sample_bytes": line.slope_estimate.to_facts(),
        }
    return None


def _find_bottleneck(chosen: Mapping[str, Any]) -> str:
    return str(max(chosen["stages"], key=chosen["stages"].__getitem__))


# --- text -----------------------------------------------------------------------------------------------------------


def explain_recommendation(
    document: Mapping[str, Any], goodput: Mapping[str, Any] | None = None, base_batch: int | None = None
) -> str:
    """The recommended size, its bottleneck and what to try; each clause is based on a measurement.

    `goodput`: the goodput of the sizes, if the noise scale is known.
    """
    chosen = _find_timed_point(document)
    parts = [
        _describe_choice(document, chosen, is_best=find_better_size(document, goodput) is None),
        *describe_progress(document, goodput, base_batch),
        _describe_bottleneck(document, chosen),
        *_describe_regression(document),
        *_describe_memory_pressure(document, chosen),
    ]
    return "; ".join(parts)


def _describe_choice(document: Mapping[str, Any], chosen: Mapping[str, Any], *, is_best: bool) -> str:
    best = next(point for point in document["points"] if point["per_device"] == document["fastest"])
    share = chosen["samples_per_s"] / best["samples_per_s"]
    speed = f"{format_rate(chosen['samples_per_s'])} samples/s"
    size = f"{'use ' if is_best else ''}batch.per_device={document['recommended']}"
    if document["recommended"] == document["fastest"]:
        return f"{size}: the fastest, at {speed}" if is_best else f"{size} is the fastest, at {speed}"
    reached = f"{100 * share:.0f} % of what {document['fastest']} reaches"
    return f"{size}{'' if is_best else ' is the knee of samples/s'}: {speed}, {reached}"


def _describe_bottleneck(document: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    stage, stages = document["bottleneck"], chosen["stages"]
    share = stages[stage] / max(sum(stages.values()), 1e-9)
    bottleneck = f"the bottleneck is {STAGE_DESCRIPTIONS[stage]} ({100 * share:.0f} % of the time)"
    if stage == "data":
        return f"{bottleneck}: {_describe_data_wait(document, chosen)}"
    overhead_share = _compute_overhead_share(document, chosen["per_device"])
    if stage in ("forward", "backward", "optimizer") and overhead_share > MAX_OVERHEAD_SHARE:
        overhead = f"{100 * overhead_share:.0f} % of a micro-batch's time is overhead that does not grow with the batch"
        return f"{bottleneck}, and {overhead}: {_suggest_for_stage(stage, document)}"
    return f"{bottleneck}: {_suggest_for_stage(stage, document)}"


def _suggest_for_stage(stage: str, document: Mapping[str, Any]) -> str:
    """What to try for a stage; more workers only where the machine has cores for them."""
    more = ", or more workers" if stage in ("forward", "backward") and has_free_cores(document) else ""
    return SUGGESTIONS_BY_STAGE[stage] + more


SUGGESTIONS_BY_STAGE = {
    "transfer": "transfer smaller types (uint8 images), and set data.num_workers=1 or more, which pins memory",
    "forward": "try train.compile=true or train.precision=bf16 (on a GPU)",
    "backward": "try train.compile=true or train.precision=bf16 (on a GPU)",
    "sync": "batch.accumulation=2 halves how often workers wait for each other",
    "optimizer": "raise batch.accumulation, which spreads the step over more samples",
    "checkpoint": "use a longer checkpoint.every",
    "other": "time is spent outside the measured stages, or the machine is busy",
}


def _describe_data_wait(document: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The speed without waiting for data, and how many loader processes that would need."""
    synthetic = next((point for point in document["synthetic"] if point["per_device"] == chosen["per_device"]), None)
    if synthetic is None or (synthetic["samples_per_s"] or 0.0) <= chosen["samples_per_s"]:  # not faster: noise
        return "raise data.num_workers"
    workers = document["loader_workers"]
    loading_ms = chosen["stages"]["data"] if workers == 0 else workers * chosen["ms_per_update"]
    enough = max(1, math.ceil(loading_ms / synthetic["ms_per_update"]))
    speed_without = f"on synthetic data it would be {format_rate(synthetic['samples_per_s'])} samples/s"
    if enough <= workers:
        return f"{speed_without}; data.num_workers={workers} should keep up, so check the storage"
    return f"{speed_without}; about data.num_workers={enough} would keep up"


def _compute_overhead_share(document: Mapping[str, Any], size: int) -> float:
    """The share of a micro-batch's time that does not depend on its size."""
    model = document["model"]
    if model is None:
        return 0.0
    constant, slope = model["alpha_s"]["value"], model["beta_s"]["value"]
    return float(constant / max(constant + slope * size, 1e-12))


def _describe_regression(document: Mapping[str, Any]) -> list[str]:
    """Name what grew if a larger size is slower; if the user named the sizes, compare the smallest with the largest."""
    points = [point for point in document["points"] if point["samples_per_s"]]
    slower = [point for point in points if point["label"] == "regressed"]
    if slower:
        smaller = [point for point in points if point["per_device"] < slower[0]["per_device"]]
        best = max(smaller, key=lambda point: float(point["samples_per_s"]))
        return [_describe_slower_size(best, slower[0], document["accumulation"])]
    if document["asked"] and len(points) > 1:
        smallest, largest = points[0], points[-1]
        ratio = largest["samples_per_s"] / smallest["samples_per_s"]
        if smallest["low"] <= largest["high"] and largest["low"] <= smallest["high"]:
            return [f"{largest['per_device']} and {smallest['per_device']} are equally fast within measurement error"]
        word = "faster" if ratio > 1 else "slower"
        return [f"{largest['per_device']} is {max(ratio, 1 / ratio):.2f} times {word} than {smallest['per_device']}"]
    return []


def _describe_slower_size(small: Mapping[str, Any], large: Mapping[str, Any], accumulation: int) -> str:
    before, after = (
        {stage: ms / point["per_device"] / accumulation for stage, ms in point["stages"].items()}
        for point in (small, large)
    )
    stage, grew = find_grown_stage(before, after)
    ratio = small["samples_per_s"] / large["samples_per_s"]
    return (
        f"{large['per_device']} is {ratio:.2f} times slower than {small['per_device']}: {STAGE_DESCRIPTIONS[stage]} "
        f"takes {format_number(1e3 * grew)} us more per sample"
    )


def _describe_memory_pressure(document: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    if chosen["alloc_retries"]:
        return [f"the allocator retried {format_count(chosen['alloc_retries'])} times: memory is full"]
    limit = document["limit_bytes"]
    if limit and chosen["memory_bytes"] > HIGH_MEMORY_SHARE * limit:
        return [f"it uses {format_bytes(chosen['memory_bytes'])} of {format_bytes(limit)} memory"]
    return []
