"""From the command line to the frozen `RunConfig`: composition, conversion, refusals and display."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli.help import format_help
from launcher.config import compose
from launcher.config.keys import config_keys, flatten, from_mapping, to_mapping
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.sweep import points, run_sweep

RECIPE = """\
# @package _global_
defaults:
  - override /schedule: cosine
recipe:
  _target_: tiny.Tiny
  trust: [tiny]
  width: 16
  data: null
lr:
  base: 0.1
  base_batch: 64
train:
  duration: 3ep
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's --config-dir with a custom recipe, next to an empty current folder."""
    mine = tmp_path / "mine"
    (mine / "recipe").mkdir(parents=True)
    (mine / "recipe" / "tiny.yaml").write_text(RECIPE)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return mine


@pytest.fixture
def composed(folder: Path) -> Any:
    return lambda *overrides: compose.resolve(["--config-dir", str(folder), "recipe=tiny", *overrides])


@pytest.fixture
def compose_config(composed: Any) -> Any:
    return lambda *overrides: composed(*overrides).config


@pytest.fixture
def refusal(composed: Any) -> Any:
    def refused(*overrides: str) -> str:
        with pytest.raises(UsageError) as caught:
            composed(*overrides)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refused


# --- composing ----------------------------------------------------------------------------------------------------


def test_a_recipe_chooses_its_schedule_and_values_and_the_rest_has_defaults(compose_config: Any) -> None:
    made = compose_config()
    assert (made.schedule.decay, made.lr.base, made.train.duration) == ("cosine", 0.1, "3ep")
    assert made.optimizer["_target_"] == "torch.optim.SGD"
    assert (made.batch, made.data) == (RunConfig().batch, RunConfig().data)


def test_the_command_line_has_the_last_word(compose_config: Any) -> None:
    made = compose_config("schedule=step", "optimizer=adamw", "train.duration=5ep", "recipe.width=64", "lr.base=1e-3")
    assert (made.schedule.decay, made.schedule.milestones) == ("step", ("0.5dur", "0.75dur"))
    assert (made.train.duration, made.recipe["width"], made.lr.base) == ("5ep", 64, 0.001)
    assert made.optimizer["_target_"] == "torch.optim.AdamW"


def test_a_users_file_wins_over_a_shipped_one_of_the_same_name(folder: Path) -> None:
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.SGD\nmomentum: 0.5\n")
    made = compose.compose(["recipe=tiny", "--config-dir", str(folder)])
    assert made.optimizer == {"_target_": "torch.optim.SGD", "momentum": 0.5}


def test_of_two_folders_the_first_wins(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "first" / "recipe").mkdir(parents=True)
    (tmp_path / "first" / "recipe" / "tiny.yaml").write_text(RECIPE.replace("width: 16", "width: 32"))
    made = compose.compose(["-cd", str(tmp_path / "first"), f"--config-dir={folder}", "recipe=tiny"])
    assert made.recipe["width"] == 32


def test_hydras_own_search_path_is_searched_too(folder: Path) -> None:
    made = compose.compose([f"hydra.searchpath=['file://{folder}']", "recipe=tiny"])
    assert made.recipe["width"] == 16


def test_a_folder_that_is_not_there_is_never_ignored(refusal: Any) -> None:
    assert "--config-dir nowhere is not a folder" in refusal("--config-dir", "nowhere")


def test_the_programs_own_configuration_cannot_be_replaced(folder: Path, refusal: Any) -> None:
    (folder / "launcher.yaml").write_text("seed: 1\n")
    assert "contains launcher.yaml, a name reserved for the program" in refusal()


@pytest.mark.parametrize(
    ("choice", "sinks"),
    [
        (None, ["console", "wandb"]),
        ("sink=wandb", ["wandb"]),
        ("sink=[console,tensorboard]", ["console", "tensorboard"]),
        ("sink=[]", []),
    ],
)
def test_sinks_are_a_list_of_choices(compose_config: Any, choice: str | None, sinks: list[str]) -> None:
    assert list(compose_config(*([choice] if choice else [])).sink) == sinks


@pytest.mark.parametrize("nth", range(7))
def test_every_shipped_choice_composes(compose_config: Any, nth: int) -> None:
    """Combine the nth choice of each group; a group with fewer choices wraps around."""
    shipped = Path(compose.__file__).parent.parent / "conf"
    choices = []
    for group in ("strategy", "batch", "optimizer", "schedule", "launch", "sink"):
        names = sorted(path.stem for path in (shipped / group).glob("*.yaml"))
        assert 0 < len(names) <= 7
        choices.append(f"{group}={names[nth % len(names)]}")
    assert "lr" not in compose_config(*choices).optimizer


def test_fields_of_ones_own_recipe_are_named_without_a_plus() -> None:
    """The YAML does not list the arguments; the class defines them."""
    own = ["recipe=own", "recipe._target_=spirals.Spirals", "recipe.trust=[spirals]", "recipe.hidden=8"]
    made = compose.compose([*own, "lr.base=0.1", "lr.base_batch=64"])
    assert made.recipe == {"_target_": "spirals.Spirals", "trust": ["spirals"], "hidden": 8}


def test_the_environment_may_be_named_without_a_plus(compose_config: Any) -> None:
    assert compose_config("launch.env.NCCL_DEBUG=INFO", "launch.env.N=1").launch.env == {"NCCL_DEBUG": "INFO", "N": "1"}
    assert compose_config("launch.env={A:1}").launch.env == {"A": "1"}


def test_composing_writes_nothing(compose_config: Any) -> None:
    compose_config("seed=1")
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """A composed configuration as plain values, to insert one typed value into."""
    return to_mapping(RunConfig(optimizer={"_target_": "torch.optim.SGD"}, sink={"wandb": {"mode": None}}))


@pytest.fixture
def valued(base: dict[str, Any]) -> Any:
    """Return the configuration with the value of one override, parsed by Hydra's grammar, inserted."""

    def put(override: str) -> RunConfig:
        [parsed] = compose.parse_overrides([override])
        mapping = copy.deepcopy(base)
        *sections, last = parsed.key_or_group.split(".")
        part = mapping
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = parsed.value()
        return compose.finalize(mapping, [parsed]).config

    return put


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("batch.per_device=1e2", 100),
        ("batch.accumulation=4", 4),
        ("batch.accumulation=auto", "auto"),
        ("batch.ramp=[[0dur,0.25],[0.2dur,1]]", (("0dur", 0.25), ("0.2dur", 1.0))),
        ("lr.base=1", 1.0),
        ("run.name=2024", "2024"),
        ("launch.nodes=1", "1"),
        ("checkpoint.every=null", None),
        ("schedule.warmup_from=0.5", 0.5),
        ("schedule.warmup_from=base", "base"),
        ("schedule.momentum=[0.85,0.95]", (0.85, 0.95)),
        ("plan.world_sizes=[1,2,8]", (1, 2, 8)),
        ("train.compile=true", True),
    ],
)
def test_a_value_gets_the_type_of_its_key(valued: Any, override: str, value: Any) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    got = getattr(getattr(valued(override), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=abc", "seed=abc: expected a whole number, e.g. seed=0"),
        ("seed=1.5", "seed=1.5: expected a whole number"),
        ("batch.per_device=true", "batch.per_device=true: expected a whole number or auto, e.g. batch.per_device=32"),
        ("batch.per_device=null", "batch.per_device=null: expected a whole number"),
        ("lr.base=nan", "lr.base=nan: expected a number or null, e.g. lr.base=0.1"),
        ("lr.base=inf", "lr.base=inf: expected a number"),
        ("lr.base=-1", "lr.base=-1.0 is below 0"),
        ("schedule.decay=cosin", "did you mean schedule.decay=cosine?"),
        ("train.precision=fp8", "expected one of fp32, bf16, fp16, fp64"),
        ("train.compile=1", "train.compile=1: expected true or false"),
        ("run.name=1.5", "run.name=1.5: expected text, in quotes"),
        ("run.name=../up", "run.name=../up: type up to 64 letters"),
        ("run.name=.hidden", "run.name=.hidden: type up to 64 letters"),
        ("batch.ramp=[[0dur,x]]", "expected a list of [text, a number] or null, e.g. batch.ramp=[[0dur,0.25]"),
        ("launch.workers=0", "launch.workers=0 is below 1: type launch.workers=1 or more"),
        ("launch.nodes=2", "launch.nodes=2: launch=local uses this machine only"),
        ("seed=-1", "seed=-1 is below 0"),
        ("seed=9223372036854775808", "seed=9223372036854775808 is too large"),
        ("checkpoint.keep=0", "checkpoint.keep=0 is below 1"),
        ("train.clip_norm=0", "train.clip_norm=0.0 must be > 0"),
        ("optimizer.momentum=nan", "optimizer.momentum=nan: type a finite number"),
        ("train.target.metric=val/accuracy", "needs either train.target.at_least= or train.target.at_most="),
        ("train.stop_at_target=true", "train.stop_at_target=true has no target"),
        ("sink.wandb.mode=onlin", "sink.wandb.mode=onlin: expected one of online, offline, disabled or null"),
        ("sink.wandb.tags=abc", "sink.wandb.tags=abc: expected a list of text"),
        ("sink.wandb.projct=x", "did you mean sink.wandb.project?"),
    ],
)
def test_a_wrong_value_is_answered_by_name_with_what_to_type(valued: Any, override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        valued(override)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=abc", "seed=abc: expected a whole number, e.g. seed=0"),
        ("recipe.data=???", "recipe.data has no value: type recipe.data="),
        ("recipe.data=${nowhere}", "recipe.data: Interpolation key 'nowhere' not found"),
        ("launch.env.A=true", "launch.env.A=true: expected text"),
    ],
)
def test_a_wrong_value_is_found_when_composing(refusal: Any, override: str, said: str) -> None:
    assert said in refusal(override)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.per_devic=8", "batch.per_devic is not a key: did you mean batch.per_device?"),
        ("per_device=8", "did you mean batch.per_device?"),
        ("epochs=3", "epochs is not a key: did you mean train.duration?"),
        ("lr=0.1", "lr is a section, not a key: type lr.base="),
        ("qqqqqq=1", "qqqqqq is not a key: launcher --help lists them all"),
        ("world=4", "world is not a key: the world size comes from the job: launch.workers=2"),
        ("world_size=4", "the world size comes from the job"),
        ("+batch.per_devic=8", "did you mean batch.per_device?"),
        ("+seed=1", "+seed=1: seed exists already: type it without +"),
        ("~seed", "~seed: seed can't be removed: type seed=0"),
        ("recipe=tinny", "recipe=tinny: did you mean tiny? choose from "),
        ("recipe=[a", "recipe=[a cannot be read"),
        ("schedule=cosin", "schedule=cosin: did you mean cosine? choose from constant, cosine, exponential"),
        ("batch=64", "for a number type batch.per_device=64 or batch.global=64"),
        (
            "strategy=tensor_parallel",
            "strategy=tensor_parallel: model parallelism within one sample is not supported",
        ),
        ("batch=null", "batch=null: choose from bounded, goodput, hold, scale"),
        ("+batch=hold", "+batch=hold: batch exists already: type it without +"),
        ("sink=[console,wadnb]", "sink=wadnb: did you mean wandb? choose from console, tensorboard, wandb"),
        ("recipe.widht=3", "recipe.widht is not a key here: did you mean recipe.width?"),
        ("recipe.layers=3", "known keys are _target_, trust, width, data; type +recipe.layers="),
        (
            "optimizer.lr=0.1",
            "optimizer.lr=0.1: the learning rate is set by lr.base and the schedule: type lr.base=0.1",
        ),
        ("+optimizer.lr=0.1", "type lr.base=0.1"),
        ("seed=1,2", "seed=1,2 is a sweep: add -m for one run per value, or type seed=[1,2] for a list"),
        ("recipe.data=/a b(c", """quote the value, e.g. "recipe.data='/a b(c'\""""),
        ("hydra.run.dir=x", "hydra.run.dir=x has no effect on a single run"),
        ("hydra.job.env_set.A=1", "has no effect on a single run"),
        ("stray", "stray is not an override"),
        ("", "'' is not an override"),
        ("-m", "-m starts several runs"),
        ("--mulirun", "--mulirun is not a flag: did you mean --multirun?"),
        ("--config-name=x", "type experiment=NAME"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_right_one(refusal: Any, override: str, said: str) -> None:
    assert said in refusal(override)


def test_a_key_that_a_file_misspells_is_refused_too(folder: Path, refusal: Any) -> None:
    (folder / "recipe" / "tiny.yaml").write_text(RECIPE + "batch:\n  per_devic: 8\n")
    assert "batch.per_devic is not a key: did you mean batch.per_device?" in refusal()


def test_new_fields_are_passed_to_the_recipe_and_the_optimizer_with_a_plus(compose_config: Any) -> None:
    made = compose_config("+recipe.depth=3", "+optimizer.maximize=true", "~optimizer.nesterov")
    assert made.recipe["depth"] == 3
    assert made.optimizer["maximize"] is True
    assert "nesterov" not in made.optimizer


def test_yaml_tags_are_never_obeyed(folder: Path, tmp_path: Path, refusal: Any) -> None:
    mark = tmp_path / "obeyed"
    (folder / "recipe" / "tiny.yaml").write_text(f"_target_: !!python/object/apply:os.system ['touch {mark}']\n")
    assert "python/object/apply" in refusal()
    with pytest.raises(UsageError):
        compose.from_yaml(f"recipe: !!python/object/apply:os.system ['touch {mark}']\n")
    assert not mark.exists()


# --- the batch policy ---------------------------------------------------------------------------------------------


def test_a_global_batch_without_a_policy_selects_hold_and_says_so(composed: Any) -> None:
    made = composed("batch.global=256")
    assert (made.config.batch.policy, made.config.batch.global_batch) == ("hold", 256)
    assert made.notes == ("batch.global=256 selects batch=hold: the global batch is the same at every world size",)


@pytest.mark.parametrize("choice", ["batch=hold", "batch.policy=hold"])
def test_a_chosen_policy_needs_no_note(composed: Any, choice: str) -> None:
    made = composed(choice, "batch.global=full")
    assert (made.config.batch.policy, made.config.batch.global_batch, made.notes) == ("hold", "full", ())


@pytest.mark.parametrize("choice", ["batch=scale", "batch.policy=scale"])
def test_scale_with_a_global_batch_is_a_contradiction(refusal: Any, choice: str) -> None:
    assert "batch.global=256 does not work with batch=scale" in refusal(choice, "batch.global=256")


def test_a_rate_that_meets_another_optimizer_is_said(composed: Any) -> None:
    said = "lr.base=0.1 was chosen for torch.optim.SGD, not for torch.optim.AdamW: set lr.base= too"
    assert composed("optimizer=adamw").notes == (said,)
    assert composed("optimizer=sgd").notes == ()
    assert composed("optimizer=adamw", "lr.base=0.001").notes == ()


# --- conversion to and from plain values --------------------------------------------------------------------------


def test_a_run_survives_plain_values_and_yaml(compose_config: Any) -> None:
    made = compose_config("batch.global=256", "batch.ramp=[[0dur,0.5],[0.1dur,1]]", "lr.base=1e-5", "run.name=1e5x", "sink=[]")
    assert from_mapping(to_mapping(made)) == made
    assert compose.from_yaml(compose.to_yaml(made)) == made


def test_the_key_is_batch_global_and_the_attribute_global_batch(compose_config: Any) -> None:
    made = compose_config("batch.global=256")
    assert to_mapping(made)["batch"]["global"] == 256
    assert flatten(made)["batch.global"] == 256
    assert flatten(made)["optimizer.momentum"] == 0.9


@given(
    st.dictionaries(
        st.sampled_from(sorted(config_keys())), st.none() | st.booleans() | st.floats() | st.text(), max_size=5
    )
)
def test_any_plain_values_make_a_run_or_a_refusal_of_one_line(values: dict[str, Any]) -> None:
    mapping: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        part = mapping
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    try:
        made = from_mapping(mapping)
    except UsageError:
        return
    assert from_mapping(to_mapping(made)) == made
    numbers = [value for value in flatten(made).values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)


def test_secrets_are_masked_where_they_are_written_and_whole_where_they_are_used(compose_config: Any) -> None:
    made = compose_config("recipe.data='s3://me:hunter2@host/x?token=abc123'", "+recipe.api_key=xyz987")
    assert made.recipe["data"] == "s3://me:hunter2@host/x?token=abc123"
    written = compose.to_yaml(made)
    assert "s3://me:***@host/x?token=***" in written
    assert not any(secret in written for secret in ("hunter2", "abc123", "xyz987"))


def test_a_run_is_frozen(compose_config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose_config().seed = 3


# --- display ------------------------------------------------------------------------------------------------------


def test_the_shown_configuration_is_the_whole_that_would_run(folder: Path) -> None:
    args = ["--config-dir", str(folder), "recipe=tiny", "--cfg", "job", "batch.global=64", "recipe.data=s3://u:pw1@h"]
    shown = yaml.safe_load(compose.show_config(args))
    assert shown["batch"]["policy"] == "hold"
    assert shown["recipe"]["data"] == "s3://u:***@h"
    assert list(shown) == list(to_mapping(RunConfig()))


def test_hydra_tells_of_itself(folder: Path) -> None:
    args = ["--config-dir", str(folder), "recipe=tiny"]
    assert "hydra" in yaml.safe_load(compose.show_config([*args, "--cfg", "hydra"]))
    assert "schedule: cosine" in compose.show_config([*args, "--info", "defaults-tree"])


def test_the_help_names_every_key_with_its_line_and_fits_the_screen() -> None:
    text = format_help(80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.strip() for line in text.splitlines()]
    for key in config_keys().values():
        assert any(line.startswith(f"{key.name}=") for line in lines), key.name
        assert key.doc
    assert "batch=      bounded, goodput, hold, scale" in lines
    assert max(map(len, format_help(60).splitlines())) <= 60


# --- sweeps -------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(folder: Path) -> Iterator[Any]:
    SEEN.clear()
    yield lambda *overrides, point=record: run_sweep.run_sweep(
        ["--config-dir", str(folder), "-m", "recipe=tiny", *overrides], point
    )
    SEEN.clear()


SEEN: list[RunConfig] = []


def record(config: RunConfig, words: Sequence[str]) -> int:
    SEEN.append(config)
    finish(config)
    return EXIT_OK


def finish(config: RunConfig) -> None:
    run_dir = RunDirectory(Path(str(config.run.dir)))
    run_dir.path.mkdir(parents=True, exist_ok=True)
    run_dir.write_done({"samples": 1000, "updates": 10, "seconds": 2.0})


def stopped_at_16(config: RunConfig, words: Sequence[str]) -> int:
    SEEN.append(config)
    if config.batch.per_device != 16:
        finish(config)
    return EXIT_OK


def fail_at_16(config: RunConfig, words: Sequence[str]) -> int:
    if config.batch.per_device == 16:
        SEEN.append(config)
        raise OSError("no disk at s3://u:hunter2@h")
    return record(config, words)


def interrupted(config: RunConfig, words: Sequence[str]) -> int:
    SEEN.append(config)
    return EXIT_INTERRUPTED


def test_each_point_is_a_run_folder_in_the_sweeps(swept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("batch.per_device=8,16", "seed=1,2", "run.name=sizes") == EXIT_OK
    assert [(config.batch.per_device, config.seed) for config in SEEN] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert [config.run.dir for config in SEEN] == [f"runs/sizes/{n}" for n in range(4)]
    assert [config.run.name for config in SEEN] == [f"sizes-{n}" for n in range(4)]
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]
    assert [path.name for path in Path("runs").iterdir()] == ["sizes"]
    [line] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  3 ")]
    assert line == ["3", "-", "-", "500", "2.0", "-", "16", "2"]


def test_run_dir_names_the_sweeps_folder(swept: Any, tmp_path: Path) -> None:
    place = tmp_path / "a place"
    assert swept("seed=1,2", f"run.dir='{place}'") == EXIT_OK
    assert [config.run.dir for config in SEEN] == [str(place / "0"), str(place / "1")]
    assert list(Path.cwd().iterdir()) == []


def test_an_unnamed_sweep_is_named_by_the_time(swept: Any) -> None:
    swept("seed=1,2")
    [folder] = Path("runs").iterdir()
    assert folder.name.startswith("sweep-2")
    assert [config.run.dir for config in SEEN] == [str(folder / "0"), str(folder / "1")]


def test_a_failed_point_is_told_and_the_others_run(swept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("batch.per_device=8,16,32", "run.name=sizes", point=fail_at_16) == 1
    assert [config.batch.per_device for config in SEEN] == [8, 16, 32]
    told = capsys.readouterr()
    assert "error: OSError: no disk at s3://u:***@h" in told.err
    [line] = [line.split() for line in told.out.splitlines() if line.startswith("  1 ")]
    assert line == ["1", "-", "-", "failed", "(1)", "-", "-", "16"]


def test_interrupting_a_point_twice_ends_the_sweep(swept: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        swept("seed=1,2,3", point=interrupted)
    assert len(SEEN) == 1


def test_a_sweep_that_was_asked_to_stop_starts_no_other_point(swept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("batch.per_device=8,16,32", "run.name=sizes", point=stopped_at_16) == EXIT_OK
    assert [config.batch.per_device for config in SEEN] == [8, 16]
    words = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
    assert words == ["500", "stopped", "not"]


def test_a_share_of_a_sweep_runs_its_own_points_alone(swept: Any) -> None:
    swept("batch.per_device=8,16,32", "seed=1,2", "run.name=sizes", "--shard=1/4")
    assert [config.run.dir for config in SEEN] == ["runs/sizes/1", "runs/sizes/5"]


def test_the_words_of_a_point_ask_for_its_run(swept: Any) -> None:
    """A job started elsewhere with these overrides trains the same run in the same folder."""
    words: list[Sequence[str]] = []

    def keep(config: RunConfig, asked: Sequence[str]) -> int:
        words.append(asked)
        return record(config, asked)

    swept("batch.per_device=8,16", "run.dir='a b'", "sink=wandb", point=keep)
    again = [compose.compose(asked) for asked in words]
    assert [config.batch.per_device for config in again] == [8, 16]
    assert [config.run.dir for config in again] == ["a b/0", "a b/1"]
    assert [config.sink["wandb"]["group"] for config in again] == ["a b", "a b"]


def test_a_global_batch_selects_hold_at_every_point(swept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    swept("batch.global=64,128")
    assert [(config.batch.policy, config.batch.global_batch) for config in SEEN] == [("hold", 64), ("hold", 128)]
    assert "note: batch.global=64 selects batch=hold" in capsys.readouterr().err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two points at a time take two cores")
def test_points_side_by_side_keep_their_output_apart(swept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("batch.per_device=8,16,32", "run.name=s", "sweep.max_parallel=2", point=fail_at_16) == 1
    told = capsys.readouterr()
    [failed] = [line for line in told.err.splitlines() if line.startswith("point 1 ")]
    assert failed == "point 1 failed (1), error: OSError: no disk at s3://u:***@h (log: runs/s/1.log)"
    assert Path("runs/s/1.log").read_text().startswith("point 1: recipe=tiny batch.per_device=16\n")
    assert [(Path("runs/s") / str(point) / "done.json").exists() for point in range(3)] == [True, False, True]
    assert SEEN == [], "each ran in a process of its own"
    assert [line.split()[3] for line in told.out.splitlines()[2:5]] == ["500", "failed", "500"]


def test_a_sweep_written_in_an_experiment(swept: Any, folder: Path) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n"
    )
    assert swept("experiment=seeds") == EXIT_OK
    assert [config.seed for config in SEEN] == [1, 2]


def test_what_hydra_writes_about_the_sweep_holds_no_secret(swept: Any) -> None:
    swept("seed=1,2", "recipe.data=s3://u:hunter2@h", "run.name=s")
    written = Path("runs/s/multirun.yaml")
    assert "hunter2" not in written.read_text()
    assert written.stat().st_mode & 0o077 == 0
    assert SEEN[0].recipe["data"] == "s3://u:hunter2@h"


@given(st.text(st.sampled_from("ab '\"\\\\$`;#,=[{}%\u00e9"), max_size=12).filter(lambda text: "${" not in text))
def test_a_quoted_value_is_read_as_it_was(text: str) -> None:
    assert compose.parse_overrides([f"run.dir={points.quote_override(text)}"])[0].value() == text


def test_a_point_can_be_sent_to_another_process() -> None:
    sent = pickle.loads(pickle.dumps(functools.partial(points.run_point, points.PointTask(record), [])))
    assert sent.args == (points.PointTask(record), [])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["batch.per_device=8,x"], "batch.per_device=x: expected a whole number"),
        (["batch=hold,scal", "batch.global=8"], "batch=scal: did you mean scale?"),
        (["seed=1,2", "batch.per_devic=3"], "did you mean batch.per_device?"),
        (["run.name=a,b"], "run.name can't be swept over"),
        (["run.dir=a,b"], "run.dir can't be swept over"),
        (["run.name=../a", "seed=1,2"], "run.name=../a: type up to 64 letters"),
        (["hydra.sweep.dir=a", "seed=1,2"], "the sweep's folder is set by run.name= or run.dir="),
        (["hydra/launcher=nowhere", "seed=1,2"], "hydra/launcher=nowhere: choose from basic"),
        (["seed=interval(1,2)"], "does not support sweep type"),
        (["sweep.max_parallel=1,2"], "sweep.max_parallel can't be swept over"),
        (["sweep.max_parallel=0", "seed=1,2"], "sweep.max_parallel=0 is below 1: type sweep.max_parallel=1 or more"),
        (
            ["sweep.max_parallel=2", "seed=1,2", "launch=slurm"],
            "points on this machine only: leave it out, or launch=s",
        ),
        (["sweep.max_parallel=2", "seed=1,2", "launch.workers=999"], "each point needs 999 cores"),
        (["hydra/sweeper=optuna", "seed=1,2"], "type sweep.trials=20 instead"),
    ],
)
def test_a_wrong_point_is_found_before_the_first_begins(swept: Any, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        swept(*overrides)
    assert said in str(caught.value)
    assert SEEN == []
    assert list(Path.cwd().iterdir()) == []
