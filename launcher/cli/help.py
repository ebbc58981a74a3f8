"""The text of `launcher --help`, generated from the configuration keys and the files in conf/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from launcher.config.coercion import format_value
from launcher.config.keys import Key, config_keys

__all__ = ["format_help"]

HELP_HEAD = """\
launcher [VERB] [FLAGS] [OVERRIDES]

Trains at any world size; keeps batch size, learning rate and sampling correct.

  launcher recipe=resnet                          train with one process per GPU
  launcher recipe=gpt launch.workers=2            train with two processes
  torchrun --nproc-per-node=2 -m launcher         train under torchrun
  launcher -m batch.per_device=8,16,32            a sweep, one job per point
  launcher plan plan.world_sizes=[1,2,8]               show the plan; start nothing

Verbs (first argument)
  train           train a run; the default verb
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
  -cd, --config-dir DIR   folder with your recipe/*.yaml, experiment/*.yaml
  -c, --cfg job           show the resolved configuration
  -i, --info defaults     show the files that it is composed of
  -h, --help              show this text
  --version               show the version

Overrides (Hydra): group=choice, key=value, +recipe.new=1, [1,2] for a list.
Durations are a number and a unit: 10ep, 500ba, 50000sp, 1e9tok, 0.05dur, 10min.
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
    yield textwrap.fill(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
