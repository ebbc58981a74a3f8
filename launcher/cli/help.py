"""The text of `launcher --help`, generated from the configuration keys and the files in conf/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from launcher.cli.verb_help import VERB_HELP, format_command_list, format_usage
from launcher.config.coercion import describe_type, format_value
from launcher.config.keys import Key, config_keys

__all__ = ["format_help", "format_short_help", "format_verb_help"]

HELP_HEAD = """\
Usage: launcher [COMMAND] [FLAGS] [OVERRIDES]

Trains with any number of workers; plans the batch and learning rate for each.

  launcher recipe=resnet                          train with one process per GPU
  launcher recipe=gpt launch.workers=2            train with two processes
  torchrun --nproc-per-node=2 -m launcher         train under torchrun
  launcher -m batch.per_device=8,16,32            a sweep, one job per point
  launcher plan plan.world_sizes=[1,2,8]          show the plan; start nothing

Commands (first argument); launcher COMMAND --help says more about one
"""
HELP_FLAGS = """\

Flags
  -m, --multirun          sweep: one run per combination of values a,b,c
  -cd, --config-dir DIR   directory of your recipe/*.yaml, experiment/*.yaml
  -c, --cfg job           show the resolved configuration
  -i, --info defaults     show the files that it is composed of
  -h, --help              show this text, with all keys
  --version               show the version

Overrides (Hydra): group=choice, key=value, +recipe.new=1, [1,2] for a list.
Durations are a number and a unit, e.g. 10ep
  ep              epochs
  ba              updates at the base batch
  sp              samples
  tok             tokens
  dur             fraction of train.duration, e.g. 0.05dur
  s, min, h       wall time, for checkpoint.every
"""


def format_help(width: int = 80) -> str:
    """Return the help in at most `width` columns: usage, groups with choices, and all keys with defaults."""
    return "\n".join([*_format_head(width), "", "Keys, their defaults and values", *_format_keys(("",), width)]) + "\n"


def format_short_help(width: int = 80) -> str:
    """Return the help without the keys."""
    return "\n".join([*_format_head(width), "", "launcher --help lists all keys."]) + "\n"


def format_verb_help(verb: str, width: int = 80) -> str:
    """Return the help of one command: its usage, options, and the keys that matter to it."""
    prefixes = VERB_HELP[verb].keys
    lines = list(format_usage(verb, width))
    if prefixes:
        lines += ["", "Groups", *_format_groups(width)]
        lines += ["", "Keys, their defaults and values", *_format_keys(prefixes, width)]
    if prefixes not in ((), ("",)):
        lines += ["", *textwrap.wrap("The keys of train apply too: launcher train --help lists all of them.", width)]
    return "\n".join(lines) + "\n"


def _format_head(width: int) -> list[str]:
    head = [*HELP_HEAD.splitlines(), *format_command_list(), *HELP_FLAGS.splitlines()]
    wrapped = [textwrap.fill(line, width, subsequent_indent="    ") for line in head]
    return [*wrapped, "", "Groups", *_format_groups(width)]


def _format_groups(width: int) -> Iterator[str]:
    folder = Path(next(iter(import_module("launcher.conf").__path__)))
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        yield textwrap.fill(f"  {group.name + '=':<12}{choices}", width, subsequent_indent=" " * 14)


def _format_keys(prefixes: tuple[str, ...], width: int) -> Iterator[str]:
    for key in config_keys().values():
        if key.name.startswith(prefixes):
            yield from _format_key(key, width)


def _format_key(key: Key, width: int) -> Iterator[str]:
    """The key with its default, the values that it takes, and its documentation."""
    values = describe_type(key.type)
    line = f"  {f'{key.name}={format_value(key.default)}':<34}  {values}"
    if len(line) <= width:
        yield line
    else:
        yield f"  {key.name}={format_value(key.default)}"
        yield textwrap.fill(values, width, initial_indent=" " * 38, subsequent_indent=" " * 38)
    yield textwrap.fill(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
