"""Update time as a function of batch and world size.

The model is that of Pollux (OSDI 2021, arXiv 2008.12260), fitted to measured updates; predictions have error bands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from launcher.goodput.throughput_model import Estimate
from launcher.system.statistics import student_t_quantile

__all__ = ["EXTRAPOLATION_FACTOR", "FixedCosts", "TimedUpdate", "UpdateModel", "fit_update_model"]

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
        constant, per_worker = sync[2:] if nodes > 1 else sync[:2]
        sync_s = constant + per_worker * max(world - 2, 0)
        last_micro = compute if world == 1 else _combine_overlapped(compute, sync_s, gamma)
        other_micros = last_micro if self.work.every_micro else compute
        device = (accumulation - 1) * other_micros + last_micro + self.work.optimizer_s
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
        comparable = [
            measured for measured, on in self.worlds if (on > 1) == (nodes > 1) and (measured > 1 or world == 1)
        ]
        where = "across nodes" if nodes > 1 else "on one node"
        if not comparable:
            raise ValueError(f"no synchronisation {where} was measured: measure 2 workers or more {where}")
        if world > EXTRAPOLATION_FACTOR * max(comparable):
            raise ValueError(
                f"{world} workers are beyond twice the {max(comparable)} measured {where}: measure larger world sizes"
            )

    def _compute_slopes(self, layout: tuple[int, int, int, int]) -> list[float]:
        """Derivatives of the log time with respect to each of `logs`, by finite differences.

        `layout`: the arguments of `compute_seconds`.
        """
        log_time = math.log(self.compute_seconds(*layout))
        shifted = [replace(self, logs=_shift_log(self.logs, at, _DIFFERENCE_STEP)) for at in range(len(self.logs))]
        return [(math.log(model.compute_seconds(*layout)) - log_time) / _DIFFERENCE_STEP for model in shifted]


def fit_update_model(measured: Sequence[TimedUpdate], work: FixedCosts = FixedCosts()) -> UpdateModel:
    """Fit the model by least squares in log time, with every constant above 0 and gamma from 1 to 10.

    Constants that the measurements do not determine stay near a guess (a loose prior), and their uncertainty widens
    every band. With no more measurements than constants, errors of 5 % are assumed, or the measured ones if larger.

    Raises:
        ValueError: fewer than two micro-batch sizes.
    """
    if len({update.per_device for update in measured}) < 2:
        raise ValueError(
            "only one micro-batch size was timed, measure two or more to separate fixed from per-sample time"
        )
    guess = _guess_logs(measured, work)
    model = UpdateModel(work, guess)
    measured_spread = math.sqrt(sum(update.spread**2 for update in measured) / len(measured))
    spread, freedom = max(_FIRST_SPREAD, measured_spread), 1.0
    for _ in range(_PASSES):
        model, squared_error, freedom = _fit_at_spread(model, guess, measured, spread)
        if freedom >= 1:
            spread = max(_MIN_SPREAD, measured_spread, math.sqrt(squared_error / freedom))
    worlds = tuple(sorted({(update.world, update.nodes) for update in measured}))
    return replace(model, t_quantile=student_t_quantile(max(1.0, freedom)), worlds=worlds)


def _combine_overlapped(compute: float, sync: float, gamma: float) -> float:
    """(C^g + S^g)^(1/g) without overflow."""
    large, small = max(compute, sync), min(compute, sync)
    return large * math.pow(1 + math.pow(small / large, gamma), 1 / gamma)


def _guess_logs(measured: Sequence[TimedUpdate], work: FixedCosts) -> tuple[float, ...]:
    """Initial logs: a third of a micro-batch's time is constant, synchronisation a tenth plus a fortieth per worker.

    Synchronisation across nodes is taken to cost twice as much.
    """
    fixed = work.optimizer_s + work.host_s
    micros = sorted(max(update.seconds - fixed, update.seconds / 10) / update.accumulation for update in measured)
    sizes = sorted(update.per_device for update in measured)
    micro_s, size = micros[len(micros) // 2], sizes[len(sizes) // 2]
    parts = (micro_s / 3, micro_s / 1.5 / size, micro_s / 10, micro_s / 40, micro_s / 5, micro_s / 20, 2.0)
    return tuple(map(math.log, parts))


def _fit_at_spread(
    model: UpdateModel, guess: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> tuple[UpdateModel, float, float]:
    """Fit at this relative spread of the times; return the model, sum of squared errors and degrees of freedom.

    Levenberg-Marquardt on the errors in log time over `spread` plus the distance from the guess.
    """
    widths = [_PRIOR_WIDTH] * (len(guess) - 1) + [_GAMMA_PRIOR_WIDTH]
    damping = 1e-3
    cost = _compute_cost(model, guess, widths, measured, spread)
    for _ in range(_MAX_STEPS):
        normal, right_side = _make_normal_equations(model, guess, widths, measured, spread)
        damped = [[x * (1 + damping * (i == j)) for j, x in enumerate(row)] for i, row in enumerate(normal)]
        step = _solve(damped, right_side)
        candidate = replace(model, logs=_apply_bounded_step(model.logs, step))
        new_cost = _compute_cost(candidate, guess, widths, measured, spread)
        if new_cost < cost:
            converged = cost - new_cost < 1e-9 * (1 + cost)
            model, cost, damping = candidate, new_cost, damping / 4
            if converged:
                break
        elif damping > 1e9:
            break
        else:
            damping *= 8
    normal, _ = _make_normal_equations(model, guess, widths, measured, spread)
    covariance = _invert(normal)
    # the number of constants that the data, rather than the prior, determine
    determined = sum(1 - covariance[i][i] / widths[i] ** 2 for i in range(len(widths)))
    squared_error = sum(_compute_log_error(model, update) ** 2 for update in measured)
    return replace(model, covariance=covariance), squared_error, len(measured) - determined


def _compute_log_error(model: UpdateModel, update: TimedUpdate) -> float:
    return math.log(
        model.compute_seconds(update.per_device, update.accumulation, update.world, update.nodes) / update.seconds
    )


def _compute_cost(
    model: UpdateModel, guess: Sequence[float], widths: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> float:
    prior = sum(((u - g) / w) ** 2 for u, g, w in zip(model.logs, guess, widths, strict=True))
    return prior + sum((_compute_log_error(model, update) / spread) ** 2 for update in measured)


def _make_normal_equations(
    model: UpdateModel, guess: Sequence[float], widths: Sequence[float], measured: Sequence[TimedUpdate], spread: float
) -> tuple[list[list[float]], list[float]]:
    """Matrix and right-hand side of the normal equations at the model's constants."""
    size = len(guess)
    normal = [[(i == j) / widths[i] ** 2 for j in range(size)] for i in range(size)]
    right_side = [(guess[i] - model.logs[i]) / widths[i] ** 2 for i in range(size)]
    for update in measured:
        slopes = model._compute_slopes((update.per_device, update.accumulation, update.world, update.nodes))
        error = _compute_log_error(model, update)
        for i, slope in enumerate(slopes):
            right_side[i] -= slope * error / spread**2
            for j, other in enumerate(slopes):
                normal[i][j] += slope * other / spread**2
    return normal, right_side


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
