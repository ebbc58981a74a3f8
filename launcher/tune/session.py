"""One rank of `tune`: it meets the others, measures with them, and rank 0 has the document."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher import recipe as recipes
from launcher import rendezvous
from launcher.assembly import OpenData, device_of, open_data
from launcher.data import dataset_of
from launcher.errors import RequestError
from launcher.greeting import greet
from launcher.settings import Run
from launcher.sinks.text import rate
from launcher.study import Sizes, study
from launcher.threads import threads_of
from launcher.topology import Topology
from launcher.tune import cache
from launcher.tune.closer import look_closer
from launcher.tune.council import Council
from launcher.tune.document import document, recommended
from launcher.tune.ledger import Ledger
from launcher.tune.memory import allowed_bytes, available_bytes
from launcher.tune.probe import Stand
from launcher.tune.survey import Survey, Term

if TYPE_CHECKING:
    from launcher.batch import BatchPlan

__all__ = ["Earlier", "measured"]

#: High over low of an interval that nothing can be relied on with.
NOISY = 3.0
BUDGET_S = 120.0
SEARCHING = 2 / 3  # of the budget; the rest is as much as a closer look at what was found can take


@dataclass(frozen=True)
class Ready:
    """What a rank makes ready before it meets the others."""

    recipe: Any
    sizes: Sizes
    device: torch.device
    data: OpenData

    def facts(self) -> Mapping[str, Any]:
        return {
            "the launcher's version": version("elastic-batch-launcher"),
            "torch's version": torch.__version__,
            "the training data's length": self.sizes.train,
        }

    def place(self, topology: Topology, threads: int) -> cache.Place:
        return cache.Place(
            world=topology.world,
            nodes=topology.nodes,
            local_world=topology.local_world,
            device=name_of(self.device),
            cores=len(os.sched_getaffinity(0)),
            threads=threads,
            code=cache.code_of(self.recipe),
            shape=shape_of(self.data.train[0]),
            train_samples=self.sizes.train,
            versions=cache.versions(),
        )


@dataclass(frozen=True)
class Earlier:
    """What an earlier start of the workers found out before memory ran out on one of them in a collective."""

    ledger: Ledger = Ledger()
    spent_s: float = 0.0

    def to_facts(self) -> dict[str, Any]:
        return {"ledger": self.ledger.to_facts(), "spent_s": self.spent_s}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Earlier:
        return cls(Ledger.from_facts(facts["ledger"]), facts["spent_s"])


def measured(
    run: Run,
    topology: Topology,
    store: dist.Store,
    earlier: Earlier = Earlier(),
    state: Path | None = None,
    *,
    look: bool = False,
) -> dict[str, Any]:
    """The document that `tune` prints, on every rank the same; with `look` the kept one, where there is one.

    With `look` training waits for a number, and what explains it beside is not measured.

    Raises:
        RequestError: something is wrong with the request, found by any rank.
    """
    threads = threads_of(run, topology.local_world)
    torch.set_num_threads(threads)
    ready = greet(store, topology, partial(made_ready, run, topology), Ready.facts)
    council = Council(store, topology.rank, topology.world)
    key = cache.key_of(run, ready.place(topology, threads))
    allowed = allowance(ready.device, topology, council)
    looked = council.of_first(looked_up(key, allowed) if look and topology.rank == 0 else None)
    if looked is not None and looked["found"] is not None:
        council.adjourn()
        return {**looked["found"], "cached": True, "said": looked["said"]}
    rendezvous.join(store, topology, ready.device, run.launch.backend, run.launch.timeout_s)
    found = surveyed(run, ready, council, topology, allowed, earlier, state, closer=not look)
    dist.destroy_process_group()
    said = [] if looked is None else looked["said"]
    agreed = council.of_first({**found, "cached": False, "said": [*said, *remembered(key, found, topology.rank)]})
    council.adjourn()
    return dict(agreed)


def looked_up(key: Mapping[str, Any], allowed: float | None) -> dict[str, Any]:
    """What is kept for this key, and what is to be said; rank 0's to read, so that differing copies do no harm."""
    looked = cache.look(key)
    if looked.profile is None:
        return {"found": None, "said": looked.said}
    found = looked.profile.found
    point = recommended(found)
    needed = 0 if point is None else point["memory_bytes"]
    if allowed is not None and needed > allowed:
        short = f"{found['recommended']} samples need {needed / 1e9:.3g} GB of memory, {allowed / 1e9:.3g} GB are free"
        return {"found": None, "said": [f"the profile of {looked.profile.day} is not used: {short}"]}
    return {"found": {**found, "measured": looked.profile.measured}, "said": []}


def remembered(key: Mapping[str, Any], found: Mapping[str, Any], rank: int) -> list[str]:
    """Keep what was measured; where that cannot be it is said, and nothing else is wrong."""
    if rank or found["recommended"] is None:
        return []
    try:
        kept = f"kept for batch.per_device=auto: {cache.keep(cache.Profile(key, found['measured'], found))}"
    except OSError as problem:
        return [f"{cache.FOLDER} cannot be written ({problem.strerror}): the next start measures anew", *doubts(found)]
    return [kept, *doubts(found)]


def doubts(found: Mapping[str, Any]) -> list[str]:
    """Where the recommended size's own speed is hardly known, what to do about it."""
    point = recommended(found)
    if point is None or point["high"] <= NOISY * point["low"]:
        return []
    size, low, high = found["recommended"], rate(point["low"]), rate(point["high"])
    return [
        f"between {low} and {high} samples/s were measured at {size}, too far apart to rely on: try launch.threads=1, "
        "a larger tune.budget_s, or with fewer programs beside it"
    ]


def surveyed(
    run: Run,
    ready: Ready,
    council: Council,
    topology: Topology,
    allowed: float | None,
    earlier: Earlier,
    state: Path | None,
    *,
    closer: bool,
) -> dict[str, Any]:
    """Measure; every rank has its own document, which differ by their clocks."""
    plan = study(run, ready.sizes, topology.world)
    make = partial(Stand.of, plan, topology, ready.recipe, ready.device, ready.data, council)
    term = Term(budget_of(run) * (SEARCHING if closer else 1.0), council, earlier.spent_s)
    survey = Survey(make, ready.data.train, largest(run, ready.sizes, plan.plan), allowed, term, earlier.ledger, state)
    if not survey.ledger.closing:
        walked(survey, run)
        if closer:
            beside(survey, ready, run)
            look_closer(survey, term, plan_accumulation(run))
    facts = {
        "recipe": type(ready.recipe).__name__,
        "world": topology.world,
        "nodes": topology.nodes,
        "accumulation": plan_accumulation(run),
        "train_samples": ready.sizes.train,
        "device": name_of(ready.device),
        "precision": run.train.precision,
        "strategy": run.strategy.name,
        "threads": threads_of(run, topology.local_world),
        "loader_workers": run.data.workers,
        "limit_bytes": limit_of(ready.device, allowed),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "spent_s": round(term.used_s(), 1),
        "asked": run.tune.sizes is not None,
    }
    return document(survey.ledger, facts)


def walked(survey: Survey, run: Run) -> None:
    if run.tune.sizes is not None:
        survey.these(run.tune.sizes)
    else:
        survey.search()


def made_ready(run: Run, topology: Topology) -> Ready:
    recipe = recipes.build(run.recipe)
    sizes = recipes.sizes(recipe)
    check(run, sizes, topology.world)
    return Ready(recipe, sizes, device_of(run, topology), open_data(recipe, run, sizes))


def check(run: Run, sizes: Sizes, world: int) -> None:
    """
    Raises:
        RequestError: what is asked for cannot be measured.
    """
    plan = study(run, sizes, world).plan
    if run.elastic.exact:
        raise RequestError(
            "elastic.exact=true cuts every batch into shards, whatever batch.per_device: type elastic.exact=false"
        )
    room = largest(run, sizes, plan, limited=False)
    for key, value in (("tune.sizes", max(run.tune.sizes or (1,))), ("tune.max", run.tune.max or 1)):
        if value > room and key == "tune.sizes":
            raise RequestError(
                f"{key}: {value} samples on each of {world} workers are beyond the {sizes.train} training samples: "
                f"type {room} or less"
            )


def largest(run: Run, sizes: Sizes, plan: BatchPlan, *, limited: bool = True) -> int:
    """The largest size that the data set has samples for, and that is asked for."""
    room = max(1, sizes.train // (plan.world * plan_accumulation(run)))
    return min(room, run.tune.max) if limited and run.tune.max is not None else room


def budget_of(run: Run) -> float:
    return BUDGET_S if run.tune.budget_s is None else run.tune.budget_s


def plan_accumulation(run: Run) -> int:
    return 1 if run.batch.accumulation == "auto" else run.batch.accumulation


def allowance(device: torch.device, topology: Topology, council: Council) -> float | None:
    """On a CPU, what each worker may take; the least of all machines."""
    if device.type == "cuda":
        return None
    said = [one for one in council.gather(allowed_bytes(available_bytes(), topology.local_world)) if one is not None]
    return min(said, default=None)


def limit_of(device: torch.device, allowed: float | None) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None if allowed is None else int(allowed)


def beside(survey: Survey, ready: Ready, run: Run) -> None:
    """Where waiting for data is what takes longest, the same without the reading."""
    advice = survey.ledger.advice()
    if advice is None or run.data.source == "synthetic":
        return
    sizes = [one for one in survey.ledger.sizes() if one.speeds and one.fits]
    stages = {one.size: one.stages_ms for one in sizes}
    times = stages[advice.recommended] if advice.recommended in stages else sizes[-1].stages_ms
    if max(times, key=times.__getitem__) == "data":
        others = [one.size for one in sizes if one.size != advice.recommended]
        survey.beside([advice.recommended, *others], dataset_of(ready.recipe, "train", "synthetic"))


def shape_of(sample: Any) -> Any:
    """Shapes and types of all that a sample holds."""
    if hasattr(sample, "shape") and hasattr(sample, "dtype"):
        return [list(sample.shape), str(sample.dtype)]
    if isinstance(sample, Mapping):
        return {str(name): shape_of(part) for name, part in sample.items()}
    return [shape_of(part) for part in sample] if isinstance(sample, list | tuple) else type(sample).__name__


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
