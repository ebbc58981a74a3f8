"""The noise scale that earlier runs measured, or that a person types."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import RequestError
from launcher.history import History, history
from launcher.noise import efficiency
from launcher.runfolder import RUNS
from launcher.settings import Run
from launcher.throughput import Estimate

__all__ = ["Noise", "begun_with", "noise_of"]


@dataclass(frozen=True)
class Noise:
    """A noise scale in samples with its interval, as far as that is known, and where it is from."""

    scale: float
    low: float
    high: float
    source: str

    def efficiency(self, batch: int, base: int) -> Estimate:
        low, high = sorted(efficiency(batch, base, bound) for bound in (self.low, self.high))
        value = efficiency(batch, base, self.scale)
        return Estimate(value, min(low, value), max(high, value))


def noise_of(run: Run) -> Noise | None:
    """plan.noise as a number or a run; else the newest run of this recipe here that measured one. None: unknown.

    Raises:
        RequestError: plan.noise is no noise scale, or the run that it names has measured none.
    """
    if run.plan.noise is not None:
        return _asked(run, last=True)
    name = _class_of(run)
    for folder in sorted(RUNS.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True):
        if _recipe(folder.parent) == name and (found := _measured(history(str(folder.parent)))) is not None:
            return found
    return None


def begun_with(run: Run) -> Run:
    """With plan.noise as a number, where training is to begin by it: of a run the first scale that it knew.

    A run's folder may be gone at the next start. And noise grows as training goes on, so its last would be too much.

    Raises:
        RequestError: as `noise_of`.
    """
    if run.batch.policy != "goodput" or run.plan.noise is None:
        return run
    return replace(run, plan=replace(run.plan, noise=_asked(run, last=False).scale))


def _asked(run: Run, *, last: bool) -> Noise:
    asked = run.plan.noise
    if isinstance(asked, str):
        found, other = _of_run(asked, last=last)
        if other not in (None, _class_of(run)):
            raise RequestError(
                f"plan.noise={asked}: that run trained {other}, not {_class_of(run)}: type a run of this recipe, or a "
                "number of samples"
            )
        if found is None:
            raise RequestError(f"plan.noise={asked}: that run has measured no noise scale: type a number of samples")
        return found
    if asked is None or asked <= 0:
        raise RequestError(f"plan.noise={asked} is no noise scale: type a number of samples above 0")
    return Noise(asked, asked, asked, "plan.noise")


def _of_run(word: str, *, last: bool) -> tuple[Noise | None, str | None]:
    """What the run knew, and the class of its recipe."""
    try:
        known = history(word)
    except RequestError as problem:
        raise RequestError(f"plan.noise={problem}; or type a number of samples") from problem
    return _measured(known, last=last), _recipe(known.folder)


def _class_of(run: Run) -> str:
    return str(run.recipe["_target_"]).rpartition(".")[2]


def _measured(run: History, *, last: bool = True) -> Noise | None:
    row = next((row for row in (reversed(run.rows) if last else run.rows) if "noise/scale" in row), None)
    if row is None:
        return None
    scale = row["noise/scale"]
    low, high = row.get("noise/scale_low", scale), row.get("noise/scale_high", scale)
    return Noise(scale, low, high, run.name)


def _recipe(folder: Path) -> str | None:
    """The class of the recipe, as the start event names it."""
    with suppress(OSError, ValueError), (folder / "events.jsonl").open() as events:
        for line in events:
            event = json.loads(line)
            if event.get("event") == "start":
                return str(event.get("recipe"))
    return None
