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

from launcher.plan.lr_schedule import Decay, LrScaleRamp, LrSchedule, noise_gain

EPOCH = 1000
DURATION = 10 * EPOCH


def make_schedule(**changes: Any) -> LrSchedule:
    return replace(LrSchedule(base=0.1, base_batch=100, duration=DURATION, epoch=EPOCH), **changes)


def make_decaying(kind: str, **changes: Any) -> LrSchedule:
    return make_schedule(decay=Decay(kind=kind, **changes))  # type: ignore[arg-type]


# Scaling with the batch


@pytest.mark.parametrize(("batch", "lr"), [(256, 0.1), (512, 0.2), (1024, 0.4), (2048, 0.8), (4096, 1.6), (8192, 3.2)])
def test_linear_rule_matches_goyal(batch: int, lr: float) -> None:
    assert make_schedule(base_batch=256).lr(0, batch) == pytest.approx(lr, rel=1e-15)


def test_sqrt_rule_matches_lamb() -> None:
    assert make_schedule(base_batch=256, rule="sqrt").lr(0, 8192) == pytest.approx(0.5657, abs=5e-5)
    lamb = make_schedule(base=5e-3, base_batch=32768, rule="sqrt")
    assert lamb.lr(0, 8192) == pytest.approx(2.5e-3, rel=1e-15)


@pytest.mark.parametrize(("workers", "scale"), [(1, 0.25), (3, 0.75), (5, 1.25), (8, 2.0)])
def test_lr_scale_follows_world_size(workers: int, scale: float) -> None:
    assert make_schedule(base_batch=256).scale(0, 64 * workers) == scale


def test_rule_none_ignores_the_batch() -> None:
    assert make_schedule(rule="none").lr(0, 8192) == 0.1


@pytest.mark.parametrize(("kappa", "expected"), [(4, 2.2857), (16, 3.3684)])
def test_gain_matches_adascale(kappa: int, expected: float) -> None:
    """Variance 3 and squared gradient 1 at the base batch: a noise scale of three base batches."""
    assert noise_gain(kappa * 32, 32, noise=3 * 32) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10**6), st.floats(0, 1e300))
def test_gain_at_base_batch_is_one(batch: int, noise: float) -> None:
    assert noise_gain(batch, batch, noise) == 1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1e300))
def test_gain_lies_between_one_and_kappa(batch: int, base_batch: int, noise: float) -> None:
    low, high = sorted((1.0, batch / base_batch))
    assert low * (1 - 1e-12) <= noise_gain(batch, base_batch, noise) <= high * (1 + 1e-12)


def test_gain_of_unknown_or_infinite_noise_is_linear() -> None:
    assert noise_gain(512, 256, None) == noise_gain(512, 256, math.inf) == 2
    assert noise_gain(512, 256, 0) == 1


@pytest.mark.parametrize("noise", [-1.0, math.nan])
def test_negative_or_nan_noise_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match="noise scale"):
        noise_gain(512, 256, noise)
    with pytest.raises(ValueError, match="noise scale"):
        make_schedule().observed(noise)


@pytest.mark.parametrize(("power", "unknown", "known"), [(1.0, 4.0, 16 / 7), (0.5, 2.0, math.sqrt(16 / 7))])
def test_noise_rule_is_linear_until_noise_is_known(power: float, unknown: float, known: float) -> None:
    before = make_schedule(rule="noise", power=power)
    assert before.scale(0, 400) == unknown
    assert before.observed(None) == before.observed(math.inf) == before
    assert before.observed(300.0).scale(0, 400) == pytest.approx(known)


def test_noise_is_frozen_until_it_doubles_or_halves() -> None:
    seen = make_schedule(rule="noise").observed(300.0)
    assert seen.observed(599.0).noise == seen.observed(151.0).noise == 300.0
    assert seen.observed(600.0).noise == 600.0
    assert seen.observed(150.0).noise == 150.0


# Warmup


def test_warmup_matches_goyal() -> None:
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
def test_warmup_starts_at_configured_lr(start: Any, first: float) -> None:
    warming = make_schedule(warmup=2000, warmup_from=start)
    assert warming.lr(0, 400) == pytest.approx(first)
    assert warming.lr(1000, 400) == pytest.approx((first + 0.4) / 2)
    assert warming.lr(2000, 400) == warming.lr(9000, 400) == pytest.approx(0.4)


def test_cosine_warmup_starts_and_ends_flat() -> None:
    warming = make_schedule(warmup=2000, warmup_shape="cosine")
    assert warming.lr(200, 100) < 0.1 * 0.1 / 4
    assert warming.lr(1000, 100) == pytest.approx(0.05)
    assert warming.lr(1800, 100) > 0.1 - 0.1 * 0.1 / 4


def test_warmup_longer_than_run_stops_at_duration() -> None:
    warming = make_schedule(warmup=2 * DURATION, decay=Decay(kind="cosine"))
    assert warming.lr(DURATION, 100) == warming.lr(2 * DURATION, 100) == pytest.approx(0.05)


def test_per_epoch_lr_changes_only_at_epoch_boundaries() -> None:
    stepping = make_schedule(warmup=2 * EPOCH, per="epoch", decay=Decay(kind="linear"))
    lrs = [stepping.lr(samples, 100) for samples in range(0, DURATION, 100)]
    assert lrs[:10] == [pytest.approx(0.05)] * 10  # half of the warmup at the end of the first of two epochs
    assert lrs[10:30] == [pytest.approx(0.1)] * 20  # the decay is evaluated at the start of an epoch
    assert lrs[30:40] == [pytest.approx(0.1 * 7 / 8)] * 10


# Decay


def test_linear_and_cosine_decay_start_after_warmup() -> None:
    for kind in ("linear", "cosine"):
        falling = make_schedule(warmup=2000, decay=Decay(kind=kind, end=0.1))  # type: ignore[arg-type]
        assert falling.lr(2000, 100) == 0.1
        assert falling.lr(6000, 100) == pytest.approx(0.055)
        assert falling.lr(DURATION, 100) == pytest.approx(0.01)
    assert make_decaying("cosine").lr(2500, 100) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)
    assert make_decaying("linear").lr(2500, 100) == pytest.approx(0.075)


def test_step_decays_at_milestones_or_intervals() -> None:
    for stepping in (make_decaying("step", milestones=(3000, 6000, 8000)), make_decaying("step", every=3000)):
        assert [stepping.lr(at, 100) for at in (2999, 3000, 6000)] == pytest.approx([0.1, 0.01, 0.001])


def test_exponential_decays_by_factor_to_floor() -> None:
    falling = make_decaying("exponential", factor=0.5, every=1000, floor=0.1)
    assert [falling.lr(at, 100) for at in (0, 500, 1000, 3000)] == pytest.approx([0.1, 0.1 * 0.5**0.5, 0.05, 0.0125])
    assert falling.lr(9000, 100) == pytest.approx(0.01)


def add_validations(start: LrSchedule, *results: float) -> LrSchedule:
    for number, result in enumerate(results, start=1):
        start = start.validated(number * EPOCH, result)
    return start


def test_plateau_decays_after_patience_without_improvement() -> None:
    waiting = add_validations(make_decaying("plateau", patience=2), 1.0, 0.9, 0.95, 0.9, 0.8)
    assert [waiting.lr(at, 100) for at in (3999, 4000, 9000)] == pytest.approx([0.1, 0.01, 0.01])


def test_plateau_supports_metrics_to_maximise() -> None:
    rising = make_decaying("plateau", patience=2, mode="max")
    assert add_validations(rising, 0.1, 0.2, 0.3).lr(9000, 100) == 0.1
    assert add_validations(rising, 0.3, 0.2, 0.1).lr(9000, 100) == pytest.approx(0.01)


def test_plateau_has_floor_and_resets_patience() -> None:
    stuck = add_validations(make_decaying("plateau", patience=2, factor=0.5, floor=0.2), *[1.0] * 9)
    shares = [stuck.lr(at * EPOCH, 100) / 0.1 for at in range(10)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2])


def test_non_finite_validation_is_not_an_improvement() -> None:
    broken = add_validations(make_decaying("plateau", patience=2), 1.0, math.nan, -math.inf)
    assert broken.lr(9000, 100) == pytest.approx(0.01)


def test_repeated_validation_counts_once() -> None:
    once = add_validations(make_decaying("plateau"), 1.0, 2.0)
    assert once.validated(2 * EPOCH, 2.0) == once


def test_only_plateau_stores_validations() -> None:
    assert add_validations(make_decaying("cosine"), 1.0) == make_decaying("cosine")


def test_onecycle_rises_falls_and_stays_defined() -> None:
    cycle = make_decaying("onecycle", start=0.04, end=0.001)
    assert cycle.warmup_samples == 3000
    lrs = [cycle.lr(at, 100) for at in (0, 1500, 3000, 6500, DURATION, 3 * DURATION)]
    assert lrs == pytest.approx([0.004, 0.052, 0.1, 0.05005, 0.0001, 0.0001])
    # start and end are shares of the peak, which is base x scale
    assert make_decaying("onecycle").lr(0, 400) == pytest.approx(0.4 * 0.04)


def test_onecycle_rises_over_given_warmup() -> None:
    cycle = replace(make_decaying("onecycle"), warmup=5000)
    assert cycle.warmup_samples == 5000
    assert cycle.lr(5000, 100) == 0.1


def test_onecycle_cycles_momentum_only_if_configured() -> None:
    cycle = make_decaying("onecycle", momentum=(0.85, 0.95))
    assert [cycle.momentum(at) for at in (0, 1500, 3000, 6500, DURATION, 2 * DURATION)] == pytest.approx(
        [0.95, 0.90, 0.85, 0.90, 0.95, 0.95]
    )
    assert make_decaying("onecycle").momentum(0) is None
    assert make_decaying("cosine", momentum=(0.85, 0.95)).momentum(0) is None


# Changes of the batch


def test_small_growth_and_shrinking_act_at_once() -> None:
    assert make_schedule().resized(500, 100, 190).scale(500, 190) == 1.9
    assert make_schedule().resized(500, 800, 100).scale(500, 100) == 1


def test_growth_by_two_ramps_over_hundred_updates() -> None:
    long = make_schedule(duration=10**6).resized(10_000, 100, 400)
    assert [long.scale(at, 400) for at in (10_000, 30_000, 50_000, 90_000)] == [1, 2.5, 4, 4]


def test_ramp_takes_one_percent_of_long_runs() -> None:
    long = make_schedule(duration=10**8).resized(0, 100, 200)
    assert [long.scale(at, 200) for at in (0, 500_000, 10**6)] == [1, 1.5, 2]


def test_growth_is_measured_in_scale_not_batch() -> None:
    assert make_schedule(rule="sqrt").resized(500, 100, 300).scale(500, 300) == pytest.approx(math.sqrt(3))
    assert make_schedule(rule="sqrt", duration=10**6).resized(500, 100, 400).scale(500, 400) == 1
    assert make_schedule(rule="none").resized(500, 100, 10_000).scale(500, 10_000) == 1


def test_ramp_starts_from_current_scale_mid_ramp() -> None:
    growing = make_schedule(duration=10**6).resized(0, 100, 400)  # 1 to 4 in 40,000 samples
    assert growing.scale(20_000, 400) == 2.5
    again = growing.resized(20_000, 400, 800)
    assert again.ramps[-1] == LrScaleRamp(at=20_000, over=80_000, start=2.5, batch=800)
    assert again.scale(60_000, 800) == pytest.approx((2.5 + 8) / 2)
    assert growing.resized(20_000, 400, 300).scale(20_000, 300) == 3


def test_batch_without_ramp_gets_its_own_scale() -> None:
    assert make_schedule().resized(0, 100, 400).scale(10, 700) == 7


def test_resize_to_same_batch_changes_nothing() -> None:
    growing = make_schedule().resized(0, 100, 400)
    assert growing.resized(10, 400, 400) == growing


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), st.sampled_from(["linear", "sqrt", "noise", "none"]))
def test_repeated_resizes_do_not_compound(batches: list[int], rule: Any) -> None:
    start = make_schedule(rule=rule, duration=10**9)
    resized, batch = start, 100
    for number, following in enumerate([*batches, 100]):
        resized = resized.resized(1000 * number, batch, following)
        batch = following
    assert (resized.base, resized.base_batch) == (start.base, start.base_batch)
    assert resized.lr(10**9, 100) == start.lr(10**9, 100)


def test_resizes_back_and_forth_restore_the_lr() -> None:
    there, start = make_schedule(duration=10**6), make_schedule(duration=10**6)
    for number in range(10):
        there = there.resized(2000 * number, 100, 800).resized(2000 * number + 1000, 800, 100)
    assert there.lr(20_000, 100) == start.lr(20_000, 100)


# A planned ramp of the batch

STAGES = ((0, 100), (20_000, 200), (60_000, 400))


def test_planned_stages_equal_resizes() -> None:
    growing = make_schedule(duration=10**6).with_stages(0, STAGES)
    by_hand = growing.with_stages(0, STAGES[:1]).resized(20_000, 100, 200).resized(60_000, 200, 400)
    assert growing == by_hand
    assert growing.scale(0, 100) == 1
    assert growing.scale(30_000, 200) == 1.5
    assert growing.scale(60_000, 400) == 2  # 400 is reached in 100 of its updates
    assert growing.scale(100_000, 400) == 4


@given(st.integers(0, 10**6))
def test_same_stages_change_nothing_on_resume(samples: int) -> None:
    growing = make_schedule(duration=10**6).with_stages(0, STAGES)
    assert growing.with_stages(samples, STAGES) == growing


def test_new_world_size_replans_future_stages() -> None:
    growing = make_schedule(duration=10**6).with_stages(0, STAGES)
    doubled = growing.with_stages(30_000, [(at, 2 * batch) for at, batch in STAGES])
    assert doubled.ramps[:2] == growing.ramps[:2]
    assert doubled.ramps[2] == LrScaleRamp(at=30_000, over=40_000, start=1.5, batch=400)  # mid-ramp from 1 to 2
    assert doubled.ramps[3] == LrScaleRamp(at=60_000, over=80_000, start=3.375, batch=800)
    assert growing.resized(30_000, 200, 150).ramps[-1].at == 30_000


# The noise scale becomes known during training

NOISY = (0, 50), (20_000, 400)


def make_noisy(**changes: Any) -> LrSchedule:
    return make_schedule(rule="noise", duration=10**6, **changes)


def test_smaller_scale_from_noise_acts_at_once() -> None:
    learned = make_noisy().with_noise_at(5000, 400, noise=100)
    assert (make_noisy().scale(5000, 400), learned.scale(5000, 400)) == (4, 1.6)


def test_doubled_scale_from_noise_ramps() -> None:
    """At 1/10 of the base batch the scale moves from 1/10 to 11/20."""
    learned = make_noisy().with_noise_at(5000, 10, noise=10)
    assert [learned.scale(at, 10) for at in (5000, 10_000, 15_000)] == pytest.approx([0.1, 0.325, 0.55])
    assert learned.progress(10_000, 10) == 0.5


def test_unchanged_noise_changes_nothing() -> None:
    learned = make_noisy().with_noise_at(5000, 400, noise=100)
    assert learned.with_noise_at(6000, 400, noise=150) is learned
    assert learned.with_noise_at(6000, 400, noise=None) is learned


def test_future_stages_start_from_current_scale() -> None:
    """Planned with an unknown noise scale, the ramp would start at 0.5; once it is known the scale is 0.6."""
    before = make_noisy().with_stages(0, NOISY)
    after = before.with_noise_at(5000, 50, noise=200).with_stages(5001, NOISY)
    assert before.ramps[-1].start == 0.5
    assert after.scale(19_999, 50) == after.scale(20_000, 400) == pytest.approx(0.6)
    assert after.scale(60_000, 400) == pytest.approx(2.0)


@given(st.integers(5000, 10**6))
def test_resume_after_noise_keeps_the_same_ramps(samples: int) -> None:
    """Also if that happened in the very update that was saved."""
    after = make_noisy().with_stages(0, NOISY).with_noise_at(5000, 50, noise=5).with_stages(5001, NOISY)
    assert after.with_stages(samples, NOISY) == after


def test_resize_when_noise_becomes_known_starts_current() -> None:
    learned = make_noisy().with_stages(0, [(0, 10)]).with_noise_at(5000, 10, noise=10)
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
    lr_schedule = LrSchedule(
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
    lr_schedule = lr_schedule.with_stages(0, [(0, batch)])
    for at in sorted(draw(st.lists(st.integers(0, DURATION), max_size=3))):
        following = draw(BATCHES)
        lr_schedule, batch = lr_schedule.resized(at, batch, following).validated(at, draw(st.floats())), following
    return lr_schedule


BATCHES = st.sampled_from([1, 64, 100, 400, 5000])


@given(schedules(), st.integers(0, 3 * DURATION), BATCHES)
def test_lr_is_finite_and_never_negative(lr_schedule: LrSchedule, samples: int, batch: int) -> None:
    assert 0 <= lr_schedule.lr(samples, batch) < math.inf
    assert lr_schedule.lr(samples, batch) == lr_schedule.lr(samples, batch)


@given(schedules(), st.integers(0, DURATION), BATCHES)
def test_lr_is_constant_past_the_duration(lr_schedule: LrSchedule, beyond: int, batch: int) -> None:
    assert lr_schedule.lr(lr_schedule.duration + beyond, batch) == lr_schedule.lr(lr_schedule.duration, batch)
    assert lr_schedule.momentum(lr_schedule.duration + beyond) == lr_schedule.momentum(lr_schedule.duration)


@given(schedules())
def test_history_survives_checkpoint_round_trip(lr_schedule: LrSchedule) -> None:
    fresh = replace(lr_schedule, ramps=(), validations=(), noise=None)
    facts = json.loads(json.dumps(lr_schedule.to_facts(), allow_nan=False))
    assert fresh.from_facts(facts) == lr_schedule


@given(
    st.integers(1, DURATION), st.sampled_from(["linear", "cosine"]), st.sampled_from(["zero", "base"]) | st.floats(0, 1)
)
def test_warmup_has_no_jump(warmup: int, shape: Any, start: Any) -> None:
    warming = make_schedule(warmup=warmup, warmup_shape=shape, warmup_from=start)
    lrs = [warming.lr(at, 400) for at in range(warmup + 1)]
    assert lrs[-1] == pytest.approx(0.4)
    steepest = 0.4 * math.pi / 2 / warmup
    steps = [after - before for before, after in itertools.pairwise(lrs)]
    assert min(steps) >= -1e-15
    assert max(steps) <= steepest * 1.0001


@given(schedules(), st.integers(0, DURATION), BATCHES)
def test_later_changes_do_not_alter_past_lr(lr_schedule: LrSchedule, samples: int, batch: int) -> None:
    later = max([samples, *(ramp.at for ramp in lr_schedule.ramps), *(at for at, _ in lr_schedule.validations)]) + 1
    grown = lr_schedule.resized(later, batch, 7).validated(later, 1.0)
    assert grown.lr(samples, batch) == lr_schedule.lr(samples, batch)
