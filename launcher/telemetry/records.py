"""The records that training logs: metric rows and events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Event", "MetricsRow"]


@dataclass(frozen=True)
class MetricsRow:
    """One row of `metrics.jsonl`: the training position at `time` (UNIX seconds) and the values measured there.

    `samples`, `update` and `epoch` count completed work; `values` holds the documented keys in their documented units.
    """

    time: float
    samples: int
    update: int
    epoch: int
    world: int
    generation: int
    values: Mapping[str, float | int]


@dataclass(frozen=True)
class Event:
    """One row of `events.jsonl`: the name of an event, its `time` (UNIX seconds) and its fields."""

    time: float
    event: str
    fields: Mapping[str, Any]
