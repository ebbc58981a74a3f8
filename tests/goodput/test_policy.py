"""The goodput policy: the arithmetic of math.md on known update times."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.compose import compose
from launcher.config.schema import BatchConfig, PlanConfig
from launcher.errors import UsageError
from launcher.goodput.batch_choice import BatchBounds, compute_best_batch
from launcher.goodput.noise_scale import NoiseScale, compute_efficiency
from launcher.goodput.policy import (
    BatchChooser,
    GoodputPolicy,
    NoiseKnowledge,
    TimingProfile,
    compute_batch_bounds,
    explain_choice,
)
from launcher.plan.batch import PlanError
from launcher.plan.training_plan import make_training_plan
from tests.helpers.update_times import ALPHA_S, BETA_S, RUN, SIZES, compute_update_s, make_chooser, tune_result

# --- measurements -------------------------------------------------------------------------------------------------


def test_fit_reproduces_measured_times() -> None:
    model = make_chooser().profile.model
    for size, world in ((8, 1), (64, 2), (128, 4)):
        assert model.predict(size, 1, world).value == pytest.approx(compute_update_s(size, world), rel=0.02)
    assert model.predict(32, 4, 2).value == pytest.approx(compute_update_s(32, 2, 4), rel=0.05)


def test_two_workers_separate_compute_from_communication() -> None:
    """Each measurement has a counterpart without waiting."""
    model = make_chooser(2).profile.model
    assert model.predict(64, 1, 1).value == pytest.approx(compute_update_s(64, 1), rel=0.03)
    assert model.predict(64, 3, 2).value == pytest.approx(compute_update_s(64, 2, 3), rel=0.06)


def test_choice_is_limited_to_twice_measured_workers() -> None:
    assert make_chooser(1, 2).profile.covers(4)
    assert not make_chooser(1, 2).profile.covers(5)
    with pytest.raises(PlanError, match="5 workers are beyond twice the 2 measured"):
        make_chooser(1, 2).choose(5, 1, NoiseKnowledge(100.0))


def test_profile_round_trips_through_json() -> None:
    profile = make_chooser().profile
    assert TimingProfile.from_facts(json.loads(json.dumps(profile.to_facts()))) == profile
    for broken in ({}, {**profile.to_facts(), "tables": [{"world": 1}]}, {**profile.to_facts(), "cap": 0}):
        with pytest.raises(ValueError, match=r"a field is missing|a value is missing or out of range"):
            TimingProfile.from_facts(broken)


def test_profiles_merge_by_world_size() -> None:
    one, two = TimingProfile.from_documents([tune_result(1)]), TimingProfile.from_documents([tune_result(2)])
    both = one.merged_with(two)
    assert both.worlds == ((1, 1), (2, 1))
    assert both.merged_with(two) == both
    assert [table.world for table in both.tables] == [1, 2]


def test_regressed_sizes_are_excluded() -> None:
    document = tune_result(1)
    document["points"][-1]["label"] = "regressed"
    profile = TimingProfile.from_documents([document])
    assert profile.cap == 64
    assert max(each.per_device for each in profile.tables[0].updates) == 64


def test_single_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^batch\.policy=goodput: only one micro-batch size was timed"):
        BatchChooser(TimingProfile.from_documents([tune_result(1, (8,))]), RUN, SIZES.train).choose(
            1, 1, NoiseKnowledge(10.0)
        )


# --- the choice ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(10, 700))
def test_single_worker_choice_matches_closed_form(noise: float) -> None:
    best = compute_best_batch(noise, ALPHA_S, BETA_S)
    assert best == math.sqrt(noise * ALPHA_S / BETA_S)
    assert make_chooser(1).choose(1, 1, NoiseKnowledge(noise)).global_batch == pytest.approx(best, rel=0.06, abs=1)


@settings(max_examples=20)
@given(st.floats(1, 1e4), st.integers(1, 8))
def test_choice_beats_every_grid_batch(noise: float, world: int) -> None:
    policy = make_chooser()
    choice, model = policy.choose(world, 1, NoiseKnowledge(noise)), policy.profile.model
    for size in (1, 2, 7, 16, 33, 64, 100, 128):
        for steps in (1, 2, 5):
            batch = world * size * steps
            if batch <= compute_batch_bounds(RUN, SIZES.train, world).high:
                goodput = batch / model.compute_seconds(size, steps, world) * compute_efficiency(batch, 64, noise)
                assert goodput <= choice.goodput * (1 + 1e-9)


def test_more_noise_gives_larger_batch() -> None:
    batches = [make_chooser().choose(2, 1, NoiseKnowledge(noise)).global_batch for noise in (1.0, 100.0, 10_000.0)]
    assert batches == sorted(set(batches))


def test_unknown_noise_takes_fastest_base_batch() -> None:
    choice = make_chooser().choose(2, 1, NoiseKnowledge())
    assert (choice.global_batch, choice.per_device, choice.accumulation) == (64, 32, 1)
    assert "unknown" in explain_choice(choice, NoiseKnowledge())
    assert make_chooser().choose(8, 1, NoiseKnowledge()).global_batch == 64


def test_noise_lower_bound_never_shrinks_base_batch() -> None:
    """A possibly small noise scale is not a reason for a smaller batch; a large lower bound is one for a larger."""
    little, much = NoiseKnowledge(2.0, lower_bound=True), NoiseKnowledge(1000.0, lower_bound=True)
    assert make_chooser().choose(2, 1, NoiseKnowledge(2.0)).global_batch < 64
    assert make_chooser().choose(2, 1, little).global_batch == 64
    assert make_chooser().choose(2, 1, much) == make_chooser().choose(2, 1, NoiseKnowledge(1000.0))
    assert explain_choice(make_chooser().choose(2, 1, much), much).startswith(
        "goodput: at a noise scale of at least 1e+03 samples, "
    )


def test_measured_noise_takes_precedence_over_typed() -> None:
    assert NoiseKnowledge.from_estimates(None, None, None) == NoiseKnowledge()
    assert NoiseKnowledge.from_estimates(30.0, 500.0, 200.0) == NoiseKnowledge(30.0)
    assert NoiseKnowledge.from_estimates(None, 100.0, 200.0) == NoiseKnowledge(200.0, source=" (plan.noise)")
    assert (
        NoiseKnowledge.from_estimates(None, 300.0, 200.0)
        == NoiseKnowledge.from_estimates(None, 300.0, None)
        == NoiseKnowledge(300.0, lower_bound=True)
    )


def test_batch_is_chosen_again_as_noise_changes() -> None:
    policy = make_chooser()
    goodput_policy = GoodputPolicy(policy, 2, 1, policy.combine_noise(None, None))
    goodput_policy.on_noise(NoiseScale())
    assert not goodput_policy.has_change
    for noise, described in ((NoiseScale(lower_bound=400.0), "at least 400"), (NoiseScale(applied=900.0), "900")):
        goodput_policy.on_noise(noise)
        assert goodput_policy.successor is not None
        goodput_policy = goodput_policy.successor
        assert f"at a noise scale of {described} samples" in goodput_policy.why
        assert make_training_plan(goodput_policy.config, SIZES, 2).batch_plan.global_batch > 64
        assert not goodput_policy.has_change


def test_initial_choice_uses_typed_noise() -> None:
    policy = make_chooser(config=replace(RUN, plan=PlanConfig(noise=900.0)))
    initial = GoodputPolicy(policy, 2, 1, policy.combine_noise(None, None))
    assert initial.why.startswith("goodput: at a noise scale of 900 samples (plan.noise), ")
    assert policy.choose(2, 1, policy.combine_noise(None, None)) == policy.choose(2, 1, NoiseKnowledge(900.0))


def test_choice_respects_cap_and_bounds() -> None:
    choice = make_chooser().choose(2, 1, NoiseKnowledge(1e6))
    assert choice.per_device <= 128
    assert choice.accumulation > 1
    narrow = replace(RUN, batch=replace(RUN.batch, min_global=100, max_global=128))
    assert 100 <= make_chooser(config=narrow).choose(3, 1, NoiseKnowledge(1e6)).global_batch <= 128
    assert compute_batch_bounds(RUN, SIZES.train, 2) == BatchBounds(2, 32 * 64)
    with pytest.raises(PlanError, match="no global batch for 200 workers lies between 200 and 128"):
        compute_batch_bounds(narrow, SIZES.train, 200)


@settings(max_examples=20)
@given(st.integers(1, 8), st.one_of(st.none(), st.floats(1, 1e5)))
def test_training_plan_equals_choice(world: int, noise: float | None) -> None:
    policy = make_chooser()
    choice = policy.choose(world, 1, NoiseKnowledge(noise))
    training_plan = make_training_plan(GoodputPolicy(policy, world, 1, NoiseKnowledge(noise)).config, SIZES, world)
    assert training_plan.policy == "goodput"
    assert training_plan.batch_plan.global_batch == choice.global_batch
    assert training_plan.batch_plan.per_device == choice.per_device
    assert training_plan.batch_plan.accumulation == choice.accumulation


@pytest.mark.parametrize(
    ("batch", "fix"),
    [
        (BatchConfig(policy="goodput", global_batch=64), "type batch=hold, or remove it"),
        (BatchConfig(policy="goodput", ramp=(("0dur", 0.5),)), "type batch=bounded, or remove it"),
    ],
    ids=["global", "ramp"],
)
def test_conflicting_batch_keys_are_refused(batch: BatchConfig, fix: str) -> None:
    with pytest.raises(UsageError, match=f"does not work with batch.policy=goodput: {fix}"):
        make_training_plan(replace(RUN, batch=replace(batch, per_device=8)), SIZES, 1)


@pytest.mark.parametrize(
    ("override", "fix"), [("batch.per_device=16", "tune.max=16"), ("batch.accumulation=2", "remove it")]
)
def test_typed_batch_is_refused_but_recipe_default_ignored(override: str, fix: str) -> None:
    assert compose(["recipe=mlp", "batch=goodput"]).batch == BatchConfig(policy="goodput", per_device="auto")
    with pytest.raises(UsageError, match=f"^{override} does not work with batch=goodput, which chooses it: .*{fix}"):
        compose(["recipe=mlp", "batch=goodput", override])
