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
from launcher.config.schema import RunConfig
from launcher.distributed import rendezvous
from launcher.distributed.consistency_check import check_ranks_agree
from launcher.distributed.store_gather import StoreGather
from launcher.distributed.worker_env import num_threads
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.system.formatting import format_rate
from launcher.topology import Topology
from launcher.train.build import Datasets, open_datasets, resolve_device
from launcher.train.data import get_dataset
from launcher.tune import cache
from launcher.tune.followup import run_followups
from launcher.tune.measurements import Measurements
from launcher.tune.oom import compute_allowed_bytes, read_available_bytes
from launcher.tune.probe import ProbeContext
from launcher.tune.report.document import find_recommended_point, make_tune_document
from launcher.tune.search_loop import SizeSearch, TimeBudget

if TYPE_CHECKING:
    from launcher.plan.batch import BatchPlan

__all__ = ["EarlierAttempt", "measure_on_rank"]

#: Ratio of high to low above which an interval is too wide to rely on.
UNRELIABLE_RATIO = 3.0
DEFAULT_TUNE_BUDGET_S = 120.0
SEARCH_BUDGET_SHARE = 2 / 3  # share of the budget; the rest is for the follow-ups


@dataclass(frozen=True)
class PreparedRank:
    """What a rank prepares before it connects to the others."""

    recipe: Any
    sizes: DatasetSizes
    device: torch.device
    data: Datasets

    def describe_conditions(self) -> Mapping[str, Any]:
        return {
            "the launcher's version": version("elastic-batch-launcher"),
            "torch's version": torch.__version__,
            "the training data's length": self.sizes.train,
        }

    def make_measurement_env(self, topology: Topology, threads: int) -> cache.MeasurementEnv:
        return cache.MeasurementEnv(
            world=topology.world,
            nodes=topology.nodes,
            local_world=topology.local_world,
            device=get_device_name(self.device),
            cores=len(os.sched_getaffinity(0)),
            threads=threads,
            code=cache.source_hash(self.recipe),
            shape=describe_sample(self.data.train[0]),
            train_samples=self.sizes.train,
            versions=cache.get_versions(),
        )


@dataclass(frozen=True)
class EarlierAttempt:
    """Results of an earlier attempt, up to the point where memory ran out on one rank in a collective."""

    measurements: Measurements = Measurements()
    spent_s: float = 0.0

    def to_facts(self) -> dict[str, Any]:
        return {"ledger": self.measurements.to_facts(), "spent_s": self.spent_s}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> EarlierAttempt:
        return cls(Measurements.from_facts(facts["ledger"]), facts["spent_s"])


def measure_on_rank(
    config: RunConfig,
    topology: Topology,
    store: dist.Store,
    earlier: EarlierAttempt = EarlierAttempt(),
    state: Path | None = None,
    *,
    look: bool = False,
) -> dict[str, Any]:
    """Measure and return the document that `tune` prints, the same on all ranks; with `look`, use the cache first.

    `look` is set when training waits for the result: then the follow-ups that only explain it are skipped.

    Raises:
        RequestError: any rank found the request to be wrong.
    """
    threads = num_threads(config, topology.local_world)
    torch.set_num_threads(threads)
    ready = check_ranks_agree(
        store, topology, partial(prepare_measurement, config, topology), PreparedRank.describe_conditions
    )
    store_gather = StoreGather(store, topology.rank, topology.world)
    key = cache.make_cache_key(config, ready.make_measurement_env(topology, threads))
    allowed = compute_memory_allowance(ready.device, topology, store_gather)
    looked = store_gather.broadcast_from_rank0(lookup_cached(key, allowed) if look and topology.rank == 0 else None)
    if looked is not None and looked["found"] is not None:
        store_gather.close()
        return {**looked["found"], "cached": True, "said": looked["said"]}
    rendezvous.init_process_group(store, topology, ready.device, config.launch.backend, config.launch.timeout_s)
    found = search_sizes(config, ready, store_gather, topology, allowed, earlier, state, closer=not look)
    dist.destroy_process_group()
    said = [] if looked is None else looked["said"]
    agreed = store_gather.broadcast_from_rank0(
        {**found, "cached": False, "said": [*said, *store_result(key, found, topology.rank)]}
    )
    store_gather.close()
    return dict(agreed)


def lookup_cached(key: Mapping[str, Any], allowed: float | None) -> dict[str, Any]:
    """Look up the cache for this key, with notes. Only rank 0 reads it, as the nodes' copies may differ."""
    looked = cache.lookup(key)
    if looked.profile is None:
        return {"found": None, "said": looked.said}
    found = looked.profile.found
    point = find_recommended_point(found)
    needed = 0 if point is None else point["memory_bytes"]
    if allowed is not None and needed > allowed:
        short = f"{found['recommended']} samples need {needed / 1e9:.3g} GB of memory, {allowed / 1e9:.3g} GB are free"
        return {"found": None, "said": [f"the profile of {looked.profile.formatted_time} is not used: {short}"]}
    return {"found": {**found, "measured": looked.profile.measured}, "said": []}


def store_result(key: Mapping[str, Any], found: Mapping[str, Any], rank: int) -> list[str]:
    """Store the result in the cache on rank 0 and return notes; a write error is only a note."""
    if rank or found["recommended"] is None:
        return []
    try:
        kept = f"saved for batch.per_device=auto: {cache.store(cache.CachedProfile(key, found['measured'], found))}"
    except OSError as problem:
        lost = f"{cache.CACHE_DIR} cannot be written ({problem.strerror}): the next start will measure again"
        return [lost, *describe_unreliable_speed(found)]
    return [kept, *describe_unreliable_speed(found)]


def describe_unreliable_speed(found: Mapping[str, Any]) -> list[str]:
    """A note on what to do if the measured speed of the recommended size is unreliable."""
    point = find_recommended_point(found)
    if point is None or point["high"] <= UNRELIABLE_RATIO * point["low"]:
        return []
    size, low, high = found["recommended"], format_rate(point["low"]), format_rate(point["high"])
    return [
        f"throughput at {size} is unreliable ({low} to {high} samples/s): set launch.threads=1, raise tune.budget_s, "
        "or free the machine"
    ]


def search_sizes(
    config: RunConfig,
    ready: PreparedRank,
    store_gather: StoreGather,
    topology: Topology,
    allowed: float | None,
    earlier: EarlierAttempt,
    state: Path | None,
    *,
    closer: bool,
) -> dict[str, Any]:
    """Measure and build the document; the ranks' documents may differ in times read from their clocks."""
    plan = make_training_plan(config, ready.sizes, topology.world)
    make = partial(ProbeContext.from_plan, plan, topology, ready.recipe, ready.device, ready.data, store_gather)
    budget = TimeBudget(get_budget(config) * (SEARCH_BUDGET_SHARE if closer else 1.0), store_gather, earlier.spent_s)
    search = SizeSearch(
        make,
        ready.data.train,
        compute_largest_size(config, ready.sizes, plan.plan),
        allowed,
        budget,
        earlier.measurements,
        state,
    )
    if not search.measurements.closing:
        measure_sizes(search, config)
        if closer:
            measure_synthetic(search, ready, config)
            run_followups(search, budget, get_accumulation(config))
    facts = {
        "recipe": type(ready.recipe).__name__,
        "world": topology.world,
        "nodes": topology.nodes,
        "accumulation": get_accumulation(config),
        "train_samples": ready.sizes.train,
        "device": get_device_name(ready.device),
        "precision": config.train.precision,
        "strategy": config.strategy.name,
        "threads": num_threads(config, topology.local_world),
        "loader_workers": config.data.num_workers,
        "limit_bytes": get_memory_limit(ready.device, allowed),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "spent_s": round(budget.used_s(), 1),
        "asked": config.tune.sizes is not None,
    }
    return make_tune_document(search.measurements, facts)


def measure_sizes(search: SizeSearch, config: RunConfig) -> None:
    if config.tune.sizes is not None:
        search.measure_sizes(config.tune.sizes)
    else:
        search.search()


def prepare_measurement(config: RunConfig, topology: Topology) -> PreparedRank:
    recipe = recipes.build_recipe(config.recipe)
    sizes = recipes.get_dataset_sizes(recipe)
    check_tune_request(config, sizes, topology.world)
    return PreparedRank(recipe, sizes, resolve_device(config, topology), open_datasets(recipe, config, sizes))


def check_tune_request(config: RunConfig, sizes: DatasetSizes, world: int) -> None:
    """Validate the request.

    Raises:
        RequestError: the request cannot be measured.
    """
    plan = make_training_plan(config, sizes, world).plan
    if config.elastic.exact:
        raise UsageError(
            "elastic.exact=true ignores batch.per_device (it splits every batch into shards): type elastic.exact=false"
        )
    room = compute_largest_size(config, sizes, plan, limited=False)
    for key, value in (("tune.sizes", max(config.tune.sizes or (1,))), ("tune.max", config.tune.max or 1)):
        if value > room and key == "tune.sizes":
            raise UsageError(
                f"{key}: {value} samples on each of {world} workers exceed the {sizes.train} training samples: "
                f"type {room} or less"
            )


def compute_largest_size(config: RunConfig, sizes: DatasetSizes, plan: BatchPlan, *, limited: bool = True) -> int:
    """The largest size to try: limited by the data set and, with `limited`, by tune.max."""
    room = max(1, sizes.train // (plan.world * get_accumulation(config)))
    return min(room, config.tune.max) if limited and config.tune.max is not None else room


def get_budget(config: RunConfig) -> float:
    return DEFAULT_TUNE_BUDGET_S if config.tune.budget_s is None else config.tune.budget_s


def get_accumulation(config: RunConfig) -> int:
    return 1 if config.batch.accumulation == "auto" else config.batch.accumulation


def compute_memory_allowance(device: torch.device, topology: Topology, store_gather: StoreGather) -> float | None:
    """Memory that each worker may use on a CPU, the minimum over all machines; None on a GPU."""
    if device.type == "cuda":
        return None
    said = [
        one
        for one in store_gather.gather(compute_allowed_bytes(read_available_bytes(), topology.local_world))
        if one is not None
    ]
    return min(said, default=None)


def get_memory_limit(device: torch.device, allowed: float | None) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None if allowed is None else int(allowed)


def measure_synthetic(search: SizeSearch, ready: PreparedRank, config: RunConfig) -> None:
    """If waiting for data is the largest stage, measure the same sizes on synthetic data."""
    advice = search.measurements.make_advice()
    if advice is None or config.data.source == "synthetic":
        return
    sizes = [one for one in search.measurements.sizes() if one.speeds and one.fits]
    stages = {one.size: one.stages_ms for one in sizes}
    times = stages[advice.recommended] if advice.recommended in stages else sizes[-1].stages_ms
    if max(times, key=times.__getitem__) == "data":
        others = [one.size for one in sizes if one.size != advice.recommended]
        search.measure_synthetic([advice.recommended, *others], get_dataset(ready.recipe, "train", "synthetic"))


def describe_sample(sample: Any) -> Any:
    """Shapes and dtypes of everything in a sample."""
    if hasattr(sample, "shape") and hasattr(sample, "dtype"):
        return [list(sample.shape), str(sample.dtype)]
    if isinstance(sample, Mapping):
        return {str(name): describe_sample(part) for name, part in sample.items()}
    return [describe_sample(part) for part in sample] if isinstance(sample, list | tuple) else type(sample).__name__


def get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
