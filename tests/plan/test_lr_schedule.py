"""The learning rate: numbers from the papers, and invariants of every schedule."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.lr_schedule import Decay, LrSchedule, ScaleRamp, noise_gain

EPOCH = 1000
DURATION = 10 * EPOCH


def schedule(**changes: Any) -> LrSchedule:
    return replace(LrSchedule(base=0.1, base_batch=100, duration=DURATION, epoch=EPOCH), **changes)


def decayed(kind: str, **changes: Any) -> LrSchedule:
    return schedule(decay=Decay(kind=kind, **changes))  # type: ignore[arg-type]


# Scaling with the batch


@pytest.mark.parametrize(
    ("batch", "rate"), [(256, 0.1), (512, 0.2), (1024, 0.4), (2048, 0.8), (4096, 1.6), (8192, 3.2)]
)
def test_the_linear_rule_gives_the_rates_of_goyal(batch: int, rate: float) -> None:
    assert schedule(base_batch=256).lr(0, batch) == pytest.approx(rate, rel=1e-15)


def test_the_square_root_rule() -> None:
    assert schedule(base_batch=256, rule="sqrt").lr(0, 8192) == pytest.approx(0.5657, abs=5e-5)
    lamb = schedule(base=5e-3, base_batch=32768, rule="sqrt")
    assert lamb.lr(0, 8192) == pytest.approx(2.5e-3, rel=1e-15)


@pytest.mark.parametrize(("workers", "scale"), [(1, 0.25), (3, 0.75), (5, 1.25), (8, 2.0)])
def test_the_rate_follows_the_workers(workers: int, scale: float) -> None:
    assert schedule(base_batch=256).scale(0, 64 * workers) == scale


def test_without_a_rule_the_batch_is_ignored() -> None:
    assert schedule(rule="none").lr(0, 8192) == 0.1


@pytest.mark.parametrize(("kappa", "expected"), [(4, 2.2857), (16, 3.3684)])
def test_adascale(kappa: int, expected: float) -> None:
    """Variance 3 and squared gradient 1 at the base batch: a noise scale of three base batches."""
    assert noise_gain(kappa * 32, 32, noise=3 * 32) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10**6), st.floats(0, 1e300))
def test_the_gain_at_the_base_batch_is_one(batch: int, noise: float) -> None:
    assert noise_gain(batch, batch, noise) == 1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1e300))
def test_the_gain_lies_between_one_and_kappa(batch: int, base_batch: int, noise: float) -> None:
    low, high = sorted((1.0, batch / base_batch))
    assert low * (1 - 1e-12) <= noise_gain(batch, base_batch, noise) <= high * (1 + 1e-12)


def test_the_gain_of_an_unknown_or_infinite_noise_is_linear() -> None:
    assert noise_gain(512, 256, None) == noise_gain(512, 256, math.inf) == 2
    assert noise_gain(512, 256, 0) == 1


@pytest.mark.parametrize("noise", [-1.0, math.nan])
def test_a_noise_below_zero_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match="noise scale"):
        noise_gain(512, 256, noise)
    with pytest.raises(ValueError, match="noise scale"):
        schedule().observed(noise)


@pytest.mark.parametrize(("power", "unknown", "known"), [(1.0, 4.0, 16 / 7), (0.5, 2.0, math.sqrt(16 / 7))])
def test_the_noise_rule_is_kappa_until_the_noise_is_known(power: float, unknown: float, known: float) -> None:
    before = schedule(rule="noise", power=power)
    assert before.scale(0, 400) == unknown
    assert before.observed(None) == before.observed(math.inf) == before
    assert before.observed(300.0).scale(0, 400) == pytest.approx(known)


def test_the_noise_is_frozen_until_it_moved_by_two() -> None:
    seen = schedule(rule="noise").observed(300.0)
    assert seen.observed(599.0).noise == seen.observed(151.0).noise == 300.0
    assert seen.observed(600.0).noise == 600.0
    assert seen.observed(150.0).noise == 150.0


# Warmup


def test_the_warmup_of_goyal() -> None:
    """N = 1,281,167 and five epochs: 782 updates of 8192, from 0.1 over 1.65 to 3.2."""
    warmup = 5 * 1_281_167
    goyal = LrSchedule(0.1, 256, 90 * 1_281_167, 1_281_167, warmup=warmup, warmup_from="base")
    assert warmup == 6_405_835
    assert math.ceil(warmup / 8192) == 782
    assert round(1_281_167 / 8192, 1) == 156.4
    assert goyal.lr(0, 8192) == 0.1
    assert (goyal.lr(warmup // 2, 8192) + goyal.lr(warmup // 2 + 1, 8192)) / 2 == pytest.approx(1.65, rel=1e-12)
    assert goyal.lr(warmup, 8192) == pytest.approx(3.2)


@pytest.mark.parametrize(("start", "first"), [("zero", 0.0), ("base", 0.1), (0.25, 0.1)])
def test_where_the_warmup_starts(start: Any, first: float) -> None:
    warming = schedule(warmup=2000, warmup_from=start)
    assert warming.lr(0, 400) == pytest.approx(first)
    assert warming.lr(1000, 400) == pytest.approx((first + 0.4) / 2)
    assert warming.lr(2000, 400) == warming.lr(9000, 400) == pytest.approx(0.4)


def test_a_cosine_warmup_starts_and_ends_flat() -> None:
    warming = schedule(warmup=2000, warmup_shape="cosine")
    assert warming.lr(200, 100) < 0.1 * 0.1 / 4
    assert warming.lr(1000, 100) == pytest.approx(0.05)
    assert warming.lr(1800, 100) > 0.1 - 0.1 * 0.1 / 4


def test_a_warmup_longer_than_the_run_ends_where_the_run_ends() -> None:
    warming = schedule(warmup=2 * DURATION, decay=Decay(kind="cosine"))
    assert warming.lr(DURATION, 100) == warming.lr(2 * DURATION, 100) == pytest.approx(0.05)


def test_per_epoch_the_rate_moves_at_epoch_boundaries_only() -> None:
    stepping = schedule(warmup=2 * EPOCH, per="epoch", decay=Decay(kind="linear"))
    rates = [stepping.lr(samples, 100) for samples in range(0, DURATION, 100)]
    assert rates[:10] == [pytest.approx(0.05)] * 10  # half of the warmup at the end of the first of two epochs
    assert rates[10:30] == [pytest.approx(0.1)] * 20  # the decay is evaluated at the start of an epoch
    assert rates[30:40] == [pytest.approx(0.1 * 7 / 8)] * 10


# Decay


def test_linear_and_cosine_run_over_what_the_warmup_leaves() -> None:
    for kind in ("linear", "cosine"):
        falling = schedule(warmup=2000, decay=Decay(kind=kind, end=0.1))  # type: ignore[arg-type]
        assert falling.lr(2000, 100) == 0.1
        assert falling.lr(6000, 100) == pytest.approx(0.055)
        assert falling.lr(DURATION, 100) == pytest.approx(0.01)
    assert decayed("cosine").lr(2500, 100) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)
    assert decayed("linear").lr(2500, 100) == pytest.approx(0.075)


def test_step_at_milestones_or_every_so_often() -> None:
    for stepping in (decayed("step", milestones=(3000, 6000, 8000)), decayed("step", every=3000)):
        assert [stepping.lr(at, 100) for at in (2999, 3000, 6000)] == pytest.approx([0.1, 0.01, 0.001])


def test_exponential_falls_by_the_factor_and_not_below_its_floor() -> None:
    falling = decayed("exponential", factor=0.5, every=1000, floor=0.1)
    assert [falling.lr(at, 100) for at in (0, 500, 1000, 3000)] == pytest.approx([0.1, 0.1 * 0.5**0.5, 0.05, 0.0125])
    assert falling.lr(9000, 100) == pytest.approx(0.01)


def validated(start: LrSchedule, *results: float) -> LrSchedule:
    for number, result in enumerate(results, start=1):
        start = start.validated(number * EPOCH, result)
    return start


def test_plateau_falls_after_patience_validations_without_improvement() -> None:
    waiting = validated(decayed("plateau", patience=2), 1.0, 0.9, 0.95, 0.9, 0.8)
    assert [waiting.lr(at, 100) for at in (3999, 4000, 9000)] == pytest.approx([0.1, 0.01, 0.01])


def test_plateau_may_watch_a_metric_that_rises() -> None:
    rising = decayed("plateau", patience=2, mode="max")
    assert validated(rising, 0.1, 0.2, 0.3).lr(9000, 100) == 0.1
    assert validated(rising, 0.3, 0.2, 0.1).lr(9000, 100) == pytest.approx(0.01)


def test_plateau_has_a_floor_and_starts_counting_anew_after_a_fall() -> None:
    stuck = validated(decayed("plateau", patience=2, factor=0.5, floor=0.2), *[1.0] * 9)
    shares = [stuck.lr(at * EPOCH, 100) / 0.1 for at in range(10)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2])


def test_a_validation_that_is_not_finite_is_no_improvement() -> None:
    broken = validated(decayed("plateau", patience=2), 1.0, math.nan, -math.inf)
    assert broken.lr(9000, 100) == pytest.approx(0.01)


def test_a_validation_that_is_run_again_counts_once() -> None:
    once = validated(decayed("plateau"), 1.0, 2.0)
    assert once.validated(2 * EPOCH, 2.0) == once


def test_only_plateau_keeps_validations() -> None:
    assert validated(decayed("cosine"), 1.0) == decayed("cosine")


def test_onecycle_goes_up_and_down_and_never_runs_out() -> None:
    cycle = decayed("onecycle", start=0.04, end=0.001)
    assert cycle.warmup_samples == 3000
    rates = [cycle.lr(at, 100) for at in (0, 1500, 3000, 6500, DURATION, 3 * DURATION)]
    assert rates == pytest.approx([0.004, 0.052, 0.1, 0.05005, 0.0001, 0.0001])
    assert decayed("onecycle").lr(0, 400) == pytest.approx(0.4 * 0.04)  # shares of the peak, which is base x scale


def test_onecycle_rises_over_the_warmup_where_one_is_given() -> None:
    cycle = replace(decayed("onecycle"), warmup=5000)
    assert cycle.warmup_samples == 5000
    assert cycle.lr(5000, 100) == 0.1


def test_onecycle_moves_the_momentum_the_other_way_only_when_told() -> None:
    cycle = decayed("onecycle", momentum=(0.85, 0.95))
    assert [cycle.momentum(at) for at in (0, 1500, 3000, 6500, DURATION, 2 * DURATION)] == pytest.approx(
        [0.95, 0.90, 0.85, 0.90, 0.95, 0.95]
    )
    assert decayed("onecycle").momentum(0) is None
    assert decayed("cosine", momentum=(0.85, 0.95)).momentum(0) is None


# Changes of the batch


def test_growth_below_two_and_shrinking_act_at_once() -> None:
    assert schedule().resized(500, 100, 190).scale(500, 190) == 1.9
    assert schedule().resized(500, 800, 100).scale(500, 100) == 1


def test_growth_from_two_on_ramps_over_a_hundred_updates_of_the_new_batch() -> None:
    long = schedule(duration=10**6).resized(10_000, 100, 400)
    assert [long.scale(at, 400) for at in (10_000, 30_000, 50_000, 90_000)] == [1, 2.5, 4, 4]


def test_in_a_long_run_the_ramp_takes_a_hundredth_of_it() -> None:
    long = schedule(duration=10**8).resized(0, 100, 200)
    assert [long.scale(at, 200) for at in (0, 500_000, 10**6)] == [1, 1.5, 2]


def test_it_is_the_growth_of_the_scale_that_counts_not_of_the_batch() -> None:
    assert schedule(rule="sqrt").resized(500, 100, 300).scale(500, 300) == pytest.approx(math.sqrt(3))
    assert schedule(rule="sqrt", duration=10**6).resized(500, 100, 400).scale(500, 400) == 1
    assert schedule(rule="none").resized(500, 100, 10_000).scale(500, 10_000) == 1


def test_a_ramp_starts_from_the_scale_in_force_also_in_the_middle_of_one() -> None:
    growing = schedule(duration=10**6).resized(0, 100, 400)  # 1 to 4 in 40,000 samples
    assert growing.scale(20_000, 400) == 2.5
    again = growing.resized(20_000, 400, 800)
    assert again.ramps[-1] == ScaleRamp(at=20_000, over=80_000, start=2.5, batch=800)
    assert again.scale(60_000, 800) == pytest.approx((2.5 + 8) / 2)
    assert growing.resized(20_000, 400, 300).scale(20_000, 300) == 3


def test_a_batch_that_no_ramp_knows_has_its_own_scale_at_once() -> None:
    assert schedule().resized(0, 100, 400).scale(10, 700) == 7


def test_the_same_batch_is_no_change() -> None:
    growing = schedule().resized(0, 100, 400)
    assert growing.resized(10, 400, 400) == growing


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), st.sampled_from(["linear", "sqrt", "noise", "none"]))
def test_no_number_of_resizes_compounds(batches: list[int], rule: Any) -> None:
    start = schedule(rule=rule, duration=10**9)
    resized, batch = start, 100
    for number, following in enumerate([*batches, 100]):
        resized = resized.resized(1000 * number, batch, following)
        batch = following
    assert (resized.base, resized.base_batch) == (start.base, start.base_batch)
    assert resized.lr(10**9, 100) == start.lr(10**9, 100)


def test_ten_resizes_back_and_forth_end_at_the_same_rate() -> None:
    there, start = schedule(duration=10**6), schedule(duration=10**6)
    for number in range(10):
        there = there.resized(2000 * number, 100, 800).resized(2000 * number + 1000, 800, 100)
    assert there.lr(20_000, 100) == start.lr(20_000, 100)


# A planned ramp of the batch

STAGES = ((0, 100), (20_000, 200), (60_000, 400))


def test_planned_stages_are_resizes_ahead_of_time() -> None:
    growing = schedule(duration=10**6).with_stages(0, STAGES)
    by_hand = growing.with_stages(0, STAGES[:1]).resized(20_000, 100, 200).resized(60_000, 200, 400)
    assert growing == by_hand
    assert growing.scale(0, 100) == 1
    assert growing.scale(30_000, 200) == 1.5
    assert growing.scale(60_000, 400) == 2  # 400 is reached in 100 of its updates
    assert growing.scale(100_000, 400) == 4


@given(st.integers(0, 10**6))
def test_the_same_stages_change_nothing_whenever_a_run_goes_on(samples: int) -> None:
    growing = schedule(duration=10**6).with_stages(0, STAGES)
    assert growing.with_stages(samples, STAGES) == growing


def test_another_world_drops_the_stages_to_come_and_plans_its_own() -> None:
    growing = schedule(duration=10**6).with_stages(0, STAGES)
    doubled = growing.with_stages(30_000, [(at, 2 * batch) for at, batch in STAGES])
    assert doubled.ramps[:2] == growing.ramps[:2]
    assert doubled.ramps[2] == ScaleRamp(at=30_000, over=40_000, start=1.5, batch=400)  # mid-ramp from 1 to 2
    assert doubled.ramps[3] == ScaleRamp(at=60_000, over=80_000, start=3.375, batch=800)
    assert growing.resized(30_000, 200, 150).ramps[-1].at == 30_000


# The noise scale becomes known during training

NOISY = (0, 50), (20_000, 400)


def noisy(**changes: Any) -> LrSchedule:
    return schedule(rule="noise", duration=10**6, **changes)


def test_a_smaller_scale_acts_at_once_when_the_noise_becomes_known() -> None:
    learned = noisy().with_noise_at(5000, 400, noise=100)
    assert (noisy().scale(5000, 400), learned.scale(5000, 400)) == (4, 1.6)


def test_a_scale_that_doubles_ramps_when_the_noise_becomes_known() -> None:
    """At 1/10 of the base batch the scale moves from 1/10 to 11/20."""
    learned = noisy().with_noise_at(5000, 10, noise=10)
    assert [learned.scale(at, 10) for at in (5000, 10_000, 15_000)] == pytest.approx([0.1, 0.325, 0.55])
    assert learned.progress(10_000, 10) == 0.5


def test_what_has_not_moved_changes_nothing() -> None:
    learned = noisy().with_noise_at(5000, 400, noise=100)
    assert learned.with_noise_at(6000, 400, noise=150) is learned
    assert learned.with_noise_at(6000, 400, noise=None) is learned


def test_stages_to_come_start_from_the_scale_that_is_then_in_force() -> None:
    """Planned with an unknown noise scale, the ramp would start at 0.5; once it is known the scale is 0.6."""
    before = noisy().with_stages(0, NOISY)
    after = before.with_noise_at(5000, 50, noise=200).with_stages(5001, NOISY)
    assert before.ramps[-1].start == 0.5
    assert after.scale(19_999, 50) == after.scale(20_000, 400) == pytest.approx(0.6)
    assert after.scale(60_000, 400) == pytest.approx(2.0)


@given(st.integers(5000, 10**6))
def test_a_run_goes_on_with_the_same_ramps_wherever_the_noise_became_known(samples: int) -> None:
    """Also if that happened in the very update that was saved."""
    after = noisy().with_stages(0, NOISY).with_noise_at(5000, 50, noise=5).with_stages(5001, NOISY)
    assert after.with_stages(samples, NOISY) == after


def test_a_resize_right_where_the_noise_became_known_starts_from_the_scale_in_force() -> None:
    learned = noisy().with_stages(0, [(0, 10)]).with_noise_at(5000, 10, noise=10)
    grown = learned.with_stages(5000, [(0, 40)])
    assert grown.scale(5000, 40) == learned.scale(5000, 10) == 0.1


# Invariants of every schedule

KINDS = ["constant", "linear", "cosine", "step", "exponential", "plateau", "onecycle"]


@st.composite
def schedules(draw: st.DrawFn) -> LrSchedule:
    decay = Decay(
        kind=draw(st.sampled_from(KINDS)),
        end=draw(st.floats(0, 1)),
        start=draw(st.floats(0, 1)),
        momentum=draw(st.none() | st.just((0.85, 0.95))),
        milestones=tuple(draw(st.lists(st.integers(0, DURATION), max_size=3))),
        every=draw(st.none() | st.integers(1, DURATION)),
        factor=draw(st.floats(0.01, 1)),
        floor=draw(st.floats(0, 1)),
        mode=draw(st.sampled_from(["min", "max"])),
        patience=draw(st.integers(1, 3)),
    )
    made = LrSchedule(
        base=draw(st.floats(0, 10)),
        base_batch=draw(st.integers(1, 1000)),
        duration=draw(st.integers(1, DURATION)),
        epoch=draw(st.integers(1, DURATION)),
        rule=draw(st.sampled_from(["linear", "sqrt", "noise", "none"])),
        power=draw(st.sampled_from([1.0, 0.5])),
        warmup=draw(st.integers(0, 2 * DURATION)),
        warmup_shape=draw(st.sampled_from(["linear", "cosine"])),
        warmup_from=draw(st.sampled_from(["zero", "base"]) | st.floats(0, 1)),
        per=draw(st.sampled_from(["update", "epoch"])),
        decay=decay,
    ).observed(draw(st.none() | st.floats(0, 1e6)))
    batch = draw(BATCHES)
    made = made.with_stages(0, [(0, batch)])
    for at in sorted(draw(st.lists(st.integers(0, DURATION), max_size=3))):
        following = draw(BATCHES)
        made, batch = made.resized(at, batch, following).validated(at, draw(st.floats())), following
    return made


BATCHES = st.sampled_from([1, 64, 100, 400, 5000])


@given(schedules(), st.integers(0, 3 * DURATION), BATCHES)
def test_the_rate_is_finite_and_never_negative(made: LrSchedule, samples: int, batch: int) -> None:
    assert 0 <= made.lr(samples, batch) < math.inf
    assert made.lr(samples, batch) == made.lr(samples, batch)


@given(schedules(), st.integers(0, DURATION), BATCHES)
def test_past_the_duration_the_rate_stays(made: LrSchedule, beyond: int, batch: int) -> None:
    assert made.lr(made.duration + beyond, batch) == made.lr(made.duration, batch)
    assert made.momentum(made.duration + beyond) == made.momentum(made.duration)


@given(schedules())
def test_the_history_survives_a_checkpoint(made: LrSchedule) -> None:
    fresh = replace(made, ramps=(), validations=(), noise=None)
    facts = json.loads(json.dumps(made.to_facts(), allow_nan=False))
    assert fresh.from_facts(facts) == made


@given(
    st.integers(1, DURATION), st.sampled_from(["linear", "cosine"]), st.sampled_from(["zero", "base"]) | st.floats(0, 1)
)
def test_the_warmup_has_no_jump(warmup: int, shape: Any, start: Any) -> None:
    warming = schedule(warmup=warmup, warmup_shape=shape, warmup_from=start)
    rates = [warming.lr(at, 400) for at in range(warmup + 1)]
    assert rates[-1] == pytest.approx(0.4)
    steepest = 0.4 * math.pi / 2 / warmup
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert min(steps) >= -1e-15
    assert max(steps) <= steepest * 1.0001


@given(schedules(), st.integers(0, DURATION), BATCHES)
def test_what_is_added_later_does_not_alter_the_past(made: LrSchedule, samples: int, batch: int) -> None:
    later = max([samples, *(ramp.at for ramp in made.ramps), *(at for at, _ in made.validations)]) + 1
    grown = made.resized(later, batch, 7).validated(later, 1.0)
    assert grown.lr(samples, batch) == made.lr(samples, batch)
