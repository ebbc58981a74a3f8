"""The metrics that keys name: checked against what validation gives before training, and reported where one is missing.

Only the recipe's loss() knows its metrics, so the check takes one batch of validation; a metric that this batch lacks
may be one that only some batches have, and the whole validation decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from launcher.config.consistency import list_watched_metrics
from launcher.config.keys import closest_match
from launcher.errors import UsageError
from launcher.strategies.buffers import preserve_buffers
from launcher.train.context import TrainContext
from launcher.train.state import TrainState
from launcher.train.validation import Validator

__all__ = ["check_watched_metrics", "report_missing_metrics"]


def check_watched_metrics(context: TrainContext, state: TrainState) -> None:
    """Check, before training, that validation gives the metrics that keys name. Every rank must call this.

    Raises:
        UsageError: on every rank, validation does not give a metric; the message names the key and the choices.
    """
    unknown = find_unmeasured(context, {"val/loss", *state.metrics})
    if not unknown or context.validator is None:
        return
    if context.watchdog is not None:
        context.watchdog.enter_phase("validate")
    measured = measure_names(context, context.validator, unknown)
    for key, metric in unknown.items():
        if metric not in measured:
            near = closest_match(metric, measured)
            hint = f"did you mean {key}={near}? " if near else ""
            raise UsageError(
                f"{key}={metric} is not measured in validation: {hint}Choose from {', '.join(sorted(measured))}, which "
                f"are all that the recipe's loss() gives over the validation set"
            )


def measure_names(context: TrainContext, validator: Validator, wanted: Mapping[str, str]) -> Collection[str]:
    """The names of the metrics of one batch of each rank or, if one is missing, of the whole validation."""
    with preserve_buffers(context.replica.module):
        measured = validator.measure_names(context.replica)
        if measured.issuperset(wanted.values()):
            return measured
        return set(validator.run(context.replica).metrics)


def find_unmeasured(context: TrainContext, measured: Collection[str]) -> dict[str, str]:
    watched = list_watched_metrics(context.config)
    return {key: metric for key, metric in watched.items() if metric not in measured}


def report_missing_metrics(context: TrainContext, state: TrainState, measured: Mapping[str, float]) -> None:
    """Log an alarm if a validation lacks a metric that the one before had, or that none had so far."""
    missing = find_unmeasured(context, measured)
    before = find_unmeasured(context, state.metrics) if state.metrics else {}
    if missing and missing != before:
        named = ", ".join(f"{key}={metric}" for key, metric in missing.items())
        detail = f"this validation has no {named}: it has {', '.join(sorted(measured))}"
        context.log_event("alarm", kind="metric", detail=detail)
