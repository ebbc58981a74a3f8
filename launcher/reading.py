"""What training tells the world: rows of figures, and events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Event", "Reading"]


@dataclass(frozen=True)
class Reading:
    """One row of `metrics.jsonl`: where training stood at `time` (UNIX seconds) and what was measured there.

    `samples`, `update` and `epoch` count what was finished, `values` has the documented keys and their units.
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
    """One row of `events.jsonl`: something that happened at `time` (UNIX seconds), and its facts."""

    time: float
    event: str
    facts: Mapping[str, Any]
