"""The interface of a sink, a destination for rows and events, and what sinks are told about a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launcher.telemetry.records import Event, MetricsRow

__all__ = ["SINK_TIMEOUT_S", "Sink", "SinkContext"]

#: How long closing a sink may take if it sets no `close_timeout_s`.
SINK_TIMEOUT_S = 2.0


class Sink(Protocol):
    """A destination for rows and events. Both methods are called from the sink's own thread.

    Optional attributes: `lossless = True` gives an unbounded queue whose events are written before `log_event` returns;
    `write_interval_s` is the interval at which rows are delivered; `close_timeout_s` limits how long closing may take;
    `abandon()` is called if closing takes longer.
    """

    def write(self, entry: MetricsRow | Event) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SinkContext:
    """What the sinks need to know about a run.

    `wandb_id` stays the same across all restarts; `config` must not contain secrets.
    """

    folder: Path
    name: str
    wandb_id: str
    config: Mapping[str, Any] = field(default_factory=dict)
