"""Adam's second moment is rescaled with the batch: by a known noise scale, in step with the lr, only once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from launcher.config.schema import BatchConfig, LrConfig, RunConfig
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.adam_moments import SecondMomentScale
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Position, Update
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.train.state import TrainState

PHI = 100.0


def test_the_factor_is_the_ratio_of_the_expected_squares() -> None:
    """1 + 100/400 over 1 + 100/100."""
    before = SecondMomentScale(100, 100)
    after = before.start_transition(400, PHI).advance(1.0)
    assert before.compute_factor(after) == pytest.approx(1.25 / 2)


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 5000), st.integers(1, 5000), st.floats(0.1, 1e6))
def test_many_steps_come_to_the_same_as_one(steps: list[float], old: int, new: int, noise: float) -> None:
    here, product = SecondMomentScale(old, old), 1.0
    for done in [*sorted(steps), 1.0]:
        there = here.start_transition(new, noise).advance(done)
        here, product = there, product * here.compute_factor(there)
    assert product == pytest.approx((1 + noise / new) / (1 + noise / old), rel=1e-9)
    assert here.batch == pytest.approx(new)


def test_without_a_noise_scale_it_stays_also_where_one_becomes_known_on_the_way() -> None:
    left = SecondMomentScale(100, 100).start_transition(400, None).advance(0.2)
    assert (left.batch, SecondMomentScale(100, 100).compute_factor(left)) == (400, 1.0)
    later = left.start_transition(400, PHI).advance(0.6)
    assert left.compute_factor(later) == 1.0


def test_it_never_goes_back() -> None:
    way = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert way.advance(0.1) is way


def test_a_change_on_the_way_begins_where_it_stands() -> None:
    half = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert (half.batch, half.start_transition(50, PHI).batch) == (250, 250)


def test_it_goes_into_a_checkpoint_and_comes_back() -> None:
    half = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert SecondMomentScale.from_facts(json.loads(json.dumps(half.to_facts()))) == half


# --- training state -----------------------------------------------------------------------------------------------


def studied(world: int, optimizer: str = "AdamW", **keys: Any) -> TrainingPlan:
    config = replace(
        RunConfig(),
        optimizer={"_target_": f"torch.optim.{optimizer}"},
        batch=BatchConfig(policy="scale", per_device=8),
        lr=LrConfig(base=0.1, base_batch=8, **keys),
    )
    return make_training_plan(
        replace(config, train=replace(config.train, duration="1000000sp")), DatasetSizes(1000, 100), world
    )


def update_at(start: int, batch: int) -> Update:
    plan = BatchPlan(world=1, shares=(batch,), per_device=batch, accumulation=1)
    return Update(start // batch, start, plan, plan, size=1000)


def resized(world: int, noise: float | None, optimizer: str = "AdamW") -> TrainState:
    """The state after 8,000 samples at a batch of 8, on `world` workers."""
    before = replace(TrainState.initial(studied(1, optimizer)), noise=NoiseScale(applied=noise))
    facts = json.loads(json.dumps(before.state_dict()))
    return TrainState.from_state_dict(studied(world, optimizer), Position(8000, 1000), facts)


def test_a_resize_that_acts_at_once_rescales_at_the_first_update() -> None:
    state = resized(2, PHI)
    assert state.second_moment_factor(16) == pytest.approx((1 + PHI / 16) / (1 + PHI / 8))
    after, factor = state.advance_second_moment(update_at(8000, 16))
    assert factor == state.second_moment_factor(16)
    assert after.advance_second_moment(update_at(8016, 16)) == (after, 1.0)


def test_a_resize_that_ramps_rescales_in_step_with_the_rate() -> None:
    """Eight times the batch: the scale moves from 1 to sqrt(8) in 10,000 samples, 1 % of the run."""
    state, product, factors = resized(8, PHI), 1.0, []
    for start in range(8000, 19_000, 64):
        state, factor = state.advance_second_moment(update_at(start, 64))
        factors.append(factor)
        product *= factor
    assert product == pytest.approx((1 + PHI / 64) / (1 + PHI / 8))
    assert factors[0] == 1.0
    assert 0.5 < min(factors) < max(factors[1:100]) < 1.0
    assert factors[-1] == 1.0


@pytest.mark.parametrize(("noise", "optimizer", "batch"), [(None, "AdamW", 64), (PHI, "SGD", 64), (PHI, "AdamW", 8)])
def test_where_it_is_kept_the_event_says_so(noise: float | None, optimizer: str, batch: int) -> None:
    """Unknown noise scale, no second moment, or the same batch."""
    state = resized(batch // 8, noise, optimizer)
    assert state.second_moment_factor(batch) == "kept"
    assert state.advance_second_moment(update_at(8000, batch))[1] == 1.0


# --- in the optimizer ---------------------------------------------------------------------------------------------


def test_second_moments_and_amsgrads_maxima_are_rescaled_and_nothing_else() -> None:
    torch.manual_seed(0)
    config = replace(RunConfig(), optimizer={"_target_": "torch.optim.AdamW", "amsgrad": True})
    replica = DdpReplica(
        ReplicaArgs(
            nn.Linear(4, 3), config, 1, Precision.from_name("fp32", torch.device("cpu")), StageClock(HostTimer())
        )
    )
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        replica.backward(replica.model(torch.randn(5, 4)).square().sum(), 5)
    replica.step(0.01, None, 1.0, None)
    before = {name: tensor.clone() for name, tensor in replica.full_state().optimizer.items()}
    replica.rescale_moments(0.25)
    for name, tensor in replica.full_state().optimizer.items():
        share = 0.25 if name.endswith("exp_avg_sq") else 1.0
        assert torch.equal(tensor, before[name] * share), name
    assert {name.rpartition("/")[2] for name in before} == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
