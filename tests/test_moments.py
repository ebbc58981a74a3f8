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

from launcher.batch import BatchPlan
from launcher.moments import Moments
from launcher.noise import NoiseScale
from launcher.optim import Precision
from launcher.settings import BatchSettings, LrSettings, Run
from launcher.standing import Standing
from launcher.strategies import Given
from launcher.strategies.ddp import DdpReplica
from launcher.study import Sizes, Study, study
from launcher.telemetry import HostTimer, StageClock
from launcher.timeline import Position, Update

PHI = 100.0


def test_the_factor_is_the_ratio_of_the_expected_squares() -> None:
    """1 + 100/400 over 1 + 100/100."""
    before = Moments(100, 100)
    after = before.toward(400, PHI).reached(1.0)
    assert before.factor(after) == pytest.approx(1.25 / 2)


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 5000), st.integers(1, 5000), st.floats(0.1, 1e6))
def test_many_steps_come_to_the_same_as_one(steps: list[float], old: int, new: int, noise: float) -> None:
    here, product = Moments(old, old), 1.0
    for done in [*sorted(steps), 1.0]:
        there = here.toward(new, noise).reached(done)
        here, product = there, product * here.factor(there)
    assert product == pytest.approx((1 + noise / new) / (1 + noise / old), rel=1e-9)
    assert here.batch == pytest.approx(new)


def test_without_a_noise_scale_it_stays_also_where_one_becomes_known_on_the_way() -> None:
    left = Moments(100, 100).toward(400, None).reached(0.2)
    assert (left.batch, Moments(100, 100).factor(left)) == (400, 1.0)
    later = left.toward(400, PHI).reached(0.6)
    assert left.factor(later) == 1.0


def test_it_never_goes_back() -> None:
    way = Moments(100, 100).toward(400, PHI).reached(0.5)
    assert way.reached(0.1) is way


def test_a_change_on_the_way_begins_where_it_stands() -> None:
    half = Moments(100, 100).toward(400, PHI).reached(0.5)
    assert (half.batch, half.toward(50, PHI).batch) == (250, 250)


def test_it_goes_into_a_checkpoint_and_comes_back() -> None:
    half = Moments(100, 100).toward(400, PHI).reached(0.5)
    assert Moments.from_facts(json.loads(json.dumps(half.to_facts()))) == half


# --- training state -----------------------------------------------------------------------------------------------


def studied(world: int, optimizer: str = "AdamW", **keys: Any) -> Study:
    run = replace(
        Run(),
        optimizer={"_target_": f"torch.optim.{optimizer}"},
        batch=BatchSettings(policy="scale", per_device=8),
        lr=LrSettings(base=0.1, base_batch=8, **keys),
    )
    return study(replace(run, train=replace(run.train, duration="1000000sp")), Sizes(1000, 100), world)


def update_at(start: int, batch: int) -> Update:
    plan = BatchPlan(world=1, shares=(batch,), per_device=batch, accumulation=1)
    return Update(start // batch, start, plan, plan, size=1000)


def resized(world: int, noise: float | None, optimizer: str = "AdamW") -> Standing:
    """The state after 8,000 samples at a batch of 8, on `world` workers."""
    before = replace(Standing.fresh(studied(1, optimizer)), noise=NoiseScale(acted=noise))
    facts = json.loads(json.dumps(before.facts()))
    return Standing.restored(studied(world, optimizer), Position(8000, 1000), facts)


def test_a_resize_that_acts_at_once_rescales_at_the_first_update() -> None:
    standing = resized(2, PHI)
    assert standing.moments_to(16) == pytest.approx((1 + PHI / 16) / (1 + PHI / 8))
    after, factor = standing.followed(update_at(8000, 16))
    assert factor == standing.moments_to(16)
    assert after.followed(update_at(8016, 16)) == (after, 1.0)


def test_a_resize_that_ramps_rescales_in_step_with_the_rate() -> None:
    """Eight times the batch: the scale moves from 1 to sqrt(8) in 10,000 samples, 1 % of the run."""
    standing, product, factors = resized(8, PHI), 1.0, []
    for start in range(8000, 19_000, 64):
        standing, factor = standing.followed(update_at(start, 64))
        factors.append(factor)
        product *= factor
    assert product == pytest.approx((1 + PHI / 64) / (1 + PHI / 8))
    assert factors[0] == 1.0
    assert 0.5 < min(factors) < max(factors[1:100]) < 1.0
    assert factors[-1] == 1.0


@pytest.mark.parametrize(("noise", "optimizer", "batch"), [(None, "AdamW", 64), (PHI, "SGD", 64), (PHI, "AdamW", 8)])
def test_where_it_is_kept_the_event_says_so(noise: float | None, optimizer: str, batch: int) -> None:
    """Unknown noise scale, no second moment, or the same batch."""
    standing = resized(batch // 8, noise, optimizer)
    assert standing.moments_to(batch) == "kept"
    assert standing.followed(update_at(8000, batch))[1] == 1.0


# --- in the optimizer ---------------------------------------------------------------------------------------------


def test_second_moments_and_amsgrads_maxima_are_rescaled_and_nothing_else() -> None:
    torch.manual_seed(0)
    run = replace(Run(), optimizer={"_target_": "torch.optim.AdamW", "amsgrad": True})
    replica = DdpReplica(
        Given(nn.Linear(4, 3), run, 1, Precision.of("fp32", torch.device("cpu")), StageClock(HostTimer()))
    )
    with replica.micro(last=True, pad=False, place=0):
        replica.backward(replica.model(torch.randn(5, 4)).square().sum(), 5)
    replica.step(0.01, None, 1.0, None)
    before = {name: tensor.clone() for name, tensor in replica.tensors().optimizer.items()}
    replica.rescale_moments(0.25)
    for name, tensor in replica.tensors().optimizer.items():
        share = 0.25 if name.endswith("exp_avg_sq") else 1.0
        assert torch.equal(tensor, before[name] * share), name
    assert {name.rpartition("/")[2] for name in before} == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
