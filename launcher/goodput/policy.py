"""Choose the batch with the highest goodput, from fitted update times and the gradient noise scale.

Goodput (Pollux, OSDI 2021) is samples/s times (phi + B0) / (phi + B): throughput times statistical efficiency relative
to the base batch B0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.goodput.noise_scale import NoiseScale
from launcher.goodput.update_time_model import (
    BatchChoice,
    FixedCosts,
    TimedUpdate,
    UpdateModel,
    best_choice,
    fit_update_model,
)
from launcher.plan.batch import PlanError
from launcher.plan.lr_scaling import max_batch_ratio, resolve_lr_rule
from launcher.system.formatting import format_rate

__all__ = [
    "BatchBounds",
    "BatchChooser",
    "GoodputPolicy",
    "NoiseKnowledge",
    "NullGoodputPolicy",
    "TimingProfile",
    "apply_choice",
    "compute_batch_bounds",
    "explain_choice",
]

_Z_95 = 1.96  # half-width of a 95 % interval in standard errors


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
    def from_document(cls, found: Mapping[str, Any]) -> WorldTimings:
        """Build from a JSON document printed by `tune`."""
        return cls(found["world"], found["nodes"], tuple(_iter_timed_updates(found)))


@dataclass(frozen=True)
class TimingProfile:
    """Update times by world size. `cap` is the largest micro-batch that was timed and is not labelled regressed."""

    tables: tuple[WorldTimings, ...]
    work: FixedCosts
    cap: int

    @classmethod
    def from_documents(cls, documents: Iterable[Mapping[str, Any]], *, every_micro: bool = False) -> TimingProfile:
        """Build from JSON documents printed by `tune`, at any world sizes."""
        found = list(documents)
        points = [point for one in found for point in one["points"] if point["samples_per_s"]]
        stages = {stage: min(point["stages"][stage] for point in points) / 1e3 for stage in ("optimizer", "other")}
        return cls(
            tables=tuple(map(WorldTimings.from_document, found)),
            work=FixedCosts(stages["optimizer"], stages["other"], every_micro=every_micro),
            cap=max(point["per_device"] for point in points if point["label"] != "regressed"),
        )

    @property
    def worlds(self) -> tuple[tuple[int, int], ...]:
        """The measured (world size, nodes) pairs, sorted."""
        return tuple(sorted({(table.world, table.nodes) for table in self.tables}))

    def merged_with(self, later: TimingProfile) -> TimingProfile:
        """Merge in later measurements; they replace those at the same world size and node count."""
        old = tuple(one for one in self.tables if (one.world, one.nodes) not in later.worlds)
        return replace(later, tables=(*old, *later.tables))

    @cached_property
    def model(self) -> UpdateModel:
        """The fitted update-time model.

        Raises:
            UsageError: only one micro-batch size was measured.
        """
        try:
            updates = [each for table in self.tables for each in table.updates]
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
                WorldTimings(one["world"], one["nodes"], tuple(TimedUpdate(**each) for each in one["updates"]))
                for one in facts["tables"]
            )
            found = cls(tables, FixedCosts(**facts["work"]), facts["cap"])
            sound = all(each.seconds > 0 and each.per_device >= 1 for one in tables for each in one.updates)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"a field is missing or has the wrong type: {problem}") from problem
        if not sound or not tables or found.cap < 1:
            raise ValueError("a value is missing or out of range")
        return found


def _iter_timed_updates(found: Mapping[str, Any]) -> Iterator[TimedUpdate]:
    for point in found["points"]:
        if not point["samples_per_s"] or point["label"] == "regressed":
            continue
        spread = math.log(point["high"] / point["low"]) / (2 * _Z_95)
        each = TimedUpdate(
            point["per_device"],
            found["accumulation"],
            found["world"],
            point["ms_per_update"] / 1e3,
            found["nodes"],
            spread,
        )
        yield each
        alone_s = each.seconds - point["stages"].get("sync", 0.0) / 1e3
        if each.world > 1 and alone_s > 0:
            yield replace(each, world=1, nodes=1, seconds=alone_s)


@dataclass(frozen=True)
class BatchBounds:
    """Lower and upper bound of the global batch."""

    low: int
    high: int


def compute_batch_bounds(config: RunConfig, train: int, world: int) -> BatchBounds:
    """batch.min_global and batch.max_global; by default from one sample per worker to the limit of the lr rule.

    Raises:
        PlanError: no batch for this world size lies between them.
    """
    base, asked = config.lr.base_batch or 1, config.batch
    far = max_batch_ratio(config, resolve_lr_rule(config))
    high = asked.max_global or min(train, far * base if far else train)
    low = max(asked.min_global or 1, 1 if config.elastic.allow_idle else world)
    high = min(max(high, world) if asked.max_global is None else high, train)
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
    def from_estimates(cls, acted: float | None, least: float | None, typed: float | None) -> NoiseKnowledge:
        """The measured scale if there is one; else the configured one, unless the measured lower bound exceeds it."""
        if acted is not None:
            return cls(acted)
        if typed is not None and typed >= (least or 0.0):
            return cls(typed, source=" (plan.noise)")
        return cls(least, lower_bound=least is not None)


@dataclass(frozen=True)
class BatchChooser:
    """Choose a batch for a world size and noise scale from the measured update times."""

    profile: TimingProfile
    config: RunConfig
    train: int

    def choose(self, world: int, nodes: int, known: NoiseKnowledge) -> BatchChoice:
        """The batch with the highest goodput; while the noise scale is unknown, the fastest form of the base batch.

        Raises:
            PlanError: the bounds leave no batch, or the world size is beyond the measured range.
        """
        bounds, model = self.compute_bounds(world, known), self.profile.model
        try:
            model.predict(1, 1, world, nodes)
        except ValueError as problem:
            raise PlanError(f"batch.policy=goodput: {problem}") from problem
        return best_choice(
            model,
            world,
            known.scale or 0.0,
            self.base_batch,
            cap=self.profile.cap,
            min_global=bounds.low,
            max_global=bounds.high,
            nodes=nodes,
        )

    def compute_bounds(self, world: int, known: NoiseKnowledge) -> BatchBounds:
        """The configured bounds; while the noise scale is unknown, only the allowed batch closest to the base batch.

        If only a lower bound of the noise scale is known, the batch is not reduced below the base batch: that
        the noise may be small is not a reason for a smaller batch.
        """
        bounds = compute_batch_bounds(self.config, self.train, world)
        usual = min(max(self.base_batch, bounds.low), bounds.high)
        if known.scale is None:
            return BatchBounds(usual, usual)
        return BatchBounds(usual, bounds.high) if known.lower_bound else bounds

    def combine_noise(self, acted: float | None, least: float | None) -> NoiseKnowledge:
        """Combine what training has measured so far with the configured plan.noise."""
        typed = self.config.plan.noise
        return NoiseKnowledge.from_estimates(acted, least, None if isinstance(typed, str) else typed)

    @property
    def base_batch(self) -> int:
        return self.config.lr.base_batch or 1


class GoodputPolicy:
    """Follows the noise scale during training; `successor` is the replacement policy once another batch is better.

    The noise scale is computed only from all-gathered statistics, so every rank makes the same choice.
    """

    def __init__(self, chooser: BatchChooser, world: int, nodes: int, known: NoiseKnowledge) -> None:
        self.successor: GoodputPolicy | None = None
        self.chooser = chooser
        self._world_and_nodes = (world, nodes)
        self._known = known
        self._choice = chooser.choose(world, nodes, known)

    @property
    def has_change(self) -> bool:
        return self.successor is not None

    @property
    def config(self) -> RunConfig:
        """The configuration with the choice in place of the requested batch."""
        return apply_choice(
            self.chooser.config, self._choice, self.chooser.compute_bounds(self._world_and_nodes[0], self._known)
        )

    @property
    def why(self) -> str:
        return explain_choice(self._choice, self._known)

    def on_noise(self, noise: NoiseScale) -> None:
        """Re-evaluate the choice when the noise scale is first known or has changed by a factor of two."""
        known = self.chooser.combine_noise(noise.applied, noise.lower_bound)
        if known != self._known:
            self._known = known
            after = GoodputPolicy(self.chooser, *self._world_and_nodes, known)
            self.successor = after if get_batch_sizes(after._choice) != get_batch_sizes(self._choice) else None


class NullGoodputPolicy:
    """No goodput policy: the batch does not depend on the noise scale."""

    successor = None
    has_change = False
    why = ""

    def on_noise(self, noise: NoiseScale) -> None: ...


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


def explain_choice(choice: BatchChoice, known: NoiseKnowledge) -> str:
    """Explain a choice in one line."""
    form = f"{choice.per_device} samples x {choice.accumulation}"
    if known.scale is None:
        return f"goodput: the noise scale is unknown; using the base batch as {form} per worker"
    least = "at least " if known.lower_bound else ""
    return (
        f"goodput: at a noise scale of {least}{known.scale:.3g} samples{known.source}, {form} per worker has the "
        f"highest goodput: {format_rate(choice.samples_per_s)} samples/s with an "
        f"efficiency of {least}{100 * choice.efficiency:.0f} %"
    )
