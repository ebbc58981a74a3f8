"""Results of tune on an invented machine, for tests of its reports."""

from __future__ import annotations

from typing import Any

from launcher.tune.measurements import Measurement, Measurements
from launcher.tune.report.document import make_tune_document

FACTS: dict[str, Any] = {
    "recipe": "Mlp", "world": 2, "accumulation": 1, "train_samples": 1437, "device": "cpu (x86_64)",
    "precision": "fp32", "strategy": "ddp", "threads": 1, "loader_workers": 0, "limit_bytes": 10**10,
    "measured": "2026-01-01T00:00:00+00:00", "spent_s": 12.0, "asked": False,
}  # fmt: skip


STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")


#: The example of math.md: knee 28, fastest 40, 57 and 80 regressed.
TRACE = {10: 21.4, 14: 25.1, 20: 29.4, 28: 32.9, 40: 35.7, 57: 34.3, 80: 31.5}


def measured_size(size: int, samples_per_s: float, most: str = "forward", **more: Any) -> Measurement:
    update_ms = 2e3 * size / samples_per_s
    stages = {stage: update_ms * (0.65 if stage == most else 0.05) for stage in STAGES}
    speeds = tuple(samples_per_s * (1 + off) for off in (-0.002, 0.0, 0.002))
    return Measurement(size, speeds, stages, memory_bytes=10**8 + size * 10**5, **more)


def make_measurements(*visits: Measurement, **more: Any) -> Measurements:
    return Measurements(tuple(visits), **more)


FIXED_BYTES, PIXEL_BYTES = 310e6, 1900.0


def tune_document(scale: float = 1.0) -> dict[str, Any]:
    """The known trace, at `scale` of its samples/s."""
    return make_tune_document(
        make_measurements(*(measured_size(m, scale * speed) for m, speed in TRACE.items())), FACTS
    )


def document_with_memory(height: int, width: int) -> dict[str, Any]:
    found = tune_document()
    for point in found["points"]:
        point["memory_bytes"] = round(FIXED_BYTES + PIXEL_BYTES * point["per_device"] * height * width)
    return found


def measured_size_with_sync(size: int, samples_per_s: float, spread: float = 0.002, **more: Any) -> Measurement:
    """The update is 1 ms of sync, and otherwise forward."""
    update_ms = 2e3 * size * more.get("accumulation", 1) / samples_per_s
    stages = dict.fromkeys(STAGES, 0.0) | {"forward": update_ms - 1.0, "sync": 1.0}
    speeds = tuple(samples_per_s * (1 + off) for off in (-spread, 0.0, spread))
    return Measurement(size, speeds, stages, **{"memory_bytes": 10**8, **more})
