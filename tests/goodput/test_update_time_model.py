"""A model of update times at other batches and world sizes, with known limits, and its best batch."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.goodput.batch_choice import BatchBounds, best_choice, compute_best_batch
from launcher.goodput.update_time_model import (
    FixedCosts,
    TimedUpdate,
    UpdateModel,
    fit_update_model,
)


def make_model(
    alpha: float = 0.01, beta: float = 0.001, sync: float = 0.004, each: float = 0.001, gamma: float = 2.0
) -> UpdateModel:
    constants = (alpha, beta, sync, each, 5 * sync, 5 * each, gamma)
    return UpdateModel(FixedCosts(), tuple(map(math.log, constants)))


def measure_updates(model: UpdateModel, draw: random.Random, noise: float = 0.02) -> list[TimedUpdate]:
    cells = [(m, a, world) for m in (8, 16, 32) for a in (1, 2) for world in (1, 2, 4)]
    return [
        TimedUpdate(m, a, world, model.compute_seconds(m, a, world) * math.exp(draw.gauss(0, noise)))
        for m, a, world in cells
    ]


def test_update_time_by_hand() -> None:
    one, C, S = make_model(), 0.01 + 0.016, 0.004 + 2 * 0.001  # noqa: N806
    assert one.compute_seconds(16, 1, 1) == pytest.approx(C)
    assert one.compute_seconds(16, 3, 4) == pytest.approx(2 * C + math.hypot(C, S))
    assert one.compute_seconds(16, 1, 4, nodes=2) == pytest.approx(math.hypot(C, 5 * S))
    sharded = replace(one, work=FixedCosts(optimizer_s=0.1, host_s=0.01, every_micro=True))
    assert sharded.compute_seconds(16, 3, 4) == pytest.approx(3 * math.hypot(C, S) + 0.11)
    starved = replace(one, work=FixedCosts(host_s=0.01, data_s=0.05))
    assert starved.compute_seconds(16, 2, 1) == pytest.approx(16 * 2 * 0.05 + 0.01)


def test_gamma_interpolates_communication_overlap() -> None:
    C, S = 0.026, 0.006  # noqa: N806
    assert make_model(gamma=1.0).compute_seconds(16, 1, 4) == pytest.approx(C + S)
    assert make_model(gamma=1000.0).compute_seconds(16, 1, 4) == pytest.approx(C)


def test_model_predicts_unseen_world_sizes() -> None:
    covered, trials = 0, 30
    for seed in range(trials):
        draw = random.Random(seed)
        truth = make_model(
            draw.uniform(2e-3, 2e-2), draw.uniform(2e-4, 2e-3), draw.uniform(5e-4, 2e-2), draw.uniform(0, 4e-3) + 1e-9,
            draw.uniform(1, 6),
        )  # fmt: skip
        predicted = fit_update_model(measure_updates(truth, draw)).predict(16, 1, 8)
        covered += predicted.low <= truth.compute_seconds(16, 1, 8) <= predicted.high
    assert covered >= 0.9 * trials


def test_fit_is_deterministic_and_reproduces_measurements() -> None:
    measured = measure_updates(make_model(), random.Random(0), noise=0.0)
    model = fit_update_model(measured)
    assert model == fit_update_model(measured)
    for each in measured:
        assert model.predict(each.per_device, each.accumulation, each.world).value == pytest.approx(
            each.seconds, rel=0.01
        )


def test_predictions_stop_at_twice_measured_workers() -> None:
    model = fit_update_model(measure_updates(make_model(), random.Random(0)))
    assert model.predict(16, 1, 8).low > 0
    with pytest.raises(ValueError, match="9 workers are beyond twice the 4 measured on one node"):
        model.predict(16, 1, 9)
    with pytest.raises(ValueError, match="no synchronisation across nodes was measured"):
        model.predict(16, 1, 4, nodes=2)


def test_single_worker_data_cannot_predict_two() -> None:
    alone = [each for each in measure_updates(make_model(), random.Random(0)) if each.world == 1]
    model = fit_update_model(alone)
    assert model.predict(24, 1, 1).value == pytest.approx(0.034, rel=0.05)
    with pytest.raises(ValueError, match="no synchronisation on one node was measured"):
        model.predict(24, 1, 2)


def test_prediction_band_widens_with_fewer_measurements() -> None:
    """Measurements at 1 and 2 workers do not determine the cost of each further worker."""
    measured = measure_updates(make_model(), random.Random(0))
    few = fit_update_model([each for each in measured if each.world < 4]).predict(8, 1, 4)
    many = fit_update_model(measured).predict(8, 1, 4)
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_single_micro_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="measure two or more"):
        fit_update_model([TimedUpdate(8, 1, 1, 0.1), TimedUpdate(8, 2, 1, 0.2)])


@given(root=st.floats(2, 100), c1=st.floats(1e-5, 1e-2), noise=st.floats(10, 1e5))
def test_best_batch_matches_closed_form(root: float, c1: float, noise: float) -> None:
    c0 = root**2 * c1 / noise
    assert compute_best_batch(noise, c0, c1) == pytest.approx(root)
    chosen = best_choice(make_model(alpha=c0, beta=c1), 1, noise, 32, BatchBounds(1, 200), cap=200)
    assert abs(chosen.global_batch - root) <= 1
    assert chosen.accumulation == 1


@given(
    world=st.integers(1, 4),
    noise=st.floats(1, 1e4),
    cap=st.integers(1, 12),
    low=st.integers(1, 60),
    more=st.integers(0, 200),
)
def test_best_choice_beats_every_batch_in_bounds(world: int, noise: float, cap: int, low: int, more: int) -> None:
    model, high = make_model(), low + more
    chosen = best_choice(model, world, noise, 32, BatchBounds(low, high), cap=cap)
    assert low <= chosen.global_batch <= high
    assert chosen.per_device <= cap
    assert chosen.per_device * chosen.accumulation * world >= chosen.global_batch
    for size in range(1, cap + 1):
        for steps in range(1, high // (world * size) + 1):
            batch = world * size * steps
            if low <= batch <= high:
                goodput = batch / model.compute_seconds(size, steps, world) * (noise + 32) / (noise + batch)
                assert goodput <= chosen.goodput * (1 + 1e-9)


def test_best_choice_grows_with_noise() -> None:
    batches = [
        best_choice(make_model(), 4, noise, 32, BatchBounds(1, 2048), cap=64).global_batch
        for noise in (1, 10, 100, 1000, math.inf)
    ]
    assert batches == sorted(batches)
    assert batches[0] < 64
    assert batches[-1] == 2048


def test_equal_bounds_fix_the_batch() -> None:
    chosen = best_choice(make_model(), 3, 100.0, 32, BatchBounds(256, 256), cap=48)
    assert (chosen.global_batch, chosen.per_device, chosen.accumulation) == (256, 43, 2)
    with pytest.raises(ValueError, match="no batch lies between 9 and 8"):
        best_choice(make_model(), 1, 1.0, 32, BatchBounds(9, 8), cap=4)
