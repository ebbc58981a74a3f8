"""From the command line to the frozen `RunConfig`: composition, conversion, refusals and display."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import compose
from launcher.config.keys import config_keys, flatten, from_mapping, to_mapping
from launcher.config.misnames import SETTING_BY_NAME
from launcher.config.overrides import BUILTIN_GROUPS, parse_overrides
from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from tests.helpers.config_dirs import RECIPE_YAML, make_config_dir


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_config_dir(tmp_path, monkeypatch)


@pytest.fixture
def resolve(config_dir: Path) -> Any:
    return lambda *overrides: compose.resolve(["--config-dir", str(config_dir), "recipe=tiny", *overrides])


@pytest.fixture
def compose_config(resolve: Any) -> Any:
    return lambda *overrides: resolve(*overrides).config


@pytest.fixture
def get_usage_error(resolve: Any) -> Any:
    def compose_with_error(*overrides: str) -> str:
        with pytest.raises(UsageError) as caught:
            resolve(*overrides)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return compose_with_error


# --- composing ----------------------------------------------------------------------------------------------------


def test_recipe_yaml_overrides_defaults(compose_config: Any) -> None:
    config = compose_config()
    assert (config.schedule.decay, config.lr.base, config.train.duration) == ("cosine", 0.1, "3ep")
    assert config.optimizer["_target_"] == "torch.optim.SGD"
    assert (config.batch, config.data) == (RunConfig().batch, RunConfig().data)


def test_command_line_overrides_recipe_yaml(compose_config: Any) -> None:
    config = compose_config("schedule=step", "optimizer=adamw", "train.duration=5ep", "recipe.width=64", "lr.base=1e-3")
    assert (config.schedule.decay, config.schedule.milestones) == ("step", ("0.5dur", "0.75dur"))
    assert (config.train.duration, config.recipe["width"], config.lr.base) == ("5ep", 64, 0.001)
    assert config.optimizer["_target_"] == "torch.optim.AdamW"


def test_user_file_overrides_shipped_file_of_same_name(config_dir: Path) -> None:
    (config_dir / "optimizer").mkdir()
    (config_dir / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.SGD\nmomentum: 0.5\n")
    config = compose.compose(["recipe=tiny", "--config-dir", str(config_dir)])
    assert config.optimizer == {"_target_": "torch.optim.SGD", "momentum": 0.5}


def test_first_config_dir_wins(config_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "first" / "recipe").mkdir(parents=True)
    (tmp_path / "first" / "recipe" / "tiny.yaml").write_text(RECIPE_YAML.replace("width: 16", "width: 32"))
    config = compose.compose(["-cd", str(tmp_path / "first"), f"--config-dir={config_dir}", "recipe=tiny"])
    assert config.recipe["width"] == 32


def test_hydra_searchpath_override_is_searched(config_dir: Path) -> None:
    config = compose.compose([f"hydra.searchpath=['file://{config_dir}']", "recipe=tiny"])
    assert config.recipe["width"] == 16


def test_missing_config_dir_is_refused(get_usage_error: Any) -> None:
    assert "--config-dir nowhere is not a folder" in get_usage_error("--config-dir", "nowhere")


def test_reserved_config_name_is_refused(config_dir: Path, get_usage_error: Any) -> None:
    (config_dir / "launcher.yaml").write_text("seed: 1\n")
    assert "contains launcher.yaml, a name reserved for the program" in get_usage_error()


@pytest.mark.parametrize(
    ("choice", "sinks"),
    [
        (None, ["console", "wandb"]),
        ("sink=wandb", ["wandb"]),
        ("sink=[console,tensorboard]", ["console", "tensorboard"]),
        ("sink=[]", []),
    ],
)
def test_sinks_are_selected_by_list(compose_config: Any, choice: str | None, sinks: list[str]) -> None:
    assert list(compose_config(*([choice] if choice else [])).sink) == sinks


@pytest.mark.parametrize("nth", range(7))
def test_every_shipped_choice_composes(compose_config: Any, nth: int) -> None:
    """Combine the nth choice of each group; a group with fewer choices wraps around."""
    shipped = Path(compose.__file__).parents[2] / "conf"
    choices = []
    for group in ("strategy", "batch", "optimizer", "schedule", "launch", "sink"):
        names = sorted(path.stem for path in (shipped / group).glob("*.yaml"))
        assert 0 < len(names) <= 7
        choices.append(f"{group}={names[nth % len(names)]}")
    assert "lr" not in compose_config(*choices).optimizer


def test_custom_recipe_fields_need_no_plus() -> None:
    """The YAML does not list the arguments; the class defines them."""
    own = ["recipe=own", "recipe._target_=spirals.Spirals", "recipe.trust=[spirals]", "recipe.hidden=8"]
    config = compose.compose([*own, "lr.base=0.1", "lr.base_batch=64"])
    assert config.recipe == {"_target_": "spirals.Spirals", "trust": ["spirals"], "hidden": 8}


def test_launch_env_keys_need_no_plus(compose_config: Any) -> None:
    assert compose_config("launch.env.NCCL_DEBUG=INFO", "launch.env.N=1").launch.env == {"NCCL_DEBUG": "INFO", "N": "1"}
    assert compose_config("launch.env={A:1}").launch.env == {"A": "1"}


def test_composing_writes_no_files(compose_config: Any) -> None:
    compose_config("seed=1")
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """A composed configuration as plain values, to insert one typed value into."""
    return to_mapping(RunConfig(optimizer={"_target_": "torch.optim.SGD"}, sink={"wandb": {"mode": None}}))


@pytest.fixture
def config_with(base: dict[str, Any]) -> Any:
    """Return the configuration with the value of one override, parsed by Hydra's grammar, inserted."""

    def put(override: str) -> RunConfig:
        [parsed] = parse_overrides([override])
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
def test_value_gets_the_type_of_its_key(config_with: Any, override: str, value: Any) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    got = getattr(getattr(config_with(override), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
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
def test_invalid_value_is_refused_with_fix(config_with: Any, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_with(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed=abc: expected a whole number, e.g. seed=0"),
        ("recipe.data=???", "recipe.data has no value: type recipe.data="),
        ("recipe.data=${nowhere}", "recipe.data: Interpolation key 'nowhere' not found"),
        ("launch.env.A=true", "launch.env.A=true: expected text"),
    ],
)
def test_invalid_value_is_refused_when_composing(get_usage_error: Any, override: str, message: str) -> None:
    assert message in get_usage_error(override)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.per_devic=8", "batch.per_devic is not a key: did you mean batch.per_device?"),
        ("per_device=8", "did you mean batch.per_device?"),
        ("epochs=3", "epochs is not a key: did you mean train.duration?"),
        ("data.workers=2", "data.workers is not a key: did you mean data.num_workers?"),
        ("data.prefetch=3", "data.prefetch is not a key: did you mean data.prefetch_factor?"),
        ("elastic.hang_s=3", "elastic.hang_s is not a key: did you mean elastic.hang_timeout_s?"),
        ("elastic.first_s=3", "elastic.first_s is not a key: did you mean elastic.first_timeout_s?"),
        ("elastic.idle=true", "elastic.idle is not a key: did you mean elastic.allow_idle?"),
        ("launch.dry=true", "launch.dry is not a key: did you mean launch.dry_run?"),
        ("plan.worlds=[1]", "plan.worlds is not a key: did you mean plan.world_sizes?"),
        ("strategy.gather=bf16", "strategy.gather is not a key: did you mean strategy.param_dtype?"),
        ("strategy.reshard=false", "strategy.reshard is not a key: did you mean strategy.reshard_after_forward?"),
        ("strategy.meta=true", "strategy.meta is not a key: did you mean strategy.meta_init?"),
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
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate is not a key here: did you mean lr.base?"),
        ("tune.sizes=1,2", "is a sweep: add -m for one run per value, or type tune.sizes=[1,2] for a list"),
        ("sink=console,tensorboard", "add -m for one run per value, or type sink=[console,tensorboard] for a list"),
        ("model.init=a,b", """or quote it if the comma is part of the text: "model.init='a,b'\""""),
        ("launch.env.X=a,b", """or quote it if the comma is part of the text: "launch.env.X='a,b'\""""),
        ("lr.base=interval(0.1,1)", "add -m and sweep.trials=20"),
        ("run.name=a,b", "run.name=a,b is a sweep: a run has one folder"),
        ("optimizer=[sgd,adam]", "optimizer takes one choice, not a list: type -m optimizer=sgd,adam for one run per"),
        ("strategy=[]", "strategy takes one choice, not a list"),
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
def test_unknown_key_or_choice_suggests_the_closest(get_usage_error: Any, override: str, message: str) -> None:
    assert message in get_usage_error(override)


@pytest.mark.parametrize(
    "override",
    [
        "strategy=ddp,fsdp",
        "optimizer=sgd,adam",
        "seed=1,2",
        "lr.base=0.1,1",
        "train.duration=1ep,2ep",
        "recipe.data=a,b",
        "recipe.width=1,2",
        "recipe._target_=a,b",
        "optimizer.momentum=0.1,0.2",
        "seed=range(1,3)",
        "seed=choice(1,2)",
        "train.precision=fp32,bf16",
        "checkpoint.best=a,b",
        "launch.env.X=a,b",
        "run.dir=a,b",
        "experiment=a,b",
    ],
)
def test_a_list_is_suggested_only_where_the_key_takes_one(get_usage_error: Any, override: str) -> None:
    message = get_usage_error("recipe.data=text", override)
    assert "is a sweep" in message
    assert "for a list" not in message


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("train.epochs=3", "train.duration=3ep"),
        ("trainer.max_epochs=3", "train.duration=3ep"),
        ("num_train_epochs=1.5", "train.duration=1.5ep"),
        ("max_steps=100", "train.duration=100ba"),
        ("train.epochs=3ep", "train.duration"),
        ("train.batch_size=8", "batch.per_device"),
        ("per_device_train_batch_size=8", "batch.per_device"),
        ("train.lr=0.1", "lr.base"),
        ("Learning-Rate=0.1", "lr.base"),
        ("accumulate_grad_batches=4", "batch.accumulation"),
        ("seed_everything=1", "seed"),
        ("train.num_workers=2", "data.num_workers"),
        ("bf16=true", "train.precision=bf16"),
        ("max_grad_norm=1", "train.clip_norm"),
        ("warmup_steps=500", "schedule.warmup=500ba"),
        ("save_steps=500", "checkpoint.every=500ba"),
        ("resume_from_checkpoint=x", "resume"),
        ("deepspeed=x.json", "strategy=deepspeed"),
    ],
)
def test_names_of_other_frameworks_are_answered_with_what_to_type(
    get_usage_error: Any, override: str, setting: str
) -> None:
    message = get_usage_error(override)
    assert f"did you mean {setting}?" in message or message.endswith(f"? Type {setting}")


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("train.target.metric", "train.target.at_least=0.5"),
        ("checkpoint.best", "checkpoint.best_mode=max"),
        ("schedule.metric", "schedule=plateau"),
    ],
)
def test_metric_that_validation_cannot_give_is_refused(
    get_usage_error: Any, compose_config: Any, key: str, more: str
) -> None:
    for metric, near in (("train/loss", "val/loss"), ("accuracy", "val/accuracy"), ("val/top/1", "val/1")):
        message = get_usage_error(f"{key}={metric}", more)
        assert message.startswith(f"{key}={metric} is not measured in validation: did you mean {key}={near}? Type val/")
    assert "is not measured in validation: Type val/loss" in get_usage_error(f"{key}=val/", more)
    compose_config(f"{key}=val/any_name", more)


def test_metric_of_a_schedule_that_does_not_read_it_is_not_checked(compose_config: Any) -> None:
    assert compose_config("schedule.metric=accuracy").schedule.metric == "accuracy"


def test_the_table_of_other_names_leads_to_keys_and_hides_none() -> None:
    keys = config_keys()
    for name, setting in SETTING_BY_NAME.items():
        key = setting.partition("=")[0]
        assert key in keys or key in BUILTIN_GROUPS or key.startswith(("recipe.", "optimizer.", "sink.")), name
        assert name not in keys, name
        same_end = [key for key in keys if key.rpartition(".")[2] == name]
        assert len(same_end) != 1 or same_end[0] == key or name == "momentum", name


def test_misspelled_key_in_file_is_refused(config_dir: Path, get_usage_error: Any) -> None:
    (config_dir / "recipe" / "tiny.yaml").write_text(RECIPE_YAML + "batch:\n  per_devic: 8\n")
    assert "batch.per_devic is not a key: did you mean batch.per_device?" in get_usage_error()


def test_plus_adds_recipe_and_optimizer_fields(compose_config: Any) -> None:
    config = compose_config("+recipe.depth=3", "+optimizer.maximize=true", "~optimizer.nesterov")
    assert config.recipe["depth"] == 3
    assert config.optimizer["maximize"] is True
    assert "nesterov" not in config.optimizer


def test_yaml_python_tags_are_never_executed(config_dir: Path, tmp_path: Path, get_usage_error: Any) -> None:
    mark = tmp_path / "obeyed"
    (config_dir / "recipe" / "tiny.yaml").write_text(f"_target_: !!python/object/apply:os.system ['touch {mark}']\n")
    assert "python/object/apply" in get_usage_error()
    with pytest.raises(UsageError):
        compose.from_yaml(f"recipe: !!python/object/apply:os.system ['touch {mark}']\n")
    assert not mark.exists()


# --- the batch policy ---------------------------------------------------------------------------------------------


def test_global_batch_without_policy_selects_hold_with_note(resolve: Any) -> None:
    result = resolve("batch.global=256")
    assert (result.config.batch.policy, result.config.batch.global_batch) == ("hold", 256)
    assert result.notes == ("batch.global=256 selects batch=hold: the global batch is the same at every world size",)


@pytest.mark.parametrize("choice", ["batch=hold", "batch.policy=hold"])
def test_explicit_policy_adds_no_note(resolve: Any, choice: str) -> None:
    result = resolve(choice, "batch.global=full")
    assert (result.config.batch.policy, result.config.batch.global_batch, result.notes) == ("hold", "full", ())


@pytest.mark.parametrize("choice", ["batch=scale", "batch.policy=scale"])
def test_scale_with_global_batch_is_refused(get_usage_error: Any, choice: str) -> None:
    assert "batch.global=256 does not work with batch=scale" in get_usage_error(choice, "batch.global=256")


def test_lr_of_another_optimizer_adds_note(resolve: Any) -> None:
    message = "lr.base=0.1 was chosen for torch.optim.SGD, not for torch.optim.AdamW: set lr.base= too"
    assert resolve("optimizer=adamw").notes == (message,)
    assert resolve("optimizer=sgd").notes == ()
    assert resolve("optimizer=adamw", "lr.base=0.001").notes == ()


# --- conversion to and from plain values --------------------------------------------------------------------------


def test_config_survives_mapping_and_yaml_round_trip(compose_config: Any) -> None:
    config = compose_config(
        "batch.global=256", "batch.ramp=[[0dur,0.5],[0.1dur,1]]", "lr.base=1e-5", "run.name=1e5x", "sink=[]"
    )
    assert from_mapping(to_mapping(config)) == config
    assert compose.from_yaml(compose.to_yaml(config)) == config


def test_batch_global_key_maps_to_global_batch_attribute(compose_config: Any) -> None:
    config = compose_config("batch.global=256")
    assert to_mapping(config)["batch"]["global"] == 256
    assert flatten(config)["batch.global"] == 256
    assert flatten(config)["optimizer.momentum"] == 0.9


@given(
    st.dictionaries(
        st.sampled_from(sorted(config_keys())), st.none() | st.booleans() | st.floats() | st.text(), max_size=5
    )
)
def test_any_plain_values_give_config_or_usage_error(values: dict[str, Any]) -> None:
    mapping: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        part = mapping
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    try:
        config = from_mapping(mapping)
    except UsageError:
        return
    assert from_mapping(to_mapping(config)) == config
    numbers = [value for value in flatten(config).values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)


def test_secrets_are_masked_in_written_yaml_only(compose_config: Any) -> None:
    config = compose_config("recipe.data='s3://me:hunter2@host/x?token=abc123'", "+recipe.api_key=xyz987")
    assert config.recipe["data"] == "s3://me:hunter2@host/x?token=abc123"
    written = compose.to_yaml(config)
    assert "s3://me:***@host/x?token=***" in written
    assert not any(secret in written for secret in ("hunter2", "abc123", "xyz987"))


def test_run_config_is_frozen(compose_config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose_config().seed = 3


# --- display ------------------------------------------------------------------------------------------------------


def test_show_config_prints_the_complete_config(config_dir: Path) -> None:
    args = [
        "--config-dir",
        str(config_dir),
        "recipe=tiny",
        "--cfg",
        "job",
        "batch.global=64",
        "recipe.data=s3://u:pw1@h",
    ]
    shown = yaml.safe_load(compose.show_config(args))
    assert shown["batch"]["policy"] == "hold"
    assert shown["recipe"]["data"] == "s3://u:***@h"
    assert list(shown) == list(to_mapping(RunConfig()))


def test_show_config_prints_hydra_info(config_dir: Path) -> None:
    args = ["--config-dir", str(config_dir), "recipe=tiny"]
    assert "hydra" in yaml.safe_load(compose.show_config([*args, "--cfg", "hydra"]))
    assert "schedule: cosine" in compose.show_config([*args, "--info", "defaults-tree"])
