"""The batch that is worth most per second: fitted update times, and what a sample is worth at a noise scale.

Goodput (Pollux, OSDI 2021) is samples per second times (phi + B0) / (phi + B), progress relative to the base batch B0.
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

_ERRORS = 1.96  # standard errors that an interval of 95 % reaches


@dataclass(frozen=True)
class Table:
    """What was measured at one world size; with several workers each update has a twin of one worker.

    The twin is without the waiting for others: so a fit can tell computing from communicating.
    """

    world: int
    nodes: int
    updates: tuple[Measured, ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Table:
        """Of a document that `tune` printed."""
        return cls(found["world"], found["nodes"], tuple(_updates(found)))


@dataclass(frozen=True)
class Profile:
    """What updates take, by world size. `cap` is the largest micro-batch that was timed and did not regress."""

    tables: tuple[Table, ...]
    work: Workload
    cap: int

    @classmethod
    def of(cls, documents: Iterable[Mapping[str, Any]], *, every_micro: bool = False) -> Profile:
        """Of documents that `tune` printed, at whatever world sizes."""
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
        """Those that were measured, each with its nodes."""
        return tuple(sorted({(table.world, table.nodes) for table in self.tables}))

    def plus(self, later: Profile) -> Profile:
        """With measurements at another world size; those of the same one are replaced."""
        old = tuple(one for one in self.tables if (one.world, one.nodes) not in later.worlds)
        return replace(later, tables=(*old, *later.tables))

    @cached_property
    def model(self) -> UpdateModel:
        """
        Raises:
            RequestError: sizes of one kind only were measured.
        """
        try:
            updates = [each for table in self.tables for each in table.updates]
            return replace(fit_updates(updates, self.work), worlds=self.worlds)
        except ValueError as problem:
            raise RequestError(
                f"batch.policy=goodput: {problem}: type a larger tune.max or tune.budget_s, or batch=scale"
            ) from problem

    def reaches(self, world: int, nodes: int = 1) -> bool:
        """Whether it tells anything of so many workers: not past twice the most that were measured."""
        model = self.model
        try:
            model.predict(1, 1, world, nodes)
        except ValueError:
            return False
        return True

    def to_facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Profile:
        """The value of `to_facts`. ValueError where it is none."""
        try:
            tables = tuple(
                Table(one["world"], one["nodes"], tuple(Measured(**each) for each in one["updates"]))
                for one in facts["tables"]
            )
            found = cls(tables, Workload(**facts["work"]), facts["cap"])
            sound = all(each.seconds > 0 and each.per_device >= 1 for one in tables for each in one.updates)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"a part is missing or of another kind: {problem}") from problem
        if not sound or not tables or found.cap < 1:
            raise ValueError("a figure in it is none")
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
    """Of the global batch."""

    low: int
    high: int


def bounds_of(run: Run, train: int, world: int) -> Bounds:
    """batch.min_global and batch.max_global; by default from a sample per worker to where the rate's rule ends.

    Raises:
        PlanError: no batch of so many workers lies between them.
    """
    base, asked = run.lr.base_batch or 1, run.batch
    far = far_of(run, rule_of(run))
    high = asked.max_global or min(train, far * base if far else train)
    low = max(asked.min_global or 1, 1 if run.elastic.idle else world)
    high = min(max(high, world) if asked.max_global is None else high, train)
    if low > high:
        raise PlanError(
            f"batch.policy=goodput: no batch of {world} workers lies between {low} and {high}: "
            f"start {high} workers or fewer, or type batch.max_global={low} or more"
        )
    return Bounds(low, high)


@dataclass(frozen=True)
class Known:
    """What a choice goes by: a noise scale in samples, with `least` a lower bound of it; None where nothing is known.

    `source` says where one is from that was not measured in this training.
    """

    scale: float | None = None
    least: bool = False
    source: str = ""

    @classmethod
    def of(cls, acted: float | None, least: float | None, typed: float | None) -> Known:
        """The scale that training has measured; else the typed one, unless it is known to be more than that."""
        if acted is not None:
            return cls(acted)
        if typed is not None and typed >= (least or 0.0):
            return cls(typed, source=" (plan.noise)")
        return cls(least, least=least is not None)


@dataclass(frozen=True)
class Chooser:
    """The policy: what is known of the time of an update, and the choice that follows at a noise scale."""

    profile: Profile
    run: Run
    train: int

    def choice(self, world: int, nodes: int, known: Known) -> Choice:
        """The most progress per second; while the noise scale is unknown, the base batch in its fastest form.

        Raises:
            PlanError: the bounds leave no batch, or so many workers are beyond what was measured.
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
        """Those of the request; while the noise scale is unknown, the base batch as near as they allow.

        Where it is only known to be at least so much, no less than the base batch: that the noise may be small is no
        reason to take less.
        """
        bounds = bounds_of(self.run, self.train, world)
        usual = min(max(self.base, bounds.low), bounds.high)
        if known.scale is None:
            return Bounds(usual, usual)
        return Bounds(usual, bounds.high) if known.least else bounds

    def known(self, acted: float | None, least: float | None) -> Known:
        """From what training has measured so far; before that, from what was typed."""
        typed = self.run.plan.noise
        return Known.of(acted, least, None if isinstance(typed, str) else typed)

    @property
    def base(self) -> int:
        return self.run.lr.base_batch or 1


class Goodput:
    """Watches the noise scale of a run; `after` is the watcher from here on once another batch is worth more.

    Every rank hears of the same scale, which comes from the votes alone, so all come to the same.
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
        """The run with the choice in place of what was asked."""
        return chosen(self.chooser.run, self._choice, self.chooser.bounds(self._where[0], self._known))

    @property
    def why(self) -> str:
        return said(self._choice, self._known)

    def heard(self, noise: NoiseScale) -> None:
        """What was last worth acting on of the noise scale: the first that is known of it, or one that moved by two."""
        known = self.chooser.known(noise.acted, noise.least)
        if known != self._known:
            self._known = known
            after = Goodput(self.chooser, *self._where, known)
            self.after = after if batch_of(after._choice) != batch_of(self._choice) else None


class Fixed:
    """The batch is the policy's, whatever the noise."""

    after = None
    wants = False
    why = ""

    def heard(self, noise: NoiseScale) -> None: ...


def batch_of(choice: Choice) -> tuple[int, int, int]:
    return choice.global_batch, choice.per_device, choice.accumulation


def chosen(run: Run, choice: Choice, bounds: Bounds) -> Run:
    """Under policy goodput a plan is that of bounded, at the size and accumulation that were chosen."""
    batch = replace(
        run.batch,
        per_device=choice.per_device,
        accumulation=choice.accumulation,
        min_global=bounds.low,
        max_global=bounds.high,
    )
    return replace(run, batch=batch)


def said(choice: Choice, known: Known) -> str:
    """The reason of a choice, in a line."""
    form = f"{choice.per_device} samples x {choice.accumulation}"
    if known.scale is None:
        return f"goodput: the noise scale is unknown, so the base batch, as {form} per worker"
    least = "at least " if known.least else ""
    return (
        f"goodput: at a noise scale of {least}{known.scale:.3g} samples{known.source} {form} per worker are worth most "
        f"per second, {rate(choice.samples_per_s)} samples/s of {least}{100 * choice.efficiency:.0f} % efficiency"
    )
