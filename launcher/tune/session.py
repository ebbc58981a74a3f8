"""Run `tune` on one rank: connect to the other ranks, measure together and return the document."""

from __future__ import annotations

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
from launcher.distributed.consistency_check import prepare_and_compare
from launcher.distributed.store_gather import StoreGather
from launcher.distributed.worker_env import resolve_num_threads
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.system.formatting import format_rate
from launcher.system.processes import count_cores
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
            cores=count_cores(),
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
        return {"measurements": self.measurements.to_facts(), "spent_s": self.spent_s}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> EarlierAttempt:
        return cls(Measurements.from_facts(facts["measurements"]), facts["spent_s"])


@dataclass(frozen=True)
class MeasurementJob:
    """What to measure on this rank. `state_file`: a file of rank 0 to continue from if the workers are restarted.

    `with_followups`: also measure what only explains the result.
    """

    config: RunConfig
    topology: Topology
    earlier: EarlierAttempt
    state_file: Path | None
    with_followups: bool


def measure_on_rank(
    config: RunConfig,
    topology: Topology,
    store: dist.Store,
    earlier: EarlierAttempt = EarlierAttempt(),
    state_file: Path | None = None,
    *,
    use_cache: bool = False,
) -> dict[str, Any]:
    """Measure and return the document that `tune` prints, the same on all ranks, or a cached one with `use_cache`.

    `use_cache` is set when training waits for the result: then the follow-ups that only explain it are skipped.

    Raises:
        UsageError: any rank found the request to be wrong.
    """
    threads = resolve_num_threads(config, topology.local_world)
    torch.set_num_threads(threads)
    prepared = prepare_and_compare(
        store, topology, partial(prepare_measurement, config, topology), PreparedRank.describe_conditions
    )
    store_gather = StoreGather(store, topology.rank, topology.world)
    key = cache.make_cache_key(config, prepared.make_measurement_env(topology, threads))
    allowed = compute_memory_allowance(prepared.device, topology, store_gather)
    document, notes = store_gather.broadcast_from_rank0(
        lookup_cached(key, allowed) if use_cache and topology.rank == 0 else (None, [])
    )
    if document is not None:
        store_gather.close()
        return {**document, "cached": True, "said": notes}
    rendezvous.init_process_group(store, topology, prepared.device, config.launch.backend, config.launch.timeout_s)
    job = MeasurementJob(config, topology, earlier, state_file, with_followups=not use_cache)
    document = measure_and_describe(job, prepared, store_gather, allowed)
    dist.destroy_process_group()
    notes = [*notes, *store_result(key, document, topology.rank)]
    agreed = store_gather.broadcast_from_rank0({**document, "cached": False, "said": notes})
    store_gather.close()
    return dict(agreed)


def lookup_cached(key: Mapping[str, Any], allowed: float | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Look up the cache for this key: the document or None, and notes.

    Only rank 0 calls it, as the copies of the nodes may differ.
    """
    lookup = cache.lookup(key)
    if lookup.profile is None:
        return None, list(lookup.notes)
    document = lookup.profile.document
    point = find_recommended_point(document)
    needed = 0 if point is None else point["memory_bytes"]
    if allowed is not None and needed > allowed:
        shortage = (
            f"{document['recommended']} samples need {needed / 1e9:.3g} GB of memory, {allowed / 1e9:.3g} GB are free"
        )
        return None, [f"the profile of {lookup.profile.formatted_time} is not used: {shortage}"]
    return {**document, "measured": lookup.profile.measured}, []


def store_result(key: Mapping[str, Any], document: Mapping[str, Any], rank: int) -> list[str]:
    """Store the result in the cache on rank 0 and return notes; a write error is only a note."""
    if rank or document["recommended"] is None:
        return []
    try:
        path = cache.store(cache.CachedProfile(key, document["measured"], document))
        note = f"saved for batch.per_device=auto: {path}"
    except OSError as problem:
        note = f"{cache.CACHE_DIR} cannot be written ({problem.strerror}): the next start will measure again"
    return [note, *describe_unreliable_speed(document)]


def describe_unreliable_speed(document: Mapping[str, Any]) -> list[str]:
    """A note on what to do if the measured speed of the recommended size is unreliable."""
    point = find_recommended_point(document)
    if point is None or point["high"] <= UNRELIABLE_RATIO * point["low"]:
        return []
    size, low, high = document["recommended"], format_rate(point["low"]), format_rate(point["high"])
    return [
        f"throughput at {size} is unreliable ({low} to {high} samples/s): set launch.threads=1, raise tune.budget_s, "
        "or free the machine"
    ]


def measure_and_describe(
    job: MeasurementJob, prepared: PreparedRank, store_gather: StoreGather, allowed: float | None
) -> dict[str, Any]:
    """Measure and build the document; the ranks' documents may differ in times read from their clocks."""
    config = job.config
    share = SEARCH_BUDGET_SHARE if job.with_followups else 1.0
    budget = TimeBudget(get_budget(config) * share, store_gather, job.earlier.spent_s)
    search = make_search(job, prepared, budget, allowed)
    if not search.measurements.closing:
        measure_sizes(search, config)
        if job.with_followups:
            measure_synthetic(search, prepared, config)
            run_followups(search, budget, get_accumulation(config))
    facts = {
        **describe_setup(job, prepared),
        "limit_bytes": get_memory_limit(prepared.device, allowed),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "spent_s": round(budget.used_s(), 1),
        "asked": config.tune.sizes is not None,
    }
    return make_tune_document(search.measurements, facts)


def make_search(job: MeasurementJob, prepared: PreparedRank, budget: TimeBudget, allowed: float | None) -> SizeSearch:
    plan = make_training_plan(job.config, prepared.sizes, job.topology.world)
    make_context = partial(
        ProbeContext.from_plan,
        plan,
        job.topology,
        prepared.recipe,
        prepared.device,
        prepared.data,
        budget.store_gather,
    )
    largest = compute_largest_size(job.config, prepared.sizes, plan.batch_plan)
    return SizeSearch(
        make_context,
        prepared.data.train,
        largest,
        allowed,
        budget,
        job.earlier.measurements,
        job.state_file,
    )


def describe_setup(job: MeasurementJob, prepared: PreparedRank) -> dict[str, Any]:
    """What was measured, and on which machine, for the document."""
    config, topology = job.config, job.topology
    return {
        "recipe": type(prepared.recipe).__name__,
        "world": topology.world,
        "nodes": topology.nodes,
        "accumulation": get_accumulation(config),
        "train_samples": prepared.sizes.train,
        "device": get_device_name(prepared.device),
        "cores": count_cores(),
        "precision": config.train.precision,
        "strategy": config.strategy.name,
        "threads": resolve_num_threads(config, topology.local_world),
        "loader_workers": config.data.num_workers,
    }


def measure_sizes(search: SizeSearch, config: RunConfig) -> None:
    if config.tune.sizes is not None:
        search.measure_sizes(config.tune.sizes)
    else:
        search.search()


def prepare_measurement(config: RunConfig, topology: Topology) -> PreparedRank:
    recipe = recipes.build_recipe(config.recipe)
    opened: dict[str, Any] = {}
    sizes = recipes.get_dataset_sizes(recipe, opened)
    check_tune_request(config, sizes, topology.world)
    return PreparedRank(recipe, sizes, resolve_device(config, topology), open_datasets(recipe, config, sizes, opened))


def check_tune_request(config: RunConfig, sizes: DatasetSizes, world: int) -> None:
    """Validate the request.

    Raises:
        UsageError: the request cannot be measured.
    """
    plan = make_training_plan(config, sizes, world).batch_plan
    if config.elastic.exact:
        raise UsageError(
            "elastic.exact=true ignores batch.per_device (it splits every batch into shards): type elastic.exact=false"
        )
    largest = compute_largest_size(config, sizes, plan, limited=False)
    for key, value in (("tune.sizes", max(config.tune.sizes or (1,))), ("tune.max", config.tune.max or 1)):
        if value > largest and key == "tune.sizes":
            raise UsageError(
                f"{key}: {value} samples on each of {world} workers exceed the {sizes.train} training samples: "
                f"type {largest} or less"
            )


def compute_largest_size(config: RunConfig, sizes: DatasetSizes, plan: BatchPlan, *, limited: bool = True) -> int:
    """The largest size to try: limited by the data set and, with `limited`, by tune.max."""
    largest = max(1, sizes.train // (plan.world * get_accumulation(config)))
    return min(largest, config.tune.max) if limited and config.tune.max is not None else largest


def get_budget(config: RunConfig) -> float:
    return DEFAULT_TUNE_BUDGET_S if config.tune.budget_s is None else config.tune.budget_s


def get_accumulation(config: RunConfig) -> int:
    return 1 if config.batch.accumulation == "auto" else config.batch.accumulation


def compute_memory_allowance(device: torch.device, topology: Topology, store_gather: StoreGather) -> float | None:
    """Memory that each worker may use on a CPU, the minimum over all machines; None on a GPU."""
    if device.type == "cuda":
        return None
    gathered = store_gather.gather(compute_allowed_bytes(read_available_bytes(), topology.local_world))
    return min((allowed for allowed in gathered if allowed is not None), default=None)


def get_memory_limit(device: torch.device, allowed: float | None) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None if allowed is None else int(allowed)


def measure_synthetic(search: SizeSearch, prepared: PreparedRank, config: RunConfig) -> None:
    """If waiting for data is the largest stage, measure the same sizes on synthetic data."""
    advice = search.measurements.make_advice()
    if advice is None or config.data.source == "synthetic":
        return
    results = [result for result in search.measurements.sizes() if result.speeds and result.fits]
    stages = {result.size: result.stages_ms for result in results}
    times = stages[advice.recommended] if advice.recommended in stages else results[-1].stages_ms
    if max(times, key=times.__getitem__) == "data":
        others = [size for size in stages if size != advice.recommended]
        search.measure_synthetic([advice.recommended, *others], get_dataset(prepared.recipe, "train", "synthetic"))


def describe_sample(sample: Any) -> Any:
    """Shapes and dtypes of everything in a sample."""
    if hasattr(sample, "shape") and hasattr(sample, "dtype"):
        return [list(sample.shape), str(sample.dtype)]
    if isinstance(sample, Mapping):
        return {str(name): describe_sample(part) for name, part in sample.items()}
    return [describe_sample(part) for part in sample] if isinstance(sample, list | tuple) else type(sample).__name__


def get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
