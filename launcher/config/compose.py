"""Compose the frozen `RunConfig` from the command line.

Only this module, `overrides` and `launcher.sweep.points` depend on Hydra.

Hydra composes the files of conf/ and of the user's own folders with the overrides. The result is then converted
according to the annotations of the configuration classes, so that a wrong key or value is reported in one line, by
name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
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
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launcher.config.cli_args import HydraArgs
from launcher.config.hydra_errors import format_hydra_error
from launcher.config.keys import from_mapping, to_mapping
from launcher.config.overrides import (
    RUN_DIR_KEYS,
    check_key,
    get_typed_value,
    parse_axis,
    parse_overrides,
    refuse_outside_sweeps,
    refuse_unsweepable_keys,
    with_force_add,
)
from launcher.config.schema import RunConfig
from launcher.config.search_space import SearchAxis
from launcher.config.validation import validate_composed
from launcher.errors import UsageError
from launcher.system.redaction import mask_nested_secrets, mask_secrets

__all__ = [
    "PRIMARY_CONFIG_NAME",
    "ComposedConfig",
    "ConfigComposer",
    "SweepRequest",
    "compose",
    "finalize",
    "from_yaml",
    "hydra_errors_as_usage_errors",
    "resolve",
    "show_config",
    "to_container",
    "to_yaml",
]

PRIMARY_CONFIG_NAME = "launcher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True)
class ComposedConfig:
    """A configuration, and one-line notes on what was decided for the user."""

    config: RunConfig
    notes: tuple[str, ...] = ()


def compose(args: Sequence[str]) -> RunConfig:
    """The configuration for these overrides and flags (e.g. `--config-dir DIR`); `resolve` also returns the notes."""
    return resolve(args).config


def resolve(args: Sequence[str]) -> ComposedConfig:
    """Compose and validate the configuration for the arguments after the command, with its notes.

    Raises:
        UsageError: a flag, key or choice is unknown, a value is missing or has a wrong type or value.
    """
    arguments = HydraArgs.parse(args)
    for override in arguments.overrides:
        if override.startswith("sweep.") and not arguments.multirun:
            raise UsageError(f"{override} has no effect on a single run: add -m")
    if arguments.multirun:
        raise UsageError(
            "-m starts several runs and works only for training and tune: type launcher -m ... or launcher tune -m ..."
        )
    return ConfigComposer(arguments.config_dirs).compose_single(arguments.overrides)


@dataclass(frozen=True)
class SweepRequest:
    """A sweep requested with -m.

    `settings`: a configuration of which only the sections `run` and `sweep` are filled. `overrides`: those typed,
    except the ones that set the folder. `is_local`: whether Hydra's basic launcher is selected, i.e. the points run on
    this machine. `interpolated_run`: run.name or run.dir as typed if one contains ${...}; `settings` then has neither,
    since each point has its own.
    """

    settings: RunConfig
    overrides: tuple[str, ...]
    is_local: bool
    config: DictConfig
    interpolated_run: str | None = None


class ConfigComposer:
    """Composes configurations from the shipped files and the user's own folders, which are searched first."""

    def __init__(self, config_dirs: Sequence[str] = ()) -> None:
        version.setbase("1.3")
        setup_globals()
        ConfigStore.instance().store(name="launcher_keys", node=to_mapping(RunConfig()))
        self.search_path = build_search_path(config_dirs)
        self._loader = ConfigLoaderImpl(self.search_path)

    def compose_single(self, overrides: Sequence[str]) -> ComposedConfig:
        """Compose the configuration of a single run; sweep overrides are refused."""
        parsed = self.parse_and_check(overrides)
        for override in parsed:
            refuse_outside_sweeps(override, partial(self._read_value, parsed))
        composed = finalize(to_container(self.compose_hydra(overrides)), parsed)
        return replace(composed, notes=(*composed.notes, *self._warn_on_unmatched_lr(composed.config, parsed)))

    def _read_value(self, parsed: Sequence[Override], name: str) -> Any:
        """The value of a key without the sweeps among the overrides, or None."""
        try:
            others = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
            return OmegaConf.select(self.compose_hydra(others), name)
        except (UsageError, OmegaConfBaseException):
            return None

    def parse_and_check(self, overrides: Sequence[str]) -> list[Override]:
        """Parse the overrides in Hydra's grammar and check that every key exists."""
        with hydra_errors_as_usage_errors():
            parsed = parse_overrides(overrides)
            search_path = [override for override in overrides if override.startswith("hydra.searchpath=")]
            all_groups = self._loader.get_group_options("", ObjectType.GROUP, None, search_path)
            names = {override.key_or_group for override in parsed}.intersection(all_groups)
            groups = {
                name: self._loader.get_group_options(name, ObjectType.CONFIG, None, search_path) for name in names
            }
        for override in parsed:
            check_key(override, groups)
        return parsed

    def compose_hydra(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Hydra's composed configuration, including its own node, before interpolations are resolved."""
        with hydra_errors_as_usage_errors():
            return self._loader.load_configuration(PRIMARY_CONFIG_NAME, with_force_add(overrides), mode)

    def read_sweep_request(self, overrides: Sequence[str]) -> SweepRequest:
        """Read the sweep that the overrides request.

        Raises:
            UsageError: a key is unknown or wrong, or may not be swept over.
        """
        parsed = self.parse_and_check(overrides)
        config = self.compose_hydra(overrides, RunMode.MULTIRUN)
        refuse_unsweepable_keys(parsed, config)
        typed = [str(o.input_line) for o in parsed if o.key_or_group not in RUN_DIR_KEYS]
        run_section: dict[str, Any] = to_typed(config.run)
        interpolated = next((f"run.{key}={value}" for key, value in run_section.items() if "${" in str(value)), None)
        if interpolated is not None:
            run_section = {}
        settings = from_mapping({"run": run_section, "sweep": OmegaConf.to_container(config.sweep, resolve=True)})
        is_local = config.hydra.launcher._target_ == BASIC_LAUNCHER
        return SweepRequest(settings, tuple(typed), is_local, config, interpolated)

    def expand_points(self, config: DictConfig) -> list[list[str]]:
        """The overrides of every point of a plain sweep; empty if the user chose another sweeper, which decides."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        if config.hydra.sweeper._target_ != BASIC_SWEEPER:
            return []
        with hydra_errors_as_usage_errors():
            parsed = self._parse_sweep_overrides(config)
            batches = BasicSweeper.split_arguments(parsed, None)
        return [[*searchpath_overrides(config), *point] for batch in batches for point in batch]

    def split_axes(self, config: DictConfig) -> tuple[list[str], list[SearchAxis]]:
        """The overrides that all points of a search share, and the axes to search over."""
        with hydra_errors_as_usage_errors():
            parsed = self._parse_sweep_overrides(config)
        fixed = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in parsed if not o.is_sweep_override()]
        return [*searchpath_overrides(config), *fixed], [parse_axis(o) for o in parsed if o.is_sweep_override()]

    def _parse_sweep_overrides(self, config: DictConfig) -> list[Override]:
        """Parse the overrides of a sweep as they were typed: a ${...} in them has another value at each point."""
        configured = config.hydra.sweeper.get("params")
        params = [f"{name}={value}" for name, value in to_typed(configured).items()] if configured else []
        parser = OverridesParser.create(config_loader=self._loader)
        return parser.parse_overrides([*params, *to_typed(config.hydra.overrides.task)])

    def _warn_on_unmatched_lr(self, config: RunConfig, parsed: Sequence[Override]) -> Iterator[str]:
        """Warn if the recipe's learning rate is used with another optimizer than the one it was chosen for."""
        names = {override.key_or_group for override in parsed}
        if names.isdisjoint({"optimizer", "optimizer._target_"}) or "lr.base" in names:
            return
        rest = [str(o.input_line) for o in parsed if o.key_or_group.partition(".")[0] != "optimizer"]
        usual = to_container(self.compose_hydra(rest))["optimizer"].get("_target_")
        if config.lr.base is not None and usual != config.optimizer["_target_"]:
            chosen = config.optimizer["_target_"]
            yield f"lr.base={config.lr.base:g} was chosen for {usual}, not for {chosen}: set lr.base= too"


def to_typed(node: Any) -> Any:
    """A part of the composed configuration as it was typed, with its ${...}."""
    return OmegaConf.to_container(node, resolve=False)


def searchpath_overrides(config: DictConfig) -> list[str]:
    """The user's search path overrides, which apply to every point."""
    return [line for line in config.hydra.overrides.hydra if line.startswith("hydra.searchpath=")]


def build_search_path(config_dirs: Sequence[str]) -> ConfigSearchPath:
    """Hydra's search path with the user's folders first, so that their files win over shipped ones of the same name."""
    path = create_config_search_path("pkg://launcher.conf")
    for folder in reversed(config_dirs):
        if not Path(folder).is_dir():
            raise UsageError(
                f"--config-dir {folder} is not a folder: type the folder that contains your recipe/ or experiment/"
            )
        if (Path(folder) / f"{PRIMARY_CONFIG_NAME}.yaml").exists():
            raise UsageError(
                f"--config-dir {folder} contains {PRIMARY_CONFIG_NAME}.yaml, a name reserved for the program: "
                "rename that file"
            )
        path.prepend("command-line", f"file://{Path(folder).absolute()}")
    return path


# --- from Hydra's result to the configuration ---------------------------------------------------------------------


def to_container(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain values, with every ${...} resolved and without Hydra's own node."""
    before = HydraConfig.instance().cfg
    try:
        if "hydra" in config:
            HydraConfig.instance().set_config(config)
        with hydra_errors_as_usage_errors():
            return to_plain(config)
    finally:
        HydraConfig.instance().cfg = before


def to_plain(config: DictConfig) -> dict[str, Any]:
    job = config.copy()
    with open_dict(job):
        job.pop("hydra", None)
    mapping = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    if not isinstance(mapping, dict):
        raise UsageError("the configuration is not a mapping of keys: look at launcher --cfg job")
    return {str(name): value for name, value in mapping.items()}


def finalize(mapping: Mapping[str, Any], parsed: Sequence[Override]) -> ComposedConfig:
    """Validate the composed values; a global batch given without a policy selects batch=hold."""
    config = from_mapping(mapping)
    if config.batch.policy == "goodput":
        return ComposedConfig(validate_composed(_set_batch_auto(config, parsed)))
    if config.batch.global_batch is None or config.batch.policy != "scale":
        return ComposedConfig(validate_composed(config))
    size = config.batch.global_batch
    if {"batch", "batch.policy"} & {override.key_or_group for override in parsed}:
        raise UsageError(
            f"batch.global={size} does not work with batch=scale, whose global batch follows the number of workers: "
            f"type batch=hold batch.global={size}"
        )
    held = replace(config, batch=replace(config.batch, policy="hold"))
    return ComposedConfig(
        validate_composed(held),
        (f"batch.global={size} selects batch=hold: the global batch is the same at every world size",),
    )


def _set_batch_auto(config: RunConfig, parsed: Sequence[Override]) -> RunConfig:
    """Set the batch sizes to auto under goodput; values from a recipe are ignored, those the user typed are refused."""
    for override in parsed:
        name, value = override.key_or_group, get_typed_value(override)
        if name in ("batch.per_device", "batch.accumulation") and value != "auto":
            fix = f"type tune.max={value} to stay below" if name == "batch.per_device" else "remove it"
            raise UsageError(f"{name}={value} does not work with batch=goodput, which chooses it: {fix}")
    return replace(config, batch=replace(config.batch, per_device="auto", accumulation="auto"))


@contextmanager
def hydra_errors_as_usage_errors() -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML into a one-line `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, AssertionError) as error:
        raise UsageError(format_hydra_error(error)) from error


# --- output -------------------------------------------------------------------------------------------------------


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML with the names that users type and secrets masked: the content of run.yaml."""
    return _dump_yaml(mask_nested_secrets(to_mapping(config)))


def from_yaml(text: str) -> RunConfig:
    """Read a configuration written by `to_yaml`. YAML tags are refused; the file can only supply values."""
    with hydra_errors_as_usage_errors():
        return from_mapping(yaml.safe_load(text) or {})


def _dump_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120))


def show_config(args: Sequence[str]) -> str:
    """The text of `--cfg` and `--info`: the composed configuration or Hydra's information on it, secrets masked."""
    arguments = HydraArgs.parse(args)
    composer = ConfigComposer(arguments.config_dirs)
    composed = composer.compose_single(arguments.overrides)
    if arguments.info:
        return mask_secrets(_capture_hydra_info(arguments.info, composer, arguments.overrides))
    if arguments.cfg == "job":
        return to_yaml(composed.config)
    config = composer.compose_hydra(arguments.overrides)
    with hydra_errors_as_usage_errors():
        whole = OmegaConf.to_container(config, resolve=arguments.resolve, enum_to_str=True)
    shown_part = whole if arguments.cfg == "all" or not isinstance(whole, dict) else {"hydra": whole["hydra"]}
    return _dump_yaml(mask_nested_secrets(shown_part))


def _capture_hydra_info(info: str, composer: ConfigComposer, overrides: Sequence[str]) -> str:
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    with redirect_stdout(io.StringIO()) as output, hydra_errors_as_usage_errors():
        GlobalHydra.instance().clear()
        hydra = Hydra.create_main_hydra2(PRIMARY_CONFIG_NAME, composer.search_path)
        hydra.show_info(info, PRIMARY_CONFIG_NAME, list(overrides))
    return output.getvalue()
