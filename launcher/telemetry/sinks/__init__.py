"""Where rows and events go: JSONL files (always), the console, TensorBoard and W&B; `open_sinks` opens the chosen ones.

A sink is imported only when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launcher.errors import UsageError
from launcher.telemetry.sink import Sink, SinkContext

__all__ = ["SINK_FACTORIES", "SinkContext", "open_sinks"]

SinkOptions = Mapping[str, Any]


def _make_console(_: SinkContext, __: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.console import ConsoleSink

    return ConsoleSink()


def _make_tensorboard(context: SinkContext, _: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.tensorboard import TensorboardSink

    return TensorboardSink(context.folder)


def _make_wandb(context: SinkContext, options: SinkOptions) -> Sink:
    from launcher.telemetry.sinks.wandb import WandbSink

    return WandbSink(context, **options)


SINK_FACTORIES: Mapping[str, Callable[[SinkContext, SinkOptions], Sink]] = {
    "console": _make_console,
    "tensorboard": _make_tensorboard,
    "wandb": _make_wandb,
}


def open_sinks(chosen: Mapping[str, SinkOptions | None], context: SinkContext) -> list[Sink]:
    """Open the chosen sinks with their options, then the JSONL sink, which is always on and comes first in the list.

    Raises:
        UsageError: a sink name is unknown, or a package that a sink needs is not installed.
        OSError: the run directory is not writable.
    """
    from launcher.telemetry.sinks.jsonl import JsonlSink

    for name in chosen:
        if name not in SINK_FACTORIES:
            raise UsageError(f"sink={name} is not a sink: choose from {', '.join(sorted(SINK_FACTORIES))}")
    others = [SINK_FACTORIES[name](context, options or {}) for name, options in chosen.items()]
    # the JSONL sink is opened last, so that no file is created if another sink fails to open
    return [JsonlSink(context.folder), *others]
