"""The text of `launcher --help`, generated from the configuration keys and the files in conf/."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from launcher.config.coercion import format_value, list_choices
from launcher.config.keys import Key, config_keys

__all__ = ["format_help"]

HELP_HEAD = """\
Usage: launcher [COMMAND] [FLAGS] [OVERRIDES]

Trains with any number of workers; plans the batch and learning rate for each.

  launcher recipe=resnet                          train with one process per GPU
  launcher recipe=gpt launch.workers=2            train with two processes
  torchrun --nproc-per-node=2 -m launcher         train under torchrun
  launcher -m batch.per_device=8,16,32            a sweep, one job per point
  launcher plan plan.world_sizes=[1,2,8]          show the plan; start nothing

Commands (first argument)
  train           train a run; the default
  plan            batch, learning rate and shares per world size; format=json
  tune            measure batch sizes and recommend one; -m; format=json
  verify          check that splitting the batch keeps the gradient; format=json
  stop RUN        save and stop a run; --now kills it without saving
  status RUN      progress of a run, and who runs it
  watch RUN       live metrics; Ctrl-C stops watching, the run continues
  explain RUN     what limits a run, or why one of two is faster; format=json
  report RUN...   HTML page with curves and stage times; -o FILE.html
  export RUN      metrics as CSV; -o FILE.csv
  doctor          check this machine and run a two-process job; format=json
  new NAME        write NAME.py, a custom recipe that trains unchanged

Flags
  -m, --multirun          sweep: one run per combination of values a,b,c
  -cd, --config-dir DIR   directory of your recipe/*.yaml, experiment/*.yaml
  -c, --cfg job           show the resolved configuration
  -i, --info defaults     show the files that it is composed of
  -h, --help              show this text
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
    head = [textwrap.fill(line, width, subsequent_indent="    ") for line in HELP_HEAD.splitlines()]
    return (
        "\n".join([*head, "", "Groups", *_format_groups(width), "", "Keys and their defaults", *_format_keys(width)])
        + "\n"
    )


def _format_groups(width: int) -> Iterator[str]:
    folder = Path(next(iter(import_module("launcher.conf").__path__)))
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        yield textwrap.fill(f"  {group.name + '=':<12}{choices}", width, subsequent_indent=" " * 14)


def _format_keys(width: int) -> Iterator[str]:
    for key in config_keys().values():
        yield from _format_key(key, width)


def _format_key(key: Key, width: int) -> Iterator[str]:
    yield f"  {key.name}={format_value(key.default)}"
    yield textwrap.fill(describe_key(key), width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def describe_key(key: Key) -> str:
    """The documentation of `key`, followed by its named values unless the documentation mentions all of them."""
    choices = list_choices(key.type)
    if all(re.search(rf"\b{re.escape(choice)}\b", key.doc) for choice in choices):
        return key.doc
    return f"{key.doc} ({', '.join(choices)})"
