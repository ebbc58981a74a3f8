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

from launcher.batch import PlanError
from launcher.errors import RequestError
from launcher.noise import NoiseScale
from launcher.rules import far_of, rule_of
from launcher.scaling import Choice, Measured, UpdateModel, Workload, choose, fit_updates
from launcher.settings import Run
from launcher.sinks.text import rate

__all__ = ["Bounds", "Chooser", "Fixed", "Goodput", "Known", "Profile", "bounds_of", "chosen", "said"]

_ERRORS = 1.96  # half-width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Table:
    """Update times measured at one world size.

    With several workers, each update is listed a second time as a one-worker update without the time spent waiting for
    the others, so that a fit can separate computation from communication.
    """

    world: int
    nodes: int
    updates: tuple[Measured, ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Table:
        """Build from a JSON document printed by `tune`."""
        return cls(found["world"], found["nodes"], tuple(_updates(found)))


@dataclass(frozen=True)
class Profile:
    """Update times by world size. `cap` is the largest micro-batch that was timed and is not labelled regressed."""

    tables: tuple[Table, ...]
    work: Workload
    cap: int

    @classmethod
    def of(cls, documents: Iterable[Mapping[str, Any]], *, every_micro: bool = False) -> Profile:
        """Build from JSON documents printed by `tune`, at any world sizes."""
        found = list(documents)
        points = [point for one in found for point in one["points"] if point["samples_per_s"]]
        stages = {stage: min(point["stages"][stage] for point in points) / 1e3 for stage in ("optimizer", "other")}
        return cls(
            tables=tuple(map(Table.of, found)),
            work=Workload(stages["optimizer"], stages["other"], every_micro=every_micro),
            cap=max(point["per_device"] for point in points if point["label"] != "regressed"),
        )

    @property
    def worlds(self) -> tuple[tuple[int, int], ...]:
        """The measured (world size, nodes) pairs, sorted."""
        return tuple(sorted({(table.world, table.nodes) for table in self.tables}))

    def plus(self, later: Profile) -> Profile:
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
            return replace(fit_updates(updates, self.work), worlds=self.worlds)
        except ValueError as problem:
            raise RequestError(
                f"batch.policy=goodput: {problem}: type a larger tune.max or tune.budget_s, or batch=scale"
            ) from problem

    def reaches(self, world: int, nodes: int = 1) -> bool:
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
    def from_facts(cls, facts: Mapping[str, Any]) -> Profile:
        """Inverse of `to_facts`; ValueError if the content is invalid."""
        try:
            tables = tuple(
                Table(one["world"], one["nodes"], tuple(Measured(**each) for each in one["updates"]))
                for one in facts["tables"]
            )
            found = cls(tables, Workload(**facts["work"]), facts["cap"])
            sound = all(each.seconds > 0 and each.per_device >= 1 for one in tables for each in one.updates)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"a field is missing or has the wrong type: {problem}") from problem
        if not sound or not tables or found.cap < 1:
            raise ValueError("a value is missing or out of range")
        return found


def _updates(found: Mapping[str, Any]) -> Iterator[Measured]:
    for point in found["points"]:
        if not point["samples_per_s"] or point["label"] == "regressed":
            continue
        spread = math.log(point["high"] / point["low"]) / (2 * _ERRORS)
        each = Measured(
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
class Bounds:
    """Lower and upper bound of the global batch."""

    low: int
    high: int


def bounds_of(run: Run, train: int, world: int) -> Bounds:
    """batch.min_global and batch.max_global; by default from one sample per worker to the limit of the lr rule.

    Raises:
        PlanError: no batch for this world size lies between them.
    """
    base, asked = run.lr.base_batch or 1, run.batch
    far = far_of(run, rule_of(run))
    high = asked.max_global or min(train, far * base if far else train)
    low = max(asked.min_global or 1, 1 if run.elastic.idle else world)
    high = min(max(high, world) if asked.max_global is None else high, train)
    if low > high:
        raise PlanError(
            f"batch.policy=goodput: no global batch for {world} workers lies between {low} and {high}: "
            f"start {high} workers or fewer, or type batch.max_global={low} or more"
        )
    return Bounds(low, high)


@dataclass(frozen=True)
class Known:
    """The noise scale (in samples) that a choice is based on; `lower_bound` marks it as a lower bound, None is unknown.

    `source` names the origin of a noise scale that was not measured in this training run.
    """

    scale: float | None = None
    least: bool = False
    source: str = ""

    @classmethod
    def of(cls, acted: float | None, least: float | None, typed: float | None) -> Known:
        """The measured scale if there is one; else the configured one, unless the measured lower bound exceeds it."""
        if acted is not None:
            return cls(acted)
        if typed is not None and typed >= (least or 0.0):
            return cls(typed, source=" (plan.noise)")
        return cls(least, least=least is not None)


@dataclass(frozen=True)
class Chooser:
    """Choose a batch for a world size and noise scale from the measured update times."""

    profile: Profile
    run: Run
    train: int

    def choice(self, world: int, nodes: int, known: Known) -> Choice:
        """The batch with the highest goodput; while the noise scale is unknown, the fastest form of the base batch.

        Raises:
            PlanError: the bounds leave no batch, or the world size is beyond the measured range.
        """
        bounds, model = self.bounds(world, known), self.profile.model
        try:
            model.predict(1, 1, world, nodes)
        except ValueError as problem:
            raise PlanError(f"batch.policy=goodput: {problem}") from problem
        return choose(
            model,
            world,
            known.scale or 0.0,
            self.base,
            cap=self.profile.cap,
            min_global=bounds.low,
            max_global=bounds.high,
            nodes=nodes,
        )

    def bounds(self, world: int, known: Known) -> Bounds:
        """The configured bounds; while the noise scale is unknown, only the allowed batch closest to the base batch.

        If only a lower bound of the noise scale is known, the batch is not reduced below the base batch: that
        the noise may be small is not a reason for a smaller batch.
        """
        bounds = bounds_of(self.run, self.train, world)
        usual = min(max(self.base, bounds.low), bounds.high)
        if known.scale is None:
            return Bounds(usual, usual)
        return Bounds(usual, bounds.high) if known.least else bounds

    def known(self, acted: float | None, least: float | None) -> Known:
        """Combine what training has measured so far with the configured plan.noise."""
        typed = self.run.plan.noise
        return Known.of(acted, least, None if isinstance(typed, str) else typed)

    @property
    def base(self) -> int:
        return self.run.lr.base_batch or 1


class Goodput:
    """Follows the noise scale during training; `successor` is the replacement policy once another batch is better.

    The noise scale is computed only from all-gathered statistics, so every rank makes the same choice.
    """

    def __init__(self, chooser: Chooser, world: int, nodes: int, known: Known) -> None:
        self.after: Goodput | None = None
        self.chooser = chooser
        self._where = (world, nodes)
        self._known = known
        self._choice = chooser.choice(world, nodes, known)

    @property
    def wants(self) -> bool:
        return self.after is not None

    @property
    def run(self) -> Run:
        """The configuration with the choice in place of the requested batch."""
        return chosen(self.chooser.run, self._choice, self.chooser.bounds(self._where[0], self._known))

    @property
    def why(self) -> str:
        return said(self._choice, self._known)

    def heard(self, noise: NoiseScale) -> None:
        """Re-evaluate the choice when the noise scale is first known or has changed by a factor of two."""
        known = self.chooser.known(noise.acted, noise.least)
        if known != self._known:
            self._known = known
            after = Goodput(self.chooser, *self._where, known)
            self.after = after if batch_of(after._choice) != batch_of(self._choice) else None


class Fixed:
    """No goodput policy: the batch does not depend on the noise scale."""

    after = None
    wants = False
    why = ""

    def heard(self, noise: NoiseScale) -> None: ...


def batch_of(choice: Choice) -> tuple[int, int, int]:
    return choice.global_batch, choice.per_device, choice.accumulation


def chosen(run: Run, choice: Choice, bounds: Bounds) -> Run:
    """Apply the choice to the configuration; goodput plans are bounded plans with the chosen size and accumulation."""
    batch = replace(
        run.batch,
        per_device=choice.per_device,
        accumulation=choice.accumulation,
        min_global=bounds.low,
        max_global=bounds.high,
    )
    return replace(run, batch=batch)


def said(choice: Choice, known: Known) -> str:
    """Explain a choice in one line."""
    form = f"{choice.per_device} samples x {choice.accumulation}"
    if known.scale is None:
        return f"goodput: the noise scale is unknown; using the base batch as {form} per worker"
    least = "at least " if known.least else ""
    return (
        f"goodput: at a noise scale of {least}{known.scale:.3g} samples{known.source}, {form} per worker has the "
        f"highest goodput: {rate(choice.samples_per_s)} samples/s with an "
        f"efficiency of {least}{100 * choice.efficiency:.0f} %"
    )
