"""`batch.per_device=auto`: a number is found before anything of the run exists, and from then on it is as if typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from launcher.errors import RequestError
from launcher.settings import BatchSettings, Run

__all__ = ["Settled", "Unmeasured", "answered", "as_kept", "is_open", "looking", "question", "stood_in"]

BUDGET_S = 30.0
LARGE = 1 << 40


class Unmeasured(Exception):
    """A worker that measured failed for another reason than memory; the message is the line to tell."""

    def __init__(self, line: str, trace: str = "") -> None:
        super().__init__(line)
        self.trace = trace


@dataclass(frozen=True)
class Settled:
    """A run without open questions; `why` says in one line what was chosen, empty where nothing was."""

    run: Run
    why: str = ""


def is_open(run: Run) -> bool:
    return run.batch.per_device == "auto"


def with_size(run: Run, size: int) -> Run:
    return replace(run, batch=replace(run.batch, per_device=size))


def stood_in(run: Run) -> Run:
    """The run with a number that refuses nothing by itself: all else that is wrong is found before measuring."""
    if not is_open(run):
        return run
    if run.elastic.exact:
        raise RequestError(
            "batch.per_device=auto does not go with elastic.exact=true, whose shards are not measured: "
            "type batch.per_device=32 or another number"
        )
    return with_size(run, LARGE if run.batch.policy == "hold" else 1)


def question(run: Run) -> Run:
    """What `tune` is asked: this run's step for any size, whatever its batch policy makes of that."""
    steps = run.batch.accumulation if run.batch.policy == "scale" else "auto"
    budget_s = BUDGET_S if run.tune.budget_s is None else run.tune.budget_s
    return replace(
        run,
        batch=BatchSettings(policy="scale", per_device=1, accumulation=steps),
        tune=replace(run.tune, budget_s=budget_s),
    )


def answered(run: Run, found: Mapping[str, Any]) -> Settled:
    """
    Raises:
        RequestError: no size fits into memory.
    """
    size = found["recommended"]
    if size is None:
        raise RequestError(
            f"batch.per_device=auto: {found['why']}; sizes from {found['points'][0]['per_device']} on were tried"
        )
    because = found["why"].partition(";")[0].partition(": ")[2]
    when = datetime.fromisoformat(found["measured"])
    source = f"kept from {when:%Y-%m-%d %H:%M} UTC" if found["cached"] else f"measured now in {found['spent_s']:g} s"
    workers = "1 worker" if found["world"] == 1 else f"{found['world']} workers"
    return Settled(with_size(run, size), f"batch.per_device=auto took {size}: {because} on {workers}, {source}")


def looking(run: Run) -> str:
    return f"batch.per_device=auto: what is kept is used, else it is measured, up to {question(run).tune.budget_s:g} s"


def as_kept(run: Run, where: object) -> Settled:
    """The number is one that the run's folder had already."""
    size = run.batch.per_device
    return Settled(run, f"batch.per_device=auto is {size}, as {where} has it: nothing was measured")
