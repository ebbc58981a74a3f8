"""Goodput of the measured sizes: samples/s times the efficiency of their batch, if the noise scale is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.goodput.measured_noise import MeasuredNoise

__all__ = ["goodput_values"]


def goodput_values(
    document: Mapping[str, Any], noise: MeasuredNoise | None, base_batch: int | None
) -> dict[str, Any] | None:
    """Goodput with its interval for each timed size, and the best size, for the document of `tune`; None if unknown.

    Goodput is progress per second in samples at the base batch; its interval combines those of speed and noise scale.
    """
    timed = [point for point in document["points"] if point["samples_per_s"]]
    if noise is None or base_batch is None or not timed:
        return None
    points = [
        _compute_goodput_point(point, document["world"] * document["accumulation"], noise, base_batch)
        for point in timed
    ]
    best = max(points, key=lambda point: float(point["goodput"]))
    return {"noise": vars(noise), "base_batch": base_batch, "points": points, "best": best["per_device"]}


def _compute_goodput_point(
    point: Mapping[str, Any], micro_batches: int, noise: MeasuredNoise, base_batch: int
) -> dict[str, Any]:
    batch = point["per_device"] * micro_batches
    efficiency = noise.estimate_efficiency(batch, base_batch)
    return {
        "per_device": point["per_device"],
        "global": batch,
        "efficiency": efficiency.value,
        "goodput": point["samples_per_s"] * efficiency.value,
        "low": point["low"] * efficiency.low,
        "high": point["high"] * efficiency.high,
    }
