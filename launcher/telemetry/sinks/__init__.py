"""Metric sinks: a table from each sink name to the function that opens it. Sinks are imported only when used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.telemetry.metrics_logger import Sink

__all__ = ["SINK_FACTORIES", "Sink", "SinkContext", "open_sinks"]

SinkOptions = Mapping[str, Any]


@dataclass(frozen=True)
class SinkContext:
    """What the sinks need to know about a run.

    `wandb_id` stays the same across all restarts; `config` must not contain secrets.
    """

    folder: Path
    name: str
    wandb_id: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _make_console(_: SinkContext, __: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.console import ConsoleSink

    return ConsoleSink()


def _make_tensorboard(to: SinkContext, _: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.tensorboard import TensorboardSink

    return TensorboardSink(to.folder)


def _make_wandb(to: SinkContext, options: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.wandb import WandbSink

    return WandbSink(to.folder, to.wandb_id, to.name, to.config, **options)


SINK_FACTORIES: Mapping[str, Callable[[SinkContext, SinkOptions], Sink]] = {
    "console": _make_console,
    "tensorboard": _make_tensorboard,
    "wandb": _make_wandb,
}


def open_sinks(chosen: Mapping[str, SinkOptions | None], to: SinkContext) -> list[Sink]:
    """Open the chosen sinks with their options, preceded by the JSONL sink, which is always on.

    Raises:
        UsageError: a sink name is unknown, or a package that a sink needs is not installed.
        OSError: the run directory is not writable.
    """
    from launcher.telemetry.sinks.jsonl import JsonlSink

    for name in chosen:
        if name not in SINK_FACTORIES:
            raise UsageError(f"sink={name} is not a sink: choose from {', '.join(sorted(SINK_FACTORIES))}")
    others = [SINK_FACTORIES[name](to, options or {}) for name, options in chosen.items()]
    return [JsonlSink(to.folder), *others]  # JSONL is opened last: if another sink fails to open, no file is created
