"""Update time as a function of batch and world size, and the choice of the batch with the highest goodput.

The model is that of Pollux (OSDI 2021, arXiv 2008.12260), fitted to measured updates; predictions have error bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from launcher.goodput.noise_scale import compute_efficiency
from launcher.goodput.throughput_model import Estimate
from launcher.system.statistics import student_t_quantile

__all__ = [
    "BatchChoice",
    "FixedCosts",
    "TimedUpdate",
    "UpdateModel",
    "best_choice",
    "compute_best_batch",
    "fit_update_model",
]

EXTRAPOLATION_FACTOR = 2  # times the largest world size measured
_MAX_GAMMA = 10.0  # upper limit; at 10, overlap is complete to within 7 %
#: Prior width in log space around a guess made from the data: a factor of twenty, and of two for gamma.
_PRIOR_WIDTH, _GAMMA_PRIOR_WIDTH = 3.0, 0.7
_FIRST_SPREAD, _MIN_SPREAD = 0.05, 0.003
_DIFFERENCE_STEP = 1e-5
_MAX_STEPS, _PASSES = 60, 4


@dataclass(frozen=True)
class TimedUpdate:
    """A timed update: `per_device` is the largest micro-batch, `spread` the relative standard error of `seconds`."""

    per_device: int
    accumulation: int
    world: int
    seconds: float
    nodes: int = 1
    spread: float = 0.0


@dataclass(frozen=True)
class FixedCosts:
    """Known fixed costs: seconds of the optimizer step and of host work, and of data loading per sample of a rank.

    `every_micro`: the strategy communicates in every micro-batch, as FSDP2 and ZeRO-3 do.
    """

    optimizer_s: float = 0.0
    host_s: float = 0.0
    data_s: float = 0.0
    every_micro: bool = False


@dataclass(frozen=True)
class UpdateModel:
    """Update time = max((a - 1) C + (C^g + S^g)^(1/g) + optimizer, data) + host, C = alpha + beta m.

    a: accumulation, m: micro-batch, K: world size. S = alpha_r + beta_r max(K - 2, 0) within a node, with separate
    constants across nodes, and 0 for one worker; g >= 1 describes how far communication overlaps with computation.
    `logs` are the logarithms of (alpha, beta, alpha_r and beta_r within a node, both again across nodes, g), and
    `covariance` is their covariance matrix.
    """

    work: FixedCosts
    logs: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] = ()
    t_quantile: float = math.inf
    worlds: tuple[tuple[int, int], ...] = field(default=())  # the measured (world size, nodes)

    @cached_property
    def _constants(self) -> tuple[float, ...]:
        return tuple(map(math.exp, self.logs))

    def compute_seconds(self, per_device: float, accumulation: int, world: int, nodes: int = 1) -> float:
        """Time of one update at any configuration, without range check or error band (see `predict`)."""
        alpha, beta, *sync, gamma = self._constants
        compute = alpha + beta * per_device
        constant, each = sync[2:] if nodes > 1 else sync[:2]
        exposed = compute if world == 1 else _combine_overlapped(compute, constant + each * max(world - 2, 0), gamma)
        apart = exposed if self.work.every_micro else compute
        device = (accumulation - 1) * apart + exposed + self.work.optimizer_s
        return max(device, self.work.data_s * per_device * accumulation) + self.work.host_s

    def predict(self, per_device: int, accumulation: int, world: int, nodes: int = 1) -> Estimate:
        """Time of one update in seconds, with its error band.

        Raises:
            ValueError: too far from what was measured; the message states the limit.
        """
        self._check_range(world, nodes)
        value = self.compute_seconds(per_device, accumulation, world, nodes)
        slopes = self._compute_slopes((per_device, accumulation, world, nodes))
        variance = sum(
            a * b * self.covariance[i][j] for i, a in enumerate(slopes) for j, b in enumerate(slopes) if a and b
        )
        factor = math.exp(min(50.0, self.t_quantile * math.sqrt(max(0.0, variance))))
        return Estimate(value, value / factor, value * factor)

    def _check_range(self, world: int, nodes: int) -> None:
        alike = [measured for measured, on in self.worlds if (on > 1) == (nodes > 1) and (measured > 1 or world == 1)]
        where = "across nodes" if nodes > 1 else "on one node"
        if not alike:
            raise ValueError(f"no synchronisation {where} was measured: measure 2 workers or more {where}")
        if world > EXTRAPOLATION_FACTOR * max(alike):
            raise ValueError(
                f"{world} workers are beyond twice the {max(alike)} measured {where}: measure larger world sizes"
            )

    def _compute_slopes(self, where: tuple[int, int, int, int]) -> list[float]:
        """Derivatives of the log time with respect to each of `logs`, by finite differences."""
        here = math.log(self.compute_seconds(*where))
        return [
            (math.log(replace(self, logs=_shift_log(self.logs, at, _DIFFERENCE_STEP)).compute_seconds(*where)) - here)
            / _DIFFERENCE_STEP
            for at in range(len(self.logs))
        ]


def fit_update_model(measured: Sequence[TimedUpdate], work: FixedCosts = FixedCosts()) -> UpdateModel:
    """Fit the model by least squares in log time, with every constant above 0 and gamma from 1 to 10.

    Constants that the measurements do not determine stay near a guess (a loose prior), and their uncertainty widens
    every band. With no more measurements than constants, errors of 5 % are assumed, or the measured ones if larger.

    Raises:
        ValueError: fewer than two micro-batch sizes.
    """
    if len({each.per_device for each in measured}) < 2:
        raise ValueError(
            "only one micro-batch size was timed, measure two or more to separate fixed from per-sample time"
        )
    guess = _guess_logs(measured, work)
    model, known = UpdateModel(work, guess), math.sqrt(sum(each.spread**2 for each in measured) / len(measured))
    spread, freedom = max(_FIRST_SPREAD, known), 1.0
    for _ in range(_PASSES):
        model, off, freedom = _fit_at_spread(model, guess, measured, spread)
        if freedom >= 1:
            spread = max(_MIN_SPREAD, known, math.sqrt(off / freedom))
    worlds = tuple(sorted({(each.world, each.nodes) for each in measured}))
    return replace(model, t_quantile=student_t_quantile(max(1.0, freedom)), worlds=worlds)


def compute_best_batch(noise: float, constant_s: float, per_sample_s: float) -> float:
    """The batch with the highest goodput if an update takes constant + per_sample x batch: sqrt(phi c0 / c1)."""
    return math.sqrt(noise * constant_s / per_sample_s)


@dataclass(frozen=True)
class BatchChoice:
    """A batch with its samples/s, its efficiency relative to the base batch, and their product, the goodput."""

    per_device: int
    accumulation: int
    global_batch: int
    samples_per_s: float
    efficiency: float
    goodput: float


def best_choice(
    model: UpdateModel,
    world: int,
    noise: float,
    base_batch: int,
    *,
    cap: int,
    min_global: int = 1,
    max_global: int,
    nodes: int = 1,
) -> BatchChoice:
    """The (per_device, accumulation) with the highest goodput, per_device up to `cap`; ties go to the smaller batch.

    The global batch is world x per_device x accumulation, clamped to the bounds as under batch.policy=bounded.

    Raises:
        ValueError: the bounds leave no batch.
    """
    if not 1 <= min_global <= max_global or cap < 1:
        raise ValueError(f"no batch lies between {min_global} and {max_global} with micro-batches up to {cap}")
    found = [
        choice
        for size in range(1, cap + 1)
        for choice in _iter_candidates(model, size, (world, nodes), (noise, base_batch), (min_global, max_global))
        if choice.per_device <= cap
    ]
    if not found:
        raise ValueError(f"no batch lies between {min_global} and {max_global} with micro-batches up to {cap}")
    return max(found, key=lambda choice: (choice.goodput, -choice.global_batch, -choice.accumulation))


def _iter_candidates(
    model: UpdateModel, size: int, workers: tuple[int, int], worth: tuple[float, int], bounds: tuple[int, int]
) -> Iterator[BatchChoice]:
    """Yield the best accumulation for one micro-batch size, and both ends of its range, where the batch is clamped.

    Time is convex in the accumulation a, so time x (phi + B) / B is too, and bisection finds the minimum.
    """
    world, nodes = workers
    low, high = max(1, bounds[0] // (world * size)), max(1, -(-bounds[1] // (world * size)))

    def at(accumulation: int) -> BatchChoice:
        batch = min(max(world * size * accumulation, bounds[0]), bounds[1])
        per_device = -(-batch // (world * accumulation))
        speed = batch / model.compute_seconds(per_device, accumulation, world, nodes)
        value = compute_efficiency(batch, worth[1], worth[0])
        return BatchChoice(per_device, accumulation, batch, speed, value, speed * value)

    yield at(low)
    yield at(high)
    low, high = low + 1, high - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if at(middle).goodput < at(middle + 1).goodput else (low, middle)
    if low == high:
        yield at(low)


def _combine_overlapped(compute: float, sync: float, gamma: float) -> float:
    """(C^g + S^g)^(1/g) without overflow."""
    large, small = max(compute, sync), min(compute, sync)
    return large * math.pow(1 + math.pow(small / large, gamma), 1 / gamma)


def _guess_logs(measured: Sequence[TimedUpdate], work: FixedCosts) -> tuple[float, ...]:
    """Initial logs: a third of a micro-batch's time is constant, synchronisation a tenth plus a fortieth per worker.

    Synchronisation across nodes is taken to cost twice as much.
    """
    fixed = work.optimizer_s + work.host_s
    micros = sorted(max(each.seconds - fixed, each.seconds / 10) / each.accumulation for each in measured)
    sizes = sorted(each.per_device for each in measured)
    micro_s, size = micros[len(micros) // 2], sizes[len(sizes) // 2]
    parts = (micro_s / 3, micro_s / 1.5 / size, micro_s / 10, micro_s / 40, micro_s / 5, micro_s / 20, 2.0)
    return tuple(map(math.log, parts))


def _fit_at_spread(
    model: UpdateModel, guess: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> tuple[UpdateModel, float, float]:
    """Fit at this relative spread of the times; return the model, sum of squared errors and degrees of freedom.

    Levenberg-Marquardt on the errors in log time over `spread` plus the distance from the guess.
    """
    loose = [_PRIOR_WIDTH] * (len(guess) - 1) + [_GAMMA_PRIOR_WIDTH]
    damping = 1e-3
    cost = _compute_cost(model, guess, loose, measured, spread)
    for _ in range(_MAX_STEPS):
        normal, pull = _make_normal_equations(model, guess, loose, measured, spread)
        damped = [[x * (1 + damping * (i == j)) for j, x in enumerate(row)] for i, row in enumerate(normal)]
        step = _solve(damped, pull)
        there = replace(model, logs=_apply_bounded_step(model.logs, step))
        new_cost = _compute_cost(there, guess, loose, measured, spread)
        if new_cost < cost:
            done = cost - new_cost < 1e-9 * (1 + cost)
            model, cost, damping = there, new_cost, damping / 4
            if done:
                break
        elif damping > 1e9:
            break
        else:
            damping *= 8
    normal, _ = _make_normal_equations(model, guess, loose, measured, spread)
    covariance = _invert(normal)
    told = sum(1 - covariance[i][i] / loose[i] ** 2 for i in range(len(loose)))  # constants determined by the data
    off = sum(_compute_log_error(model, each) ** 2 for each in measured)
    return replace(model, covariance=covariance), off, len(measured) - told


def _compute_log_error(model: UpdateModel, each: TimedUpdate) -> float:
    return math.log(model.compute_seconds(each.per_device, each.accumulation, each.world, each.nodes) / each.seconds)


def _compute_cost(
    model: UpdateModel, guess: Sequence[float], loose: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> float:
    prior = sum(((u - g) / w) ** 2 for u, g, w in zip(model.logs, guess, loose, strict=True))
    return prior + sum((_compute_log_error(model, each) / spread) ** 2 for each in measured)


def _make_normal_equations(
    model: UpdateModel, guess: Sequence[float], loose: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> tuple[list[list[float]], list[float]]:
    """Matrix and right-hand side of the normal equations at the model's constants."""
    size = len(guess)
    normal = [[(i == j) / loose[i] ** 2 for j in range(size)] for i in range(size)]
    pull = [(guess[i] - model.logs[i]) / loose[i] ** 2 for i in range(size)]
    for each in measured:
        slopes = model._compute_slopes((each.per_device, each.accumulation, each.world, each.nodes))
        off = _compute_log_error(model, each)
        for i, slope in enumerate(slopes):
            pull[i] -= slope * off / spread**2
            for j, other in enumerate(slopes):
                normal[i][j] += slope * other / spread**2
    return normal, pull


def _shift_log(logs: Sequence[float], at: int, by: float) -> tuple[float, ...]:
    return (*logs[:at], logs[at] + by, *logs[at + 1 :])


def _apply_bounded_step(logs: Sequence[float], step: Sequence[float]) -> tuple[float, ...]:
    """Apply a step of at most a factor of e per constant; keep gamma from 1 to 10."""
    *constants, gamma = (u + max(-1.0, min(1.0, move)) for u, move in zip(logs, step, strict=True))
    return (*constants, max(0.0, min(math.log(_MAX_GAMMA), gamma)))


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    return [sum(x * y for x, y in zip(row, right, strict=True)) for row in _invert(matrix)]


def _invert(matrix: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Invert a positive definite matrix by Gauss-Jordan elimination without pivoting."""
    size = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for at, pivot in enumerate(rows):
        head = pivot[at]
        pivot[:] = [x / head for x in pivot]
        for row in rows:
            if row is not pivot and row[at]:
                factor = row[at]
                row[:] = [x - factor * y for x, y in zip(row, pivot, strict=True)]
    return tuple(tuple(row[size:]) for row in rows)
