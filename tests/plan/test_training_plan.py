"""The training plan: what a configuration means for given data at a given world size, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import ALIASES, LrConfig, RunConfig
from launcher.errors import UsageError
from launcher.plan.batch import PlanError
from launcher.plan.lr_schedule import LrScaleRamp
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan

SIZES = DatasetSizes(train=10_000, val=1000)
SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9}
PLAIN = RunConfig(optimizer=SGD, lr=LrConfig(base=0.1, base_batch=256))
RAMP = (("0dur", 0.25), ("0.1dur", 0.5), ("0.2dur", 1))


def make_config(keys: Mapping[str, Any] | None = None, optimizer: str = "torch.optim.SGD") -> RunConfig:
    """A configuration with keys given by name."""
    config = replace(PLAIN, optimizer={"_target_": optimizer})
    for key, value in (keys or {}).items():
        config = replace_key(config, key.split("."), value)
    return config


def replace_key(part: Any, names: list[str], value: Any) -> Any:
    name = ALIASES.get(names[0], names[0])
    assert is_dataclass(part)
    assert name in {field.name for field in fields(part)}
    return replace(part, **{name: value if len(names) == 1 else replace_key(getattr(part, name), names[1:], value)})


def make_plan(world: int = 1, sizes: DatasetSizes = SIZES, **keys: Any) -> TrainingPlan:
    return make_training_plan(make_config({key.replace("__", "."): value for key, value in keys.items()}), sizes, world)


# The batch


def test_scale_batch_and_lr_follow_world_size() -> None:
    for world, batch, scale in [(1, 64, 0.25), (3, 192, 0.75), (4, 256, 1), (5, 320, 1.25), (8, 512, 2)]:
        training_plan = make_plan(world, batch__per_device=64)
        assert (training_plan.batch_plan.global_batch, training_plan.schedule.scale(0, batch)) == (batch, scale)


def test_hold_keeps_batch_and_lr() -> None:
    training_plan = make_plan(3, batch__policy="hold", batch__global=256, batch__per_device=48)
    assert training_plan.batch_plan.shares == (86, 85, 85)
    assert training_plan.schedule.lr(0, 256) == 0.1
    assert training_plan.stages == ((0, training_plan.batch_plan),)


def test_global_batch_without_policy_selects_hold_with_advice() -> None:
    training_plan = make_plan(2, batch__global=100)
    assert (training_plan.policy, training_plan.batch_plan.global_batch) == ("hold", 100)
    assert training_plan.advice == ("batch.global=100 selects batch.policy=hold: the global batch is fixed",)


def test_full_batch_is_the_whole_training_set() -> None:
    training_plan = make_plan(3, batch__policy="hold", batch__global="full", batch__per_device=48)
    assert training_plan.batch_plan.global_batch == 10_000
    assert training_plan.batch_plan.per_device <= 48


def test_bounded_batch_is_clamped() -> None:
    keys = {"batch__policy": "bounded", "batch__min_global": 100, "batch__max_global": 200}
    assert [make_plan(world, **keys).batch_plan.global_batch for world in (1, 4, 9)] == [100, 128, 200]


def test_speeds_determine_shares() -> None:
    held = make_config({"batch.policy": "hold", "batch.global": 256, "batch.per_device": 128})
    assert make_training_plan(held, SIZES, 3, speeds=[1, 1, 0.5]).batch_plan.shares == (103, 102, 51)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ramp_stages_are_shares_of_planned_batch(world: int) -> None:
    training_plan = make_plan(world, batch__per_device=64, batch__ramp=RAMP)
    assert [(begin, plan.global_batch) for begin, plan in training_plan.stages] == [
        (0, 16 * world),
        (10_000, 32 * world),
        (20_000, 64 * world),
    ]
    assert training_plan.batch_plan.global_batch == training_plan.batch_at(99_999) == 64 * world
    assert training_plan.timeline.stages == training_plan.stages


def test_lr_follows_the_batch_ramp() -> None:
    training_plan = make_plan(4, DatasetSizes(10**6, 1000), batch__per_device=64, batch__ramp=RAMP)
    lrs = [
        training_plan.schedule.lr(at, training_plan.batch_at(at)) for at in (0, 999_999, 1_050_000, 1_100_000, 10**7)
    ]
    assert lrs == pytest.approx([0.025, 0.025, 0.0375, 0.05, 0.1])  # doubled linearly over 1 % of the duration


def test_ramp_shares_round_to_whole_samples() -> None:
    training_plan = make_plan(1, batch__per_device=10, batch__ramp=(("0ep", 0.25), ("1ep", 0.34), ("2ep", 1)))
    assert [plan.global_batch for _, plan in training_plan.stages] == [3, 3, 10]


# Durations


def test_durations_are_converted_to_samples() -> None:
    training_plan = make_plan(
        train__duration="4ep", schedule__warmup="10ba", train__validate_every="0.5ep", checkpoint__every="0.1dur"
    )
    assert (
        training_plan.duration,
        training_plan.warmup,
        training_plan.validate_every,
        training_plan.checkpoint_every,
    ) == (40_000, 2560, 5000, 4000)
    assert training_plan.checkpoint_every_s is None
    assert training_plan.timeline.duration == training_plan.schedule.duration == 40_000


def test_checkpoint_interval_may_be_a_time() -> None:
    training_plan = make_plan(checkpoint__every="10min")
    assert (training_plan.checkpoint_every, training_plan.checkpoint_every_s) == (None, 600)


def test_null_intervals_disable_periodic_actions() -> None:
    training_plan = make_plan(checkpoint__every=None, train__validate_every=None)
    assert (training_plan.validate_every, training_plan.checkpoint_every, training_plan.checkpoint_every_s) == (
        None,
        None,
        None,
    )


def test_token_duration_uses_tokens_per_sample() -> None:
    assert make_plan(sizes=DatasetSizes(1000, 100, tokens_per_sample=128), train__duration="1e6tok").duration == 7813


def test_five_epoch_warmup_matches_goyal() -> None:
    training_plan = make_training_plan(
        make_config({"schedule.warmup": "5ep", "schedule.warmup_from": "base", "train.duration": "90ep"}),
        DatasetSizes(1_281_167, 50_000),
        world=256,
    )
    assert (training_plan.batch_plan.global_batch, training_plan.warmup) == (8192, 6_405_835)
    assert training_plan.schedule.lr(6_405_835, 8192) == pytest.approx(3.2)


# The schedule


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        *[(f"torch.optim.{name}", "linear") for name in ("SGD", "ASGD")],
        *[(f"torch.optim.{name}", "sqrt") for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad")],
        *[(f"torch.optim.{name}", "sqrt") for name in ("RMSprop", "Adadelta", "Adafactor", "SparseAdam")],
        *[(name, "sqrt") for name in ("deepspeed.ops.adam.DeepSpeedCPUAdam", "deepspeed.ops.lamb.FusedLamb")],
        *[(name, "none") for name in ("torch.optim.Muon", "lion_pytorch.Lion", "mine.SignSGD")],
    ],
)
def test_auto_rule_follows_the_optimizer(optimizer: str, rule: str) -> None:
    assert make_training_plan(make_config(optimizer=optimizer), SIZES, 1).schedule.rule == rule


def test_explicit_rule_overrides_the_optimizer() -> None:
    training_plan = make_training_plan(make_config({"lr.rule": "none"}, optimizer="mine.Own"), SIZES, 1)
    assert (training_plan.rule, training_plan.schedule.rule) == ("none", "none")


def test_rprop_requires_the_full_batch() -> None:
    full = {"batch.policy": "hold", "batch.global": "full"}
    assert make_training_plan(make_config(full, "torch.optim.Rprop"), SIZES, 2).rule == "none"
    for keys in ({}, {"batch.global": 5000}, {**full, "batch.ramp": RAMP}):
        with pytest.raises(UsageError, match=r"optimizer=rprop .* sign of .* type batch\.global=full or another"):
            make_training_plan(make_config(keys, "torch.optim.Rprop"), SIZES, 2)


def test_step_decay_uses_configured_milestones() -> None:
    training_plan = make_plan(schedule__decay="step", schedule__milestones=("0.5dur", "8ep"), schedule__factor=0.2)
    assert training_plan.schedule.decay.milestones == (50_000, 80_000)
    assert training_plan.schedule.lr(80_000, 256) == pytest.approx(0.1 * 0.2**2)


def test_exponential_decays_each_epoch_by_default() -> None:
    assert make_plan(schedule__decay="exponential").schedule.decay.every == 10_000


def test_onecycle_warmup_is_30_percent_by_default() -> None:
    training_plan = make_plan(schedule__decay="onecycle", schedule__momentum=(0.85, 0.95))
    assert training_plan.warmup == 30_000
    assert training_plan.schedule.momentum(30_000) == 0.85


# Resuming from a checkpoint


def test_unchanged_resume_keeps_lr_history() -> None:
    before = make_plan(2, batch__per_device=64, batch__ramp=RAMP)
    facts = json.loads(json.dumps(before.schedule.to_facts()))
    for samples in (0, 5000, 10_000, 15_000, 90_000):
        assert make_plan(2, batch__per_device=64, batch__ramp=RAMP).with_lr_history(facts, samples) == before


def test_new_world_size_resizes_at_the_checkpoint() -> None:
    before = make_plan(1, batch__per_device=64)
    after = make_plan(4, batch__per_device=64).with_lr_history(before.schedule.to_facts(), 30_000)
    assert after.schedule.ramps[-1] == LrScaleRamp(at=30_000, over=25_600, start=0.25, batch=256)
    assert after.schedule.lr(30_000, 256) == 0.025
    assert after.schedule.lr(55_600, 256) == 0.1


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5000)), max_size=10))
def test_repeated_world_size_changes_do_not_compound(worlds: list[tuple[int, int]]) -> None:
    first = make_plan(4, batch__per_device=64)
    facts, samples = first.schedule.to_facts(), 0
    for world, steps in worlds:
        samples += steps
        facts = make_plan(world, batch__per_device=64).with_lr_history(facts, samples).schedule.to_facts()
    last = make_plan(4, batch__per_device=64).with_lr_history(facts, samples)
    assert last.schedule.lr(samples + 25_600, 256) == first.schedule.lr(0, 256)


# Advice


def test_advice_on_batch_far_from_base_batch() -> None:
    at_the_edge, beyond = {"lr.base_batch": 32}, {"lr.base_batch": 31}
    assert make_training_plan(make_config(at_the_edge), SIZES, 32).advice == ()
    (line,) = make_training_plan(make_config(beyond), SIZES, 32).advice
    assert line.startswith("the global batch is more than 32 x lr.base_batch=31")
    assert make_training_plan(make_config({**beyond, "lr.rule": "none"}), SIZES, 32).advice == ()
    adam = {"lr.base_batch": 32, "schedule.warmup": "0.1dur"}
    assert make_training_plan(make_config(adam, "torch.optim.AdamW"), SIZES, 8).advice == ()
    (line,) = make_training_plan(make_config(adam, "torch.optim.AdamW"), SIZES, 9).advice
    assert line.startswith("the global batch is more than 8 x lr.base_batch=32")


def test_advice_on_key_of_another_strategy() -> None:
    (line,) = make_training_plan(make_config({"strategy.stage": 3}), SIZES, 2).advice
    assert line == "strategy.stage=3 has no effect under strategy=ddp: it is for strategy=deepspeed"
    (line,) = make_training_plan(make_config({"strategy.reshard_after_forward": False}), SIZES, 2).advice
    assert line == "strategy.reshard_after_forward=false has no effect under strategy=ddp: it is for strategy=fsdp"
    assert (
        make_training_plan(
            make_config({"strategy.name": "fsdp", "strategy.reshard_after_forward": False}), SIZES, 2
        ).advice
        == ()
    )


def test_advice_on_goodput_with_sample_duration() -> None:
    """At 20 % efficiency ten epochs have the effect of two at the base batch."""
    (line,) = make_training_plan(make_config({"batch.policy": "goodput"}), SIZES, 2).advice
    assert "train.duration counts samples" in line
    target = {"train.target.metric": "val/accuracy", "train.target.at_least": 0.95, "train.stop_at_target": True}
    assert make_training_plan(make_config({"batch.policy": "goodput", **target}), SIZES, 2).advice == ()


@pytest.mark.parametrize(
    ("optimizer", "warmup", "advised"),
    [
        ("torch.optim.AdamW", "0ep", True),
        ("torch.optim.AdamW", "0.09dur", True),
        ("torch.optim.AdamW", "0.1dur", False),
        ("torch.optim.SGD", "0ep", False),
        ("torch.optim.RAdam", "0ep", False),  # RAdam rectifies its first updates itself
    ],
)
def test_advice_on_short_adam_warmup(optimizer: str, warmup: str, advised: bool) -> None:
    training_plan = make_training_plan(make_config({"schedule.warmup": warmup}, optimizer), SIZES, 1)
    assert bool(training_plan.advice) == advised
    assert all("2000 updates" in line for line in training_plan.advice)


def test_smaller_beta2_needs_shorter_warmup() -> None:
    adam = replace(
        make_config({"schedule.warmup": "40sp"}), optimizer={"_target_": "torch.optim.Adam", "betas": [0.9, 0.95]}
    )
    one = replace(adam, batch=replace(adam.batch, per_device=1))
    assert make_training_plan(one, SIZES, 1).advice == ()


def test_advice_on_unreachable_warmup_or_stages() -> None:
    (line,) = make_plan(schedule__warmup="20ep").advice
    assert line == "schedule.warmup is longer than train.duration: the learning rate never reaches its target"
    (line,) = make_plan(batch__ramp=(("0ep", 0.5), ("10ep", 1))).advice
    assert line == "batch.ramp has stages after train.duration: they are never reached"


# Refusals

REFUSED = [
    ({"lr.base": None}, "lr.base is not set: type e.g. lr.base=0.1 lr.base_batch=256"),
    ({"lr.base_batch": None}, "lr.base_batch is not set"),
    ({"lr.base": -0.1}, "lr.base=-0.1 is below 0: type a finite number above 0"),
    ({"lr.base": float("nan")}, "lr.base=nan is not a learning rate"),
    ({"lr.base": float("inf")}, "lr.base=inf is not a learning rate"),
    ({"lr.base_batch": 0}, "lr.base_batch=0 is below 1: type lr.base_batch=1 or more"),
    ({"batch.per_device": 0}, "batch.per_device=0 is below 1"),
    ({"batch.accumulation": 0}, "batch.accumulation=0 is below 1"),
    ({"batch.policy": "hold"}, "batch.policy=hold needs a global batch: type batch.global=256"),
    ({"batch.policy": "hold", "batch.global": -4}, "batch.global=-4 is below 1"),
    ({"batch.global": 10_001}, "batch.global=10001 exceeds the 10000 training samples: type batch.global=full"),
    ({"batch.global": "divisible"}, "batch.global=divisible works only with launcher plan, which finds the batch"),
    ({"batch.policy": "bounded", "batch.global": "divisible", "batch.max_global": 9}, "batch.global=divisible does"),
    ({"batch.policy": "goodput", "batch.global": "divisible"}, "batch.global=divisible does not work with batch"),
    ({"batch.policy": "bounded"}, "batch.policy=bounded has no bound"),
    ({"batch.policy": "bounded", "batch.max_global": 9, "batch.global": 9}, "batch.global=9 does not work with"),
    ({"batch.policy": "bounded", "batch.max_global": 9, "batch.min_global": 10}, "batch.min_global=10 is above"),
    ({"batch.max_global": 9}, "batch.max_global=9 has no effect under batch.policy=scale: type batch=bounded"),
    ({"batch.ramp": ()}, "batch.ramp=[] has no stage"),
    ({"batch.ramp": (("1ep", 1),)}, "batch.ramp: 1ep is out of order"),
    ({"batch.ramp": (("0ep", 0.5), ("2ep", 0.7), ("2ep", 1))}, "batch.ramp: 2ep is out of order"),
    ({"batch.ramp": (("0ep", 0),)}, "batch.ramp: 0 is not a share above 0"),
    ({"batch.ramp": (("0ep", -1.0),)}, "batch.ramp: -1.0 is not a share above 0"),
    ({"batch.ramp": (("0ep", float("nan")),)}, "batch.ramp: nan is not a share above 0"),
    ({"batch.ramp": ("0ep",)}, "batch.ramp: 0ep is not a time and a share"),
    ({"batch.ramp": (("0xx", 1),)}, "batch.ramp=0xx has the unknown unit xx"),
    ({"batch.ramp": (("0ep", 1), ("1ep", 1000))}, "batch.ramp: the share 1000 of 32 is a batch of 32000, above"),
    ({"train.duration": "0ep"}, "train.duration=0ep is zero samples: type train.duration=10ep"),
    ({"train.duration": "0.5dur"}, "train.duration=0.5dur would be a share of itself"),
    ({"train.duration": "10min"}, "train.duration=10min is a time"),
    ({"train.duration": "1e6tok"}, "train.duration=1e+06tok needs a recipe with tokens_per_sample"),
    ({"train.validate_every": "10min"}, "train.validate_every=10min is a time"),
    ({"train.validate_every": "0ep"}, "train.validate_every=0ep is not an interval"),
    ({"schedule.warmup": "-1ep"}, "schedule.warmup=-1ep is negative"),
    ({"schedule.warmup": "infep"}, "schedule.warmup=infep is not finite"),
    ({"schedule.warmup_from": 1.5}, "schedule.warmup_from=1.5 is not a share of the learning rate"),
    ({"schedule.decay": "step"}, "schedule.milestones=[] with schedule.every=None: schedule=step needs exactly one"),
    (
        {"schedule.decay": "step", "schedule.milestones": ("1ep",), "schedule.every": "1ep"},
        "schedule.milestones=['1ep']",
    ),
    ({"schedule.decay": "step", "schedule.every": "0ep"}, "schedule.every=0ep is not an interval"),
    ({"schedule.factor": 2.0}, "schedule.factor=2.0 would not lower the learning rate"),
    ({"schedule.end": -0.1}, "schedule.end=-0.1 is not a share of the learning rate"),
    ({"schedule.patience": 0}, "schedule.patience=0 is below 1"),
    ({"schedule.momentum": (0.8, 0.9)}, "schedule.momentum=[0.8, 0.9] has no effect under schedule=constant"),
    (
        {"schedule.decay": "onecycle", "schedule.momentum": (0.9, 0.8)},
        "schedule.momentum=[0.9, 0.8] is not [low, high]",
    ),
    ({"schedule.decay": "onecycle", "schedule.warmup_from": "base"}, "schedule.warmup_from=base has no effect"),
    ({"checkpoint.keep": 0}, "checkpoint.keep=0 is below 1"),
    ({"checkpoint.every": "0min"}, "checkpoint.every=0min is not an interval: type checkpoint.every=1ep"),
    ({"checkpoint.every": "-10min"}, "checkpoint.every=-10min is negative"),
    ({"log.every": 0}, "log.every=0 is below 1"),
    ({"elastic.min_workers": 4, "elastic.max_workers": 2}, "elastic.max_workers=2 is below elastic.min_workers=4"),
    ({"elastic.shards": 4}, "elastic.shards=4 has no effect without elastic.exact=true: type"),
    ({"elastic.hang_timeout_s": 0.0}, "elastic.hang_timeout_s=0.0 is below 1 second"),
    ({"elastic.hang_timeout_s": math.nan}, "elastic.hang_timeout_s=nan is below 1 second"),
    ({"elastic.first_timeout_s": 5.0}, "elastic.first_timeout_s=5.0 is below elastic.hang_timeout_s=8.0"),
    ({"train.target.metric": "val/loss"}, "train.target.metric=val/loss needs either train.target.at_least= or"),
    ({"train.target.at_least": 0.9}, "train.target.metric is not set"),
    ({"train.target.at_least": math.nan}, "train.target.at_least=nan is not a bound"),
    ({"train.stop_at_target": True}, "train.stop_at_target=true has no target"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_invalid_key_is_refused_with_fix(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_training_plan(make_config(keys), SIZES, 1)
    assert str(caught.value).startswith(message)
    assert "type " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_target_needs_exactly_one_bound() -> None:
    both = {"train.target.metric": "val/loss", "train.target.at_least": 1.0, "train.target.at_most": 2.0}
    with pytest.raises(UsageError, match=r"train\.target\.metric=val/loss needs either .* or "):
        make_training_plan(make_config(both), SIZES, 1)
    del both["train.target.at_least"]
    assert make_training_plan(make_config(both), SIZES, 1).config.train.target.at_most == 2.0


def test_unknown_optimizer_needs_an_explicit_rule() -> None:
    with pytest.raises(UsageError, match=r"lr\.rule=auto does not know optimizer\._target_=mine\.Own: type lr\.rule="):
        make_training_plan(make_config(optimizer="mine.Own"), SIZES, 1)


def test_empty_dataset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"recipe: the training data are empty"):
        make_training_plan(PLAIN, DatasetSizes(0, 100), 1)
    with pytest.raises(UsageError, match=r"train\.validate_every=1ep but .* empty"):
        make_training_plan(PLAIN, DatasetSizes(100, 0), 1)
    assert (
        make_training_plan(make_config({"train.validate_every": None}), DatasetSizes(100, 0), 1).validate_every is None
    )


WORLDS = [
    ({"elastic.min_workers": 2}, 1, "elastic.min_workers=2 but this job has 1: start 2 workers or more"),
    ({"elastic.max_workers": 2}, 3, "elastic.max_workers=2 but this job has 3: start 2 workers or fewer"),
    (
        {"batch.per_device": 5000},
        3,
        "batch.per_device=5000 makes a global batch of 15000 at 3 workers, more than the 10000",
    ),
    (
        {"batch.global": 9},
        16,
        "batch.global=9 is below 16 workers: type batch.global=16 or more, or elastic.allow_idle=true",
    ),
    ({"batch.global": 8, "batch.ramp": RAMP}, 4, "batch.ramp: the share 0.25 of 8 is a batch of 2, below 4 workers"),
]


@pytest.mark.parametrize(("keys", "world", "message"), WORLDS, ids=[message[:30] for _, _, message in WORLDS])
def test_unsupported_world_size_raises_plan_error(keys: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_training_plan(make_config(keys), SIZES, world)
    assert str(caught.value).startswith(message)


def test_invalid_key_is_refused_before_world_size() -> None:
    with pytest.raises(UsageError, match=r"schedule\.warmup=-1ep is negative"):
        make_training_plan(make_config({"elastic.min_workers": 2, "schedule.warmup": "-1ep"}), SIZES, 1)


@pytest.mark.parametrize(
    ("keys", "world", "fix"),
    [
        ({"batch.per_device": 5000}, 3, "type batch.per_device=3333 or less, or batch.global=10000"),
        ({"batch.per_device": 1}, 10_001, "start 10000 workers or fewer"),
        ({"batch.policy": "bounded", "batch.min_global": 20_000}, 3, "type batch.max_global=10000 or less"),
    ],
)
def test_batch_larger_than_dataset_names_the_limit(keys: dict[str, Any], world: int, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_training_plan(make_config(keys), SIZES, world)
    assert fix in str(caught.value)


def test_idle_workers_may_be_allowed() -> None:
    training_plan = make_plan(4, batch__global=8, batch__ramp=RAMP, elastic__allow_idle=True)
    assert training_plan.stages[0][1].shares == (1, 1, 0, 0)


def test_advice_on_noise_rule() -> None:
    (alone,) = make_training_plan(make_config({"lr.rule": "noise"}), SIZES, 1).advice
    assert alone.startswith("lr.rule=noise needs at least 2 workers or micro-batches")
    assert alone.endswith("type batch.accumulation=2")
    for keys, world in (({}, 2), ({"batch.accumulation": 2}, 1)):
        (line,) = make_training_plan(make_config({"lr.rule": "noise", **keys}), SIZES, world).advice
        assert line.startswith("lr.rule=noise: the gradient noise scale is known after about twenty updates")
