"""Write run directories for tests: metrics.jsonl as training writes it, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_STAGES_MS", "make_row", "write_run"]

DEFAULT_STAGES_MS = {"data": 1.0, "forward": 4.0, "backward": 8.0, "sync": 2.0, "optimizer": 1.0}
STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")


def make_row(
    update: int,
    stages_ms: Mapping[str, float] = DEFAULT_STAGES_MS,
    *,
    batch: int = 64,
    world: int = 2,
    generation: int = 1,
    samples: int | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Return the row of an update of `batch` samples; `__` in other keys stands for the slash."""
    wall_ms = sum(stages_ms.values())
    trained_samples = update * batch if samples is None else samples
    return {
        "time": 1000.0 + update * wall_ms / 1e3,
        "samples": trained_samples,
        "update": update,
        "epoch": trained_samples // 1000,
        "world": world,
        "generation": generation,
        "train/loss": 2.0 / update,
        "lr/value": 0.1,
        "lr/scale": 1.0,
        "batch/global": batch,
        "throughput/samples_per_s": batch / wall_ms * 1e3,
        **{f"stage/{stage}/ms": stages_ms.get(stage, 0.0) for stage in STAGES},
        **{f"stage/{stage}/share": stages_ms.get(stage, 0.0) / wall_ms for stage in STAGES},
        **{key.replace("__", "/"): value for key, value in values.items()},
    }


def write_run(folder: Path, rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]] = ()) -> Path:
    """Create a run directory with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in events))
    return folder
