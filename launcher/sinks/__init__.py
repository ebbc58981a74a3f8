"""Metric sinks: a table from each sink name to the function that opens it. Sinks are imported only when used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.sinks.journal import Sink

__all__ = ["SINKS", "Destination", "Sink", "open_sinks"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Destination:
    """What the sinks need to know about a run.

    `wandb_id` stays the same across all restarts; `config` must not contain secrets.
    """

    folder: Path
    name: str
    wandb_id: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _console(_: Destination, __: Options) -> Sink:
    from launcher.sinks.console import Console

    return Console()


def _tensorboard(to: Destination, _: Options) -> Sink:
    from launcher.sinks.tensorboard import Tensorboard

    return Tensorboard(to.folder)


def _wandb(to: Destination, options: Options) -> Sink:
    from launcher.sinks.wandb import Wandb

    return Wandb(to.folder, to.wandb_id, to.name, to.config, **options)


SINKS: Mapping[str, Callable[[Destination, Options], Sink]] = {
    "console": _console,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def open_sinks(chosen: Mapping[str, Options | None], to: Destination) -> list[Sink]:
    """Open the chosen sinks with their options, preceded by the JSONL sink, which is always on.

    Raises:
        UsageError: a sink name is unknown, or a package that a sink needs is not installed.
        OSError: the run directory is not writable.
    """
    from launcher.sinks.jsonl import Jsonl

    for name in chosen:
        if name not in SINKS:
            raise RequestError(f"sink={name} is not a sink: choose from {', '.join(sorted(SINKS))}")
    others = [SINKS[name](to, options or {}) for name, options in chosen.items()]
    return [Jsonl(to.folder), *others]  # JSONL is opened last: if another sink fails to open, no file is created
