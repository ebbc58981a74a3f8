"""What an existing run directory means for a new command. Keys that affect the training are listed by name."""

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
from launcher.run_dir.resume import (
    ResumeDecision,
    check_data_length,
    decide_resume,
    find_changed_keys,
    is_change_allowed,
)

FOLDER = Path("runs/one")
DEFAULTS = flatten(
    RunConfig(recipe={"_target_": "launcher.recipes.mlp.Mlp", "width": 64}, optimizer={"_target_": "torch.optim.SGD"})
)


def config_with(**changes: Any) -> dict[str, Any]:
    """The default configuration with other values; `batch__per_device` is batch.per_device."""
    return {**DEFAULTS, **{name.replace("__", "."): value for name, value in changes.items()}}


def decide(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], resume: str = "auto", **options: Any
) -> ResumeDecision:
    return decide_resume(resume, FOLDER, old, new, **options)


# --- values of resume ---------------------------------------------------------------------------------------------


def test_auto_resumes_only_an_existing_run() -> None:
    assert decide(None, DEFAULTS) == ResumeDecision(is_new_run=True)
    assert decide(DEFAULTS, DEFAULTS) == ResumeDecision()


def test_never_starts_a_new_run() -> None:
    assert decide(None, DEFAULTS, "never") == ResumeDecision(is_new_run=True)
    assert decide(DEFAULTS, config_with(seed=5), "never") == ResumeDecision(is_new_run=True)


def test_must_requires_an_existing_run() -> None:
    assert decide(DEFAULTS, DEFAULTS, "must") == ResumeDecision(require_checkpoint=True)
    with pytest.raises(
        UsageError, match=r"^resume=must but runs/one contains no run: check run\.name, or type resume=a"
    ):
        decide(None, DEFAULTS, "must")


def test_path_selects_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "update-00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(Manifest({}, {}, {}, {}, 1, {}).to_json())
    assert decide(None, DEFAULTS, str(checkpoint)) == ResumeDecision(checkpoint=checkpoint)
    assert decide(DEFAULTS, DEFAULTS, str(checkpoint)) == ResumeDecision(checkpoint=checkpoint)
    with pytest.raises(UsageError, match=r"other values of seed \(0 before, 5 now\)"):
        decide(DEFAULTS, config_with(seed=5), str(checkpoint))


@pytest.mark.parametrize("value", ["alway", "", "true", "runs/gone/checkpoints/update-00000001"])
def test_invalid_resume_value_is_refused(value: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^resume={re.escape(value or '.')} is not a checkpoint: type auto, never, must"
    ):
        decide(None, DEFAULTS, value)


# --- keys that may change -----------------------------------------------------------------------------------------

#: Every key of the configuration is in one of these; a new key has to be classified deliberately.
MAY_CHANGE = {
    "checkpoint.every", "checkpoint.keep", "checkpoint.sharded", "data.prefetch_factor", "data.num_workers", "debug",
    "elastic.balance", "elastic.first_timeout_s", "elastic.hang_timeout_s", "elastic.allow_idle",
    "elastic.max_restarts",
    "elastic.max_workers", "elastic.min_workers", "format", "launch.account", "launch.backend", "launch.constraint",
    "launch.dry_run", "launch.env", "launch.extra", "launch.grace_s", "launch.kind", "launch.nodes", "launch.partition",
    "launch.qos", "launch.threads", "launch.time", "launch.timeout_s", "launch.workers", "log.every", "plan.memory",
    "plan.noise", "plan.world_sizes",
    "resume", "run.dir", "run.name", "sink", "strategy.config", "strategy.find_unused_parameters",
    "strategy.param_dtype",
    "strategy.meta_init",
    "strategy.name", "strategy.offload", "strategy.reshard_after_forward", "strategy.stage", "strategy.static_graph",
    "sweep.max_parallel", "sweep.metric",
    "sweep.mode", "sweep.trials", "train.activation_checkpointing",
    "train.device", "train.profile", "train.stop_at_target", "train.target.at_least", "train.target.at_most",
    "train.target.metric", "train.validate_every", "tune.budget_s", "tune.max", "tune.out", "tune.sizes",
}  # fmt: skip
MAY_NOT_CHANGE = {
    "batch.accumulation", "batch.global", "batch.max_global", "batch.min_global", "batch.per_device", "batch.policy",
    "batch.ramp", "checkpoint.best", "checkpoint.best_mode", "checkpoint.dir", "data.source", "data.tail",
    "elastic.exact", "elastic.shards", "lr.base",
    "lr.base_batch", "lr.rule", "model.init", "model.strict", "optimizer", "recipe", "schedule.decay", "schedule.end",
    "schedule.every", "schedule.factor", "schedule.metric", "schedule.milestones", "schedule.min", "schedule.mode",
    "schedule.momentum", "schedule.patience", "schedule.per", "schedule.start", "schedule.warmup",
    "schedule.warmup_from", "schedule.warmup_shape", "seed", "train.clip_norm", "train.compile", "train.decay_norms",
    "train.precision",
}  # fmt: skip


def test_every_key_is_classified() -> None:
    assert not MAY_CHANGE & MAY_NOT_CHANGE
    assert set(config_keys()) == MAY_CHANGE | MAY_NOT_CHANGE | {"train.duration"}


@pytest.mark.parametrize("key", sorted(MAY_CHANGE))
def test_harmless_keys_may_change(key: str) -> None:
    old, new = {**DEFAULTS, key: "before"}, {**DEFAULTS, key: "now"}
    assert decide(old, new) == ResumeDecision(changed={key: ("before", "now")})


@pytest.mark.parametrize("key", sorted(MAY_NOT_CHANGE))
def test_training_keys_may_not_change(key: str) -> None:
    with pytest.raises(UsageError) as error:
        decide({**DEFAULTS, key: "before"}, {**DEFAULTS, key: "now"})
    assert str(error.value) == (
        f"runs/one was trained with other values of {key} (before before, now now): "
        f"type run.name=... for a new run, or resume=never"
    )


def test_all_refused_keys_are_named_at_once() -> None:
    with pytest.raises(
        UsageError, match=r"other values of lr\.base \(null before, 0\.1 now\), seed \(0 before, 5 now\): type"
    ):
        decide(DEFAULTS, config_with(seed=5, lr__base=0.1, log__every=10))


@pytest.mark.parametrize("key", ["recipe.width", "optimizer.momentum", "recipe.data"])
def test_recipe_and_optimizer_fields_may_not_change(key: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{key} (null before, 0.5 now)")):
        decide({**DEFAULTS, key: None}, {**DEFAULTS, key: 0.5})
    with pytest.raises(UsageError, match=re.escape(f"{key} (null before, 0.5 now)")):
        decide({name: value for name, value in DEFAULTS.items() if name != key} | {key: None}, {**DEFAULTS, key: 0.5})


UNLEARNED = {"recipe.data": "/data", "recipe.cache": None, "recipe.options": None}


def test_recipe_fields_that_do_not_alter_what_is_learned_may_change() -> None:
    old, new = config_with(recipe__data="/old", recipe__options__a=1), config_with(recipe__data="/new")
    changed = {"recipe.data": ("/old", "/new"), "recipe.options.a": (1, None)}
    assert decide(old, new, unlearned=UNLEARNED).changed == changed
    with pytest.raises(UsageError, match=r"other values of recipe\.data \(/old before, /new now\), recipe\.options\.a"):
        decide(old, new)
    for other in ("recipe.width", "recipe.data_augmentation", "recipe._target_", "seed"):
        with pytest.raises(UsageError, match=rf"other values of {re.escape(other)} \(\S+ before, 9 now\): type"):
            decide(old, {**new, other: 9}, unlearned=UNLEARNED)


def test_value_that_was_not_set_is_the_default() -> None:
    assert decide(DEFAULTS, config_with(recipe__data="/new"), unlearned=UNLEARNED).changed == {
        "recipe.data": ("/data", "/new")
    }
    assert decide(config_with(recipe__data="/data"), DEFAULTS, unlearned=UNLEARNED) == ResumeDecision()


@pytest.mark.parametrize("length", [63, 65, 1, 6400])
def test_data_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    manifest = Manifest({}, {}, {}, {}, 1, {}, {"data": {"train": 64, "val": 8}})
    check_data_length(tmp_path, manifest, 64)
    with pytest.raises(UsageError) as error:
        check_data_length(tmp_path, manifest, length)
    assert f"training data has {length} samples now, and had 64 when {tmp_path} was saved" in str(error.value)
    assert "restore the data of before, or type run.name=..." in str(error.value)
    assert "model.init" not in str(error.value), "there is no such file"
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=re.escape(f"model.init={tmp_path / 'model.safetensors'}")):
        check_data_length(tmp_path, manifest, length)


def test_checkpoint_of_an_earlier_version_has_no_length(tmp_path: Path) -> None:
    check_data_length(tmp_path, Manifest({}, {}, {}, {}, 1, {}), 65)


def test_hold_allows_other_micro_batches() -> None:
    held = config_with(batch__policy="hold", batch__global=256)
    smaller = {**held, "batch.per_device": 16, "batch.accumulation": 4}
    assert set(decide(held, smaller).changed) == {"batch.per_device", "batch.accumulation"}
    with pytest.raises(UsageError, match=r"batch\.global \(256 before, 512 now\)"):
        decide(held, {**smaller, "batch.global": 512})
    with pytest.raises(UsageError, match=r"batch\.policy \(scale before, hold now\)"):
        decide(DEFAULTS, held)


@pytest.mark.parametrize("policy", ["scale", "bounded"])
def test_other_policies_forbid_batch_changes(policy: str) -> None:
    old = config_with(batch__policy=policy)
    for key in ("batch.per_device", "batch.accumulation", "batch.max_global"):
        with pytest.raises(UsageError, match=re.escape(key)):
            decide(old, {**old, key: 7})


def test_plateau_schedule_forbids_other_validation_interval() -> None:
    plateau = config_with(schedule__decay="plateau")
    with pytest.raises(UsageError, match=r"train\.validate_every \(1ep before, 2ep now\)"):
        decide(plateau, {**plateau, "train.validate_every": "2ep"})


def test_masked_secrets_compare_equal() -> None:
    old, new = (
        config_with(recipe__data="https://me:***@host/data"),
        config_with(recipe__data="https://me:***@host/data"),
    )
    assert decide(old, new) == ResumeDecision()


def test_changed_keys_serialize_to_json() -> None:
    changed = decide(DEFAULTS, config_with(data__num_workers=2, run__name="one")).changed
    assert json.loads(json.dumps(changed)) == {"data.num_workers": [0, 2], "run.name": [None, "one"]}
    assert find_changed_keys({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}


# --- duration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("was", "now"), [("10ep", "20ep"), ("10ep", "10.0ep"), ("1e3sp", "2000sp"), ("500ba", "10ep")])
def test_longer_duration_resumes(was: str, now: str) -> None:
    old, new = config_with(train__duration=was), config_with(train__duration=now)
    assert decide(old, new).changed == {"train.duration": (was, now)}


@pytest.mark.parametrize(("was", "now"), [("10ep", "5ep"), ("2000sp", "1e3sp")])
def test_shorter_duration_is_refused_unless_done(was: str, now: str) -> None:
    old, new = config_with(train__duration=was), config_with(train__duration=now)
    with pytest.raises(UsageError, match=rf"train\.duration \({was} before, {now} now\)"):
        decide(old, new)
    assert decide(old, new, done=True).changed == {"train.duration": (was, now)}
    with pytest.raises(UsageError, match="other values of seed"):
        decide(old, {**new, "seed": 1}, done=True)


def test_mixed_duration_units_compare_in_samples() -> None:
    samples = {"10ep": 1000, "20ba": 640, "40ba": 1280}.__getitem__
    old = config_with(train__duration="10ep")
    assert decide(old, config_with(train__duration="40ba"), samples_of=samples).changed
    with pytest.raises(UsageError, match="20ba now"):
        decide(old, config_with(train__duration="20ba"), samples_of=samples)


def test_single_key_rule() -> None:
    assert is_change_allowed("sink.wandb.project", ("a", "b"), DEFAULTS, False, None)
    assert not is_change_allowed("seed", (0, 1), DEFAULTS, False, None)
