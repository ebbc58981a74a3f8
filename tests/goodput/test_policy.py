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
from tests.helpers.update_times import ALPHA_S, BETA_S, RUN, SIZES, chooser, tuned, update_s

# --- measurements -------------------------------------------------------------------------------------------------


def test_the_fit_gives_back_what_was_measured() -> None:
    model = chooser().profile.model
    for size, world in ((8, 1), (64, 2), (128, 4)):
        assert model.predict(size, 1, world).value == pytest.approx(update_s(size, world), rel=0.02)
    assert model.predict(32, 4, 2).value == pytest.approx(update_s(32, 2, 4), rel=0.05)


def test_two_workers_alone_tell_computing_from_communicating() -> None:
    """Each measurement has a counterpart without waiting."""
    model = chooser(2).profile.model
    assert model.predict(64, 1, 1).value == pytest.approx(update_s(64, 1), rel=0.03)
    assert model.predict(64, 3, 2).value == pytest.approx(update_s(64, 2, 3), rel=0.06)


def test_nothing_is_chosen_past_twice_the_most_workers_measured() -> None:
    assert chooser(1, 2).profile.covers(4)
    assert not chooser(1, 2).profile.covers(5)
    with pytest.raises(PlanError, match="5 workers are beyond twice the 2 measured"):
        chooser(1, 2).choose(5, 1, NoiseKnowledge(100.0))


def test_a_profile_is_the_same_after_json() -> None:
    profile = chooser().profile
    assert TimingProfile.from_facts(json.loads(json.dumps(profile.to_facts()))) == profile
    for broken in ({}, {**profile.to_facts(), "tables": [{"world": 1}]}, {**profile.to_facts(), "cap": 0}):
        with pytest.raises(ValueError, match=r"a field is missing|a value is missing or out of range"):
            TimingProfile.from_facts(broken)


def test_measurements_at_another_world_size_are_added_and_those_of_the_same_one_replaced() -> None:
    one, two = TimingProfile.from_documents([tuned(1)]), TimingProfile.from_documents([tuned(2)])
    both = one.merged_with(two)
    assert both.worlds == ((1, 1), (2, 1))
    assert both.merged_with(two) == both
    assert [table.world for table in both.tables] == [1, 2]


def test_what_regressed_is_neither_fitted_nor_chosen() -> None:
    document = tuned(1)
    document["points"][-1]["label"] = "regressed"
    profile = TimingProfile.from_documents([document])
    assert profile.cap == 64
    assert max(each.per_device for each in profile.tables[0].updates) == 64


def test_one_size_is_too_few() -> None:
    with pytest.raises(UsageError, match=r"^batch\.policy=goodput: only one micro-batch size was timed"):
        BatchChooser(TimingProfile.from_documents([tuned(1, (8,))]), RUN, SIZES.train).choose(
            1, 1, NoiseKnowledge(10.0)
        )


# --- the choice ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(10, 700))
def test_one_worker_takes_the_root_of_noise_times_constant_over_slope(noise: float) -> None:
    best = compute_best_batch(noise, ALPHA_S, BETA_S)
    assert best == math.sqrt(noise * ALPHA_S / BETA_S)
    assert chooser(1).choose(1, 1, NoiseKnowledge(noise)).global_batch == pytest.approx(best, rel=0.06, abs=1)


@settings(max_examples=20)
@given(st.floats(1, 1e4), st.integers(1, 8))
def test_no_batch_of_the_grid_is_worth_more(noise: float, world: int) -> None:
    policy = chooser()
    choice, model = policy.choose(world, 1, NoiseKnowledge(noise)), policy.profile.model
    for size in (1, 2, 7, 16, 33, 64, 100, 128):
        for steps in (1, 2, 5):
            batch = world * size * steps
            if batch <= compute_batch_bounds(RUN, SIZES.train, world).high:
                worth = batch / model.compute_seconds(size, steps, world) * compute_efficiency(batch, 64, noise)
                assert worth <= choice.goodput * (1 + 1e-9)


def test_more_noise_takes_a_larger_batch() -> None:
    batches = [chooser().choose(2, 1, NoiseKnowledge(noise)).global_batch for noise in (1.0, 100.0, 10_000.0)]
    assert batches == sorted(set(batches))


def test_an_unknown_noise_scale_takes_the_base_batch_in_its_fastest_form() -> None:
    choice = chooser().choose(2, 1, NoiseKnowledge())
    assert (choice.global_batch, choice.per_device, choice.accumulation) == (64, 32, 1)
    assert "unknown" in explain_choice(choice, NoiseKnowledge())
    assert chooser().choose(8, 1, NoiseKnowledge()).global_batch == 64


def test_noise_that_is_at_least_so_much_takes_no_less_than_the_base_batch() -> None:
    """A possibly small noise scale is not a reason for a smaller batch; a large lower bound is one for a larger."""
    little, much = NoiseKnowledge(2.0, lower_bound=True), NoiseKnowledge(1000.0, lower_bound=True)
    assert chooser().choose(2, 1, NoiseKnowledge(2.0)).global_batch < 64
    assert chooser().choose(2, 1, little).global_batch == 64
    assert chooser().choose(2, 1, much) == chooser().choose(2, 1, NoiseKnowledge(1000.0))
    assert explain_choice(chooser().choose(2, 1, much), much).startswith(
        "goodput: at a noise scale of at least 1e+03 samples, "
    )


def test_what_training_measures_comes_before_what_was_typed_and_a_bound_only_where_it_says_more() -> None:
    assert NoiseKnowledge.from_estimates(None, None, None) == NoiseKnowledge()
    assert NoiseKnowledge.from_estimates(30.0, 500.0, 200.0) == NoiseKnowledge(30.0)
    assert NoiseKnowledge.from_estimates(None, 100.0, 200.0) == NoiseKnowledge(200.0, source=" (plan.noise)")
    assert (
        NoiseKnowledge.from_estimates(None, 300.0, 200.0)
        == NoiseKnowledge.from_estimates(None, 300.0, None)
        == NoiseKnowledge(300.0, lower_bound=True)
    )


def test_a_batch_is_chosen_anew_as_more_becomes_known_of_the_noise() -> None:
    policy = chooser()
    watching = GoodputPolicy(policy, 2, 1, policy.combine_noise(None, None))
    watching.on_noise(NoiseScale())
    assert not watching.has_change
    for noise, said_of in ((NoiseScale(lower_bound=400.0), "at least 400"), (NoiseScale(applied=900.0), "900")):
        watching.on_noise(noise)
        assert watching.successor is not None
        watching = watching.successor
        assert f"at a noise scale of {said_of} samples" in watching.why
        assert make_training_plan(watching.config, SIZES, 2).plan.global_batch > 64
        assert not watching.has_change


def test_training_begins_by_the_noise_scale_that_was_typed() -> None:
    policy = chooser(config=replace(RUN, plan=PlanConfig(noise=900.0)))
    begun = GoodputPolicy(policy, 2, 1, policy.combine_noise(None, None))
    assert begun.why.startswith("goodput: at a noise scale of 900 samples (plan.noise), ")
    assert policy.choose(2, 1, policy.combine_noise(None, None)) == policy.choose(2, 1, NoiseKnowledge(900.0))


def test_the_cap_and_the_bounds_bind() -> None:
    choice = chooser().choose(2, 1, NoiseKnowledge(1e6))
    assert choice.per_device <= 128
    assert choice.accumulation > 1
    narrow = replace(RUN, batch=replace(RUN.batch, min_global=100, max_global=128))
    assert 100 <= chooser(config=narrow).choose(3, 1, NoiseKnowledge(1e6)).global_batch <= 128
    assert compute_batch_bounds(RUN, SIZES.train, 2) == BatchBounds(2, 32 * 64)
    with pytest.raises(PlanError, match="no global batch for 200 workers lies between 200 and 128"):
        compute_batch_bounds(narrow, SIZES.train, 200)


@settings(max_examples=20)
@given(st.integers(1, 8), st.one_of(st.none(), st.floats(1, 1e5)))
def test_the_plan_that_is_trained_is_the_one_that_was_chosen(world: int, noise: float | None) -> None:
    policy = chooser()
    choice = policy.choose(world, 1, NoiseKnowledge(noise))
    planned = make_training_plan(GoodputPolicy(policy, world, 1, NoiseKnowledge(noise)).config, SIZES, world)
    assert planned.policy == "goodput"
    assert planned.plan.global_batch == choice.global_batch
    assert planned.plan.per_device == choice.per_device
    assert planned.plan.accumulation == choice.accumulation


@pytest.mark.parametrize(
    ("batch", "mend"),
    [
        (BatchConfig(policy="goodput", global_batch=64), "type batch=hold, or remove it"),
        (BatchConfig(policy="goodput", ramp=(("0dur", 0.5),)), "type batch=bounded, or remove it"),
    ],
    ids=["global", "ramp"],
)
def test_what_decides_against_the_policy_is_refused(batch: BatchConfig, mend: str) -> None:
    with pytest.raises(UsageError, match=f"does not work with batch.policy=goodput: {mend}"):
        make_training_plan(replace(RUN, batch=replace(batch, per_device=8)), SIZES, 1)


@pytest.mark.parametrize(
    ("word", "mend"), [("batch.per_device=16", "tune.max=16"), ("batch.accumulation=2", "remove it")]
)
def test_a_number_on_the_command_line_is_refused_and_a_recipes_own_is_no_request(word: str, mend: str) -> None:
    assert compose(["recipe=mlp", "batch=goodput"]).batch == BatchConfig(policy="goodput", per_device="auto")
    with pytest.raises(UsageError, match=f"^{word} does not work with batch=goodput, which chooses it: .*{mend}"):
        compose(["recipe=mlp", "batch=goodput", word])
