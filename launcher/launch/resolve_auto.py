"""Replaces batch.per_device=auto, and finds the timing profile for batch=goodput, when a job starts.

The values come from the existing run or from a measurement, by the rules of `launcher.goodput.auto_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import ResolvedConfig
from launcher.goodput.measured_noise import resolve_initial_noise
from launcher.run_dir.open_run import reuse_resolved_batch, run_path
from launcher.system.stderr import print_stderr

__all__ = ["make_unmeasured_config", "resolve_from_measurement", "resolve_without_measuring"]


def resolve_without_measuring(
    config: RunConfig, world: int, *, existing: Path | None = None, run_id: str | None = None, nodes: int = 1
) -> ResolvedConfig | None:
    """Resolve the configuration if it needs no measurement, or from the existing run; None if a measurement is needed.

    `existing`: the run directory of an earlier start of the same job.
    """
    if not auto_batch.needs_measurement(config):
        return ResolvedConfig(config)
    config = resolve_initial_noise(config)
    path = existing or run_path(config, run_id, nodes)
    config = reuse_resolved_batch(config, path, is_restart=existing is not None)
    return auto_batch.from_existing_run(config, path, world, nodes)


def make_unmeasured_config(config: RunConfig) -> RunConfig:
    """The configuration to open before measuring, which finds every error that does not depend on the measurement."""
    return auto_batch.with_placeholder_batch(resolve_initial_noise(config))


def resolve_from_measurement(config: RunConfig, measurement: Mapping[str, Any], path: Path) -> ResolvedConfig:
    """Resolve the configuration from a measurement, and print its notes. `path` is the run directory, if there is one.

    Raises:
        UsageError: no batch size fits into memory.
    """
    for line in measurement["said"]:
        print_stderr(f"note: {line}")
    resolved = auto_batch.apply_tuning_result(resolve_initial_noise(config), measurement, path)
    if "console" not in config.sink:
        print_stderr(f"note: {resolved.why}")
    return resolved
