"""Resolves values that are open until the start: batch.per_device=auto and the timing profile for batch=goodput."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import ResolvedConfig
from launcher.goodput.measured_noise import resolve_initial_noise
from launcher.run_dir.open_run import open_run, reuse_resolved_batch, run_path
from launcher.system.stderr import print_stderr

__all__ = ["resolve_from_measurement", "resolve_without_measuring"]


def resolve_without_measuring(
    config: RunConfig, world: int, *, known: Path | None = None, run_id: str | None = None, nodes: int = 1
) -> ResolvedConfig | None:
    """Resolve the configuration from its run folder; None if a cache lookup or a measurement is needed.

    Raises:
        UsageError: the configuration is invalid, whatever a measurement would yield.
    """
    if not auto_batch.needs_measurement(config):
        return ResolvedConfig(config)
    config = resolve_initial_noise(config)
    path = known or run_path(config, run_id, nodes)
    found = auto_batch.from_existing_run(reuse_resolved_batch(config, path), path, world, nodes)
    if found is not None:
        return found
    open_run(auto_batch.with_placeholder_batch(config), world, existing=known, run_id=run_id, nodes=nodes)
    return None


def resolve_from_measurement(config: RunConfig, found: Mapping[str, Any], path: Path) -> ResolvedConfig:
    """Resolve the configuration from a measurement, and print its notes. `path` is the run folder, if there is one.

    Raises:
        UsageError: no batch size fits into memory.
    """
    for line in found["said"]:
        print_stderr(f"note: {line}")
    answer = auto_batch.apply_tuning_result(resolve_initial_noise(config), found, path)
    if "console" not in config.sink:
        print_stderr(f"note: {answer.why}")
    return answer
