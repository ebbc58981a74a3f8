"""Find the noise scale: given in plan.noise, or measured by an earlier run."""

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
    """A noise scale in samples with its interval (equal to the scale if unknown) and its source."""

    scale: float
    low: float
    high: float
    source: str

    def efficiency(self, batch: int, base: int) -> Estimate:
        low, high = sorted(efficiency(batch, base, bound) for bound in (self.low, self.high))
        value = efficiency(batch, base, self.scale)
        return Estimate(value, min(low, value), max(high, value))


def noise_of(run: Run) -> Noise | None:
    """The noise scale from plan.noise (a number or a run), else from the newest run of this recipe; None if unknown.

    Raises:
        UsageError: plan.noise is not a noise scale, or the run that it names has not measured one.
    """
    if run.plan.noise is not None:
        return _asked(run, last=True)
    name = _class_of(run)
    for folder in sorted(RUNS.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True):
        if _recipe(folder.parent) == name and (found := _measured(history(str(folder.parent)))) is not None:
            return found
    return None


def begun_with(run: Run) -> Run:
    """Replace plan.noise by a number under batch=goodput; for a named run this is the first scale it measured.

    The number is stored because the named run's directory may be gone at the next start. The first scale is used
    because the noise scale grows during training: the last one would be too large at the beginning.

    Raises:
        UsageError: as `find_noise_scale`.
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
        raise RequestError(f"plan.noise={asked} is not a noise scale: type a number of samples above 0")
    return Noise(asked, asked, asked, "plan.noise")


def _of_run(word: str, *, last: bool) -> tuple[Noise | None, str | None]:
    """The noise scale measured by the named run, and the class of its recipe."""
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
    """The recipe class named in the run's start event; None if it cannot be read."""
    with suppress(OSError, ValueError), (folder / "events.jsonl").open() as events:
        for line in events:
            event = json.loads(line)
            if event.get("event") == "start":
                return str(event.get("recipe"))
    return None
