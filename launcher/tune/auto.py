"""`batch.per_device=auto`: find a number before the run is created, as if the user had set it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.goodput import Profile
from launcher.settings import BatchSettings, Run
from launcher.sinks.text import plural
from launcher.strategies import even

__all__ = ["PROFILE", "Settled", "Unmeasured", "answered", "before", "is_open", "looking", "question", "stood_in"]

PROFILE = "profile.json"
BUDGET_S = 30.0
LARGE = 1 << 40


class Unmeasured(Exception):
    """A measuring worker failed for a reason other than memory; the message is the line to print."""

    def __init__(self, line: str, trace: str = "") -> None:
        super().__init__(line)
        self.trace = trace


@dataclass(frozen=True)
class Settled:
    """A configuration with all `auto` values resolved; `why` states the choice in one line, empty if there was none.

    `profile`: the measured update times under batch=goodput, as a JSON-serialisable dict.
    """

    run: Run
    why: str = ""
    profile: Mapping[str, Any] | None = None


def is_open(run: Run) -> bool:
    return run.batch.per_device == "auto" or run.batch.policy == "goodput"


def with_size(run: Run, size: int) -> Run:
    return replace(run, batch=replace(run.batch, per_device=size))


def stood_in(run: Run) -> Run:
    """Replace auto by a placeholder that passes every check, so that all other errors are found before measuring."""
    if run.batch.per_device != "auto" or run.batch.policy == "goodput":
        return run
    if run.elastic.exact:
        raise RequestError(
            "batch.per_device=auto does not work with elastic.exact=true, whose shards are not measured: "
            "type batch.per_device=32 or another number"
        )
    return with_size(run, LARGE if run.batch.policy == "hold" else 1)


def question(run: Run) -> Run:
    """The configuration to measure: this run's update at any micro-batch size, independent of its batch policy."""
    steps = run.batch.accumulation if run.batch.policy == "scale" else "auto"
    budget_s = BUDGET_S if run.tune.budget_s is None else run.tune.budget_s
    return replace(
        run,
        batch=BatchSettings(policy="scale", per_device=1, accumulation=steps),
        tune=replace(run.tune, budget_s=budget_s),
    )


def looking(run: Run) -> str:
    asked = "batch.policy=goodput" if run.batch.policy == "goodput" else "batch.per_device=auto"
    return f"{asked}: uses a stored measurement, else measures for up to {question(run).tune.budget_s:g} s"


def answered(run: Run, found: Mapping[str, Any], path: Path) -> Settled:
    """Resolve the configuration from a `tune` result; `path` is the run directory, which may hold earlier measurements.

    Raises:
        UsageError: no size fits into memory.
    """
    size = found["recommended"]
    if size is None:
        raise RequestError(
            f"batch.per_device=auto: {found['why']}; sizes from {found['points'][0]['per_device']} upwards were tried"
        )
    when = datetime.fromisoformat(found["measured"])
    source = f"stored on {when:%Y-%m-%d %H:%M} UTC" if found["cached"] else f"measured now in {found['spent_s']:g} s"
    workers = plural(found["world"], "worker")
    if run.batch.policy == "goodput":
        return _informed(run, found, path, f"update times on {workers}, {source}")
    because = found["why"].partition(";")[0].partition(": ")[2]
    return Settled(with_size(run, size), f"batch.per_device=auto chose {size}: {because} on {workers}, {source}")


def _informed(run: Run, found: Mapping[str, Any], path: Path, source: str) -> Settled:
    profile = Profile.of([found], every_micro=even(run))
    earlier = None if run.resume == "never" else profile_in(path)
    profile = profile if earlier is None else earlier.plus(profile)
    return Settled(run, f"batch.policy=goodput: {source}", profile.to_facts())


def before(run: Run, path: Path, world: int, nodes: int) -> Settled | None:
    """Resolve from an existing run directory, whose batch size is already in `config`; None: to be measured."""
    size = run.batch.per_device
    if run.batch.policy == "goodput":
        known = None if run.resume == "never" else profile_in(path)
        return Settled(run, profile=known.to_facts()) if known is not None and known.reaches(world, nodes) else None
    if size == "auto":
        return None
    return Settled(run, f"batch.per_device=auto is {size}, read from {path / 'run.yaml'}: nothing was measured")


def profile_in(path: Path) -> Profile | None:
    """The timing profile measured by an earlier start; None if it is missing or invalid."""
    try:
        return Profile.from_facts(json.loads((path / PROFILE).read_text()))
    except (OSError, ValueError):
        return None
