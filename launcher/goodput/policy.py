"""Choose the batch with the highest goodput, from fitted update times and the gradient noise scale.

Goodput (Pollux, OSDI 2021) is samples/s times (phi + B0) / (phi + B): throughput times statistical efficiency relative
to the base batch B0, with phi the gradient noise scale and B the global batch, all in samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.goodput.batch_choice import BatchBounds, BatchChoice, best_choice
from launcher.goodput.noise_scale import NoiseScale
from launcher.goodput.update_time_model import FixedCosts, TimedUpdate, UpdateModel, fit_update_model
from launcher.plan.batch import PlanError
from launcher.plan.lr_scaling import max_batch_ratio, resolve_lr_rule
from launcher.system.formatting import format_rate
from launcher.system.statistics import Z_95

__all__ = [
    "BatchChooser",
    "GoodputPolicy",
    "NoiseKnowledge",
    "TimingProfile",
    "apply_choice",
    "compute_batch_bounds",
    "explain_choice",
]


@dataclass(frozen=True)
class WorldTimings:
    """Update times measured at one world size.

    With several workers, each update is listed a second time as a one-worker update without the time spent waiting for
    the others, so that a fit can separate computation from communication.
    """

    world: int
    nodes: int
    updates: tuple[TimedUpdate, ...]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> WorldTimings:
        """Build from a JSON document printed by `tune`."""
        return cls(document["world"], document["nodes"], tuple(_iter_timed_updates(document)))


@dataclass(frozen=True)
class TimingProfile:
    """Update times by world size. `cap` is the largest micro-batch that was timed and is not labelled regressed."""

    tables: tuple[WorldTimings, ...]
    work: FixedCosts
    cap: int

    @classmethod
    def from_documents(cls, documents: Iterable[Mapping[str, Any]], *, every_micro: bool = False) -> TimingProfile:
        """Build from JSON documents printed by `tune`, at any world sizes."""
        results = list(documents)
        points = [point for result in results for point in result["points"] if point["samples_per_s"]]
        stages = {stage: min(point["stages"][stage] for point in points) / 1e3 for stage in ("optimizer", "other")}
        return cls(
            tables=tuple(map(WorldTimings.from_document, results)),
            work=FixedCosts(stages["optimizer"], stages["other"], every_micro=every_micro),
            cap=max(point["per_device"] for point in points if point["label"] != "regressed"),
        )

    @property
    def worlds(self) -> tuple[tuple[int, int], ...]:
        """The measured (world size, nodes) pairs, sorted."""
        return tuple(sorted({(table.world, table.nodes) for table in self.tables}))

    def merged_with(self, later: TimingProfile) -> TimingProfile:
        """Merge in later measurements; they replace those at the same world size and node count."""
        kept = tuple(table for table in self.tables if (table.world, table.nodes) not in later.worlds)
        return replace(later, tables=(*kept, *later.tables))

    @cached_property
    def model(self) -> UpdateModel:
        """The fitted update-time model.

        Raises:
            UsageError: only one micro-batch size was measured.
        """
        try:
            updates = [update for table in self.tables for update in table.updates]
            return replace(fit_update_model(updates, self.work), worlds=self.worlds)
        except ValueError as problem:
            raise UsageError(
                f"batch.policy=goodput: {problem}: type a larger tune.max or tune.budget_s, or batch=scale"
            ) from problem

    def covers(self, world: int, nodes: int = 1) -> bool:
        """Return whether predictions extend to this world size: at most twice the largest measured one."""
        model = self.model
        try:
            model.predict(1, 1, world, nodes)
        except ValueError:
            return False
        return True

    def to_facts(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> TimingProfile:
        """Inverse of `to_facts`; ValueError if the content is invalid."""
        try:
            tables = tuple(
                WorldTimings(
                    table["world"], table["nodes"], tuple(TimedUpdate(**fields) for fields in table["updates"])
                )
                for table in facts["tables"]
            )
            profile = cls(tables, FixedCosts(**facts["work"]), facts["cap"])
            updates = [update for table in tables for update in table.updates]
            is_valid = all(update.seconds > 0 and update.per_device >= 1 for update in updates)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"a field is missing or has the wrong type: {problem}") from problem
        if not is_valid or not tables or profile.cap < 1:
            raise ValueError("a value is missing or out of range")
        return profile


def _iter_timed_updates(document: Mapping[str, Any]) -> Iterator[TimedUpdate]:
    for point in document["points"]:
        if not point["samples_per_s"] or point["label"] == "regressed":
            continue
        update = TimedUpdate(
            point["per_device"],
            document["accumulation"],
            document["world"],
            point["ms_per_update"] / 1e3,
            document["nodes"],
            spread=math.log(point["high"] / point["low"]) / (2 * Z_95),
        )
        yield update
        seconds_without_sync = update.seconds - point["stages"].get("sync", 0.0) / 1e3
        if update.world > 1 and seconds_without_sync > 0:
            yield replace(update, world=1, nodes=1, seconds=seconds_without_sync)


def compute_batch_bounds(config: RunConfig, train: int, world: int) -> BatchBounds:
    """batch.min_global and batch.max_global; by default from one sample per worker to the limit of the lr rule.

    Raises:
        PlanError: no batch for this world size lies between them.
    """
    base, batch = config.lr.base_batch or 1, config.batch
    max_ratio = max_batch_ratio(config, resolve_lr_rule(config))
    high = batch.max_global or min(train, max_ratio * base if max_ratio else train)
    low = max(batch.min_global or 1, 1 if config.elastic.allow_idle else world)
    high = min(max(high, world) if batch.max_global is None else high, train)
    if low > high:
        raise PlanError(
            f"batch.policy=goodput: no global batch for {world} workers lies between {low} and {high}: "
            f"start {high} workers or fewer, or type batch.max_global={low} or more"
        )
    return BatchBounds(low, high)


@dataclass(frozen=True)
class NoiseKnowledge:
    """The noise scale (in samples) that a choice is based on; `lower_bound` marks it as a lower bound, None is unknown.

    `source` names the origin of a noise scale that was not measured in this training run.
    """

    scale: float | None = None
    lower_bound: bool = False
    source: str = ""

    @classmethod
    def from_estimates(
        cls, applied: float | None, lower_bound: float | None, configured: float | None
    ) -> NoiseKnowledge:
        """The measured scale if there is one; else the configured one, unless the measured lower bound exceeds it."""
        if applied is not None:
            return cls(applied)
        if configured is not None and configured >= (lower_bound or 0.0):
            return cls(configured, source=" (plan.noise)")
        return cls(lower_bound, lower_bound=lower_bound is not None)


@dataclass(frozen=True)
class BatchChooser:
    """Choose a batch for a world size and noise scale from the measured update times."""

    profile: TimingProfile
    config: RunConfig
    train_samples: int

    def choose(self, world: int, nodes: int, noise: NoiseKnowledge) -> BatchChoice:
        """The batch with the highest goodput; while the noise scale is unknown, the fastest form of the base batch.

        Raises:
            PlanError: the bounds leave no batch, or the world size is beyond the measured range.
        """
        bounds, model = self.compute_bounds(world, noise), self.profile.model
        try:
            model.predict(1, 1, world, nodes)
        except ValueError as problem:
            raise PlanError(f"batch.policy=goodput: {problem}") from problem
        return best_choice(
            model,
            world,
            noise.scale or 0.0,
            self.base_batch,
            bounds,
            cap=self.profile.cap,
            nodes=nodes,
        )

    def compute_bounds(self, world: int, noise: NoiseKnowledge) -> BatchBounds:
        """The configured bounds; while the noise scale is unknown, only the allowed batch closest to the base batch.

        If only a lower bound of the noise scale is known, the batch is not reduced below the base batch: that
        the noise may be small is not a reason for a smaller batch.
        """
        bounds = compute_batch_bounds(self.config, self.train_samples, world)
        closest = min(max(self.base_batch, bounds.low), bounds.high)
        if noise.scale is None:
            return BatchBounds(closest, closest)
        return BatchBounds(closest, bounds.high) if noise.lower_bound else bounds

    def combine_noise(self, applied: float | None, lower_bound: float | None) -> NoiseKnowledge:
        """Combine what training has measured so far with the configured plan.noise."""
        configured = self.config.plan.noise
        return NoiseKnowledge.from_estimates(applied, lower_bound, None if isinstance(configured, str) else configured)

    @property
    def base_batch(self) -> int:
        return self.config.lr.base_batch or 1


class GoodputPolicy:
    """Follows the noise scale during training; `successor` is the replacement policy once another batch is better.

    The noise scale is computed only from statistics that all ranks have, so every rank makes the same choice.
    """

    def __init__(self, chooser: BatchChooser, world: int, nodes: int, noise: NoiseKnowledge) -> None:
        self.successor: GoodputPolicy | None = None
        self.chooser = chooser
        self._world_and_nodes = (world, nodes)
        self._noise = noise
        self._choice = chooser.choose(world, nodes, noise)

    @property
    def has_change(self) -> bool:
        return self.successor is not None

    @property
    def config(self) -> RunConfig:
        """The configuration with the choice in place of the requested batch."""
        return apply_choice(
            self.chooser.config, self._choice, self.chooser.compute_bounds(self._world_and_nodes[0], self._noise)
        )

    @property
    def why(self) -> str:
        return explain_choice(self._choice, self._noise)

    def on_noise(self, noise: NoiseScale) -> None:
        """Re-evaluate the choice when the noise scale is first known or has changed by a factor of two."""
        knowledge = self.chooser.combine_noise(noise.applied, noise.lower_bound)
        if knowledge != self._noise:
            self._noise = knowledge
            successor = GoodputPolicy(self.chooser, *self._world_and_nodes, knowledge)
            is_same = get_batch_sizes(successor._choice) == get_batch_sizes(self._choice)
            self.successor = None if is_same else successor


def get_batch_sizes(choice: BatchChoice) -> tuple[int, int, int]:
    return choice.global_batch, choice.per_device, choice.accumulation


def apply_choice(config: RunConfig, choice: BatchChoice, bounds: BatchBounds) -> RunConfig:
    """Apply the choice to the configuration; goodput plans are bounded plans with the chosen size and accumulation."""
    batch = replace(
        config.batch,
        per_device=choice.per_device,
        accumulation=choice.accumulation,
        min_global=bounds.low,
        max_global=bounds.high,
    )
    return replace(config, batch=batch)


def explain_choice(choice: BatchChoice, noise: NoiseKnowledge) -> str:
    """Explain a choice in one line."""
    batch_shape = f"{choice.per_device} samples x {choice.accumulation}"
    if noise.scale is None:
        return f"goodput: the noise scale is unknown; using the base batch as {batch_shape} per worker"
    at_least = "at least " if noise.lower_bound else ""
    return (
        f"goodput: at a noise scale of {at_least}{noise.scale:.3g} samples{noise.source}, {batch_shape} per worker has "
        f"the highest goodput: {format_rate(choice.samples_per_s)} samples/s with an "
        f"efficiency of {at_least}{100 * choice.efficiency:.0f} %"
    )
