"""The goodput policy and its `plan` output: the arithmetic of math.md on known update times."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.compose import compose
from launcher.config.schema import BatchConfig, LrConfig, PlanConfig, RunConfig
from launcher.errors import UsageError
from launcher.goodput.measured_noise import MeasuredNoise, find_noise_scale, resolve_initial_noise
from launcher.goodput.noise_scale import NoiseScale, compute_efficiency
from launcher.goodput.plan_table import goodput_plan_document, goodput_plan_text
from launcher.goodput.policy import (
    BatchBounds,
    BatchChooser,
    GoodputPolicy,
    NoiseKnowledge,
    TimingProfile,
    compute_batch_bounds,
    explain_choice,
)
from launcher.goodput.update_time_model import compute_best_batch
from launcher.plan.batch import PlanError
from launcher.plan.training_plan import DatasetSizes, make_training_plan

ALPHA_S, BETA_S, SYNC_S, EACH_S = 0.010, 0.0005, 0.004, 0.001
SIZES = DatasetSizes(20_000, 1000)
RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.Mlp"},
    batch=BatchConfig(policy="goodput", per_device="auto"),
    lr=LrConfig(base=0.1, base_batch=64),
    optimizer={"_target_": "torch.optim.SGD"},
)


def update_s(per_device: int, world: int, accumulation: int = 1) -> float:
    """Alpha and beta of a micro-batch, and exposed communication; gamma is 1."""
    sync_s = SYNC_S + EACH_S * max(world - 2, 0) if world > 1 else 0.0
    return accumulation * (ALPHA_S + BETA_S * per_device) + sync_s


def tuned(world: int, sizes: tuple[int, ...] = (8, 16, 32, 64, 128)) -> dict[str, Any]:
    """A result of `tune` on a machine without timing noise."""
    points = []
    for size in sizes:
        seconds = update_s(size, world)
        speed = world * size / seconds
        stages = {"sync": 1e3 * (seconds - update_s(size, 1)), "optimizer": 0.0, "other": 0.0}
        points.append(
            {
                "per_device": size,
                "samples_per_s": speed,
                "low": speed / 1.01,
                "high": speed * 1.01,
                "ms_per_update": 1e3 * seconds,
                "stages": stages,
                "label": "rising",
            }
        )
    return {"points": points, "world": world, "nodes": 1, "accumulation": 1}


@lru_cache
def profile_of(*worlds: int) -> TimingProfile:
    """Fitted once."""
    return TimingProfile.from_documents([tuned(world) for world in worlds or (1, 2, 4)])


def chooser(*worlds: int, config: RunConfig = RUN) -> BatchChooser:
    return BatchChooser(profile_of(*worlds), config, SIZES.train)


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


# --- the goodput plan ---------------------------------------------------------------------------------------------

KNOWN = MeasuredNoise(500.0, 400.0, 650.0, "a run")


def test_a_row_holds_the_arithmetic() -> None:
    found = goodput_plan_document(chooser(), SIZES, KNOWN, "1, 2, 4 workers")
    row = found["plans"][1]
    assert (row["world"], row["feasible"]) == (2, True)
    assert row["samples_per_s"] == pytest.approx(
        row["global"] / update_s(row["per_device"], 2, row["accumulation"]), rel=0.05
    )
    assert row["efficiency"] == pytest.approx((500 + 64) / (500 + row["global"]))
    assert row["goodput"] == pytest.approx(row["samples_per_s"] * row["efficiency"])
    assert row["seconds"] == pytest.approx(10 * SIZES.train / row["goodput"])
    assert row["device_hours"] == pytest.approx(2 * row["seconds"] / 3600)
    for name in ("", "goodput_", "seconds_", "device_hours_"):
        value = row["samples_per_s"] if not name else row[name.removesuffix("_")]
        assert row[f"{name}low"] < value < row[f"{name}high"]


def test_it_ends_at_twice_the_most_workers_and_says_so() -> None:
    found = goodput_plan_document(chooser(), SIZES, KNOWN, "")
    assert [row["world"] for row in found["plans"]] == list(range(1, 9))
    assert "nothing is predicted past 8 workers" in found["why"]
    asked = replace(RUN, plan=PlanConfig(world_sizes=(8, 9)))
    rows = goodput_plan_document(chooser(config=asked), SIZES, KNOWN, "")["plans"]
    assert [row["feasible"] for row in rows] == [True, False]
    assert "9 workers are beyond twice the 4 measured" in rows[1]["why"]


def test_it_names_the_world_size_past_which_more_do_not_pay() -> None:
    """With a small noise scale a large batch gains nothing, and more workers only wait for each other."""
    few = goodput_plan_document(chooser(), SIZES, MeasuredNoise(5.0, 5.0, 5.0, "plan.noise"), "")
    assert few["pays_to"] < 8
    assert f"more than {few['pays_to']} workers do not pay off" in few["why"].replace("worker d", "workers d")
    goodputs = [row["goodput"] for row in few["plans"]]
    assert goodputs[few["pays_to"] - 1] >= 0.9 * max(goodputs)
    assert all(one < 0.9 * max(goodputs) for one in goodputs[: few["pays_to"] - 1])
    many = goodput_plan_document(chooser(), SIZES, MeasuredNoise(1e6, 1e6, 1e6, "plan.noise"), "")
    assert many["pays_to"] == 8
    assert many["why"].startswith("every worker up to 8 pays off")


def test_an_unknown_noise_scale_is_said_and_the_base_batch_is_worth_what_it_does() -> None:
    found = goodput_plan_document(chooser(), SIZES, None, "")
    assert found["noise"] is None
    assert {row["efficiency"] for row in found["plans"]} == {1.0}
    assert "noise scale unknown" in goodput_plan_text(found)


def test_the_text_fits_a_terminal() -> None:
    for noise in (None, KNOWN):
        written = goodput_plan_text(
            goodput_plan_document(chooser(), SIZES, noise, "1, 2, 4 workers on cpu, 2026-11-21 16:40 UTC")
        )
        assert max(map(len, written.splitlines())) <= 80
        json.dumps(goodput_plan_document(chooser(), SIZES, noise, ""))


# --- source of the noise scale ------------------------------------------------------------------------------------


def written(folder: Path, recipe: str, *later: Mapping[str, float], **values: float) -> None:
    folder.mkdir(parents=True)
    first = {"time": 1.0, "samples": 64, "update": 1, "epoch": 0, "world": 1, "generation": 1, **values}
    rows = (first, *({**first, "time": 2.0, "samples": 128, "update": 2, **row} for row in later))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text(json.dumps({"time": 1.0, "event": "start", "recipe": recipe}) + "\n")


def test_the_newest_run_of_the_recipe_that_measured_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_noise_scale(RUN) is None
    measured = {"noise/scale": 300.0, "noise/scale_low": 200.0, "noise/scale_high": 500.0}
    written(tmp_path / "runs" / "other", "Resnet", **measured)
    written(tmp_path / "runs" / "unknown", "Mlp")
    assert find_noise_scale(RUN) is None
    written(tmp_path / "runs" / "one", "Mlp", **measured)
    assert find_noise_scale(RUN) == MeasuredNoise(300.0, 200.0, 500.0, "one")


def test_a_number_or_a_run_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_noise_scale(asked(500.0)) == MeasuredNoise(500.0, 500.0, 500.0, "plan.noise")
    written(tmp_path / "runs" / "unknown", "Mlp")
    with pytest.raises(UsageError, match=r"^plan\.noise=unknown: that run has measured no noise scale"):
        find_noise_scale(asked("unknown"))
    with pytest.raises(UsageError, match=r"^plan\.noise=-1.0 is not a noise scale"):
        find_noise_scale(asked(-1.0))
    with pytest.raises(
        UsageError, match=r"^plan\.noise=nosuch is not a run: the most recent are unknown; or type a number"
    ):
        find_noise_scale(asked("nosuch"))
    written(tmp_path / "runs" / "other", "Resnet", **{"noise/scale": 300.0})
    with pytest.raises(UsageError, match=r"^plan\.noise=other: that run trained Resnet, not Mlp: type a run of"):
        find_noise_scale(asked("other"))


def test_training_begins_by_the_first_scale_that_a_run_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.yaml stores the number, so the other run may be deleted. `plan` uses that run's final value."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "runs" / "one", "Mlp", {"noise/scale": 300.0}, **{"noise/scale": 60.0})
    assert find_noise_scale(asked("one")) == MeasuredNoise(300.0, 300.0, 300.0, "one")
    assert resolve_initial_noise(asked("one")).plan.noise == 60.0
    assert resolve_initial_noise(asked(500.0)).plan.noise == 500.0
    assert resolve_initial_noise(RUN) == RUN
    fixed = replace(asked("one"), batch=replace(RUN.batch, policy="scale"))
    assert resolve_initial_noise(fixed) == fixed
    with pytest.raises(UsageError, match=r"^plan\.noise=-1.0 is not a noise scale"):
        resolve_initial_noise(asked(-1.0))


def asked(noise: float | str) -> RunConfig:
    return replace(RUN, plan=PlanConfig(noise=noise))
