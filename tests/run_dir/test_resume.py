"""What an existing run folder means for a new command. Keys that affect the training are listed by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.manifest import Manifest
from launcher.config.keys import config_keys, flatten
from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.run_dir.resume import ResumeDecision, decide_resume, find_changed_keys, is_change_allowed

FOLDER = Path("runs/one")
USUAL = flatten(
    RunConfig(recipe={"_target_": "launcher.recipes.mlp.Mlp", "width": 64}, optimizer={"_target_": "torch.optim.SGD"})
)


def asked(**changes: Any) -> dict[str, Any]:
    """The default configuration with other values; `batch__per_device` is batch.per_device."""
    return {**USUAL, **{name.replace("__", "."): value for name, value in changes.items()}}


def decided(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], resume: str = "auto", **options: Any
) -> ResumeDecision:
    return decide_resume(resume, FOLDER, old, new, **options)


# --- values of resume ---------------------------------------------------------------------------------------------


def test_auto_begins_where_there_is_nothing_and_goes_on_where_there_is() -> None:
    assert decided(None, USUAL) == ResumeDecision(fresh=True)
    assert decided(USUAL, USUAL) == ResumeDecision()


def test_never_is_a_new_run_whatever_is_there() -> None:
    assert decided(None, USUAL, "never") == ResumeDecision(fresh=True)
    assert decided(USUAL, asked(seed=5), "never") == ResumeDecision(fresh=True)


def test_must_needs_something_to_go_on_from() -> None:
    assert decided(USUAL, USUAL, "must") == ResumeDecision(require_checkpoint=True)
    with pytest.raises(
        UsageError, match=r"^resume=must but runs/one contains no run: check run\.name, or type resume=a"
    ):
        decided(None, USUAL, "must")


def test_a_path_is_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "update-00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(Manifest({}, {}, {}, {}, 1, {}).to_json())
    assert decided(None, USUAL, str(checkpoint)) == ResumeDecision(checkpoint=checkpoint)
    assert decided(USUAL, USUAL, str(checkpoint)) == ResumeDecision(checkpoint=checkpoint)
    with pytest.raises(UsageError, match=r"other values of seed \(0 before, 5 now\)"):
        decided(USUAL, asked(seed=5), str(checkpoint))


@pytest.mark.parametrize("word", ["alway", "", "true", "runs/gone/checkpoints/update-00000001"])
def test_a_word_that_is_none_of_them_is_refused_before_anything_starts(word: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^resume={re.escape(word or '.')} is not a checkpoint: type auto, never, must"
    ):
        decided(None, USUAL, word)


# --- keys that may change -----------------------------------------------------------------------------------------

#: Every key of the configuration is in one of these; a new key has to be classified deliberately.
MAY = {
    "checkpoint.every", "checkpoint.keep", "checkpoint.sharded", "data.prefetch_factor", "data.num_workers", "debug",
    "elastic.balance", "elastic.first_timeout_s", "elastic.hang_timeout_s", "elastic.allow_idle", "elastic.max_restarts",
    "elastic.max_workers", "elastic.min_workers", "format", "launch.account", "launch.backend", "launch.constraint",
    "launch.dry_run", "launch.env", "launch.extra", "launch.kind", "launch.nodes", "launch.partition", "launch.qos",
    "launch.threads", "launch.time", "launch.timeout_s", "launch.workers", "log.every", "plan.memory", "plan.noise",
    "plan.world_sizes",
    "resume", "run.dir", "run.name", "sink", "strategy.config", "strategy.find_unused_parameters", "strategy.param_dtype",
    "strategy.meta_init",
    "strategy.name", "strategy.offload", "strategy.reshard_after_forward", "strategy.stage", "sweep.max_parallel", "sweep.metric",
    "sweep.mode", "sweep.trials", "train.activation_checkpointing",
    "train.device", "train.profile", "train.stop_at_target", "train.target.at_least", "train.target.at_most",
    "train.target.metric", "train.validate_every", "tune.budget_s", "tune.max", "tune.out", "tune.sizes",
}  # fmt: skip
MAY_NOT = {
    "batch.accumulation", "batch.global", "batch.max_global", "batch.min_global", "batch.per_device", "batch.policy",
    "batch.ramp", "checkpoint.best", "checkpoint.best_mode", "checkpoint.dir", "data.source", "data.tail",
    "elastic.exact", "elastic.shards", "lr.base",
    "lr.base_batch", "lr.rule", "model.init", "model.strict", "optimizer", "recipe", "schedule.decay", "schedule.end",
    "schedule.every", "schedule.factor", "schedule.metric", "schedule.milestones", "schedule.min", "schedule.mode",
    "schedule.momentum", "schedule.patience", "schedule.per", "schedule.start", "schedule.warmup",
    "schedule.warmup_from", "schedule.warmup_shape", "seed", "train.clip_norm", "train.compile", "train.decay_norms",
    "train.precision",
}  # fmt: skip


def test_every_key_was_thought_of() -> None:
    assert not MAY & MAY_NOT
    assert set(config_keys()) == MAY | MAY_NOT | {"train.duration"}


@pytest.mark.parametrize("key", sorted(MAY))
def test_what_does_not_alter_what_is_learned_may_change_and_is_told(key: str) -> None:
    old, new = {**USUAL, key: "before"}, {**USUAL, key: "now"}
    assert decided(old, new) == ResumeDecision(changed={key: ("before", "now")})


@pytest.mark.parametrize("key", sorted(MAY_NOT))
def test_what_alters_it_is_refused_with_both_values_and_the_mend(key: str) -> None:
    with pytest.raises(UsageError) as error:
        decided({**USUAL, key: "before"}, {**USUAL, key: "now"})
    assert str(error.value) == (
        f"runs/one was trained with other values of {key} (before before, now now): "
        f"type run.name=... for a new run, or resume=never"
    )


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(
        UsageError, match=r"other values of lr\.base \(null before, 0\.1 now\), seed \(0 before, 5 now\): type"
    ):
        decided(USUAL, asked(seed=5, lr__base=0.1, log__every=10))


@pytest.mark.parametrize("key", ["recipe.width", "optimizer.momentum", "recipe.data"])
def test_a_field_of_the_recipe_or_the_optimizer_is_what_is_learned(key: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{key} (null before, 0.5 now)")):
        decided({**USUAL, key: None}, {**USUAL, key: 0.5})
    with pytest.raises(UsageError, match=re.escape(f"{key} (null before, 0.5 now)")):
        decided({name: value for name, value in USUAL.items() if name != key} | {key: None}, {**USUAL, key: 0.5})


def test_under_hold_the_batch_may_be_cut_up_otherwise() -> None:
    held = asked(batch__policy="hold", batch__global=256)
    smaller = {**held, "batch.per_device": 16, "batch.accumulation": 4}
    assert set(decided(held, smaller).changed) == {"batch.per_device", "batch.accumulation"}
    with pytest.raises(UsageError, match=r"batch\.global \(256 before, 512 now\)"):
        decided(held, {**smaller, "batch.global": 512})
    with pytest.raises(UsageError, match=r"batch\.policy \(scale before, hold now\)"):
        decided(USUAL, held)


@pytest.mark.parametrize("policy", ["scale", "bounded"])
def test_where_the_batch_follows_them_they_may_not(policy: str) -> None:
    old = asked(batch__policy=policy)
    for key in ("batch.per_device", "batch.accumulation", "batch.max_global"):
        with pytest.raises(UsageError, match=re.escape(key)):
            decided(old, {**old, key: 7})


def test_validating_at_other_times_changes_a_rate_that_listens() -> None:
    plateau = asked(schedule__decay="plateau")
    with pytest.raises(UsageError, match=r"train\.validate_every \(1ep before, 2ep now\)"):
        decided(plateau, {**plateau, "train.validate_every": "2ep"})


def test_a_masked_secret_is_the_same_secret() -> None:
    old, new = asked(recipe__data="https://me:***@host/data"), asked(recipe__data="https://me:***@host/data")
    assert decided(old, new) == ResumeDecision()


def test_what_changed_can_be_an_event() -> None:
    changed = decided(USUAL, asked(data__num_workers=2, run__name="one")).changed
    assert json.loads(json.dumps(changed)) == {"data.num_workers": [0, 2], "run.name": [None, "one"]}
    assert find_changed_keys({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}


# --- duration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("was", "now"), [("10ep", "20ep"), ("10ep", "10.0ep"), ("1e3sp", "2000sp"), ("500ba", "10ep")])
def test_a_longer_duration_goes_on(was: str, now: str) -> None:
    old, new = asked(train__duration=was), asked(train__duration=now)
    assert decided(old, new).changed == {"train.duration": (was, now)}


@pytest.mark.parametrize(("was", "now"), [("10ep", "5ep"), ("2000sp", "1e3sp")])
def test_a_shorter_one_is_another_run_unless_all_is_done(was: str, now: str) -> None:
    old, new = asked(train__duration=was), asked(train__duration=now)
    with pytest.raises(UsageError, match=rf"train\.duration \({was} before, {now} now\)"):
        decided(old, new)
    assert decided(old, new, done=True).changed == {"train.duration": (was, now)}
    with pytest.raises(UsageError, match="other values of seed"):
        decided(old, {**new, "seed": 1}, done=True)


def test_durations_in_different_units_are_compared_in_samples() -> None:
    samples = {"10ep": 1000, "20ba": 640, "40ba": 1280}.__getitem__
    old = asked(train__duration="10ep")
    assert decided(old, asked(train__duration="40ba"), samples_of=samples).changed
    with pytest.raises(UsageError, match="20ba now"):
        decided(old, asked(train__duration="20ba"), samples_of=samples)


def test_the_rule_for_one_key_is_a_plain_function() -> None:
    assert is_change_allowed("sink.wandb.project", ("a", "b"), USUAL, False, None)
    assert not is_change_allowed("seed", (0, 1), USUAL, False, None)
