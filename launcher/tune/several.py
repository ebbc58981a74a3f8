"""`tune -m`: measure every point of a sweep, one after the other on the whole machine, and print one table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.arguments import Arguments
from launcher.config import Asked, Composed, Composer, parse
from launcher.errors import EXIT_FAILED, EXIT_REQUEST, RequestError
from launcher.launch import tell, unmeasured
from launcher.points import of_a_point
from launcher.settings import Run, SweepSettings
from launcher.sinks.text import printable
from launcher.tune import drive as tuning
from launcher.tune.auto import Unmeasured
from launcher.tune.page import page
from launcher.tune.table import Measured, document, table

__all__ = ["several"]

#: Keys that apply to all points together: there is one table and one output folder.
OUTPUTS = ("format", "tune.out")
ELSEWHERE = "hydra/{}= is only for training: tune measures the listed points on this machine: leave it out"

Measure = Callable[[Run], Mapping[str, Any]]


def several(args: Sequence[str], measure: Measure | None = None) -> int:
    """Measure each point and print the table or one JSON document; return the worst exit status, as a sweep does.

    Every point is composed and validated before the first is measured; a point that fails does not stop the others.
    `measure` replaces the workers of this machine (for tests).

    Raises:
        RequestError: the configuration of a point is wrong; nothing was measured.
        KeyboardInterrupt: SIGTERM or Ctrl-C was received; workers and temporary files have been removed.
    """
    arguments = Arguments.parse(args)
    composer = Composer(arguments.config_dirs)
    asked = composer.asked(arguments.overrides)
    refuse(asked, arguments.share)
    points = composer.points(asked.config)
    refuse_points(points)
    composed = [composer.composed(words) for words in points]
    first = composed[0].run
    if first.launch.dry:
        return max(tuning.drive(one.run) for one in composed)
    with tuning.interruptible():  # covers the time between two points too
        each = zip(points, composed, strict=True)
        found = [measured(number, of_a_point(words), one, measure) for number, (words, one) in enumerate(each)]
        shown(found, first)
    return max(point.status for point in found)


def refuse(asked: Asked, share: tuple[int, int]) -> None:
    """Reject options of training sweeps that `tune -m` does not support."""
    for name, value in vars(asked.settings.sweep).items():
        if value != getattr(SweepSettings(), name):
            raise RequestError(
                f"sweep.{name}={value} is only for training: tune measures the listed points one after the other, "
                "each on the whole machine: leave it out"
            )
    if share[1] > 1:
        raise RequestError(f"--share={share[0]}/{share[1]} is only for training (tune prints one table): leave it out")
    if not asked.here:
        raise RequestError(ELSEWHERE.format("launcher"))


def refuse_points(points: Sequence[Sequence[str]]) -> None:
    """Reject sweeps whose points come from a Hydra sweeper plugin, and sweeps over the output keys."""
    if not points:
        raise RequestError(ELSEWHERE.format("sweeper"))
    for key in OUTPUTS:
        if len({word for words in points for word in words if word.partition("=")[0] == key}) > 1:
            raise RequestError(f"{key} can't be swept over, as all points go into one table: type one value")


def measured(number: int, words: Sequence[str], composed: Composed, measure: Measure | None) -> Measured:
    """Measure one point. An error is printed and returned, so that the next point is still measured."""
    tell(f"point {number}: {' '.join(words)}")
    for note in composed.notes:
        tell(f"note: {note}")
    run, values = composed.run, values_of(words)
    try:
        found = (measure or on_this_machine)(run)
        for line in found["said"]:
            tell(f"note: {line}")
        tell(f"point {number}: {found['why']}")
        return Measured(tuple(words), values, tuning.valued(found, run), image=image_of(run))
    except RequestError as error:
        status, why = EXIT_REQUEST, str(error)
        tell(f"error: {why}")
    except Unmeasured as error:
        status, why = unmeasured(error, run), str(error)
    except Exception as error:
        status, why = EXIT_FAILED, f"{type(error).__name__}: {error}"
        tell(f"error: {why}")
    return Measured(tuple(words), values, status=status, error=" ".join(why.split()))


def on_this_machine(run: Run) -> Mapping[str, Any]:
    workers, run = tuning.checked(run)
    return tuning.found(run, workers)


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """The overrides of a point by key, as plain values, without the output keys."""
    asked = [one for one in parse(words) if not one.is_hydra_override() and one.key_or_group not in OUTPUTS]
    return {one.key_or_group: one.value() for one in asked}


def image_of(run: Run) -> tuple[int, int] | None:
    """Height and width in pixels from recipe.image_size (one number or two); None if the recipe does not have it."""
    asked = run.recipe.get("image_size")
    if isinstance(asked, int):
        return asked, asked
    return (asked[0], asked[1]) if isinstance(asked, list | tuple) and len(asked) == 2 else None


def shown(points: Sequence[Measured], run: Run) -> None:
    """Print a table or one JSON document; with `tune.out`, write tune.json for all points and a page for each."""
    found = document(points)
    written = json.dumps(found) + "\n" if run.format == "json" else printable(table(points), sys.stdout)
    print(written, end="")
    if run.tune.out is None:
        return
    folder = Path(run.tune.out)
    tuning.keep(folder, {"tune.json": json.dumps(found, indent=1) + "\n"})
    told = [(number, point.found) for number, point in enumerate(points) if point.found is not None]
    for number, one in told:
        tuning.keep(folder / str(number), {"tune.html": page(one)})
    pages = "".join(f", {folder / str(number) / 'tune.html'}" for number, _ in told)
    tell(f"written: {folder / 'tune.json'}{pages}")
