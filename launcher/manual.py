"""What `launcher --help` says, made from the keys themselves and the files in conf/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from launcher.keys import Key, keys
from launcher.typed import shown

__all__ = ["help_text"]

HEAD = """\
launcher [VERB] [FLAGS] [OVERRIDES]

Trains on any number of workers, with the batch, the rate and the samples right.

  launcher recipe=resnet                          train, one process per GPU
  launcher recipe=gpt launch.workers=2            train with two processes
  torchrun --nproc-per-node=2 -m launcher         train as torchrun's workers
  launcher -m batch.per_device=8,16,32            a sweep, one job per point
  launcher plan plan.worlds=[1,2,8]               show batch and rate, no start

Verbs, the first word
  train           the default
  plan            batch, rate and shares at each world size; format=json
  tune            measure batch sizes and recommend one; -m; format=json
  verify          does the split batch give the whole one's gradient? format=json
  stop RUN        save and stop a run started elsewhere; --now ends it unsaved
  status RUN      where a run started elsewhere stands
  watch RUN       its figures as they come; Ctrl-C ends the watching alone
  explain RUN     what limits a run; RUN_A RUN_B why one is faster; format=json
  report RUN...   one page with curves and stages; -o FILE.html
  export RUN      its metrics as CSV; -o FILE.csv
  doctor          is this machine fit? a job of two processes too; format=json
  new NAME        write NAME.py, a recipe of your own that trains as it is

Flags
  -m, --multirun          a sweep: one run per combination of values a,b,c
  -cd, --config-dir DIR   your own recipe/NAME.yaml, experiment/NAME.yaml
  -c, --cfg job           show the whole configuration that would run
  -i, --info defaults     show the files it is composed of
  -h, --help              this text
  --version               the version

Overrides are Hydra's: group=choice, key=value, +recipe.new=1, [1,2] for a list.
Durations are a number and a unit: 10ep, 500ba, 50000sp, 1e9tok, 0.05dur, 10min.
"""


def help_text(width: int = 80) -> str:
    """The whole manual in at most `width` columns: usage, groups and choices, every key with its default."""
    head = [textwrap.fill(line, width, subsequent_indent="    ") for line in HEAD.splitlines()]
    return "\n".join([*head, "", "Groups", *_groups(width), "", "Keys and their defaults", *_keys(width)]) + "\n"


def _groups(width: int) -> Iterator[str]:
    folder = Path(next(iter(import_module("launcher.conf").__path__)))
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        yield textwrap.fill(f"  {group.name + '=':<12}{choices}", width, subsequent_indent=" " * 14)


def _keys(width: int) -> Iterator[str]:
    for key in keys().values():
        yield from _entry(key, width)


def _entry(key: Key, width: int) -> Iterator[str]:
    yield f"  {key.name}={shown(key.default)}"
    yield textwrap.fill(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
