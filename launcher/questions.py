"""Resolves values that are open until the start: batch.per_device=auto and the timing profile for batch=goodput."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.observed import begun_with
from launcher.opening import kept, opened, path_of
from launcher.redact import redact
from launcher.settings import Run
from launcher.tune import auto
from launcher.tune.auto import Settled

__all__ = ["closed", "settled"]


def closed(
    run: Run, world: int, *, known: Path | None = None, run_id: str | None = None, nodes: int = 1
) -> Settled | None:
    """Resolve the configuration from its run folder; None if a cache lookup or a measurement is needed.

    Raises:
        UsageError: the configuration is invalid, whatever a measurement would yield.
    """
    if not auto.is_open(run):
        return Settled(run)
    run = begun_with(run)
    path = known or path_of(run, run_id, nodes)
    found = auto.before(kept(run, path), path, world, nodes)
    if found is not None:
        return found
    opened(auto.stood_in(run), world, known=known, run_id=run_id, nodes=nodes)
    return None


def settled(run: Run, found: Mapping[str, Any], path: Path) -> Settled:
    """Resolve the configuration from a measurement, and print its notes. `path` is the run folder, if there is one.

    Raises:
        UsageError: no batch size fits into memory.
    """
    for line in found["said"]:
        say(f"note: {line}")
    answer = auto.answered(begun_with(run), found, path)
    if "console" not in run.sink:
        say(f"note: {answer.why}")
    return answer


def say(text: str) -> None:
    print(redact(" ".join(text.split())), file=sys.stderr, flush=True)
