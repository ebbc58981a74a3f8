"""The rules for `batch.per_device=auto`, which becomes a number before the run is created, as if the user had set it.

`launcher.launch.resolve_auto` applies them, and starts the measurement if one is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.config.schema import BatchConfig, RunConfig
from launcher.config.strategy_checks import needs_equal_micro_batches
from launcher.errors import EXIT_FAILED, UsageError
from launcher.goodput.policy import TimingProfile
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.formatting import format_plural
from launcher.system.stderr import print_stderr

__all__ = [
    "MeasurementError",
    "ResolvedConfig",
    "apply_tuning_result",
    "from_existing_run",
    "lookup_note",
    "needs_measurement",
    "report_unmeasured",
    "tuning_config",
    "with_placeholder_batch",
]

DEFAULT_BUDGET_S = 30.0
UNLIMITED_PER_DEVICE = 1 << 40


class MeasurementError(Exception):
    """A measuring worker failed for a reason other than memory; the message is the line to print."""

    def __init__(self, line: str, trace: str = "") -> None:
        super().__init__(line)
        self.trace = trace


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration with all `auto` values resolved; `why` states the choice in one line, empty if there was none.

    `profile`: the measured update times under batch=goodput, as a JSON-serialisable dict.
    """

    config: RunConfig
    why: str = ""
    profile: Mapping[str, Any] | None = None


def needs_measurement(config: RunConfig) -> bool:
    return config.batch.per_device == "auto" or config.batch.policy == "goodput"


def with_size(config: RunConfig, size: int) -> RunConfig:
    return replace(config, batch=replace(config.batch, per_device=size))


def with_placeholder_batch(config: RunConfig) -> RunConfig:
    """Replace auto by a placeholder that passes every check, so that all other errors are found before measuring."""
    if config.batch.per_device != "auto" or config.batch.policy == "goodput":
        return config
    if config.elastic.exact:
        raise UsageError(
            "batch.per_device=auto does not work with elastic.exact=true, whose shards are not measured: "
            "type batch.per_device=32 or another number"
        )
    return with_size(config, UNLIMITED_PER_DEVICE if config.batch.policy == "hold" else 1)


def tuning_config(config: RunConfig) -> RunConfig:
    """The configuration to measure: this run's update at any micro-batch size, independent of its batch policy."""
    steps = config.batch.accumulation if config.batch.policy == "scale" else "auto"
    budget_s = DEFAULT_BUDGET_S if config.tune.budget_s is None else config.tune.budget_s
    return replace(
        config,
        batch=BatchConfig(policy="scale", per_device=1, accumulation=steps),
        tune=replace(config.tune, budget_s=budget_s),
    )


def lookup_note(config: RunConfig) -> str:
    request = "batch.policy=goodput" if config.batch.policy == "goodput" else "batch.per_device=auto"
    return f"{request}: uses a stored measurement, else measures for up to {tuning_config(config).tune.budget_s:g} s"


def apply_tuning_result(config: RunConfig, document: Mapping[str, Any], path: Path) -> ResolvedConfig:
    """Resolve the configuration from a `tune` result; `path` is the run directory, which may hold earlier measurements.

    Raises:
        UsageError: no size fits into memory.
    """
    size = document["recommended"]
    if size is None:
        raise UsageError(
            f"batch.per_device=auto: {document['why']}; sizes from {document['points'][0]['per_device']} upwards were "
            "tried"
        )
    when = datetime.fromisoformat(document["measured"])
    stored = f"stored on {when:%Y-%m-%d %H:%M} UTC"
    source = stored if document["cached"] else f"measured now in {document['spent_s']:g} s"
    workers = format_plural(document["world"], "worker")
    if config.batch.policy == "goodput":
        return _resolve_goodput(config, document, path, f"update times on {workers}, {source}")
    reason = document["why"].partition(";")[0].partition(": ")[2]
    return ResolvedConfig(
        with_size(config, size), f"batch.per_device=auto chose {size}: {reason} on {workers}, {source}"
    )


def _resolve_goodput(config: RunConfig, document: Mapping[str, Any], path: Path, source: str) -> ResolvedConfig:
    profile = TimingProfile.from_documents([document], every_micro=needs_equal_micro_batches(config))
    earlier = None if config.resume == "never" else read_timing_profile(path)
    profile = profile if earlier is None else earlier.merged_with(profile)
    return ResolvedConfig(config, f"batch.policy=goodput: {source}", profile.to_facts())


def from_existing_run(config: RunConfig, path: Path, world: int, nodes: int) -> ResolvedConfig | None:
    """Resolve from an existing run directory, whose batch size is already in `config`; None: to be measured."""
    size = config.batch.per_device
    if config.batch.policy == "goodput":
        profile = None if config.resume == "never" else read_timing_profile(path)
        if profile is None or not profile.covers(world, nodes):
            return None
        return ResolvedConfig(config, profile=profile.to_facts())
    if size == "auto":
        return None
    return ResolvedConfig(
        config, f"batch.per_device=auto is {size}, read from {RunDirectory(path).run_yaml}: nothing was measured"
    )


def read_timing_profile(path: Path) -> TimingProfile | None:
    """The timing profile measured by an earlier start; None if it is missing or invalid."""
    try:
        return TimingProfile.from_facts(json.loads(RunDirectory(path).profile_json.read_text()))
    except (OSError, ValueError):
        return None


def report_unmeasured(error: MeasurementError, config: RunConfig) -> int:
    """Print why the measurement failed; return the exit status."""
    print_stderr(f"error: {error}")
    if config.debug and error.trace:
        print_stderr(error.trace, multiline=True)
    return EXIT_FAILED
