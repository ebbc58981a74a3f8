"""Run `tune` on one rank: connect to the other ranks, measure together and return the document."""

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

#: Ratio of high to low above which an interval is too wide to rely on.
NOISY = 3.0
BUDGET_S = 120.0
SEARCHING = 2 / 3  # share of the budget; the rest is for the follow-ups


@dataclass(frozen=True)
class Ready:
    """What a rank prepares before it connects to the others."""

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
    """Results of an earlier attempt, up to the point where memory ran out on one rank in a collective."""

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
    """Measure and return the document that `tune` prints, the same on all ranks; with `look`, use the cache first.

    `look` is set when training waits for the result: then the follow-ups that only explain it are skipped.

    Raises:
        RequestError: any rank found the request to be wrong.
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
    """Look up the cache for this key, with notes. Only rank 0 reads it, as the nodes' copies may differ."""
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
    """Store the result in the cache on rank 0 and return notes; a write error is only a note."""
    if rank or found["recommended"] is None:
        return []
    try:
        kept = f"saved for batch.per_device=auto: {cache.keep(cache.Profile(key, found['measured'], found))}"
    except OSError as problem:
        lost = f"{cache.FOLDER} cannot be written ({problem.strerror}): the next start will measure again"
        return [lost, *doubts(found)]
    return [kept, *doubts(found)]


def doubts(found: Mapping[str, Any]) -> list[str]:
    """A note on what to do if the measured speed of the recommended size is unreliable."""
    point = recommended(found)
    if point is None or point["high"] <= NOISY * point["low"]:
        return []
    size, low, high = found["recommended"], rate(point["low"]), rate(point["high"])
    return [
        f"throughput at {size} is unreliable ({low} to {high} samples/s): set launch.threads=1, raise tune.budget_s, "
        "or free the machine"
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
    """Measure and build the document; the ranks' documents may differ in times read from their clocks."""
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
    """Validate the request.

    Raises:
        RequestError: the request cannot be measured.
    """
    plan = study(run, sizes, world).plan
    if run.elastic.exact:
        raise RequestError(
            "elastic.exact=true ignores batch.per_device (it splits every batch into shards): type elastic.exact=false"
        )
    room = largest(run, sizes, plan, limited=False)
    for key, value in (("tune.sizes", max(run.tune.sizes or (1,))), ("tune.max", run.tune.max or 1)):
        if value > room and key == "tune.sizes":
            raise RequestError(
                f"{key}: {value} samples on each of {world} workers exceed the {sizes.train} training samples: "
                f"type {room} or less"
            )


def largest(run: Run, sizes: Sizes, plan: BatchPlan, *, limited: bool = True) -> int:
    """The largest size to try: limited by the data set and, with `limited`, by tune.max."""
    room = max(1, sizes.train // (plan.world * plan_accumulation(run)))
    return min(room, run.tune.max) if limited and run.tune.max is not None else room


def budget_of(run: Run) -> float:
    return BUDGET_S if run.tune.budget_s is None else run.tune.budget_s


def plan_accumulation(run: Run) -> int:
    return 1 if run.batch.accumulation == "auto" else run.batch.accumulation


def allowance(device: torch.device, topology: Topology, council: Council) -> float | None:
    """Memory that each worker may use on a CPU, the minimum over all machines; None on a GPU."""
    if device.type == "cuda":
        return None
    said = [one for one in council.gather(allowed_bytes(available_bytes(), topology.local_world)) if one is not None]
    return min(said, default=None)


def limit_of(device: torch.device, allowed: float | None) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None if allowed is None else int(allowed)


def beside(survey: Survey, ready: Ready, run: Run) -> None:
    """If waiting for data is the largest stage, measure the same sizes on synthetic data."""
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
    """Shapes and dtypes of everything in a sample."""
    if hasattr(sample, "shape") and hasattr(sample, "dtype"):
        return [list(sample.shape), str(sample.dtype)]
    if isinstance(sample, Mapping):
        return {str(name): shape_of(part) for name, part in sample.items()}
    return [shape_of(part) for part in sample] if isinstance(sample, list | tuple) else type(sample).__name__


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
