"""Compose the frozen `RunConfig` from the command line. Only this module and `points` depend on Hydra.

Hydra composes the files of conf/ and of the user's own folders with the overrides. The result is then converted
according to the annotations of the configuration classes, so that a wrong key or value is reported in one line, by
name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launcher.arguments import Arguments
from launcher.checks import check
from launcher.errors import RequestError
from launcher.keys import flat, from_mapping, keys, no_such_key, to_mapping
from launcher.redact import redact, redacted
from launcher.refusals import no_such_choice, refusal
from launcher.search import Axis
from launcher.settings import Run
from launcher.typed import shown

__all__ = [
    "PLACES",
    "PRIMARY",
    "Asked",
    "Composed",
    "Composer",
    "compose",
    "flat",
    "from_mapping",
    "from_yaml",
    "one_line",
    "opened",
    "parse",
    "plain",
    "resolve",
    "settled",
    "show_config",
    "to_mapping",
    "to_yaml",
]

PRIMARY = "launcher"
SHIPPED = ("strategy", "batch", "optimizer", "schedule", "launch", "sink", "recipe", "experiment")
#: The keys that set the folder of a run or of a whole sweep.
PLACES = ("run.name", "run.dir")
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
#: Sections with free keys: the recipe's fields, the optimizer's arguments, a sink's options, environment variables.
OPEN = ("recipe.", "optimizer.", "sink.", "launch.env.")


@dataclass(frozen=True)
class Composed:
    """A configuration, and one-line notes on what was decided for the user."""

    run: Run
    notes: tuple[str, ...] = ()


def compose(args: Sequence[str]) -> Run:
    """The configuration for these overrides and flags (e.g. `--config-dir DIR`); `resolve` also returns the notes."""
    return resolve(args).run


def resolve(args: Sequence[str]) -> Composed:
    """Compose and validate the configuration for the arguments after the verb, with its notes.

    Raises:
        UsageError: a flag, key or choice is unknown, a value is missing or has a wrong type or value.
    """
    arguments = Arguments.parse(args)
    for word in arguments.overrides:
        if word.startswith("sweep.") and not arguments.multirun:
            raise RequestError(f"{word} has no effect on a single run: add -m")
    if arguments.multirun:
        raise RequestError(
            "-m starts several runs and works only for training and tune: type launcher -m ... or launcher tune -m ..."
        )
    return Composer(arguments.config_dirs).composed(arguments.overrides)


@dataclass(frozen=True)
class Asked:
    """A sweep requested with -m.

    `settings`: a configuration of which only the sections `run` and `sweep` are filled. `own`: the overrides except
    those that set the folder. `here`: whether Hydra's basic launcher is selected, i.e. the points run on this machine.
    """

    settings: Run
    own: tuple[str, ...]
    here: bool
    config: DictConfig


class Composer:
    """Composes configurations from the shipped files and the user's own folders, which are searched first."""

    def __init__(self, config_dirs: Sequence[str] = ()) -> None:
        version.setbase("1.3")
        setup_globals()
        ConfigStore.instance().store(name="launcher_keys", node=to_mapping(Run()))
        self.search_path = search_path(config_dirs)
        self._loader = ConfigLoaderImpl(self.search_path)

    def composed(self, overrides: Sequence[str]) -> Composed:
        """Compose the configuration of a single run; sweep overrides are refused."""
        parsed = self.parsed(overrides)
        for override in parsed:
            refuse_outside_sweeps(override)
        composed = settled(plain(self.config(overrides)), parsed)
        return replace(composed, notes=(*composed.notes, *self._rate_notes(composed.run, parsed)))

    def parsed(self, overrides: Sequence[str]) -> list[Override]:
        """Parse the overrides in Hydra's grammar and check that every key exists."""
        with one_line():
            parsed = parse(overrides)
            wider = [override for override in overrides if override.startswith("hydra.searchpath=")]
            known = self._loader.get_group_options("", ObjectType.GROUP, None, wider)
            names = {override.key_or_group for override in parsed}.intersection(known)
            groups = {name: self._loader.get_group_options(name, ObjectType.CONFIG, None, wider) for name in names}
        for override in parsed:
            check_key(override, groups)
        return parsed

    def config(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Hydra's composed configuration, including its own node, before interpolations are resolved."""
        with one_line():
            return self._loader.load_configuration(PRIMARY, opened(overrides), mode)

    def asked(self, overrides: Sequence[str]) -> Asked:
        """Read the sweep that the overrides request.

        Raises:
            UsageError: a key is unknown or wrong, or may not be swept over.
        """
        parsed = self.parsed(overrides)
        config = self.config(overrides, RunMode.MULTIRUN)
        _refuse_own_keys(parsed, config)
        own = [str(o.input_line) for o in parsed if o.key_or_group not in PLACES]
        place = {name: OmegaConf.select(config, f"run.{name}") for name in ("name", "dir")}
        settings = from_mapping({"run": place, "sweep": OmegaConf.to_container(config.sweep, resolve=True)})
        return Asked(settings, tuple(own), config.hydra.launcher._target_ == BASIC_LAUNCHER, config)

    def points(self, config: DictConfig) -> list[list[str]]:
        """The overrides of every point of a plain sweep; empty if the user chose another sweeper, which decides."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        if config.hydra.sweeper._target_ != BASIC_SWEEPER:
            return []
        with one_line():
            parsed = self._asked_of_points(config)
            batches = BasicSweeper.split_arguments(parsed, None)
        return [[*searched(config), *point] for batch in batches for point in batch]

    def axes(self, config: DictConfig) -> tuple[list[str], list[Axis]]:
        """The overrides that all points of a search share, and the axes to search over."""
        with one_line():
            parsed = self._asked_of_points(config)
        fixed = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in parsed if not o.is_sweep_override()]
        return [*searched(config), *fixed], [axis_of(o) for o in parsed if o.is_sweep_override()]

    def _asked_of_points(self, config: DictConfig) -> list[Override]:
        params = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
        parser = OverridesParser.create(config_loader=self._loader)
        return parser.parse_overrides([*params, *config.hydra.overrides.task])

    def _rate_notes(self, run: Run, parsed: Sequence[Override]) -> Iterator[str]:
        """Warn if the recipe's learning rate is used with another optimizer than the one it was chosen for."""
        names = {override.key_or_group for override in parsed}
        if names.isdisjoint({"optimizer", "optimizer._target_"}) or "lr.base" in names:
            return
        rest = [str(o.input_line) for o in parsed if o.key_or_group.partition(".")[0] != "optimizer"]
        usual = plain(self.config(rest))["optimizer"].get("_target_")
        if run.lr.base is not None and usual != run.optimizer["_target_"]:
            chosen = run.optimizer["_target_"]
            yield f"lr.base={run.lr.base:g} was chosen for {usual}, not for {chosen}: set lr.base= too"


def searched(config: DictConfig) -> list[str]:
    """The user's search path overrides, which apply to every point."""
    return [line for line in config.hydra.overrides.hydra if line.startswith("hydra.searchpath=")]


def axis_of(override: Override) -> Axis:
    """The search axis of `lr.base=interval(0.01,1)`, `tag(log,interval(…))`, `range(…)` or `a,b`.

    Raises:
        UsageError: the bounds are not ascending, or not above 0 under tag(log,...).
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start or 0, value.end or 0, "log" in value.tags
        if not low < high or (log and low <= 0):
            raise RequestError(f"{override.input_line}: type the lower end first, and one above 0 under tag(log,...)")
        return Axis(key, low=low, high=high, whole=isinstance(low, int) and isinstance(high, int), log=log)
    return Axis(key, choices=tuple(override.sweep_string_iterator()))


def search_path(config_dirs: Sequence[str]) -> ConfigSearchPath:
    """Hydra's search path with the user's folders first, so that their files win over shipped ones of the same name."""
    path = create_config_search_path("pkg://launcher.conf")
    for folder in reversed(config_dirs):
        if not Path(folder).is_dir():
            raise RequestError(
                f"--config-dir {folder} is not a folder: type the folder that contains your recipe/ or experiment/"
            )
        if (Path(folder) / f"{PRIMARY}.yaml").exists():
            raise RequestError(
                f"--config-dir {folder} contains {PRIMARY}.yaml, a name reserved for the program: rename that file"
            )
        path.prepend("command-line", f"file://{Path(folder).absolute()}")
    return path


# --- overrides ----------------------------------------------------------------------------------------------------


def parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not name or not (equals or name.startswith("~")):
            raise RequestError(
                f"{override or repr('')} is not an override: type the verb first, then KEY=VALUE, e.g. seed=1"
            )
    return list(parser.parse_overrides(list(overrides)))


def opened(overrides: Sequence[str]) -> list[str]:
    """Prefix overrides of free-form keys with ++, so that the user need not type a +.

    These are launch.env, which is empty, and the fields of a custom recipe (recipe=own), which no YAML lists; they
    are checked when the recipe is built.
    """
    chosen = [override for override in overrides if override.startswith("recipe=")]
    own = ("recipe.",) if chosen[-1:] == ["recipe=own"] else ()
    free = ("launch.env.", "launch.env=", *own)
    return [f"++{override}" if override.startswith(free) else override for override in overrides]


def refuse_outside_sweeps(override: Override) -> None:
    line, name = str(override.input_line), override.key_or_group
    if override.is_sweep_override():
        values = line.partition("=")[2]
        raise RequestError(f"{line} is a sweep: add -m for one run per value, or type {name}=[{values}] for a list")
    if override.is_hydra_override() and name != "hydra.searchpath":
        raise RequestError(f"{line} has no effect on a single run: add -m, or set the run's folder with run.dir=")


def check_key(override: Override, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown key with the closest known one as a hint; values are checked after composition."""
    name = override.key_or_group
    if override.input_line == "hydra/sweeper=optuna":
        raise RequestError("hydra/sweeper=optuna: Optuna is enabled by a key: type sweep.trials=20 instead")
    if name in groups:
        _check_choice(override, groups[name])
    elif name == "optimizer.lr":
        raise RequestError(
            f"{override.input_line}: the learning rate is set by lr.base and the schedule: "
            f"type lr.base={_typed(override)}"
        )
    elif "/" not in name and not override.is_hydra_override() and not name.startswith(OPEN):
        _check_settings_key(override)


def _check_choice(override: Override, options: Sequence[str]) -> None:
    name, value = override.key_or_group, override.value()
    if override.is_add() and name in SHIPPED:
        raise RequestError(f"{override.input_line}: {name} exists already: type it without +")
    if override.is_delete() or override.is_sweep_override() or isinstance(value, Mapping):
        return
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str) or (choice not in options and "/" not in choice):
            raise RequestError(no_such_choice(name, shown(choice), options))


def _check_settings_key(override: Override) -> None:
    name = override.key_or_group
    if name not in keys():
        raise no_such_key(name)
    if override.is_delete():
        raise RequestError(f"{override.input_line}: {name} can't be removed: type {keys()[name].example()}")
    if override.is_add() and not override.is_force_add():
        raise RequestError(f"{override.input_line}: {name} exists already: type it without +")


def _typed(override: Override) -> str:
    """The override's value as it was typed."""
    return str(override.input_line).partition("=")[2]


# --- from Hydra's result to the configuration ---------------------------------------------------------------------


def plain(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain values, with every ${...} resolved and without Hydra's own node."""
    before = HydraConfig.instance().cfg
    try:
        if "hydra" in config:
            HydraConfig.instance().set_config(config)
        with one_line():
            return to_plain(config)
    finally:
        HydraConfig.instance().cfg = before


def to_plain(config: DictConfig) -> dict[str, Any]:
    job = config.copy()
    with open_dict(job):
        job.pop("hydra", None)
    mapping = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    if not isinstance(mapping, dict):
        raise RequestError("the configuration is not a mapping of keys: look at launcher --cfg job")
    return {str(name): value for name, value in mapping.items()}


def settled(mapping: Mapping[str, Any], parsed: Sequence[Override]) -> Composed:
    """Validate the composed values; a global batch given without a policy selects batch=hold."""
    run = from_mapping(mapping)
    if run.batch.policy == "goodput":
        return Composed(check(_left_to_choose(run, parsed)))
    if run.batch.global_batch is None or run.batch.policy != "scale":
        return Composed(check(run))
    size = run.batch.global_batch
    if {"batch", "batch.policy"} & {override.key_or_group for override in parsed}:
        raise RequestError(
            f"batch.global={size} does not work with batch=scale, whose global batch follows the number of workers: "
            f"type batch=hold batch.global={size}"
        )
    held = replace(run, batch=replace(run.batch, policy="hold"))
    return Composed(
        check(held), (f"batch.global={size} selects batch=hold: the global batch is the same at every world size",)
    )


def _left_to_choose(run: Run, parsed: Sequence[Override]) -> Run:
    """Set the batch sizes to auto under goodput; values from a recipe are ignored, those the user typed are refused."""
    for override in parsed:
        name, value = override.key_or_group, _typed(override)
        if name in ("batch.per_device", "batch.accumulation") and value != "auto":
            mend = f"type tune.max={value} to stay below" if name == "batch.per_device" else "remove it"
            raise RequestError(f"{name}={value} does not work with batch=goodput, which chooses it: {mend}")
    return replace(run, batch=replace(run.batch, per_device="auto", accumulation="auto"))


@contextmanager
def one_line() -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML into a one-line `UsageError`."""
    try:
        yield
    except RequestError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, AssertionError) as error:
        raise RequestError(refusal(error)) from error


# --- output -------------------------------------------------------------------------------------------------------


def to_yaml(run: Run) -> str:
    """The whole configuration as YAML with the names that users type and secrets masked: the content of run.yaml."""
    return _dumped(redacted(to_mapping(run)))


def from_yaml(text: str) -> Run:
    """Read a configuration written by `to_yaml`. YAML tags are refused; the file can only supply values."""
    with one_line():
        return from_mapping(yaml.safe_load(text) or {})


def _dumped(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120))


def show_config(args: Sequence[str]) -> str:
    """The text of `--cfg` and `--info`: the composed configuration or Hydra's information on it, secrets masked."""
    arguments = Arguments.parse(args)
    composer = Composer(arguments.config_dirs)
    composed = composer.composed(arguments.overrides)
    if arguments.info:
        return redact(_told_by_hydra(arguments.info, composer, arguments.overrides))
    if arguments.cfg == "job":
        return to_yaml(composed.run)
    config = composer.config(arguments.overrides)
    with one_line():
        whole = OmegaConf.to_container(config, resolve=arguments.resolve, enum_to_str=True)
    shown_part = whole if arguments.cfg == "all" or not isinstance(whole, dict) else {"hydra": whole["hydra"]}
    return _dumped(redacted(shown_part))


def _told_by_hydra(info: str, composer: Composer, overrides: Sequence[str]) -> str:
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    with redirect_stdout(io.StringIO()) as told, one_line():
        GlobalHydra.instance().clear()
        hydra = Hydra.create_main_hydra2(PRIMARY, composer.search_path)
        hydra.show_info(info, PRIMARY, list(overrides))
    return told.getvalue()


# --- sweeps -------------------------------------------------------------------------------------------------------


def _refuse_own_keys(parsed: Sequence[Override], config: DictConfig) -> None:
    """Refuse sweeps over the folder or name, and Hydra's folder keys: points are numbered in the sweep's folder."""
    params = config.hydra.sweeper.get("params") or {}
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()] + [str(name) for name in params]
    for name in swept:
        if name in PLACES:
            raise RequestError(
                f"{name} can't be swept over: it names the sweep's folder, in which the points are numbered"
            )
        if name.startswith("sweep."):
            raise RequestError(f"{name} can't be swept over, it configures the sweep itself: type one value")
    for override in parsed:
        if override.key_or_group in ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.mode"):
            raise RequestError(f"{override.input_line}: the sweep's folder is set by run.name= or run.dir=")
