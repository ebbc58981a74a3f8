"""`tune -m`: measure every point of a sweep, one after the other on the whole machine, and print one table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.cli_args import HydraArgs
from launcher.config.compose import ComposedConfig, ConfigComposer, SweepRequest
from launcher.config.overrides import parse_overrides
from launcher.config.schema import RunConfig, SweepConfig
from launcher.errors import EXIT_FAILED, EXIT_USAGE, UsageError, format_named_error
from launcher.goodput.auto_batch import MeasurementError, report_unmeasured
from launcher.sweep.points import select_point_overrides
from launcher.system.formatting import encodable
from launcher.system.signal_handlers import sigterm_as_keyboard_interrupt
from launcher.system.stderr import print_stderr
from launcher.tune import driver as tuning
from launcher.tune.report.html import render_tune_page
from launcher.tune.report.sweep_table import MeasuredPoint, format_points_table, make_points_document

__all__ = ["tune_sweep"]

#: Keys that apply to all points together: there is one table and one output folder.
OUTPUT_KEYS = ("format", "tune.out")
UNSUPPORTED_PLUGIN = "hydra/{}= is only for training: tune measures the listed points on this machine: leave it out"

MeasureFunction = Callable[[RunConfig], Mapping[str, Any]]


def tune_sweep(args: Sequence[str], measure: MeasureFunction | None = None) -> int:
    """Measure each point and print the table or one JSON document; return the worst exit status, as a sweep does.

    Every point is composed and validated before the first is measured; a point that fails does not stop the others.
    `measure` replaces the workers of this machine (for tests).

    Raises:
        UsageError: the configuration of a point is wrong; nothing was measured.
        KeyboardInterrupt: SIGTERM or Ctrl-C was received; workers and temporary files have been removed.
    """
    arguments = HydraArgs.parse(args)
    composer = ConfigComposer(arguments.config_dirs)
    request = composer.read_sweep_request(arguments.overrides)
    refuse_sweep_options(request, arguments.shard)
    points = composer.expand_points(request.config)
    check_sweep_points(points)
    composed = [composer.compose_single(overrides) for overrides in points]
    first = composed[0].config
    if first.launch.dry_run:
        return max(tuning.tune_batch_size(point.config) for point in composed)
    with sigterm_as_keyboard_interrupt():  # covers the time between two points too
        results = [
            measure_point(number, select_point_overrides(overrides), point, measure)
            for number, (overrides, point) in enumerate(zip(points, composed, strict=True))
        ]
        print_points(results, first)
    return max(result.status for result in results)


def refuse_sweep_options(request: SweepRequest, shard: tuple[int, int]) -> None:
    """Reject options of training sweeps that `tune -m` does not support."""
    for name, value in vars(request.settings.sweep).items():
        if value != getattr(SweepConfig(), name):
            raise UsageError(
                f"sweep.{name}={value} is only for training: tune measures the listed points one after the other, "
                "each on the whole machine: leave it out"
            )
    if shard[1] > 1:
        raise UsageError(f"--shard={shard[0]}/{shard[1]} is only for training (tune prints one table): leave it out")
    if not request.is_local:
        raise UsageError(UNSUPPORTED_PLUGIN.format("launcher"))


def check_sweep_points(points: Sequence[Sequence[str]]) -> None:
    """Reject sweeps whose points come from a Hydra sweeper plugin, and sweeps over the output keys."""
    if not points:
        raise UsageError(UNSUPPORTED_PLUGIN.format("sweeper"))
    for key in OUTPUT_KEYS:
        if len({override for point in points for override in point if override.partition("=")[0] == key}) > 1:
            raise UsageError(f"{key} can't be swept over, as all points go into one table: type one value")


def measure_point(
    number: int, overrides: Sequence[str], composed: ComposedConfig, measure: MeasureFunction | None
) -> MeasuredPoint:
    """Measure one point. An error is printed and returned, so that the next point is still measured."""
    print_stderr(f"point {number}: {' '.join(overrides)}")
    for note in composed.notes:
        print_stderr(f"note: {note}")
    config, values = composed.config, parse_point_values(overrides)
    try:
        document = (measure or measure_on_this_machine)(config)
        for note in document["said"]:
            print_stderr(f"note: {note}")
        print_stderr(f"point {number}: {document['why']}")
        return MeasuredPoint(
            tuple(overrides), values, tuning.with_goodput(document, config), image=get_image_size(config)
        )
    except UsageError as error:
        status, message = EXIT_USAGE, str(error)
        print_stderr(f"error: {message}")
    except MeasurementError as error:
        status, message = report_unmeasured(error, config), str(error)
    except Exception as error:
        status, message = EXIT_FAILED, format_named_error(type(error).__name__, str(error))
        print_stderr(f"error: {message}")
    return MeasuredPoint(tuple(overrides), values, status=status, error=" ".join(message.split()))


def measure_on_this_machine(config: RunConfig) -> Mapping[str, Any]:
    workers, config = tuning.validate_tune_request(config)
    return tuning.measure(config, workers)


def parse_point_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides of a point by key, as plain values, without the output keys."""
    parsed = [override for override in parse_overrides(overrides) if not override.is_hydra_override()]
    return {override.key_or_group: override.value() for override in parsed if override.key_or_group not in OUTPUT_KEYS}


def get_image_size(config: RunConfig) -> tuple[int, int] | None:
    """Height and width in pixels from recipe.image_size (one number or two); None if the recipe does not have it."""
    size = config.recipe.get("image_size")
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None


def print_points(points: Sequence[MeasuredPoint], config: RunConfig) -> None:
    """Print a table or one JSON document; with `tune.out`, write tune.json for all points and a page for each."""
    summary = make_points_document(points)
    if config.format == "json":
        print(json.dumps(summary))
    else:
        print(encodable(format_points_table(points), sys.stdout), end="")
    if config.tune.out is None:
        return
    folder = Path(config.tune.out)
    written = [folder / "tune.json"]
    tuning.write_outputs(folder, {"tune.json": json.dumps(summary, indent=1) + "\n"})
    for number, point in enumerate(points):
        if point.document is not None:
            tuning.write_outputs(folder / str(number), {"tune.html": render_tune_page(point.document)})
            written.append(folder / str(number) / "tune.html")
    print_stderr(f"written: {', '.join(map(str, written))}")
